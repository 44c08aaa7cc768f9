# SPDX-License-Identifier: Apache-2.0
"""Data sets that are not folders: torchvision's by name, one's own by import path."""

import inspect

import torchvision.datasets

from dino.errors import UserError
from dino.own_code import call_by_path


def open_dataset(name, root, download=False):
    """The sequence of images that --dataset `name` stands for, of the split to train on.

    `name` is a class of torchvision.datasets, whose files are under `root`, or MODULE:NAME, a
    function or class that takes no arguments. Raises UserError where there is none, or no files.
    """
    if ":" in name:
        dataset = call_by_path(name, "--dataset")
    else:
        dataset = open_of_torchvision(name, root, download)
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise UserError(
            f"--dataset {name}: a {type(dataset).__name__} has no length or no items. It must be a"
            " sequence of PIL images, or of tuples that begin with one."
        )
    if len(dataset) == 0:
        raise UserError(f"--dataset {name}: it is empty.")
    return dataset


def open_of_torchvision(name, root, download):
    kind = getattr(torchvision.datasets, name, None)
    if name not in torchvision.datasets.__all__ or not inspect.isclass(kind):
        raise UserError(
            f"--dataset {name}: not in torchvision.datasets. Names are such as CIFAR10, STL10 or"
            " Flowers102, in their upper and lower case; one's own is my_module:build."
        )
    takes = inspect.signature(kind.__init__).parameters
    wanted = dict(root=str(root), train=True, split="train", download=download)
    options = {option: value for option, value in wanted.items() if option in takes}
    if download and "download" not in takes:
        raise UserError(f"--download: torchvision cannot download {name}. Leave the flag out.")
    try:
        return kind(**options)
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        advice = "" if download or "download" not in takes else " --download fetches its files."
        reason = str(error).removesuffix(" You can use download=True to download it")
        raise UserError(f"--dataset {name} --data_path {root}: {reason}.{advice}") from None
