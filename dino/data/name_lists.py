# SPDX-License-Identifier: Apache-2.0
"""The text files by which DAVIS and VOC list the names of what belongs to a split."""

from collections import Counter

from dino.errors import UserError


def read_names(path, separate=str.splitlines):
    """The names in a text file, which `separate` takes apart; blank ones are skipped.

    UserError unless the file is text, and lists each name once.
    """
    try:
        names = [name.strip() for name in separate(path.read_text()) if name.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{path}: this file is not text. It must list a name per line.") from None
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"{path} lists {name} twice.")
    return names
