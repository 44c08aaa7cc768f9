# SPDX-License-Identifier: Apache-2.0
"""What a data set is like, from a sample of its images: sizes, colours, layout, mean, deviation.

n images in the sample.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from dino.data.augmentations import STDS
from dino.data.channels import size_of
from dino.data.images import UnreadableImage
from dino.data.items import image_of

SAMPLE = 256  # images looked at
PIXELS = 64  # per side, at most, of those that count for mean and deviation: every so-many-th
PLACES = 8  # per side, over which brightness is averaged to see whether its place matters
# Tiles cut at random have at most 0.0007 in samples of 256, photographs of things 0.02 to 0.05,
# clothes on hangers 0.02 to 0.07.
LAYOUT = 0.005
DARK = 64  # of 255: images without a higher value use less than a quarter of the 256 levels
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
    layout: float = 0.0  # share of the brightness' variance that the place in the image explains
    brightest: int = 255  # the highest value of any channel, of 255

    @property
    def has_layout(self):
        """True if it matters where something is: sky above, the object in the middle."""
        return self.layout > LAYOUT

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
            f", {self.layout:.1%} of the variance is due to the place in the image"
            f" (from a sample of {self.sample})"
        )


def survey(images, seed=0, skip_bad=False, in_chans=3, sample=SAMPLE):
    """The Survey of a sequence of images, as items.image_of takes its items.

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
    sides, greys, means, squares, places, brightest = map(np.array, zip(*looked_at, strict=True))
    mean = means.mean(axis=0)
    std = np.maximum(squares.mean(axis=0) - mean**2, 0) ** 0.5
    return Survey(
        images=len(images),
        sample=len(looked_at),
        sides=(int(sides.min()), int(np.median(sides)), int(sides.max())),
        grey=float(greys.mean()),
        mean=tuple(mean.round(4).tolist()),
        std=tuple(std.round(4).clip(*STDS).tolist()),
        layout=share_of_places(places),
        brightest=int(brightest.max()),
    )


def look_at(image):
    """(shorter side, grey or not, mean and mean square of each channel, brightness by place, the
    highest value of any channel, of 255).
    """
    pixels = np.asarray(image)
    rows, columns = (-(-side // PIXELS) for side in pixels.shape[:2])
    pixels = pixels[::rows, ::columns].astype(float)
    places = F.adaptive_avg_pool2d(torch.from_numpy(pixels.mean(axis=2))[None], PLACES).flatten()
    pixels = pixels.reshape(-1, pixels.shape[-1])
    brightest = pixels.max()
    # of more channels than RGB none is a colour
    is_grey = pixels.shape[-1] <= 3 and (pixels.max(axis=1) - pixels.min(axis=1)).mean() < GREY
    pixels /= 255
    means, squares = pixels.mean(axis=0), (pixels**2).mean(axis=0)
    return min(size_of(image)), is_grey, means, squares, places.numpy() / 255, brightest


def dark_images(brightest):
    """A sentence about images without a value above `brightest` (of 255), "" unless DARK."""
    if brightest >= DARK:
        return ""
    return (
        f"no value of the images is above {brightest} of 255, so that they have {brightest + 1} of"
        " 256 levels. If these are files of 16 bits from a sensor of fewer, say which number is"
        " white: --white 4095 for 12 bits."
    )


def share_of_places(brightness):
    """Share in [0, 1] of the variance of (images, places) that belongs to the places.

    By analysis of variance: what the means of the places differ by, less what they would differ by
    if each were drawn from its image at random.
    """
    if len(brightness) < 2:
        return 0.0
    images, mean = brightness.mean(axis=1, keepdims=True), brightness.mean(axis=0)
    rest = brightness - images - mean + brightness.mean()
    excess = mean.var() - rest.var() / (len(brightness) - 1)
    return float(max(0.0, excess) / max(brightness.var(), 1e-12))
