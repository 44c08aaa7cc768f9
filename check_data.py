# SPDX-License-Identifier: Apache-2.0
"""Look at every image of a data set before a long run does.

    python check_data.py photos/                             # a folder, or a list of paths
    python check_data.py photos/ --stats --views views.png   # mean and std; what the network sees

Prints counts, sizes, formats, files that cannot be read, exact duplicates, warnings about what
DINO finds hard, and the settings that fit (those of --preset auto), with their reasons. Exit code 0
if every image can be read, 1 if one cannot, 2 for a wrong PATH.

Each image is decoded in a process that may die of it, or hang: then it counts as unreadable.
"""

import collections
import hashlib
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from PIL import Image

from dino.command_line import Parser, add_image_arguments, check_output_file, count_cores, number
from dino.data.channels import RGB, count_channels, read_any, reader, size_of
from dino.data.images import (
    ImageFiles,
    UnreadableImage,
    given_path,
    limit_pixels,
    list_training_images,
)
from dino.errors import exit_on_user_error
from dino.meters import progress_bar
from dino.printable import printable
from dino.signals import leave_signals_to_parent
from dino.training.advice import MOST_FOR_STATS, print_settings_that_fit, print_stats

SECONDS = 60.0  # that an image may take
LISTED = 20  # lines of a list that are printed; the rest are counted
ORIENTATION, UPRIGHT = 0x0112, (None, 1)  # an EXIF tag, and its values that ask for no rotation
# Means over 32 x 32 pixels, of 255, below which an image counts as grey, or as blank.
GREY, BLANK = 3.0, 3.0
# From this ratio of its sides on, no crop holds half of an image: a crop's is at most 4 / 3.
ELONGATED = 2.7
FEW = 0.01  # share of the images from which on some flaws are worth a warning


@dataclass
class Facts:
    """What there is to know of a readable image."""

    width: int
    height: int
    format: str
    mode: str  # Pillow's: RGB, L, CMYK, ...
    digest: bytes  # of the file
    is_rotated: bool  # by EXIF, which training does not heed
    chroma: float  # mean distance of a pixel's highest and lowest channel, of 255
    contrast: float  # standard deviation of the grey values, of 255

    @property
    def short_side(self):
        return min(self.width, self.height)

    @property
    def elongation(self):
        return max(self.width, self.height) / self.short_side


def look_at_file(path, in_chans=RGB):
    """The Facts of an image. Raises UnreadableImage, or OSError for a file that vanishes."""
    if in_chans != RGB:
        return look_at_channels(path, in_chans)
    image = read_any(path)
    small = np.asarray(image.resize((32, 32), Image.Resampling.BOX), float)
    with Image.open(path) as header, open(path, "rb") as file:
        return Facts(
            *image.size,
            format=header.format,
            mode=header.mode,
            digest=hashlib.file_digest(file, "sha256").digest(),
            is_rotated=orientation(header) not in UPRIGHT,
            chroma=float((small.max(axis=2) - small.min(axis=2)).mean()),
            contrast=float(small.mean(axis=2).std()),
        )


def look_at_channels(path, in_chans):
    """The same of an image of other channels, of which none is a colour."""
    image = read_any(path, in_chans)
    with open(path, "rb") as file:
        return Facts(
            *size_of(image),
            format=Path(path).suffix.removeprefix(".").upper(),
            mode=f"{in_chans} channels",
            digest=hashlib.file_digest(file, "sha256").digest(),
            is_rotated=False,
            chroma=255.0,
            contrast=float(image.mean(axis=2).std()),
        )


def orientation(header):
    try:
        return header.getexif().get(ORIENTATION)
    except Exception:  # broken metadata of a sound image
        return None


# ---- processes ----


class Worker:
    """A process that looks at one image at a time, and is `spent` once it died or hung."""

    def __init__(self, in_chans):
        self.connection, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=serve, args=(theirs, in_chans), daemon=True)
        self.process.start()
        theirs.close()  # so that its death ends the connection
        self.spent = False

    def start(self, path):
        self.path, self.deadline = path, time.monotonic() + SECONDS
        self.connection.send(path)

    def result(self):
        """Facts, or why there are none, or None while neither has come."""
        try:
            if self.connection.poll():
                return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            self.spent = True
            return f"{self.path}: the process that decoded it died ({self.process.exitcode})"
        if time.monotonic() > self.deadline:
            self.spent = True
            return f"{self.path}: not decoded within {SECONDS:g} seconds"
        return None

    def end(self):
        self.process.kill()
        self.process.join()
        self.connection.close()


