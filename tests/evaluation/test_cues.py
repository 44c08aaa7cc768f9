# SPDX-License-Identifier: Apache-2.0
"""What tells classes apart: beside NumPy and Pillow, and on classes made to differ in one thing."""

import numpy as np
import pytest
from conftest import photograph
from PIL import Image

from dino.data.images import UnreadableImage
from dino.evaluation.cues import Cues, class_cues, describe

SIDE, CLASSES, IMAGES = 32, 4, 40  # pixels, classes, images of each


def write(folder, draw):
    """`draw(label, rng)` gives an image's pixels."""
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        path = folder / "train" / f"class{label}"
        path.mkdir(parents=True)
        for number in range(IMAGES):
            Image.fromarray(draw(label, rng)).save(path / f"{number:02}.png")
    return folder


def corner_of_any_colour(label, rng):
    """A square of random colour on grey noise, in the corner that is the class."""
    image = rng.integers(100, 150, (SIDE, SIDE, 3), np.uint8)
    top, left = divmod(label, 2)
    image[16 * top : 16 * top + 16, 16 * left : 16 * left + 16] = rng.permutation([250, 250, 20])
    return image


def colour_anywhere(label, rng):
    """A square in the colour that is the class, of equal brightness, in any corner."""
    image = rng.integers(100, 150, (SIDE, SIDE, 3), np.uint8)
    top, left = rng.integers(0, 2, 2)
    colour = ([250, 20, 20], [20, 250, 20], [20, 20, 250], [97, 97, 96])[label]
    image[16 * top : 16 * top + 16, 16 * left : 16 * left + 16] = colour
    return image


def test_outlines_tell_what_differs_in_its_place_and_colours_what_differs_in_colour(tmp_path):
    by_place = class_cues(write(tmp_path / "place", corner_of_any_colour))
    by_colour = class_cues(write(tmp_path / "colour", colour_anywhere))
    assert by_place.outlines == by_colour.colours == 100
    assert max(by_place.colours, by_colour.outlines) < 45  # by chance 25
    assert (by_place.outlines_tell, by_colour.outlines_tell) == (True, False)


def test_outlines_that_are_a_little_better_do_not_count():
    assert not Cues(colours=38, outlines=41).outlines_tell  # drawings
    assert not Cues(colours=1, outlines=3).outlines_tell  # a thousand classes


def test_images_are_described_as_by_numpy_and_pillow():
    image = photograph().resize((SIDE, SIDE))
    colours, outlines = describe(image)
    bins = 3 * [np.arange(0, 257, 64)]
    counts, _ = np.histogramdd(np.asarray(image).reshape(-1, 3), bins)
    np.testing.assert_allclose(colours, (counts.ravel() / SIDE**2) ** 0.5, atol=1e-6)
    grey = Image.fromarray(np.asarray(image, np.float32).mean(axis=2)).resize((8, 8), Image.BOX)
    expected = np.asarray(grey).ravel() - np.asarray(grey).mean()
    np.testing.assert_allclose(outlines, expected / np.linalg.norm(expected), atol=1e-5)


def test_a_bad_image_is_named_or_skipped_and_one_image_tells_nothing(tmp_path):
    (write(tmp_path, colour_anywhere) / "train" / "class0" / "bad.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImage, match=r"bad\.png"):
        class_cues(tmp_path)
    assert class_cues(tmp_path, skip_bad=True).colours == 100
    (tmp_path / "one" / "train" / "a").mkdir(parents=True)
    photograph().save(tmp_path / "one" / "train" / "a" / "1.png")
    assert class_cues(tmp_path / "one") is None
