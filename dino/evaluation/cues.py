# SPDX-License-Identifier: Apache-2.0
"""What tells the classes of a data set apart before anything is learned: colours, or outlines.

n images, C classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from dino.data.images import ImageFiles, UnreadableImage, list_labelled_images
from dino.data.loaders import image_of
from dino.evaluation.knn import count_correct

SAMPLE = 2000  # images at most; half of them vote, half are asked
LEVELS = 4  # of each channel in a histogram of colours
PLACES = 8  # per side, over which brightness is averaged
SIDE = 64  # pixels of an image that are looked at, at most: every so-many-th
# Clothes 1.6 to 1.7, photographs of things 0.6 to 0.8, drawings 1.0; an error of either is 1.5 %.
FAR, MARGIN = 1.4, 5.0


@dataclass(frozen=True)
class Cues:
    """k-NN accuracies in percent, by histograms of colours and by grey images of 8 x 8 pixels."""

    colours: float
    outlines: float

    @property
    def outlines_tell(self):
        """True if outlines tell the classes far better than colours do."""
        return self.outlines > max(FAR * self.colours, self.colours + MARGIN)

    def __str__(self):
        return f"k-NN accuracy {self.colours:.0f} % by colours, {self.outlines:.0f} % by outlines"


def class_cues(data_path, seed=0, skip_bad=False, flag="--knn_data_path"):
    """The Cues of the RGB images in `data_path`/train, one folder per class.

    The sample is drawn by `seed`. Raises the UnreadableImage of an image in it, unless `skip_bad`;
    returns None where it has fewer than two images.
    """
    paths, labels, classes = list_labelled_images(data_path, "train", flag=flag)
    images, rows, kept = ImageFiles(paths), [], []
    for number in np.random.default_rng((seed, 3)).permutation(len(paths))[:SAMPLE].tolist():
        try:
            rows.append(describe(image_of(images[number], number)))
        except UnreadableImage:
            if not skip_bad:
                raise
        else:
            kept.append(number)
    if len(kept) < 2:
        return None
    half, labels = len(kept) // 2, labels[kept]
    accuracies = []
    for features in map(torch.stack, zip(*rows, strict=True)):
        sides = features[:half], labels[:half], features[half:], labels[half:]
        correct = count_correct(*sides, [min(20, half)], 0.07, len(classes))
        accuracies.append(100 * float(correct[0, 0]) / (len(kept) - half))
    return Cues(*accuracies)


def describe(image):
    """(colours, outlines) of an RGB image: unit vectors (LEVELS^3,) and (PLACES^2,).

    Colours: roots of a joint histogram, whose products are Bhattacharyya's coefficients. Outlines:
    brightness by place less its mean.
    """
    pixels = np.asarray(image)
    rows, columns = (-(-side // SIDE) for side in pixels.shape[:2])
    pixels = torch.from_numpy(pixels[::rows, ::columns].astype(np.float32) / 256)
    red, green, blue = (pixels * LEVELS).long().unbind(dim=2)
    bins = (red * LEVELS + green) * LEVELS + blue
    colours = torch.bincount(bins.flatten(), minlength=LEVELS**3).sqrt()
    brightness = F.adaptive_avg_pool2d(pixels.mean(dim=2)[None], PLACES).flatten()
    return F.normalize(colours, dim=0), F.normalize(brightness - brightness.mean(), dim=0)
