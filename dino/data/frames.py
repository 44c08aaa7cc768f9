# SPDX-License-Identifier: Apache-2.0
"""Frames of a video as image files, in the order of their numbers."""

import re
from pathlib import Path

from dino.data.images import read_image, refuse_folder
from dino.errors import UserError

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")


def list_frames(folder, names=".*"):
    """Paths of the images in `folder` whose names match a regular expression, in order."""
    try:
        paths = [path for path in Path(folder).iterdir() if path.is_file()]
    except OSError as error:
        refuse_folder(error)
    frames = [
        path
        for path in paths
        if path.suffix.lower() in FRAME_SUFFIXES
        and re.fullmatch(names, path.name, re.DOTALL)
        and not path.name.startswith(".")
    ]
    return sorted(frames, key=by_number)


def by_number(path):
    """Sort key under which frame-10000 comes after frame-9999, however many zeros they have."""
    parts = re.split(r"([0-9]+)", path.name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name


def check_frames(paths):
    """Read all frames: UserError for one that cannot be read or has another size than the first."""
    first = None
    for path in paths:
        size = read_image(path).size
        first = first or size
        check_size(path, size, first, "the first frame")
    return first


def check_size(path, size, expected, source):
    """Raise UserError unless two (width, height) are the same."""
    if size != expected:
        found, wanted = (" x ".join(map(str, pixels)) for pixels in (size, expected))
        raise UserError(f"{path}: {found} pixels, and {source} has {wanted}.")
