# SPDX-License-Identifier: Apache-2.0
"""Images on disk: finding them, refusing a wrong --data_path with advice, reading one."""

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from dino.errors import UserError
from dino.printable import printable


def find_images(folder):
    """Paths of all images under `folder`, at any depth, in ImageFolder's order.

    Links are followed, once.
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


class ImageFiles:
    """Images on disk as a sequence: `images[i]` reads the i-th path."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, number):
        return read_image(self.paths[number])


def list_training_images(data_path, flag="--data_path"):
    """Paths of the images to train on: those of a folder, or those listed in a text file.

    The folder may have class folders or not. A relative path in the file starts from the file's
    folder. Raises UserError where there is no image; `flag` is where `data_path` is from.
    """
    path = given_path(data_path, flag)
    if path.is_dir():
        images = find_images(path)
        if not images:
            raise UserError(
                f"{flag} {data_path}: no image in this folder or below it (looked for"
                f" {', '.join(IMG_EXTENSIONS)})."
            )
        return images
    if path.is_file():
        return read_list(path, flag)
    raise UserError(
        f"{flag} {data_path}: no such folder or file. Give a folder of images (with or without"
        " class folders), or a text file with the path of one image per line. --preset demo needs"
        " no images."
    )


def given_path(data_path, flag="--data_path"):
    """The Path; UserError for "", which Path would read as the current folder.

    It is usually an unset shell variable.
    """
    if not str(data_path):
        raise UserError(f"{flag} '' is empty. Give a folder, or . for this one.")
    return Path(data_path)


def read_list(path, flag):
    """The paths in a text file, one per line; UserError names the first that does not exist."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except UnicodeDecodeError:
        raise UserError(
            f"{flag} {path}: this file is not text. Give a folder of images, or a text file with"
            " the path of one image per line."
        ) from None
    images = [os.path.join(path.parent, line) for line in lines if line]
    if not images:
        raise UserError(f"{flag} {path}: this list of images is empty.")
    for number, image in enumerate(images, start=1):
        if not os.path.isfile(image):
            raise UserError(f"{flag} {path}: line {number} names {image}, which is not a file.")
    return images


def list_labelled_images(data_path, split, classes=None, flag="--data_path"):
    """(paths, labels, class names) of `data_path`/`split`, which holds one folder per class.

    Classes are numbered in the order of their names or, where `classes` is given, as there, so
    that training and validation agree even if one lacks a class. `flag` is where `data_path` is
    from.
    """
    folder = given_path(data_path, flag) / split
    if not folder.is_dir():
        raise UserError(
            f"{flag} {data_path}: no folder {split}/ in it. It must hold train/ and val/, each with"
            " one folder of images per class."
        )
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        raise UserError(
            f"{flag} {data_path}: no class folders in {split}/. It must hold one folder of images"
            " per class."
        )
    if classes is None:
        classes = names
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise UserError(
            f"{flag} {data_path}: class folder {unknown[0]!r} of {split}/ has no counterpart in"
            " train/."
        )
    images = [(path, classes.index(name)) for name in names for path in find_images(folder / name)]
    if not images:
        raise UserError(
            f"{flag} {data_path}: the {len(names)} class folders of {split}/ hold no image."
        )
    paths, labels = zip(*images, strict=True)
    return list(paths), torch.tensor(labels), classes


class UnreadableImage(UserError):
    """(path, reason): an image that could not be decoded."""

    def __init__(self, path, reason):
        super().__init__(printable(str(path)), printable(reason))

    @property
    def path(self):
        return self.args[0]

    def __str__(self):
        path, reason = self.args
        return f"{path}: cannot be read as an image ({reason}). Repair or remove it."


def read_image(path):
    """The image at `path` as PIL RGB, as the official code reads it. Raises UnreadableImage.

    The first frame of an animation; no rotation by EXIF; transparency is dropped. Values of 16 bits
    are scaled to 8, where PIL alone would cut them off at 255.
    """
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes below PIL's limit
            return to_rgb(Image.open(file))
    except Exception as error:  # whatever a decoder may raise on somebody's bytes
        raise UnreadableImage(path, str(error) or type(error).__name__) from None


def to_rgb(image):
    """A PIL image of any mode as RGB."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
