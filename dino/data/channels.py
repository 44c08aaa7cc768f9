# SPDX-License-Identifier: Apache-2.0
"""Images of any number of channels: grey, RGB with infra-red, multispectral; TIFF and .npy.

They are uint8 arrays (H, W, C), and stay arrays until they are tensors; RGB images are Pillow's.
"""

import contextlib
import functools
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dino.data.images import (
    ARRAYS,
    UnreadableImage,
    check_is_regular,
    check_pixels,
    highest_by_range,
    open_image,
    read_image,
    to_rgb,
)

RGB = 3
TIFF = (".tif", ".tiff")
LOOKED_AT = 8  # files, to find out how many channels there are


def read_any(path, in_chans=RGB):
    """The image at `path`: PIL RGB for 3 channels, else uint8 (H, W, in_chans).

    Raises UnreadableImage for what cannot be decoded or has another number of channels.
    """
    is_array = str(path).lower().endswith(ARRAYS)
    if in_chans == RGB and not is_array:
        return read_image(path)
    try:
        image = with_channels(read_channels(path), in_chans)
        return Image.fromarray(image) if in_chans == RGB else image
    except UnreadableImage:
        raise
    except Exception as error:  # whatever a decoder may raise on somebody's bytes
        raise UnreadableImage(path, str(error) or type(error).__name__) from None


def reader(in_chans):
    """`read_any` of so many channels, as a function of the path alone."""
    return functools.partial(read_any, in_chans=in_chans)


def read_channels(path):
    """The image of a file with all its channels, uint8 (H, W, C), values scaled by `to_levels`."""
    check_is_regular(path)
    ending = Path(path).suffix.lower()
    if ending in ARRAYS:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        check_shape(pixels.shape)
    elif ending in TIFF:
        with open_tiff(path) as series:
            check_shape(series.shape)
            pixels = series.asarray()
    else:
        with open_image(path) as image:
            plain = image.mode in ("L", "RGB", "RGBA", "LA")
            pixels = np.asarray(image if plain else to_rgb(image))
    return to_levels(np.ascontiguousarray(channels_last(pixels)))


@contextlib.contextmanager
def open_tiff(path):
    """The first image of a TIFF as a series of tifffile, of which only the headers are read yet.

    Series of several files are off: tifffile would open whatever files the metadata name, and wait
    for ever where one is a pipe.
    """
    import tifffile  # comes with scikit-image; Pillow reads 8 bits and 4 channels at most

    with tifffile.TiffFile(path, is_ome=False, is_mmstack=False, is_ndtiff=False) as file:
        yield file.series[0]


def to_levels(values):
    """Numbers of any type as uint8 levels. ValueError for values that have no place in 0 to 255.

    16-bit integers by their type, 32-bit numbers by their range, as images.to_rgb does.
    """
    if values.dtype == np.uint8:
        return values
    if not (np.isfinite(values).all() and values.min() >= 0):
        raise ValueError("values below 0, or that are not finite")
    highest = 65535 if values.dtype == np.uint16 else highest_by_range(values)
    return np.floor(values * (255 / highest) + 0.5).astype(np.uint8)


def check_shape(shape):
    """Raise ValueError for more pixels than the limit, before they are decoded."""
    sides = sorted(shape)[-2:]
    check_pixels(*(sides if len(sides) == 2 else (1, 1)))


def channels_last(pixels):
    """(H, W), (C, H, W) or (H, W, C) -> (H, W, C): the shortest of three sides has the channels."""
    if pixels.ndim == 2:
        return pixels[..., None]
    if pixels.ndim != 3:
        raise ValueError(f"an array of {pixels.ndim} dimensions, not (H, W) or (H, W, C)")
    return np.moveaxis(pixels, 0, -1) if pixels.shape[0] < pixels.shape[-1] else pixels


def with_channels(image, in_chans):
    """An image, PIL or array, as uint8 (H, W, in_chans). ValueError if it has another number.

    One channel is the grey value of a colour image.
    """
    if isinstance(image, Image.Image):
        image = channels_last(np.asarray(image))
    if in_chans == 1 and image.shape[-1] == RGB:
        image = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    if image.shape[-1] != in_chans:
        raise ValueError(f"{image.shape[-1]} channels, and --in_chans is {in_chans}")
    return image


def count_channels(paths):
    """What --in_chans should be for these files: 3, unless those looked at agree on another number.

    Only TIFF and .npy can have it; the transparency of other formats is not a channel of its own,
    and grey TIFFs are read as RGB, like other grey images.
    """
    counts = set()
    for path in paths[:: -(-len(paths) // LOOKED_AT)]:
        ending = Path(path).suffix.lower()
        try:
            channels = read_channels(path).shape[-1] if ending in (*ARRAYS, *TIFF) else RGB
        except Exception:  # reading it as an image will say what is wrong
            channels = RGB
        counts.add(RGB if channels == 1 and ending in TIFF else channels)
    return counts.pop() if len(counts) == 1 else RGB


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


def size_of(image):
    """(width, height) of a PIL image or an array (H, W, C)."""
    return image.size if isinstance(image, Image.Image) else image.shape[1::-1]
