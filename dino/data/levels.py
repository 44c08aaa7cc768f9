# SPDX-License-Identifier: Apache-2.0
"""The numbers in image files as levels, 0 to 255, whatever their type; of which one is white."""

import re

import numpy as np
from PIL import Image

# Tags of TIFF. The sample format 2 is "integer with a sign", 3 "floating-point number".
BITS, COMPRESSION, PHOTOMETRIC, PLANES, SAMPLE_FORMAT = 258, 259, 262, 284, 339
WHITE_IS_ZERO, NOT_COMPRESSED, APART = 0, 1, 2
HIGHEST_WHITE = 2.0**32  # that a flag or a file may state
ONE_NUMBER = ("I", "F")  # how Pillow's modes of one number a pixel, of more than 8 bits, begin
# In what Pillow calls the bytes of a file: a channel's, in some order. BMP's BGR;16 are a pixel's.
OF_16_BITS = re.compile(";16[BLN]")

_white = 0  # see set_white


def set_white(number):
    """Read `number` and what is above it as white in images of more than 8 bits a channel: --white.

    0: their type or range says what is white. Holds for this process, like Pillow's limit of
    pixels; loader workers get it with `reading_rules`.
    """
    global _white
    _white = number


def white():
    """What `set_white` set."""
    return _white


def to_rgb(image):
    """A PIL image of any mode as RGB. ValueError for values that have no place in 0 to 255."""
    check_bits(image)
    check_palette(image)
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if image.mode == "L" and 2 in tags.get(SAMPLE_FORMAT, ()):
        raise ValueError("8-bit integers with a sign")
    if image.mode.startswith(ONE_NUMBER):
        if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
            raise ValueError("more than 8 bits of which 0 is white")
        values = check_values(np.asarray(image))
        highest = highest_of_pillow(image, tags) or highest_by_range(values)
        image = Image.fromarray(scale(values, highest))
    return image.convert("RGB")


def to_levels(values, bits=None):
    """Numbers of any type as uint8 levels. ValueError for values that have no place in 0 to 255.

    Integers of up to 16 bits without a sign by their type, of which a TIFF may use fewer `bits`, or
    by `set_white`; other numbers by this or their range, as in `to_rgb`.
    """
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.dtype == np.uint8 and bits in (None, 8):
        return values
    if values.dtype == np.int8:
        raise ValueError("8-bit integers with a sign")
    check_values(values)
    if values.dtype == np.bool_:
        highest = 1
    elif values.dtype == np.uint8:
        highest = 2**bits - 1
    elif _white:
        highest = _white
    elif values.dtype == np.uint16:
        highest = 2 ** (bits or 16) - 1
    else:
        highest = highest_by_range(values)
    return scale(values, highest)


def check_values(values):
    """`values`; ValueError for those that no scale brings to 0 to 255."""
    if not (np.isfinite(values).all() and values.min() >= 0):
        raise ValueError("values below 0, or that are not finite")
    return values


def scale(values, highest):
    """0 to `highest` as uint8 of 0 to 255, rounded; what is above `highest` is 255."""
    return np.floor(np.minimum(values, highest) * (255 / highest) + 0.5).astype(np.uint8)


def highest_of_pillow(image, tags):
    """The value of white in Pillow's modes I;16, I and F; None if only the range can tell.

    Pillow scales a PPM to 65535 by the greatest value that its header states.
    """
    if image.format == "PPM" and image.mode == "I":
        return 65535
    if _white:
        return _white
    bits = set(tags.get(BITS, ()))
    if len(bits) == 1 and 8 < max(bits) < 16:
        return 2 ** max(bits) - 1
    if image.mode.startswith("I;16") or (image.format == "PNG" and image.mode == "I"):
        return 65535
    if image.mode == "I" and tags.get(BITS) == (16,):
        return 32767 if tags.get(SAMPLE_FORMAT) == (2,) else 65535
    return None


def highest_by_range(values):
    """The value of white by the greatest value: 1 (of floating-point numbers), 255 or 65535.

    In 16 bits with a sign, which end there, 32767 stands for 65535. ValueError for a greatest value
    between these: the image would come out almost black, or does not hold levels.
    """
    highest = values.max()
    shares = np.issubdtype(values.dtype, np.floating)
    if shares and highest <= 1:
        return 1
    if highest <= 255 and (highest > 16 or not shares):
        return 255
    if 4096 < highest <= 65535:
        return 32767 if values.dtype == np.int16 else 65535
    raise ValueError(
        f"values up to {highest:g}, from which it cannot be told whether white is 1, 255 or 65535:"
        " see --white of main_dino.py"
    )


def loses_bits(image):
    """Whether Pillow keeps 8 of the 16 bits of each of several channels.

    Of an image that has been decoded nobody can tell.
    """
    several = not image.mode.startswith(ONE_NUMBER)
    return several and any(OF_16_BITS.search(str(tile.args)) for tile in getattr(image, "tile", ()))


def check_bits(image):
    """Raise ValueError for a PIL image that has lost the bits of which --white tells."""
    if _white and loses_bits(image):
        raise ValueError(
            f"{image.format} of several channels of 16 bits, of which 8 would be read, and --white"
            f" {_white:g} is of all; save it as TIFF"
        )


def check_palette(image):
    """Raise ValueError for a PIL image with numbers that its palette has no colour for.

    Pillow makes them black, and all of an image whose palette is missing.
    """
    if image.mode in ("P", "PA"):
        highest, colours = image.getchannel(0).getextrema()[1], len(image.getpalette()) // 3
        if highest >= colours:
            raise ValueError(f"number {highest} of a palette of {colours} colours")


def check_decodable(tags):
    """Raise ValueError for a TIFF of which Pillow 13 gives other numbers than it holds.

    Each byte of the planes is a pixel to it, or the bytes are swapped once too often.
    """
    compressed = tags.get(COMPRESSION, NOT_COMPRESSED) != NOT_COMPRESSED
    if tags.get(PLANES) == APART and max(tags.get(BITS, (1,))) > 8 and not compressed:
        raise ValueError("planes of more than 8 bits that are not compressed; save them compressed")
    if compressed and tags.prefix == b"MM" and {2, 3} & set(tags.get(SAMPLE_FORMAT, ())):
        raise ValueError(
            "big-endian numbers with a sign that are compressed; save it little-endian"
        )
