# SPDX-License-Identifier: Apache-2.0
"""Sets in the layout of Copydays: which original an image is a copy of."""

import numpy as np
import pytest
from conftest import photograph
from PIL import Image

from dino.data.copydays import BLOCKS, load_image, open_copydays, positives
from dino.errors import UserError

ORIGINALS = ["200000.jpg", "200100.jpg", "200200.jpg"]


def write_blocks(root, **blocks):
    """Folders of images, by names; __ in the name of a block is a slash."""
    for block, names in blocks.items():
        folder = root / block.replace("__", "/")
        folder.mkdir(parents=True)
        for name in names:
            photograph().resize((16, 16)).save(folder / name, format="JPEG")
    return root


def test_the_twenty_blocks_are_those_of_copydays_in_the_official_order():
    assert len(BLOCKS) == 20
    assert BLOCKS[:3] == ["original", "strong", "jpegqual/3"]
    assert BLOCKS[10:12] == ["jpegqual/75", "crops/10"]
    assert BLOCKS[-1] == "crops/80"


def test_strong_copies_belong_to_all_originals_with_their_first_four_characters():
    names = ["200017.jpg", "200201.jpg", "2001.jpg"]
    assert positives("strong", names, [*ORIGINALS, "200150.jpg"]) == [[0], [2], [1, 3]]


def test_other_copies_belong_to_the_original_of_their_name_in_blocks_of_any_size():
    assert positives("crops/10", ["200100.png"], ORIGINALS) == [[1]]
    assert positives("crops/10", ORIGINALS[::-1], ORIGINALS) == [[2], [1], [0]]


def test_copies_without_any_name_of_an_original_go_by_their_place_as_in_the_official_code():
    assert positives("crops/10", ["a.jpg", "b.jpg", "c.jpg"], ORIGINALS) == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("block", "names", "message"),
    [
        ("strong", ["200001.jpg", "3000.jpg"], "strong/3000.jpg: .* same first 4 characters"),
        ("crops/10", ["200000.jpg", "300000.jpg", "200200.jpg"], "crops/10/300000.jpg: .* name"),
        ("crops/10", ["a.jpg", "b.jpg"], "crops/10/a.jpg: .* same name"),
    ],
)
def test_a_copy_without_an_original_is_named(block, names, message):
    with pytest.raises(UserError, match=message):
        positives(block, names, ORIGINALS)


def test_the_blocks_that_are_there_are_opened_and_the_others_named(tmp_path, capsys):
    write_blocks(tmp_path, original=ORIGINALS, strong=["200001.JPG"], crops__10=ORIGINALS[:1])
    copydays = open_copydays(tmp_path)
    assert list(copydays.blocks) == ["original", "strong", "crops/10"]
    assert copydays.blocks["strong"] == [str(tmp_path / "strong" / "200001.JPG")]
    wanted = {"original": [[0], [1], [2]], "strong": [[0]], "crops/10": [[0]]}
    assert copydays.positives == wanted
    assert "left out: jpegqual/3, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"strong": ["2000.jpg"]}, r"no folder original/ in it"),
        ({"original": ORIGINALS}, "no block of copies"),
        ({"original": [], "strong": ["2000.jpg"]}, "no image in .*original"),
        ({"original": ORIGINALS, "crops__10": []}, "no image in .*crops/10"),
    ],
)
def test_missing_and_empty_folders_are_named(tmp_path, blocks, message):
    write_blocks(tmp_path, **blocks)
    with pytest.raises(UserError, match=message):
        open_copydays(tmp_path)


def test_an_image_is_squeezed_into_a_square_by_pillows_bicubic_filter(tmp_path):
    image = photograph().crop((0, 0, 200, 120))
    image.save(tmp_path / "image.png")
    square = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)) / 255
    expected = (square - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    loaded = load_image(tmp_path / "image.png", 64)
    np.testing.assert_allclose(loaded.permute(1, 2, 0), expected, atol=1e-6)
