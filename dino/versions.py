# SPDX-License-Identifier: Apache-2.0
"""Which software and which GPU a process runs with."""

import platform
from importlib import metadata

import torch

PACKAGES = ("torchvision", "timm", "numpy", "pillow")


def versions():
    """{name: version} of Python, PyTorch and the libraries that training depends on; the GPU."""
    found = {"Python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # built from source and only on the path
            found[package] = "unknown"
    cuda = torch.cuda.is_available()
    return found | {"GPU": torch.cuda.get_device_name() if cuda else "none"}
