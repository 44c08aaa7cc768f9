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
import os
import statistics
import sys
from pathlib import Path

from dino.command_line import Parser, add_image_arguments, count_cores, number
from dino.data.channels import MOST_CHANNELS, count_channels, reader
from dino.data.images import ImageFiles, given_path, limit_pixels, list_training_images
from dino.data.inspection import Facts, look_at_all
from dino.data.survey import GREY, dark_images
from dino.errors import UserError, exit_on_user_error
from dino.meters import progress_bar
from dino.output_checks import check_output_file
from dino.printable import printable
from dino.training.advice import MOST_FOR_STATS, print_settings_that_fit, print_stats

LISTED = 20  # lines of a list that are printed; the rest are counted
# Standard deviation of the means over 32 x 32 pixels, below which an image is blank, where the
# brightest value of all images is 255.
BLANK = 3.0
# From this ratio of its sides on, no crop holds half of an image: a crop's is at most 4 / 3.
ELONGATED = 2.7
FEW = 0.01  # share of the images from which on some flaws are worth a warning


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
        yield (
            f"{small} have a side below --global_crop_size {crop_size}: enlarging them costs time"
            " and adds no detail. The settings below, of --preset auto, fit them."
        )
    if grey := share([image for image in facts if image.chroma < GREY], 0.5):
        yield (
            f"{grey} are grey or nearly so: the colours of the augmentation do little for them, and"
            " runs with the official settings collapse more easily."
        )
    brightest = max((image.brightest for image in facts), default=255)
    if dark := dark_images(brightest):
        yield dark
    least = BLANK * max(1, brightest) / 255
    if blank := share([image for image in facts if image.contrast < least], FEW):
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
        yield (
            f"{repeated} are duplicates: they weigh twice, and inflate accuracies where"
            " train/ and val/ share them."
        )


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
    add(
        "--in_chans",
        default=None,
        type=number(int, 1, MOST_CHANNELS),
        help="channels of the images; by default what the files agree on",
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
        check_output_file(args.views, "--views", ending=".png")
        if data_path.is_dir() and data_path.resolve() in Path(args.views).resolve().parents:
            raise UserError(f"--views {args.views} would be one of the images of {data_path}.")
    found, errors = {}, []
    in_chans = args.in_chans or count_channels(paths)
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
