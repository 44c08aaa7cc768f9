# SPDX-License-Identifier: Apache-2.0
"""Data sets that are not folders: torchvision's by name, one's own by import path."""

import inspect
import os

import torchvision.datasets

from dino.data.images import UnreadableImage
from dino.errors import UserError
from dino.own_code import call_by_path

ONES_OWN = "A function of your own may build it instead: --dataset my_module:build."


def open_dataset(name, root, download=False):
    """The sequence of images that --dataset `name` stands for, of the split to train on.

    `name` is a class of torchvision.datasets, whose files are under `root`, or MODULE:NAME, a
    function or class that takes no arguments. Raises UserError where there is none, or no files.
    """
    if ":" in name:
        dataset, unreadable = call_by_path(name, "--dataset"), OSError
    else:
        dataset, unreadable = open_of_torchvision(name, root, download), Exception
    try:
        length = len(dataset) if hasattr(dataset, "__getitem__") else None
    except (TypeError, ValueError, NotImplementedError):  # of a class, of an IterableDataset
        length = None
    if length is None:
        raise UserError(
            f"--dataset {name}: a {type(dataset).__name__} has no length or no items. It must be a"
            " sequence of PIL images, or of tuples that begin with one."
        )
    if length == 0:
        raise UserError(f"--dataset {name}: it is empty.")
    return Items(dataset, unreadable)


class Items:
    """The items of a data set; where reading one raises `errors`, it is an UnreadableImage."""

    def __init__(self, dataset, errors):
        self.dataset, self.errors = dataset, errors

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, number):
        try:
            return self.dataset[number]
        except self.errors as error:
            reason = str(error) or type(error).__name__
            raise UnreadableImage(f"images[{number}]", reason) from None


def open_of_torchvision(name, root, download):
    """The data set of this name, of the split to train on. UserError where it cannot be opened."""
    kind = getattr(torchvision.datasets, name, None)
    if name not in torchvision.datasets.__all__ or not inspect.isclass(kind):
        raise UserError(
            f"--dataset {name}: not in torchvision.datasets. Names are such as CIFAR10, STL10 or"
            " Flowers102, in their upper and lower case; one's own is my_module:build."
        )
    check_safe(name)
    takes = inspect.signature(kind.__init__).parameters
    wanted = dict(root=str(root), train=True, split="train", download=download)
    options = {option: value for option, value in wanted.items() if option in takes}
    if download and "download" not in takes:
        raise UserError(f"--download: torchvision cannot download {name}. Leave the flag out.")
    if "root" in takes and not download and not os.path.isdir(root):
        raise UserError(  # some make the folder that they do not find
            f"--dataset {name} --data_path {root}: no such folder. Give the one that holds the data"
            " set, or one for --download to fetch it to."
        )
    try:
        return kind(**options)
    except Exception as error:  # whatever torchvision may raise on somebody's files
        advice = "" if download or "download" not in takes else " --download fetches its files."
        reason = (str(error) or type(error).__name__).partition(" You can use download=True")[0]
        raise UserError(
            f"--dataset {name} --data_path {root}: {reason.rstrip('.')}.{advice} {ONES_OWN}"
        ) from None


def check_safe(name):
    """Raise UserError for a data set that unpickles a file of its folder, unchecked."""
    if name.startswith("LSUN"):
        raise UserError(
            f"--dataset {name}: torchvision unpickles a cache in its folder, which can run code."
            f" {ONES_OWN}"
        )
