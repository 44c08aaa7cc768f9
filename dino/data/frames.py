# SPDX-License-Identifier: Apache-2.0
"""Frames of a video as image files, in the order of their numbers."""

import re
from pathlib import Path

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")


def by_number(path):
    """Sort key under which frame-10000 comes after frame-9999, however many zeros they have."""
    parts = re.split(r"(\d+)", Path(path).name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], Path(path).name


def list_frames(folder, prefix=""):
    """Paths of the images in `folder` whose names begin with `prefix`, in order."""
    return sorted(
        (
            path
            for path in Path(folder).iterdir()
            if path.suffix.lower() in FRAME_SUFFIXES
            and path.name.startswith(prefix)
            and path.is_file()
        ),
        key=by_number,
    )
