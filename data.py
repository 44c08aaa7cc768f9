# SPDX-License-Identifier: Apache-2.0
"""Images on disk: finding them, refusing a wrong --data_path helpfully, reading them, and serving
them in order.
"""

import os
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.datasets.folder import IMG_EXTENSIONS

from distributed import get_rank, get_world_size
from errors import UserError


def find_images(folder):
    """Paths of all images under `folder`, at any depth, in the order of ImageFolder. Links are
    followed, once.
    """
    found, visited = [], set()
    for directory, subdirectories, names in os.walk(folder, followlinks=True):
        visited.add(os.path.realpath(directory))
        subdirectories[:] = sorted(
            name
            for name in subdirectories
            if os.path.realpath(os.path.join(directory, name)) not in visited
        )
        found += [
            os.path.join(directory, name)
            for name in sorted(names)
            if name.lower().endswith(IMG_EXTENSIONS)
        ]
    return found


def list_training_images(data_path):
    """Paths of the images to train on: of a folder, with or without class folders, or of a text
    file of paths.

    A relative path in the file starts from the file's folder. Raises UserError where there is no
    image.
    """
    path = Path(data_path)
    if path.is_dir():
        images = find_images(path)
        if not images:
            raise UserError(
                f"--data_path {data_path}: no image in this folder or below it (looked for"
                f" {', '.join(IMG_EXTENSIONS)})."
            )
        return images
    if path.is_file():
        return read_list(path)
    raise UserError(
        f"--data_path {data_path}: no such folder or file. Give a folder of images (with or"
        " without class"
        " folders), or a text file with the path of one image per line. --preset demo needs no"
        " images."
    )


def read_list(path):
    """The paths in a text file, one per line; UserError names the first that does not exist."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except UnicodeDecodeError:
        raise UserError(
            f"--data_path {path}: this file is not text. Give a folder of images, or a text file"
            " with the path"
            " of one image per line."
        ) from None
    images = [os.path.join(path.parent, line) for line in lines if line]
    if not images:
        raise UserError(f"--data_path {path}: this list of images is empty.")
    for number, image in enumerate(images, start=1):
        if not os.path.isfile(image):
            raise UserError(
                f"--data_path {path}: line {number} names {image}, which is not a file."
            )
    return images


def list_labelled_images(data_path, split, classes=None):
    """(paths, labels, class names) of `data_path`/`split`, which holds one folder per class.

    Classes are numbered in the order of their names or, where `classes` is given, as there, so
    that training and validation agree even if one lacks a class.
    """
    folder = Path(data_path) / split
    if not folder.is_dir():
        raise UserError(
            f"--data_path {data_path}: no folder {split}/ in it. It must hold train/ and val/,"
            " each with one folder"
            " of images per class."
        )
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        raise UserError(f"{folder}: no class folders. It must hold one folder of images per class.")
    if classes is None:
        classes = names
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise UserError(f"{folder}: class folder {unknown[0]!r} has no counterpart in train/.")
    images = [(path, classes.index(name)) for name in names for path in find_images(folder / name)]
    if not images:
        raise UserError(f"{folder}: its {len(names)} class folders hold no image.")
    paths, labels = zip(*images, strict=True)
    return list(paths), torch.tensor(labels), classes


class UnreadableImage(UserError):
    """An image that could not be decoded; its text names the file and says why."""


def read_image(path):
    """The image at `path` as PIL RGB. Raises UnreadableImage."""
    try:
        with open(path, "rb") as file:
            return Image.open(file).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImage(
            f"{path}: cannot be read as an image ({error}). Repair or remove it."
        ) from None


class TrainingImages(Dataset):
    """Augmented views, by (epoch, number of the image): a function of these and the seed alone.

    An unreadable image gives its UnreadableImage as the item: raised inside a loader worker it
    would come out as a traceback of the worker.
    """

    def __init__(self, paths, augmentation, seed=0):
        self.paths, self.augmentation, self.seed = paths, augmentation, seed

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, epoch_and_index):
        epoch, index = epoch_and_index
        try:
            image = read_image(self.paths[index])
        except UnreadableImage as error:
            return error
        return self.augmentation(image, key=(self.seed, epoch, index))


class LabelledTrainingImages(TrainingImages):
    """(augmented image, label), by (epoch, number of the image); else as TrainingImages."""

    def __init__(self, paths, labels, augmentation, seed=0):
        super().__init__(paths, augmentation, seed)
        self.labels = labels

    def __getitem__(self, epoch_and_index):
        image = super().__getitem__(epoch_and_index)
        if isinstance(image, UnreadableImage):
            return image
        return image, self.labels[epoch_and_index[1]]


class LabelledImages(Dataset):
    """(transformed image, label); an unreadable image gives its UnreadableImage."""

    def __init__(self, paths, labels, transform):
        self.paths, self.labels, self.transform = paths, labels, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        try:
            return self.transform(read_image(self.paths[index])), self.labels[index]
        except UnreadableImage as error:
            return error


def collate_readable(items):
    """torch's default collation or, if an item is an UnreadableImage, that."""
    for item in items:
        if isinstance(item, UnreadableImage):
            return item
    return torch.utils.data.default_collate(items)


class ImageLoader(DataLoader):
    """A DataLoader that raises the UnreadableImage that comes instead of a batch.

    It draws a seed for its workers, which nothing here uses, from a generator of its own: torch's
    global one would move on, and with it stochastic depth.
    """

    def __init__(self, dataset, **options):
        generator = torch.Generator()
        super().__init__(dataset, collate_fn=collate_readable, generator=generator, **options)

    def __iter__(self):
        for batch in super().__iter__():
            if isinstance(batch, UnreadableImage):
                raise batch
            yield batch


class EpochSampler(DistributedSampler):
    """The official order (torch's DistributedSampler), as (epoch, index) pairs: workers then know
    the epoch.
    """

    def __iter__(self):
        return ((self.epoch, index) for index in super().__iter__())


def training_loader(paths, augmentation, *, batch_size, num_workers, seed, pin_memory, labels=None):
    """Loader of lists of V view tensors (B, 3, S, S); the last, smaller batch of an epoch is
    dropped.

    With `labels`: of pairs (images, labels), and no batch is dropped.
    """
    if labels is None:
        dataset = TrainingImages(paths, augmentation, seed)
    else:
        dataset = LabelledTrainingImages(paths, labels, augmentation, seed)
    return ImageLoader(
        dataset,
        sampler=EpochSampler(dataset, get_world_size(), get_rank(), shuffle=True, seed=seed),
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        drop_last=labels is None,
        persistent_workers=num_workers > 0,
    )


def evaluation_loader(paths, labels, transform, *, batch_size, num_workers, pin_memory):
    """Loader of (images, labels) over every world_size-th image from this rank's number on, in
    order.
    """
    share = slice(get_rank(), None, get_world_size())
    return ImageLoader(
        LabelledImages(paths[share], labels[share], transform),
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )
