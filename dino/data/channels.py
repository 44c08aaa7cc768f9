# SPDX-License-Identifier: Apache-2.0
"""Images of any number of channels: grey, RGB with infra-red, multispectral; TIFF and .npy.

They are uint8 arrays (H, W, C), and stay arrays until they are tensors; RGB images are Pillow's.
"""

import contextlib
import functools
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dino.data.images import (
    ARRAYS,
    UnreadableImage,
    check_is_regular,
    check_pixels,
    open_image,
    read_image,
)
from dino.data.levels import check_bits, loses_bits, to_levels, to_rgb, white
from dino.errors import UserError

RGB = 3
TIFF = (".tif", ".tiff")
BLACK_IS_ZERO_OR_RGB = (1, 2)  # values of TIFF's tag PhotometricInterpretation
LOOKED_AT = 8  # files, to find out how many channels there are
MOST_FOR_WHITE = 64  # files, to find out how many bits are used
MOST_CHANNELS = 1024  # of an image


def read_any(path, in_chans=RGB):
    """The image at `path`: PIL RGB for 3 channels, else uint8 (H, W, in_chans).

    Raises UnreadableImage for what cannot be decoded or has another number of channels.
    """
    if in_chans == RGB and is_for_pillow(path):
        return read_image(path)
    try:
        image = with_channels(read_channels(path, in_chans), in_chans)
        return Image.fromarray(image) if in_chans == RGB else image
    except UnreadableImage:
        raise
    except Exception as error:  # whatever a decoder may raise on somebody's bytes
        raise UnreadableImage(path, str(error) or type(error).__name__) from None


def is_for_pillow(path):
    """Whether Pillow reads an RGB image of this file as well as tifffile or numpy do."""
    ending = Path(path).suffix.lower()
    if ending in TIFF and white():
        with open_image(path) as image:
            return not loses_bits(image)
    return ending not in ARRAYS


def reader(in_chans):
    """`read_any` of so many channels, as a function of the path alone."""
    return functools.partial(read_any, in_chans=in_chans)


def read_channels(path, in_chans=None):
    """The image of a file with all its channels, uint8 (H, W, C), values scaled by `to_levels`.

    ValueError for a TIFF or .npy of too many pixels, or that is not for `in_chans` channels, before
    it is decoded.
    """
    pixels, bits = read_numbers(path, in_chans)
    if pixels is None:
        with open_image(path) as image:
            return as_levels(image)
    return to_levels(np.ascontiguousarray(channels_last(pixels)), bits)


def read_numbers(path, in_chans=None):
    """(pixels, bits) of a .npy or a TIFF of levels; (None, None) of a file that is for Pillow.

    `pixels` are numbers of any type in two dimensions or three; `bits` is how many of them a TIFF
    says it uses, else None. ValueError as for `read_channels`.
    """
    check_is_regular(path)
    ending = Path(path).suffix.lower()
    pixels = bits = None
    if ending in ARRAYS:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        check_shape(pixels.shape, in_chans)
    elif ending in TIFF:
        with open_tiff(path) as series:
            if holds_levels(series):
                channels = check_shape(shape_of(series), in_chans)
                if channels != in_chans == 1 and not channels_are_told(series):
                    raise ValueError(f"{channels} pages that may be frames; save one of them alone")
                pixels, bits = series.asarray(), series.keyframe.bitspersample
    return pixels, bits


def as_levels(image):
    """A PIL image as uint8 (H, W, C); as RGB where its numbers are not levels of channels."""
    check_bits(image)
    levels = np.asarray(image if image.mode in ("L", "RGB", "RGBA", "LA") else to_rgb(image))
    # not by channels_last, to which an RGB image of two rows would be one of two channels
    return levels.reshape(*levels.shape[:2], -1)


def holds_levels(series):
    """Whether the numbers in a TIFF are levels, and not indices of a palette, inks or differences
    of colours, which Pillow converts to RGB.
    """
    return series.keyframe.photometric in BLACK_IS_ZERO_OR_RGB


@contextlib.contextmanager
def open_tiff(path):
    """The first image of a TIFF as a series of tifffile, of which only the headers are read yet.

    Series of several files are off: tifffile would open whatever files the metadata name, and wait
    for ever where one is a pipe. ValueError for strips that share their bytes: each would be
    decompressed, and a few bytes of zlib may be gigabytes.
    """
    import tifffile  # comes with scikit-image; Pillow reads 8 bits and 4 channels at most

    with tifffile.TiffFile(path, is_ome=False, is_mmstack=False, is_ndtiff=False) as file:
        series = file.series[0]
        if sum(sum(page.databytecounts) for page in series.pages if page) > file.filehandle.size:
            raise ValueError("strips of more bytes than the file has")
        yield series


def shape_of(series):
    """The shape of a series of tifffile. ValueError if its pages hold more than the metadata say:
    all of them would be decoded.
    """
    pages = (len(series), *series.keyframe.shape)
    if math.prod(pages) > math.prod(series.shape):
        raise ValueError(f"pages of {pages}, and metadata that make them {series.shape}")
    return series.shape


def channels_are_told(series):
    """False for a series of several pages that may be frames, a volume or the channels.

    An array (H, W, C) that tifffile saved without names ("Q") has H pages of (W, C).
    """
    shape, axes = series.shape, series.axes
    one_page = math.prod(shape) == math.prod(series.keyframe.shape)
    rows = axes[0] == "Q" and shape[-1] < min(shape[:-1])
    return one_page or rows or bool(set(axes) & {"C", "S"})


def check_shape(shape, in_chans=None):
    """The number of channels of an array of this shape, from its header, before it is decoded.

    ValueError for more pixels or channels than the limits, or for other channels than `in_chans`.
    """
    axis = channel_axis(shape)
    height, width, *_ = (side for number, side in enumerate(shape) if number != axis)
    channels = 1 if axis is None else shape[axis]
    check_pixels(width, height)
    check_channels(channels, in_chans)
    return channels


def check_channels(channels, in_chans):
    """Raise ValueError for an image that cannot become one of `in_chans` channels, if given."""
    if channels > MOST_CHANNELS:
        raise ValueError(f"{channels} channels, more than {MOST_CHANNELS}")
    if in_chans not in (None, channels) and (in_chans, channels) != (1, RGB):
        raise ValueError(
            f"{channels} channels, and the network takes {in_chans}: see --in_chans of main_dino.py"
        )


def channel_axis(shape):
    """Where the channels are in (C, H, W) or (H, W, C): the shorter of both. None for (H, W)."""
    if len(shape) == 2:
        return None
    if len(shape) != 3:
        raise ValueError(f"an array of {len(shape)} dimensions, not (H, W) or (H, W, C)")
    return 0 if shape[0] < shape[-1] else 2


def channels_last(pixels):
    """(H, W), (C, H, W) or (H, W, C) -> (H, W, C)."""
    axis = channel_axis(pixels.shape)
    return pixels[..., None] if axis is None else np.moveaxis(pixels, axis, -1)


def with_channels(image, in_chans):
    """An image, PIL or array, as uint8 (H, W, in_chans). ValueError if it has another number.

    One channel is the grey value of a colour image. Numbers are scaled by `to_levels`.
    """
    if isinstance(image, Image.Image):
        image = as_levels(image)
    image = to_levels(np.ascontiguousarray(image))
    check_channels(image.shape[-1], in_chans)
    if in_chans == 1 and image.shape[-1] == RGB:
        image = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    return image


def count_channels(paths):
    """What --in_chans should be for these files: 3, unless those looked at agree on another number.

    Only TIFF and .npy can have it; the transparency of other formats is not a channel of its own,
    and grey TIFFs are read as RGB, like other grey images. UserError if they agree on the number
    of pages of a TIFF, of which the metadata do not say that these are channels.
    """
    counts, untold = set(), None
    for path in paths[:: -(-len(paths) // LOOKED_AT)]:
        try:
            channels, told = channels_in_header(path)
        except Exception:  # reading it as an image will say what is wrong
            channels, told = RGB, True
        counts.add(channels)
        untold = untold or (None if told else path)
    channels, *others = counts
    if others or channels == RGB:
        return RGB
    if untold is not None:
        raise UserError(
            f"{untold}: this TIFF has several pages and does not say whether they are channels."
            f" Give --in_chans {channels} if they are, --in_chans {RGB} to use the first page only."
        )
    return channels


def channels_in_header(path):
    """(number of channels, False if they may be frames) of a file, of which no pixel is decoded."""
    ending = Path(path).suffix.lower()
    if ending not in (*ARRAYS, *TIFF):
        return RGB, True
    check_is_regular(path)
    if ending in ARRAYS:
        return check_shape(np.load(path, mmap_mode="r", allow_pickle=False).shape), True
    with open_tiff(path) as series:
        if not holds_levels(series):
            return RGB, True
        channels = check_shape(shape_of(series))
        return (RGB if channels == 1 else channels), channels_are_told(series)


def find_white(paths):
    """What --white should be for these files: 2^b - 1 if those of 16 bits use b of them, else 0.

    So a sensor of 12 bits has all 256 levels, of which 65535 as white would leave 17.
    """
    highest = max(map(highest_of_16_bits, paths[:: -(-len(paths) // MOST_FOR_WHITE)]))
    bits = max(8, highest.bit_length())
    return 2.0**bits - 1 if highest and bits < 16 else 0.0


def highest_of_16_bits(path):
    """The greatest number in a file of 16-bit integers without a sign; 0 for other files.

    Also for a file that cannot be read: reading it as an image will say what is wrong.
    """
    numbers = None
    with contextlib.suppress(Exception), open_image(path) as image:
        if image.mode.startswith("I;16") or (image.format, image.mode) == ("PNG", "I"):
            numbers = np.asarray(image).astype(np.uint16)
    if numbers is None:  # not grey, or not for Pillow
        with contextlib.suppress(Exception):
            numbers, _ = read_numbers(path)
    is_16_bits = numbers is not None and (numbers.dtype.kind, numbers.dtype.itemsize) == ("u", 2)
    return int(numbers.max()) if is_16_bits else 0


def to_levels_tensor(image):
    """A PIL image or an array (H, W, C) -> uint8 (C, H, W), channels last in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def as_rgb(pixels):
    """(H, W, C) -> (H, W, 3), to be looked at: the first three channels; one is grey, two are red
    and green.
    """
    if pixels.shape[-1] == 1:
        return pixels.repeat(RGB, axis=-1)
    shown = pixels[..., :RGB]
    return np.pad(shown, ((0, 0), (0, 0), (0, RGB - shown.shape[-1])))


def as_picture(image):
    """A PIL image, to be looked at, of a PIL image or an array (H, W, C): see `as_rgb`."""
    return image if isinstance(image, Image.Image) else Image.fromarray(as_rgb(image))


def size_of(image):
    """(width, height) of a PIL image or an array (H, W, C)."""
    return image.size if isinstance(image, Image.Image) else image.shape[1::-1]