def serve(connection, in_chans):
    """Answer each path with Facts or with why there are none, for as long as the parent lives."""
    leave_signals_to_parent()
    warnings.simplefilter("ignore")
    parent = multiprocessing.parent_process().sentinel
    while connection in wait([connection, parent]):
        path = connection.recv()
        try:
            connection.send(look_at_file(path, in_chans))
        except UnreadableImage as error:
            connection.send(str(error).removesuffix(" Repair or remove it."))
        except OSError as error:
            connection.send(f"{path}: {error.strerror or error}")


def look_at_all(paths, processes, in_chans=RGB):
    """Yield (path, Facts or why there are none) as they come. No image can end it."""
    waiting, idle, busy = collections.deque(paths), [], []
    try:
        while waiting or busy:
            while waiting and len(busy) < processes:
                worker = idle.pop() if idle else Worker(in_chans)
                worker.start(waiting.popleft())
                busy.append(worker)
            wait([worker.connection for worker in busy], timeout=1)
            for worker in list(busy):
                found = worker.result()
                if found is None:
                    continue
                yield worker.path, found
                busy.remove(worker)
                if worker.spent:
                    worker.end()
                else:
                    idle.append(worker)
    finally:
        for worker in busy + idle:
            worker.end()


# ---- report ----


def print_list(lines):
    """The first LISTED lines, indented, and how many more there are."""
    for line in lines[:LISTED]:
        print(f"  {printable(line)}")
    if len(lines) > LISTED:
        print(f"  ... and {len(lines) - LISTED} more")


def print_counts(root, paths):
    """Print the number of images in all and by folder."""
    folders = collections.Counter(os.path.relpath(os.path.dirname(path), root) for path in paths)
    numbers = sorted(folders.values())
    spread = f", {numbers[0]} to {numbers[-1]} in one" if len(folders) > 1 else ""
    print(f"{len(paths)} images in {len(folders)} folder{'s' * (len(folders) > 1)}{spread}")
    if len(folders) > 1:
        print_list([f"{folder}: {count}" for folder, count in sorted(folders.items())])


def print_ignored(root, paths):
    """Print the extensions of other files in the folder: perhaps images of another format."""
    images = set(paths)
    others = [
        name
        for folder, _, names in os.walk(root, followlinks=False)
        for name in names
        if os.path.join(folder, name) not in images
    ]
    if others:
        endings = collections.Counter(os.path.splitext(name)[1].lower() for name in others)
        print(f"ignored, not an image extension: {tally(endings)}")


def tally(counter):
    named = [f"{name or 'no ending'} ({count})" for name, count in counter.most_common(8)]
    return printable(", ".join(named))


def print_sizes(facts):
    for name in ("width", "height"):
        sides = [getattr(image, name) for image in facts]
        middle = round(statistics.median(sides))
        print(f"{name}: {min(sides)} to {max(sides)} pixels, median {middle}")
    for name in ("format", "mode"):
        print(f"{name}: {tally(collections.Counter(getattr(image, name) for image in facts))}")


def group_duplicates(found):
    """[[path, path of an equal file, ...], ...] of {path: Facts}."""
    groups = collections.defaultdict(list)
    for path, image in found.items():
        groups[image.digest].append(path)
    return [sorted(group) for group in groups.values() if len(group) > 1]


