# SPDX-License-Identifier: Apache-2.0
"""A retrieval set and a copy-detection set of photographs that come with scikit-image.

    python benchmarks/made_sets.py made/
    python eval_image_retrieval.py --data_path made/ --dataset photographs --imsize 64 \
        --pretrained_weights runs/demo/backbone.pth
    python eval_copy_detection.py --data_path made/copydays --distractors_path made/distractors \
        --imsize 64 --pretrained_weights runs/demo/backbone.pth

Both have the layouts of the real sets: revisited Oxford and Paris, and Copydays. They need no
download and are the same wherever scikit-image and Pillow are. Queries, database and originals
come from the blocks of the photographs that the demo holds out of its training; distractors and
the images for a whitening (made/whitening) come from the other blocks.
"""

import argparse
import pickle
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

sys.path.insert(0, str(Path(__file__).parent.parent))  # where the project's modules are

from dino.data.copydays import BLOCKS
from dino.data.demo import PHOTOGRAPHS, open_photograph, split_blocks

SHARE = 0.6  # side of a view by that of its block, for retrieval
# Of the database for each query: how many views, and between which overlaps (intersection over
# union) with the query's.
EASY, HARD, JUNK = (3, 0.5, 1.0), (3, 0.2, 0.5), (2, 0.0, 0.2)
EDITED = 2  # hard ones besides, with a large overlap but changed
STRONG = 2  # strong copies of each original
DISTRACTORS, WHITENING = 20, 40  # of each photograph


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where photographs/, copydays/ and so on go")
    folder = parser.parse_args(argv).folder
    write_retrieval_set(folder)
    write_copydays(folder)
    print(f"{sum(1 for path in folder.rglob('*.jpg'))} images in {folder}")


# ---- retrieval ----


def write_retrieval_set(folder, photographs=PHOTOGRAPHS):
    """Write `folder`/photographs/: a query for each held-out block, and views of the same block.

    Easy ones share at least half of the area with the query's view; hard ones less, or they are
    edited; junk shares less than a fifth. All other views are wrong, also of the same photograph.
    """
    rng = np.random.default_rng(0)
    content = {"gnd": [], "imlist": [], "qimlist": []}
    images = folder / "photographs" / "jpg"
    images.mkdir(parents=True, exist_ok=True)

    def add(image, key, name):
        save(image, images / f"{name}.jpg")
        content[key].append(name)
        return len(content[key]) - 1

    for photograph in photographs:
        image, stem = open_photograph(photograph), Path(photograph).stem
        for number, block in enumerate(split_blocks(*image.size)[1]):
            name = f"{stem}_{number}"
            box = corner_view(block, rng)
            add(image.crop(box), "qimlist", f"{name}_query")
            views = {
                label: [image.crop(other_view(block, box, *overlap, rng)) for _ in range(count)]
                for label, (count, *overlap) in dict(easy=EASY, hard=HARD, junk=JUNK).items()
            }
            views["hard"] += [
                edit(image.crop(other_view(block, box, 0.5, 1.0, rng)), rng, count=2)
                for _ in range(EDITED)
            ]
            entry = {
                label: [
                    add(view, "imlist", f"{name}_{label}{i}") for i, view in enumerate(of_label)
                ]
                for label, of_label in views.items()
            }
            content["gnd"].append({"bbx": [0, 0, box[2] - box[0], box[3] - box[1]], **entry})
    with open(folder / "photographs" / "gnd_photographs.pkl", "wb") as file:
        pickle.dump(content, file, protocol=3)


def random_view(block, rng):
    """(left, top, right, bottom) of a view of the block, wide or high."""
    left, top, right, bottom = block
    side = SHARE * min(right - left, bottom - top)
    width, height = rng.permutation([round(side), round(0.75 * side)])
    x, y = rng.integers(left, right - width + 1), rng.integers(top, bottom - height + 1)
    return tuple(int(v) for v in (x, y, x + width, y + height))


