# SPDX-License-Identifier: Apache-2.0
"""The embedded data set: tiles of the photographs inside scikit-image."""

from pathlib import Path

import numpy as np
from PIL import Image

DEMO = "demo"  # as --data_path

# Files inside scikit-image's wheel; the rest of its gallery would be downloaded.
PHOTOGRAPHS = [
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
]
TILE = 64


def write_demo_images(folder, tile=64, train_tiles=100, val_tiles=40):
    import skimage

    folder = Path(folder)
    rng = np.random.default_rng(0)
    for name in PHOTOGRAPHS:
        image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
        W, H = image.size
        split = int(W * 0.7)
        for part, (lo, hi), n in (
            ("train", (0, split), train_tiles),
            ("val", (split, W), val_tiles),
        ):
            out = folder / part / name.split(".")[0]
            out.mkdir(parents=True, exist_ok=True)
            for i in range(n):
                x = rng.integers(lo, hi - tile + 1)
                y = rng.integers(0, H - tile + 1)
                image.crop((x, y, x + tile, y + tile)).save(out / f"{i:03d}.png")
    return str(folder / "train"), str(folder)
