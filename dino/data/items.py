# SPDX-License-Identifier: Apache-2.0
"""What a loader makes of one image: data sets of views, of labelled and of plain images."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torch.utils.data._utils.pin_memory import pin_memory

from dino.data.channels import RGB, reader, size_of, with_channels
from dino.data.images import UnreadableImage
from dino.data.levels import to_rgb

MOST_ATTEMPTS = 10  # of --on_bad_image skip, to replace one image


class TrainingImages(Dataset):
    """Augmented views, by (epoch, number of the image): a function of these and the seed alone.

    `images` is any sequence of PIL images, or of tuples that begin with one; for other numbers of
    channels than 3, arrays (H, W, in_chans) will do. An unreadable image
    gives its UnreadableImage as the item, or with `skip_bad` a Replaced: raised inside a loader
    worker it would come out as a traceback of the worker.
    """

    def __init__(self, images, augmentation, seed=0, skip_bad=False, in_chans=RGB):
        self.images, self.augmentation, self.in_chans = images, augmentation, in_chans
        self.seed, self.skip_bad = seed, skip_bad

    def __len__(self):
        return len(self.images)

    def __getitem__(self, epoch_and_index):
        try:
            return self.views(*epoch_and_index)
        except StopIteration as error:  # of the user's code: it would end the epoch without a word
            raise RuntimeError("the images or their augmentation raised StopIteration") from error

    def views(self, epoch, index):
        bad = []
        for number in itertools.chain([index], self.others(epoch, index)):
            try:
                image = image_of(self.images[number], number, self.in_chans)
            except UnreadableImage as error:
                bad.append(error)
                if not self.skip_bad:
                    return error
            else:
                views = self.augmentation(image, key=(self.seed, epoch, index))
                return Replaced(views, bad) if bad else views
        return bad[0]

    def others(self, epoch, index):
        """Numbers of the images to try in the place of one that cannot be read."""
        generator = np.random.default_rng((self.seed, epoch, index, 1))  # not that of the views
        yield from generator.integers(len(self), size=MOST_ATTEMPTS).tolist()


def image_of(item, number, in_chans=RGB):
    """The image of an item of a sequence of images or of tuples (image, label, ...).

    As PIL RGB or, for other numbers of channels than 3, as uint8 (H, W, in_chans). UnreadableImage
    for anything else.
    """
    image = item[0] if isinstance(item, tuple | list) and item else item
    is_array = isinstance(image, np.ndarray) and in_chans != RGB
    try:
        if not (is_array or isinstance(image, Image.Image)):
            raise ValueError(f"{type(image).__name__}, not a PIL image or (PIL image, label)")
        if 0 in size_of(image):
            raise ValueError("no pixels")
        return to_rgb(image) if in_chans == RGB else with_channels(image, in_chans)
    except (ValueError, TypeError) as error:  # TypeError: numbers that have no order
        raise UnreadableImage(f"images[{number}]", str(error)) from None


@dataclass
class Replaced:
    """An item in the place of unreadable images, or a batch with such items."""

    item: object
    bad: list  # their UnreadableImages

    def pin_memory(self):
        """Called by a DataLoader that pins memory, which does not know this type."""
        return Replaced(pin_memory(self.item), self.bad)


class LabelledTrainingImages(TrainingImages):
    """(augmented image, label), by (epoch, number of the image); else as TrainingImages."""

    def __init__(self, images, labels, augmentation, seed=0, in_chans=RGB):
        super().__init__(images, augmentation, seed, in_chans=in_chans)
        self.labels = labels

    def __getitem__(self, epoch_and_index):
        image = super().__getitem__(epoch_and_index)
        if isinstance(image, UnreadableImage):
            return image
        return image, self.labels[epoch_and_index[1]]


class LoadedImages(Dataset):
    """(`load(path)`, number of the path); an unreadable image gives its UnreadableImage."""

    def __init__(self, paths, load):
        self.paths, self.load = paths, load

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, number):
        try:
            return self.load(self.paths[number]), number
        except UnreadableImage as error:
            return error


class LabelledImages(Dataset):
    """(transformed image, label), with the channels that the transform wants.

    An unreadable image gives its UnreadableImage.
    """

    def __init__(self, paths, labels, transform):
        self.paths, self.labels, self.transform = paths, labels, transform
        self.read = reader(getattr(transform, "in_chans", RGB))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        try:
            return self.transform(self.read(self.paths[index])), self.labels[index]
        except UnreadableImage as error:
            return error


def collate_readable(items):
    """torch's default collation.

    Returns an UnreadableImage if any item is one; a Replaced batch if any item was replaced.
    """
    bad = []
    for i, item in enumerate(items):
        if isinstance(item, UnreadableImage):
            return item
        if isinstance(item, Replaced):
            items[i] = item.item
            bad += item.bad
    batch = torch.utils.data.default_collate(items)
    return Replaced(batch, bad) if bad else batch
