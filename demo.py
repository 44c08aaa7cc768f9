# SPDX-License-Identifier: Apache-2.0
"""The embedded data set: tiles of the photographs inside scikit-image. A tile's class is its photograph."""

from pathlib import Path

import numpy as np
from PIL import Image

from distributed import barrier, is_main_process

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
TILES = {"train": 100, "val": 80}  # of each photograph
GRID = 4  # blocks per side, of which one in each row and column is for validation


def write_demo_images(folder):
    """Write train/ and val/ below `folder`, with a folder per photograph; return (train/, folder).

    Rank 0 writes, and the tiles are always the same ones. Those of validation come from blocks of
    the photograph that no training tile touches.
    """
    folder = Path(folder)
    if is_main_process():
        rng = np.random.default_rng(0)
        for name in PHOTOGRAPHS:
            for split, count in TILES.items():
                write_tiles(name, folder / split / Path(name).stem, split, count, rng)
    barrier()
    return str(folder / "train"), str(folder)


def write_tiles(name, folder, split, count, rng):
    """`count` tiles at random places of random blocks of one photograph, as 000.png and so on."""
    import skimage  # a second, for those who want the demo

    image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
    folder.mkdir(parents=True, exist_ok=True)
    blocks = split_blocks(*image.size)[split]
    for number in range(count):
        left, top, right, bottom = blocks[rng.integers(len(blocks))]
        x, y = rng.integers(left, right - TILE + 1), rng.integers(top, bottom - TILE + 1)
        image.crop((x, y, x + TILE, y + TILE)).save(folder / f"{number:03}.png")


def split_blocks(width, height):
    """{"train": boxes, "val": boxes}: the blocks of a GRID x GRID division, (left, top, right, bottom)."""
    blocks = {"train": [], "val": []}
    for row in range(GRID):
        for column in range(GRID):
            left, right = width * column // GRID, width * (column + 1) // GRID
            top, bottom = height * row // GRID, height * (row + 1) // GRID
            # a knight's move apart: one block of validation in each row and each column
            is_val = column == (2 * row + row // 2) % GRID
            blocks["val" if is_val else "train"].append((left, top, right, bottom))
    return blocks