def corner_view(block, rng):
    """A view in a corner of the block, so that there are views of any overlap with it."""
    left, top, right, bottom = block
    x, y, right_of_view, bottom_of_view = random_view(block, rng)
    width, height = right_of_view - x, bottom_of_view - y
    x, y = (left, right - width)[rng.integers(2)], (top, bottom - height)[rng.integers(2)]
    return x, y, x + width, y + height


def other_view(block, box, low, high, rng):
    """A view of the block whose overlap with `box` is from `low` to `high`, but not `box`."""
    while True:
        view = random_view(block, rng)
        if low <= overlap(view, box) < high:
            return view


def overlap(a, b):
    """Intersection over union of two boxes (left, top, right, bottom)."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, width) * max(0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return both / (sum(areas) - both)


# ---- copy detection ----


def write_copydays(folder, photographs=PHOTOGRAPHS, blocks=BLOCKS):
    """Write `folder`/copydays/, distractors/ and whitening/.

    The originals are the held-out blocks. Copies are JPEG files of less quality, crops around the
    middle and, as after printing and photographing, turned crops with one more edit.
    """
    rng = np.random.default_rng(1)
    for name in [f"copydays/{block}" for block in blocks] + ["distractors", "whitening"]:
        (folder / name).mkdir(parents=True, exist_ok=True)
    number = 2000
    for photograph in photographs:
        image, stem = open_photograph(photograph), Path(photograph).stem
        others, held_out = split_blocks(*image.size)
        for block in held_out:
            write_copies(image.crop(block), number, folder / "copydays", blocks, rng)
            number += 1
        for kind, count in (("distractors", DISTRACTORS), ("whitening", WHITENING)):
            for i in range(count):
                view = random_view(others[rng.integers(len(others))], rng)
                save(image.crop(view), folder / kind / f"{stem}_{i}.jpg")


def write_copies(original, number, folder, blocks, rng):
    """The original as NUMBER00.jpg, and its copies in every block."""
    width, height = original.size
    for block in blocks:
        kind, _, level = block.partition("/")
        path = folder / block / f"{number}00.jpg"
        if kind == "original":
            save(original, path)
        elif kind == "jpegqual":
            save(original, path, quality=int(level))
        elif kind == "crops":
            kept = (1 - int(level) / 100) ** 0.5  # of each side
            x, y = width * (1 - kept) / 2, height * (1 - kept) / 2
            save(original.crop([round(v) for v in (x, y, width - x, height - y)]), path)
        else:
            for i in range(1, 1 + STRONG):
                copy = edit(turn(original, rng), rng, count=1)
                save(copy, path.with_name(f"{number}{i:02}.jpg"))


# ---- edits ----


def recolor(image, rng):
    """Other saturation, brightness and contrast."""
    for change in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        image = change(image).enhance(rng.uniform(0.4, 1.6))
    return image


def grey(image, rng):
    return image.convert("L").convert("RGB")


def blur(image, rng):
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.01, 0.03) * min(image.size)))


def turn(image, rng):
    """The middle of the image, turned by up to 15 degrees."""
    turned = image.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC)
    width, height = image.size
    x, y = width * rng.uniform(0.08, 0.16), height * rng.uniform(0.08, 0.16)
    return turned.crop([round(v) for v in (x, y, width - x, height - y)])


def write_over(image, rng):
    """A bar with a word across the image."""
    image, (width, height) = image.copy(), image.size
    top = int(rng.uniform(0, 0.8) * height)
    color = tuple(int(v) for v in rng.integers(0, 256, 3))
    pen = ImageDraw.Draw(image)
    pen.rectangle([0, top, width, top + 0.15 * height], fill=color)
    pen.text((2, top), "DINO", fill=tuple(255 - v for v in color))
    return image


def edit(image, rng, count):
    """The image after `count` of the edits that leave everything in its place."""
    edits = (recolor, grey, blur, write_over)
    for number in rng.choice(len(edits), count, replace=False):
        image = edits[number](image, rng)
    return image


def save(image, path, quality=90):
    image.save(path, quality=quality)


if __name__ == "__main__":
    main()
