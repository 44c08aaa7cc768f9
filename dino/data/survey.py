# SPDX-License-Identifier: Apache-2.0
"""What a data set is like, from a sample of its images: sizes, colours, mean and deviation.

n images in the sample.
"""

from dataclasses import dataclass

import numpy as np

from dino.data.channels import size_of
from dino.data.images import UnreadableImage
from dino.data.loaders import image_of

SAMPLE = 256  # images looked at
PIXELS = 64  # per side, at most, of those that count for mean and deviation: every so-many-th
GREY = 3.0  # mean distance of a pixel's highest and lowest channel, of 255, below which it is grey


@dataclass(frozen=True)
class Survey:
    """What the sample says of all `images`."""

    images: int
    sample: int
    sides: tuple  # shorter sides in pixels: least, median, greatest
    grey: float  # share of the images that are grey or nearly so
    mean: tuple  # of each channel, of 1
    std: tuple

    @property
    def is_grey(self):
        """True if colours are too rare to learn from."""
        return self.grey > 0.9

    def __str__(self):
        least, median, greatest = self.sides
        size = f"{median} pixels" if least == greatest else f"{least} to {greatest} pixels"
        middle = "" if least == greatest else f", median {median}"
        return (
            f"{self.images} images, shorter side {size}{middle}, {self.grey:.0%} grey"
            f" (from a sample of {self.sample})"
        )


def survey(images, seed=0, skip_bad=False, in_chans=3, sample=SAMPLE):
    """The Survey of a sequence of images, as loaders.image_of takes its items.

    The sample is drawn by `seed`. Raises the UnreadableImage of an image in it, unless `skip_bad`.
    """
    count = min(sample, len(images))
    numbers = np.random.default_rng((seed, 2)).choice(len(images), count, replace=False)
    looked_at = []
    for number in sorted(numbers.tolist()):
        try:
            looked_at.append(look_at(image_of(images[number], number, in_chans)))
        except UnreadableImage:
            if not skip_bad:
                raise
    if not looked_at:
        return Survey(len(images), 0, (1, 1, 1), 0.0, (0.5,) * in_chans, (0.25,) * in_chans)
    sides, greys, means, squares = (np.array(column) for column in zip(*looked_at, strict=True))
    mean = means.mean(axis=0)
    # a channel that never changes must not be divided by 0
    std = np.maximum(np.sqrt(squares.mean(axis=0) - mean**2), 1e-3)
    return Survey(
        images=len(images),
        sample=len(looked_at),
        sides=(int(sides.min()), int(np.median(sides)), int(sides.max())),
        grey=float(greys.mean()),
        mean=tuple(mean.round(4).tolist()),
        std=tuple(std.round(4).tolist()),
    )


def look_at(image):
    """(shorter side, grey or not, mean of each channel, mean square of each channel)."""
    pixels = np.asarray(image)
    rows, columns = (-(-side // PIXELS) for side in pixels.shape[:2])
    pixels = pixels[::rows, ::columns].reshape(-1, pixels.shape[-1]).astype(float)
    # of more channels than RGB none is a colour
    is_grey = pixels.shape[-1] <= 3 and (pixels.max(axis=1) - pixels.min(axis=1)).mean() < GREY
    pixels /= 255
    return min(size_of(image)), is_grey, pixels.mean(axis=0), (pixels**2).mean(axis=0)
