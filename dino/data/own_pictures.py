# SPDX-License-Identifier: Apache-2.0
"""Pictures that carry a mark, by which a later run knows that it may replace or remove them."""

import io
import os

from PIL.PngImagePlugin import PngInfo

from dino.atomic import replacing
from dino.data.frames import list_frames
from dino.errors import UserError

MARK = "written by video_generation.py of DINO"
HEAD = 512  # bytes of a file, where Pillow puts a JPEG's comment and a PNG's text
JPEG_QUALITY = 95


def save(image, path):
    """Write a marked picture, whole or not at all; Pillow itself may not notice a full disk."""
    content, text = io.BytesIO(), PngInfo()
    if path.suffix.lower() == ".png":
        text.add_text("Software", MARK)
        image.save(content, "PNG", pnginfo=text)
    else:
        image.save(content, "JPEG", quality=JPEG_QUALITY, comment=MARK)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getvalue())


def is_own(path):
    """Whether `save` wrote the file, or another that ends with the mark."""
    with open(path, "rb") as file:
        beginning = file.read(HEAD)
        file.seek(max(0, os.path.getsize(path) - len(MARK)))
        return MARK.encode() in beginning + file.read()


def check_own(folder, names, given):
    """Raise UserError if a picture in `folder` has such a name, a regular expression, but no mark.

    `given`: the flag and its value.
    """
    for path in list_frames(folder, names) if folder.is_dir() else ():
        if not is_own(path):
            raise UserError(
                f"{given}: {path} would be replaced or removed, and has no mark of this script: it"
                f" is somebody's own, or of an earlier version. Move {folder} away, or give another"
                " --output_path."
            )


def remove_others(folder, names, kept):
    """Remove the pictures with such names that are not among the `kept` ones."""
    for path in set(list_frames(folder, names)) - set(kept):
        path.unlink()
