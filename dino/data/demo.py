# SPDX-License-Identifier: Apache-2.0
"""The embedded data set: tiles of photographs that come with scikit-image, a class each."""

from pathlib import Path

import numpy as np

from dino.data.images import read_image
from dino.distributed import barrier, is_main_process

DEMO = "demo://"  # as --data_path

# Those inside scikit-image's wheel that are large enough; the rest of its gallery is downloaded.
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
TILE = 32  # pixels
# Tiles of each photograph: many without a label to train on, few with one for the k-NN.
UNLABELLED, LABELLED, HELD_OUT = 200, 50, 80
NUMBER_OF_IMAGES = len(PHOTOGRAPHS) * UNLABELLED  # to train on
GRID = 4  # blocks per side, of which one in each row and column is held out


def demo_folder(output_dir):
    """Where the demo's images of a run are: images/ to train on, train/ and val/ for the k-NN."""
    return Path(output_dir) / "demo_images"


def write_demo_images(folder):
    """Write images/, without labels, and train/ and val/, with a folder per photograph.

    Rank 0 writes, and the tiles are always the same ones. Those of val/ come from blocks of the
    photograph that no other tile touches.
    """
    folder = Path(folder)
    if is_main_process():
        rng = np.random.default_rng(0)
        for name in PHOTOGRAPHS:
            image, stem = open_photograph(name), Path(name).stem
            blocks, held_out_blocks = split_blocks(*image.size)
            write_tiles(image, blocks, UNLABELLED, folder / "images", f"{stem}_", rng)
            write_tiles(image, blocks, LABELLED, folder / "train" / stem, "", rng)
            write_tiles(image, held_out_blocks, HELD_OUT, folder / "val" / stem, "", rng)
    barrier()


def open_photograph(name):
    import skimage  # a second, for those who want the demo

    return read_image(Path(skimage.__file__).parent / "data" / name)


def write_tiles(image, blocks, count, folder, prefix, rng):
    """`count` tiles at random places of random blocks, as `prefix`000.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        left, top, right, bottom = blocks[rng.integers(len(blocks))]
        x, y = rng.integers(left, right - TILE + 1), rng.integers(top, bottom - TILE + 1)
        image.crop((x, y, x + TILE, y + TILE)).save(folder / f"{prefix}{number:03}.png")


def split_blocks(width, height):
    """(to train on, held out): the blocks of a GRID x GRID division, (left, top, right, bottom)."""
    train, held_out = [], []
    for row in range(GRID):
        for column in range(GRID):
            left, right = width * column // GRID, width * (column + 1) // GRID
            top, bottom = height * row // GRID, height * (row + 1) // GRID
            # a knight's move apart: one in each row and each column
            is_held_out = column == (2 * row + row // 2) % GRID
            (held_out if is_held_out else train).append((left, top, right, bottom))
    return train, held_out
