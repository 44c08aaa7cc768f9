# SPDX-License-Identifier: Apache-2.0
"""Images with ground-truth masks, in VOC2012's layout or as images/ beside masks/."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dino.data.images import given_path, images_by_name, read_image
from dino.data.name_lists import read_names
from dino.errors import UserError

LOSSY_IN_TIFF = ("jpeg", "tiff_jpeg", "webp")
BLACK_IS_NOT_ZERO = ("CMYK", "YCbCr", "LAB")  # modes
BACKGROUND, VOID = 0, 255  # labels of VOC; void is what its annotators left undecided

# Where VOC keeps the masks of each ground truth; the first folder that exists serves.
VOC_MASKS = {
    "objects": ("SegmentationObject",),
    "foreground": ("SegmentationClass", "SegmentationObject"),
}


class SegmentedImages:
    """Iterates over (name, path of the image, objects (n, H, W) bool, which pixels count (H, W)).

    `ground_truth`: "objects", "foreground", or None for the first with VOC2012's folder and for the
    second with any other; see `true_masks`. UserError where a file is missing or has no partner,
    before any is read.
    """

    def __init__(self, data_path, ground_truth=None):
        self.is_voc = (given_path(data_path) / "JPEGImages").is_dir()
        self.ground_truth = ground_truth or ("objects" if self.is_voc else "foreground")
        find = find_voc if self.is_voc else find_pairs
        self.samples = find(data_path, self.ground_truth)
        if not self.samples:
            raise UserError(f"--data_path {data_path}: there are no images to measure.")
        for _, *paths in self.samples:
            for path in paths:
                if not Path(path).is_file():
                    raise UserError(f"--data_path {data_path} lists {path}, which is not a file.")

    def __len__(self):
        return len(self.samples)

    def __iter__(self):
        read_labels = read_voc_labels if self.is_voc else read_pair_labels
        for name, image_path, mask_path in self.samples:
            yield name, image_path, *true_masks(read_labels(mask_path), self.ground_truth)


def true_masks(labels, ground_truth):
    """(objects (n, H, W) bool, which pixels count (H, W) bool) of labels (H, W).

    "objects": one for each label, and all pixels count, so that void is background: the rule of
    DINO's authors. "foreground": all objects as one, and void does not count, as PASCAL scores.
    """
    if ground_truth == "objects":
        names = np.setdiff1d(labels, [BACKGROUND, VOID])
        objects, counted = labels == names[:, None, None], np.ones(labels.shape, bool)
    else:
        counted = labels != VOID
        objects = ((labels != BACKGROUND) & counted)[None]
    return torch.from_numpy(objects), torch.from_numpy(counted)


def find_voc(data_path, ground_truth):
    """(name, path of the image, path of the mask) of VOC2012's validation images."""
    root = Path(data_path)
    masks = [root / name for name in VOC_MASKS[ground_truth] if (root / name).is_dir()]
    names = root / "ImageSets" / "Segmentation" / "val.txt"
    if not masks or not names.is_file():
        missing = names if masks else root / VOC_MASKS[ground_truth][0]
        raise UserError(
            f"--data_path {data_path}: it has JPEGImages/ as VOC2012 does, but there is no"
            f" {missing}, which --ground_truth {ground_truth} needs."
        )
    return [
        (name, root / "JPEGImages" / f"{name}.jpg", masks[0] / f"{name}.png")
        for name in read_names(names, separate=str.split)
    ]


def find_pairs(data_path, ground_truth):
    """The same of images/ and masks/, which go together by their paths without suffix."""
    folders = [Path(data_path) / name for name in ("images", "masks")]
    if not all(folder.is_dir() for folder in folders):
        raise UserError(
            f"--data_path {data_path}: neither VOC2012's folder, with JPEGImages/,"
            " SegmentationObject/ or SegmentationClass/ and ImageSets/Segmentation/val.txt, nor"
            " one with images/ and masks/."
        )
    if ground_truth == "objects":
        raise UserError(
            "--ground_truth objects: masks/ does not tell objects apart, VOC2012's layout does."
            " Leave the flag out."
        )
    images, masks = map(images_by_name, folders)
    for name in sorted(images.keys() ^ masks.keys()):
        other = folders[1] if name in images else folders[0]
        alone = images.get(name) or masks[name]
        raise UserError(f"--data_path {data_path}: {alone} has no counterpart in {other}.")
    return [(name, images[name], masks[name]) for name in images]


def read_voc_labels(path):
    """(H, W) uint8: BACKGROUND, VOID, or the number of an object or a class."""
    mask = open_mask(path)
    if mask.mode != "P":
        raise UserError(
            f"{path}: its pixels are colours or greys ({mask.mode}), not labels with a palette as"
            " in VOC2012. Take the original files."
        )
    return np.asarray(mask)


def read_pair_labels(path):
    """(H, W): BACKGROUND or not. With a palette, labels as in VOC, and so perhaps VOID; in any
    other file each pixel that is not black is foreground, one of 255 too.
    """
    mask = open_mask(path)
    if mask.mode == "P":
        return np.asarray(mask)
    if mask.mode in BLACK_IS_NOT_ZERO:
        raise UserError(
            f"{path}: its colours are {mask.mode}, of which black is not 0. Save the mask as PNG."
        )
    pixels = np.asarray(mask)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if mask.mode in ("LA", "RGBA"):
        pixels = pixels[..., :-1]  # opacity says nothing
    return (pixels != 0).any(axis=-1).astype(np.uint8)


def open_mask(path):
    read_image(path)  # raises, with the name of the file, for what cannot be decoded
    mask = Image.open(path)
    compression = mask.info.get("compression") if mask.format == "TIFF" else None
    is_lossy = mask.format == "JPEG" or (mask.format == "WEBP" and is_lossy_webp(path))
    if is_lossy or compression in LOSSY_IN_TIFF:
        kind = f"{compression} in TIFF" if compression else mask.format
        raise UserError(
            f"{path}: {kind} blurs the edge of a mask. Save masks as PNG, from their source."
        )
    if mask.mode == "P":
        check_background(mask, path)
    return mask


def check_background(mask, path):
    """Raise UserError if black is another number than 0, the background, as `quantize` may order
    colours.
    """
    is_black = ~np.array(mask.getpalette()).reshape(-1, 3).any(axis=1)
    black = set(np.flatnonzero(is_black)).intersection(np.unique(mask))
    if black and not is_black[0]:
        raise UserError(
            f"{path}: black is number {min(black)} of its palette, and 0, which is taken for the"
            " background, is another colour. Save the mask with black as 0."
        )


def is_lossy_webp(path):
    """Whether the pixels of a WebP are in a chunk `VP8 `; in `VP8L` nothing is lost."""
    content, start = Path(path).read_bytes(), 12  # behind the header, RIFF and WEBP
    while start < len(content) and content[start : start + 4] not in (b"VP8 ", b"VP8L"):
        size = int.from_bytes(content[start + 4 : start + 8], "little")
        start += 8 + size + size % 2
    return content[start : start + 4] == b"VP8 "
