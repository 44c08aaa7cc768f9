# SPDX-License-Identifier: Apache-2.0
"""Sets in the layout of Copydays (Douze et al. 2009): originals, and blocks of edited copies.

    DATA_PATH/original/*.jpg
    DATA_PATH/strong/*.jpg               print, blur, paint and so on
    DATA_PATH/jpegqual/3/*.jpg ... 75    by the quality of the JPEG file
    DATA_PATH/crops/10/*.jpg ... 80      by the percentage of the area that is cut off

The first four characters of a name say which original a strong copy is of.
"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from dino.data.augmentations import IMAGENET_MEAN, IMAGENET_STD
from dino.data.images import find_images, given_path, read_image
from dino.distributed import print0
from dino.errors import UserError
from dino.printable import printable

BLOCKS = [  # in the order in which the official script prints them
    "original",
    "strong",
    *(f"jpegqual/{quality}" for quality in (3, 5, 8, 10, 15, 20, 30, 50, 75)),
    *(f"crops/{percent}" for percent in (10, 15, 20, 30, 40, 50, 60, 70, 80)),
]
PREFIX = 4  # characters that a strong copy's name shares with its original's


@dataclass
class Copydays:
    """Images of each block, and which originals each of them is a copy of."""

    blocks: dict  # {block: paths, sorted}
    positives: dict  # {block: see `positives`}


def open_copydays(data_path):
    """The Copydays in `data_path`: the blocks that are there, with any number of images.

    UserError without `original`, without any other block, for an empty folder, and for a copy whose
    original is missing.
    """
    root = given_path(data_path)
    if not (root / "original").is_dir():
        raise UserError(
            f"--data_path {data_path}: no folder original/ in it. It must hold original/ and some"
            " of strong/, jpegqual/3/ ... 75/ and crops/10/ ... 80/, as Copydays does."
        )
    present = [block for block in BLOCKS if (root / block).is_dir()]
    if len(present) == 1:
        raise UserError(f"--data_path {data_path}: there is original/, but no block of copies.")
    absent = [block for block in BLOCKS if block not in present]
    if absent:
        print0(f"Not in {data_path}, and left out: {', '.join(absent)}.")
    blocks = {block: list_folder(root / block, "--data_path") for block in present}
    originals = names_of(blocks["original"])
    found = {block: positives(block, names_of(paths), originals) for block, paths in blocks.items()}
    return Copydays(blocks, found)


def check_unique(original_names):
    """Raise UserError for two originals of one name: a copy would count as one of the second."""
    stem, count = Counter(Path(name).stem for name in original_names).most_common(1)[0]
    if count > 1:
        raise UserError(
            f"original/ holds {count} images of the name {printable(stem)}, by which copies find"
            " their original. Rename them, with their copies."
        )


def shared(paths, others):
    """Those of the paths, printable, that are files of `others` too, without links."""
    files = set(map(os.path.realpath, others))
    return [printable(path) for path in paths if os.path.realpath(path) in files]


def list_folder(folder, flag):
    """Paths of the images in `folder`, sorted by name; UserError if there is none.

    Suffixes match in any case; the official script skips .JPG.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{flag} {folder}: no such folder.")
    paths = find_images(folder)
    if not paths:
        raise UserError(f"{flag}: no image in {folder}.")
    return paths


def names_of(paths):
    return [Path(path).name for path in paths]


def positives(block, query_names, original_names):
    """For each image of a block the indices of its originals: a list of lists, none empty.

    In `strong` these are the originals whose names begin with the same four characters; in other
    blocks the one of the same name, whatever the suffix. A block with as many images as there are
    originals, and no name in common with them, goes by the place, as all blocks but `strong` do in
    the official code. UserError for a copy without an original.
    """
    stems = [Path(name).stem for name in query_names]
    places = {Path(name).stem: i for i, name in enumerate(original_names)}
    if block == "strong":
        found = [
            [i for i, original in enumerate(original_names) if original[:PREFIX] == stem[:PREFIX]]
            for stem in stems
        ]
    elif len(query_names) == len(original_names) and places.keys().isdisjoint(stems):
        found = [[i] for i in range(len(query_names))]
    else:
        check_unique(original_names)
        found = [[places[stem]] if stem in places else [] for stem in stems]
    for name, originals in zip(query_names, found, strict=True):
        if not originals:
            rule = f"first {PREFIX} characters" if block == "strong" else "name"
            raise UserError(
                f"{block}/{printable(name)}: no image in original/ has the same {rule}. Add its"
                " original, or remove the copy."
            )
    return found


def load_image(path, imsize, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """The image at `imsize` x `imsize` pixels, whatever its aspect ratio, normalised."""
    image = F.resize(read_image(path), [imsize, imsize], InterpolationMode.BICUBIC)
    return F.normalize(F.to_tensor(image), mean, std)
