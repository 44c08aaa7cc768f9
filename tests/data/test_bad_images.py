# SPDX-License-Identifier: Apache-2.0
"""Odd and broken images: each kind has a behaviour, and --on_bad_image says what a run does."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_RUN, photograph
from helpers import assert_equal_states, final_state
from PIL import Image

from dino.data.augmentations import DataAugmentationDINO
from dino.data.images import UnreadableImage, list_training_images, read_image
from dino.errors import UserError
from dino.training.flags import parse_args
from main_dino import train_dino


def train(data, folder, *flags):
    """main_dino.py in this process: three epochs of six steps."""
    flags = [*SMALL_RUN, "--epochs", 3, "--batch_size_per_gpu", 50, *flags]
    flags += ["--data_path", data, "--output_dir", folder]
    train_dino(parse_args([str(flag) for flag in flags]))


def bad_images(folder):
    """One of each kind, beside 300 good ones; returns {name: how it is read, or None}."""
    folder.mkdir()
    tile = photograph().crop((0, 0, 40, 40))
    for i in range(300):
        tile.save(folder / f"good{i:03}.png")
    content = (folder / "good000.png").read_bytes()
    (folder / "truncated.png").write_bytes(content[: len(content) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    return folder


KINDS = {
    "cmyk.jpg": lambda path: photograph().convert("CMYK").save(path),
    "palette.png": lambda path: photograph().convert("P").save(path, transparency=0),
    "alpha.png": lambda path: photograph().convert("RGBA").save(path),
    "animated.gif": lambda path: (
        photograph()
        .resize((32, 32))
        .save(path, save_all=True, append_images=[Image.new("RGB", (32, 32))])
    ),
    "1x1.png": lambda path: Image.new("RGB", (1, 1)).save(path),
    "1x5000.png": lambda path: Image.new("RGB", (1, 5000)).save(path),
}


@pytest.mark.parametrize("name", KINDS)
def test_odd_images_are_read_and_cropped(tmp_path, name):
    KINDS[name](tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.mode == "RGB"
    views = DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 1, 32, 16)(image, 0)
    assert [tuple(view.shape) for view in views] == [(3, 32, 32)] * 2 + [(3, 16, 16)]


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path):
    values = (np.linspace(0, 65535, 256).astype(np.uint16)).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    found = np.asarray(read_image(tmp_path / "deep.png"))[:, :, 0]
    np.testing.assert_allclose(found, values / 257, atol=1)


def test_exif_rotation_is_left_alone_as_in_the_official_code(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    photograph("coffee.png").save(tmp_path / "rotated.jpg", exif=exif)
    assert read_image(tmp_path / "rotated.jpg").size == (600, 400)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("no image"),
        lambda path: path.symlink_to(path),
        lambda path: None,
        lambda path: path.mkdir(),
    ],
    ids=["empty", "text", "a link to itself", "vanished", "a folder"],
)
def test_what_is_no_image_is_named(tmp_path, make):
    path = tmp_path / "image.jpg"
    make(path)
    with pytest.raises(UnreadableImage, match=r"image\.jpg: cannot be read as an image"):
        read_image(path)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    photograph().save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(
        UnreadableImage, match=r"bomb\.png: .*more than twice .*--max_image_pixels 1000"
    ):
        read_image(tmp_path / "bomb.png")


def test_a_name_that_is_not_utf8_is_found_read_and_printed(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        photograph().resize((8, 8)).save(tmp_path / name)
    except OSError:
        pytest.skip("this file system wants UTF-8")
    (path,) = list_training_images(tmp_path)
    assert read_image(path).size == (8, 8)
    Path(path).write_bytes(b"")
    with pytest.raises(UnreadableImage) as error:
        read_image(path)
    str(error.value).encode("utf-8")


def test_a_bad_image_stops_the_run_with_its_name_or_is_skipped_and_listed(tmp_path):
    data = bad_images(tmp_path / "data")
    with pytest.raises(UnreadableImage, match=r"\.(png|jpg): cannot be read as an image"):
        train(data, tmp_path / "error", "--num_workers", 1)
    skip = ("--on_bad_image", "skip", "--epochs", 1)
    train(data, tmp_path / "skip", "--num_workers", 1, *skip)
    lines = [json.loads(line) for line in (tmp_path / "skip/metrics.jsonl").open()]
    skipped = {Path(line["bad_image"]).name for line in lines if "bad_image" in line}
    assert skipped <= {"truncated.png", "empty.jpg", "text.jpg"}
    assert skipped, "an epoch of 300 of 303 images sees one at least"
    train(data, tmp_path / "again", *skip)
    assert_equal_states(final_state(tmp_path / "skip"), final_state(tmp_path / "again"))


def test_more_than_one_bad_image_in_a_hundred_stops_the_run(tmp_path):
    data = bad_images(tmp_path / "data")
    (data / "fourth.png").write_bytes(b"")
    with pytest.raises(UserError, match="4 of 304 images could not be read, more than 1%"):
        train(data, tmp_path / "run", "--on_bad_image", "skip")
