# SPDX-License-Identifier: Apache-2.0
"""Sets in the layout of revisited Oxford and Paris: the ground truth and the images."""

import pickle

import numpy as np
import pytest
import torch
from conftest import photograph
from PIL import Image

from dino.data.images import UnreadableImage
from dino.data.retrieval_set import load_image, open_retrieval_set, read_ground_truth
from dino.errors import UserError

RIGHT = {
    "gnd": [
        {"bbx": [1.5, 2, 30, 40.25], "easy": [0], "hard": [2], "junk": [1]},
        {"bbx": [0, 0, 9, 9], "easy": [], "hard": [1]},  # no easy ones, and junk is absent
    ],
    "imlist": ["oxford_000001", "oxford_000002", "oxford.000003"],
    "qimlist": ["all_souls_000013", "all_souls_000026"],
}


def write_set(root, content=RIGHT, name="own", suffix=".jpg"):
    folder = root / name / "jpg"
    folder.mkdir(parents=True)
    for i, image in enumerate(RIGHT["imlist"] + RIGHT["qimlist"]):
        photograph().resize((40 + i, 30)).save(folder / f"{image}{suffix}")
    (root / name / f"gnd_{name}.pkl").write_bytes(pickle.dumps(content, protocol=3))
    return root


def test_a_set_is_opened_in_the_order_of_its_lists(tmp_path):
    images = open_retrieval_set(write_set(tmp_path), "own")
    folder = tmp_path / "own" / "jpg"
    assert images.database == [str(folder / f"{name}.jpg") for name in RIGHT["imlist"]]
    assert images.queries == [str(folder / f"{name}.jpg") for name in RIGHT["qimlist"]]
    assert images.paths == images.database + images.queries
    assert images.sizes == [(40, 30), (41, 30), (42, 30), (43, 30), (44, 30)]
    assert images.ground_truth == RIGHT["gnd"]


def test_images_of_other_suffixes_are_found_too(tmp_path):
    assert len(open_retrieval_set(write_set(tmp_path, suffix=".PNG"), "own").paths) == 5


WRONG = {
    "not a dict": ([], "it is not a dict with gnd"),
    "no queries": ({**RIGHT, "qimlist": []}, "qimlist is not a list of names"),
    "names that are numbers": ({**RIGHT, "imlist": [1, 2, 3]}, "imlist is not a list of names"),
    "an entry too few": ({**RIGHT, "gnd": RIGHT["gnd"][:1]}, "gnd is not a list of 2 entries"),
    "an entry without hard": (
        {**RIGHT, "gnd": [{"easy": [0]}, RIGHT["gnd"][1]]},
        "entry 0 of gnd is not a dict with easy and hard",
    ),
    "a truth value for an index": (
        {**RIGHT, "gnd": [{"easy": [True], "hard": []}] * 2},
        "easy images that are not a list of whole numbers",
    ),
    "an index beyond the database": (
        {**RIGHT, "gnd": [RIGHT["gnd"][0], {"easy": [3], "hard": []}]},
        "entry 1 of gnd has the easy image 3; imlist has 3",
    ),
    "an index twice": ({**RIGHT, "gnd": [{"easy": [0], "hard": [0]}] * 2}, "names image 0 twice"),
    "an image twice": (
        {**RIGHT, "imlist": [*RIGHT["imlist"], RIGHT["imlist"][1]]},
        f"imlist has {RIGHT['imlist'][1]} twice",
    ),
    "a query among the images, in no list": (
        {**RIGHT, "imlist": [*RIGHT["imlist"], RIGHT["qimlist"][1]]},
        f"entry 1 of gnd does not name its query, which is image {len(RIGHT['imlist'])} of imlist",
    ),
    "nothing to find": (
        {**RIGHT, "gnd": [{"easy": [], "hard": [], "junk": [0]}] * 2},
        "no query has an easy or a hard image",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_ground_truth_is_refused_with_what_is_wrong(tmp_path, name):
    content, message = WRONG[name]
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=message):
        read_ground_truth(path)


def test_images_that_are_not_there_are_counted_and_the_first_is_named(tmp_path):
    write_set(tmp_path)
    for name in ("oxford_000002", "all_souls_000026"):
        (tmp_path / "own" / "jpg" / f"{name}.jpg").unlink()
    with pytest.raises(UserError, match=r"2 of the 5 images .* the first is oxford_000002\.jpg"):
        open_retrieval_set(tmp_path, "own")


def test_a_file_that_is_not_an_image_is_named_before_any_is_read(tmp_path):
    write_set(tmp_path)
    (tmp_path / "own" / "jpg" / "oxford_000002.jpg").write_text("a page of a proxy")
    with pytest.raises(UnreadableImage, match=r"oxford_000002\.jpg: cannot be read"):
        open_retrieval_set(tmp_path, "own")


# Measured on the official code; (width, height).
@pytest.mark.parametrize(
    ("size", "imsize", "expected"),
    [
        ((1024, 768), 224, (224, 168)),
        ((1024, 768), 512, (512, 384)),
        ((1024, 681), 224, (224, 149)),
        ((100, 80), 224, (100, 80)),
    ],
)
def test_the_longer_side_becomes_imsize_and_nothing_is_enlarged(tmp_path, size, imsize, expected):
    photograph().resize(size).save(tmp_path / "image.png")
    assert load_image(tmp_path / "image.png", imsize).shape == (3, *expected[::-1])


def test_an_image_is_reduced_by_pillows_thumbnail_and_normalised(tmp_path):
    image = photograph().resize((500, 300))
    image.save(tmp_path / "image.png")
    image.thumbnail((64, 64), Image.Resampling.LANCZOS, reducing_gap=2.0)
    expected = (np.asarray(image) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    loaded = load_image(tmp_path / "image.png", 64)
    np.testing.assert_allclose(loaded.permute(1, 2, 0), expected, atol=1e-6)


def test_a_truncated_image_is_read_as_far_as_it_goes_with_a_warning(tmp_path, capsys):
    whole, cut = tmp_path / "whole.jpg", tmp_path / "cut.jpg"
    photograph().save(whole)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    first_rows = [load_image(path, 512)[:, :100] for path in (whole, cut)]
    assert torch.equal(*first_rows)
    assert "cut.jpg is truncated" in capsys.readouterr().out
    with pytest.raises(OSError, match="truncated"), Image.open(cut) as image:
        image.load()  # Pillow is as strict as before
