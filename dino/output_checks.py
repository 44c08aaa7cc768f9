# SPDX-License-Identifier: Apache-2.0
"""Where a script is to write: refused before the work starts if it cannot, or must not."""

import os
import stat
from pathlib import Path

from dino.errors import UserError

# What a file that a script may overwrite begins with, by the ending of its name: what we wrote.
OURS = {".json": b"{", ".png": b"\x89PNG", ".html": b"<!DOCTYPE html>"}
PLOT = b"Software\0Matplotlib"  # near the beginning of a PNG that Matplotlib wrote


def check_output_folder(folder, flag="--output_dir"):
    """Raise UserError unless `folder` is one, or could be made, and can be written to."""
    if not str(folder):
        raise UserError(f"{flag} '' is empty. Give a folder, or . for this one.")
    check_can_be_made(Path(folder), f"{flag} {folder}")


def check_output_file(path, flag="--output", ending=None):
    """Raise UserError unless a file can be written to `path`, whose folder may not exist yet.

    With an `ending`, one of OURS, the name must end so, and a file that is there must be of the
    kind that the scripts write: a slip must not cost a photograph, or weights.
    """
    mode = os.stat(path).st_mode if os.path.exists(path) else 0
    if stat.S_ISDIR(mode):
        raise UserError(f"{flag} {path} is a folder. Give the name of a file.")
    if ending and not stat.S_ISCHR(mode) and not str(path).endswith(ending):
        raise UserError(f"{flag} {path}: give a name that ends in {ending}.")
    if stat.S_ISFIFO(mode):
        raise UserError(f"{flag} {path} is a pipe, which may have no reader. Give a file.")
    if ending and stat.S_ISREG(mode):
        with open(path, "rb") as file:
            beginning = file.read(1000)
        if not beginning.startswith(OURS[ending]) or (ending == ".png" and PLOT not in beginning):
            raise UserError(
                f"{flag} {path} exists and was not written by these scripts. Give another name, or"
                " remove it."
            )
    check_can_be_made(Path(path).parent, f"{flag} {path}")


def check_can_be_made(folder, given):
    """Raise UserError unless `folder`, or the nearest one above it that exists, is writable."""
    folders = (folder, *folder.parents, *folder.absolute().parents)
    existing = next(path for path in folders if os.path.exists(path))
    effective = os.access in os.supports_effective_ids
    if not existing.is_dir() or not os.access(existing, os.W_OK, effective_ids=effective):
        raise UserError(f"{given}: {existing} is not a folder that can be written to.")