def find_flaws(facts, surplus, crop_size, batch_size):
    """Sentences about what DINO finds hard. `surplus`: files that are equal to another one."""
    count = len(facts)

    def share(flawed, least=0.0):
        """ "12 of 100 images (12 %)", or "" if their share is not above `least`."""
        few = len(flawed) <= least * count
        return "" if few else f"{len(flawed)} of {count} images ({100 * len(flawed) / count:.3g} %)"

    if count < batch_size:
        yield f"{count} images are fewer than a batch of {batch_size} (--batch_size_per_gpu)."
    if small := share([image for image in facts if image.short_side < crop_size], FEW):
        middle = statistics.median(image.short_side for image in facts)
        better = max(32, int(middle) // 32 * 32)
        advice = f" --global_crop_size {better} fits them better." if better < crop_size else ""
        yield (
            f"{small} have a side below --global_crop_size {crop_size}: what is enlarged is"
            f" blurred, and costs as much.{advice}"
        )
    if grey := share([image for image in facts if image.chroma < GREY], 0.5):
        yield (
            f"{grey} are grey or nearly so: the colours of the augmentation do little for them, and"
            " runs on such data collapse more easily. Try --use_bn_in_head true."
        )
    if blank := share([image for image in facts if image.contrast < BLANK], FEW):
        yield f"{blank} are blank or nearly so: there is nothing to learn in them."
    if elongated := share([image for image in facts if image.elongation >= ELONGATED], FEW):
        yield (
            f"{elongated} are more than {ELONGATED} times as long as wide: a crop, which is nearly"
            " square, never holds half of them. Cut them into pieces."
        )
    if rotated := share([image for image in facts if image.is_rotated]):
        yield (
            f"{rotated} are stored on their side, to be rotated by EXIF, which training, like the"
            " official code, does not do. Rotate the files, as with exiftran or jpegtran."
        )
    if repeated := share(surplus, FEW):
        yield f"{repeated} are duplicates: they count twice, also between train/ and val/."


def report(data_path, paths, found, errors, args):
    """Print all that was found out. `found`: {path: Facts}; `errors`: texts."""
    root = data_path if data_path.is_dir() else data_path.parent
    print_counts(root, paths)
    if data_path.is_dir():
        print_ignored(root, paths)
    facts = list(found.values())
    if facts:
        print_sizes(facts)
    print(f"unreadable: {len(errors)}")
    print_list(sorted(errors))
    groups = group_duplicates(found)
    surplus = [path for group in groups for path in group[1:]]
    print(f"duplicates: {len(surplus)} files are byte-for-byte copies of another")
    print_list([" = ".join(os.path.relpath(path, root) for path in group) for group in groups])
    for flaw in find_flaws(facts, surplus, args.global_crop_size, args.batch_size_per_gpu):
        print(f"Warning: {flaw}")


def get_args_parser():
    parser = Parser(prog="check_data.py", description="Look at a data set before a long run does.")
    add = parser.add_argument
    add("path", metavar="PATH", help="what --data_path will be: a folder of images, or a list")
    add(
        "--global_crop_size",
        default=224,
        type=number(int, 1),
        help="pixels of the crops that the run will take",
    )
    add("--batch_size_per_gpu", default=64, type=number(int, 1), help="images of a step of the run")
    add(
        "--stats",
        action="store_true",
        help=f"measure mean and standard deviation of each channel, of {MOST_FOR_STATS} images at"
        " most, for --mean and --std",
    )
    add(
        "--views",
        default=None,
        metavar="FILE",
        help="draw the views of a few images with the settings that fit, as a PNG",
    )
    add_image_arguments(parser)
    add(
        "--num_workers",
        default=None,
        type=number(int, 1),
        help="processes that decode; by default one for each core",
    )
    return parser


def check_data(args):
    """Report on the images of `args.path`; returns the exit code."""
    limit_pixels(args.max_image_pixels)
    data_path = given_path(args.path, "PATH")
    paths = list_training_images(data_path, "PATH")
    if args.views:
        check_output_file(args.views, "--views")
    found, errors = {}, []
    in_chans = count_channels(paths)
    results = look_at_all(paths, args.num_workers or count_cores(), in_chans)
    for path, result in progress_bar(results, "images", len(paths)):
        if isinstance(result, Facts):
            found[path] = result
        else:
            errors.append(result)
    report(data_path, paths, found, errors, args)
    if found:
        images = ImageFiles(sorted(found), reader(in_chans))
        print_settings_that_fit(images, in_chans, args.views)
        if args.stats:
            print_stats(images, in_chans)
    return 1 if errors else 0


def main():
    with exit_on_user_error("check_data.py"):
        sys.exit(check_data(get_args_parser().parse_args()))


if __name__ == "__main__":
    main()
