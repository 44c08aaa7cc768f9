# SPDX-License-Identifier: Apache-2.0
"""The images of any folder, list or data set, with their classes where they have any."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dino.data.images import (
    given_path,
    list_labelled_images,
    list_lines,
    list_training_images,
    listed_files,
)

UNLABELLED = -1


@dataclass
class ListedImages:
    """n images on disk: their paths, labels (n,) int64, or UNLABELLED, and the classes' names."""

    paths: list
    labels: torch.Tensor
    classes: list

    def __str__(self):
        known = self.labels.unique()
        count = len(known[known != UNLABELLED])
        return f"{len(self.paths)} images {f'of {count} classes' if count else 'without labels'}"


def unlabelled(paths):
    return ListedImages(paths, torch.full((len(paths),), UNLABELLED), [])


def describe_set(paths, data_path):
    """A text that tells the images `paths` below `data_path` from others: their number and names.

    The same where the folder has moved.
    """
    root = os.path.join(data_path, "")
    names = "\0".join(str(path).removeprefix(root) for path in paths)
    digest = hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{len(paths)} images, names {digest[:8]}"


def class_name(label, classes):
    """The name of a class, or its number where it has none; "" for UNLABELLED."""
    if label == UNLABELLED:
        return ""
    return classes[label] if classes else str(label)


def list_images(data_path, flag="--data_path"):
    """The ListedImages of a folder, a list or a data set. UserError where there is no image.

    A data set is a folder with train/ and val/, each of class folders. In another folder an image's
    class is the folder directly below `data_path` that holds it, at any depth, as for torchvision's
    ImageFolder; where an image has none, no image has a label. A list may have a tab and a label
    after each path: whole numbers, which are kept, or class names.
    """
    path = given_path(data_path, flag)
    if all(has_folders(path / split) for split in ("train", "val")):
        paths, labels, classes = list_labelled_images(path, "train", flag=flag)
        val_paths, val_labels, _ = list_labelled_images(path, "val", classes, flag=flag)
        return ListedImages(paths + val_paths, torch.cat([labels, val_labels]), classes)
    if path.is_file():
        rows = [line.split("\t", 1) for line in list_lines(path, flag)]
        paths = listed_files([row[0].strip() for row in rows], path, flag)
        labels, classes = number_labels([row[1].strip() for row in rows if len(row) > 1], len(rows))
    else:
        paths = list_training_images(data_path, flag)
        folders = [Path(image).relative_to(path).parts[:-1] for image in paths]
        labels, classes = number_classes([parts[0] for parts in folders if parts], len(paths))
    return ListedImages(paths, labels, classes)


def has_folders(path):
    return path.is_dir() and any(entry.is_dir() for entry in path.iterdir())


def number_labels(texts, count):
    """`number_classes` of the labels in a list, unless they are numbers already."""
    if len(texts) == count and all(re.fullmatch("[0-9]{1,9}", text) for text in texts):
        return torch.tensor([int(text) for text in texts]), []
    return number_classes(texts, count)


def number_classes(names, count):
    """(labels, class names in alphabetical order) of `count` images, if there are so many names."""
    if len(names) < count:
        return torch.full((count,), UNLABELLED), []
    classes, labels = np.unique(names, return_inverse=True)
    return torch.from_numpy(labels), classes.tolist()
