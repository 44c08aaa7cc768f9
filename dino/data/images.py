# SPDX-License-Identifier: Apache-2.0
"""Images on disk: finding them, refusing a wrong --data_path with advice, reading one."""

import contextlib
import functools
import io
import itertools
import os
import stat
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torchvision.datasets.folder import IMG_EXTENSIONS

from dino.command_line import PLACEHOLDER
from dino.data.levels import check_decodable, set_white, to_rgb, white
from dino.errors import UserError
from dino.printable import printable

# Formats that are opened, whatever a file is called. Of Pillow's others, EPS runs a program.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "DIB", "GIF", "TIFF", "WEBP", "AVIF")
# What a run writes into its folder, which is data where --data_path and --output_dir are one.
PICTURES_OF_A_RUN = {
    *("augmentations.png", "curves.png", "attention_over_epochs.png"),
    *("attention_maps.png", "patch_features.png", "neighbours.png"),
}
FOLDERS_OF_A_RUN = {"attention_history", "tensorboard", "wandb"}
SIGN_OF_A_RUN = "args.json"
START_OF_SCAN, MOST_SCANS = b"\xff\xda", 500  # of a JPEG; progressive ones have about ten
GIVE_IMAGES = "Give a folder of images, or a text file with the path of one image per line."
ARRAYS = (".npy",)  # count as images in a folder without any of torchvision's extensions


def find_images(folder, endings=IMG_EXTENSIONS):
    """Paths of all files under `folder` with an extension in `endings`, in ImageFolder's order.

    Links are followed, once. Hidden files and folders (.ipynb_checkpoints, ._name.jpg), which the
    official code takes for data, and what a run wrote is left out. UserError for a folder
    that may not be listed.
    """
    found, visited = [], set()
    for directory, subdirectories, names in os.walk(
        folder, followlinks=True, onerror=refuse_folder
    ):
        visited.add(os.path.realpath(directory))
        is_run = SIGN_OF_A_RUN in names
        subdirectories[:] = sorted(
            name
            for name in subdirectories
            if not (name.startswith(".") or (is_run and name in FOLDERS_OF_A_RUN))
            and os.path.realpath(os.path.join(directory, name)) not in visited
        )
        drawn = PICTURES_OF_A_RUN if is_run else ()
        found += [
            os.path.join(directory, name)
            for name in sorted(names)
            if name.lower().endswith(endings) and not name.startswith(".") and name not in drawn
        ]
    return found


def refuse_folder(error):
    raise UserError(
        f"{error.filename}: this folder cannot be listed ({error.strerror}). Change its permissions"
        " or move it away."
    )


def images_by_name(folder):
    """{path without suffix, relative to `folder`: path} of the images in it, at any depth."""
    paths = {}
    for path in find_images(folder):
        other = paths.setdefault(str(Path(path).relative_to(folder).with_suffix("")), path)
        if other != path:
            raise UserError(f"{other} and {path} have the same name but for the suffix.")
    return paths


def find_images_or_arrays(folder):
    """`find_images`; ARRAYS where there is none with another ending."""
    return find_images(folder) or find_images(folder, ARRAYS)


def list_training_images(data_path, flag="--data_path"):
    """Paths of the images to train on: those of a folder, or those listed in a text file.

    The folder may have class folders or not. A relative path in the file starts from the file's
    folder. Raises UserError where there is no image; `flag` is where `data_path` is from.
    """
    path = given_path(data_path, flag)
    if path.is_dir():
        images = find_images_or_arrays(path)
        if not images:
            raise UserError(
                f"{flag} {data_path}: no image in this folder or below it (looked for"
                f" {', '.join(IMG_EXTENSIONS)})."
            )
        return images
    if path.is_file():
        lines = [without_label(line, path) for line in list_lines(path, flag)]
        return listed_files(lines, path, flag)
    if path.exists():
        raise UserError(f"{flag} {data_path}: this is a pipe or a device. {GIVE_IMAGES}")
    raise UserError(
        f"{flag} {data_path}: no such folder or file. Give a folder of images (with or without"
        " class folders), or a text file with the path of one image per line. --preset demo needs"
        " no images."
    )


def given_path(data_path, flag="--data_path"):
    """The Path; UserError for "" and for the official default, which stands for a path.

    "" is usually an unset shell variable; Path would read it as the current folder.
    """
    if not str(data_path):
        raise UserError(f"{flag} '' is empty. Give a folder, or . for this one.")
    if str(data_path).startswith(PLACEHOLDER) and not os.path.exists(data_path):
        raise UserError(f"{flag} is missing: give the folder of your images.")
    return Path(data_path)


def without_label(line, path):
    """What a line of the list `path` has before its tab, unless the tab is in a file's name.

    After the tab is the label, for extract_features.py.
    """
    if "\t" not in line or os.path.isfile(os.path.join(path.parent, line)):
        return line
    return line.split("\t", 1)[0].strip()


def list_lines(path, flag):
    """The lines of a list of images that are not blank; UserError where there is none."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"{flag} {path}: this file is not text. {GIVE_IMAGES}") from None
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"{flag} {path}: this list of images is empty.")
    return lines


def listed_files(lines, path, flag):
    """The images that the lines of the list `path` name; relative ones start from its folder.

    UserError names the first that does not exist.
    """
    images = [os.path.join(path.parent, line) for line in lines]
    for number, image in enumerate(images, start=1):
        if not os.path.isfile(image):
            raise UserError(
                f"{flag} {path}: line {number} names {image}, which is not a file. A list has"
                " one path per line, and after a tab perhaps a label; relative paths start from the"
                " list's folder."
            )
    return images


def list_labelled_images(data_path, split, classes=None, flag="--data_path"):
    """(paths, labels, class names) of `data_path`/`split`, which holds one folder per class.

    Classes are numbered in the order of their names or, where `classes` is given, as there, so
    that training and validation agree even if one lacks a class. `flag` is where `data_path` is
    from.
    """
    folder = given_path(data_path, flag) / split
    if not folder.is_dir():
        raise UserError(
            f"{flag} {data_path}: no folder {split}/ in it. It must hold train/ and val/, each with"
            " one folder of images per class."
        )
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        raise UserError(
            f"{flag} {data_path}: no class folders in {split}/. It must hold one folder of images"
            " per class."
        )
    if classes is None:
        classes = names
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise UserError(
            f"{flag} {data_path}: class folder {unknown[0]!r} of {split}/ has no counterpart in"
            " train/."
        )
    endings = IMG_EXTENSIONS if find_images(folder) else ARRAYS
    found = {name: find_images(folder / name, endings) for name in names}
    if not any(found.values()):
        raise UserError(
            f"{flag} {data_path}: the {len(names)} class folders of {split}/ hold no image."
        )
    for name, paths in found.items():
        if not paths:  # its images have another ending, and accuracies would be without the class
            raise UserError(
                f"{flag} {data_path}: class folder {name!r} of {split}/ holds no image (looked for"
                f" {', '.join(endings)}). Convert its files, or remove the folder."
            )
    labels = [classes.index(name) for name, paths in found.items() for _ in paths]
    return list(itertools.chain(*found.values())), torch.tensor(labels), classes


class ImageFiles:
    """Images on disk as a sequence: `images[i]` is what `read` makes of the i-th path."""

    def __init__(self, paths, read=None):
        self.paths, self.read = paths, read or read_image

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, number):
        return self.read(self.paths[number])


RAISE_IT = ", which may be raised if the image is as it should be"


class UnreadableImage(UserError):
    """(path, reason): an image that could not be decoded."""

    def __init__(self, path, reason):
        super().__init__(printable(str(path)), printable(reason))

    @property
    def path(self):
        return self.args[0]

    def __str__(self):
        path, reason = self.args
        return f"{path}: cannot be read as an image ({reason}). Repair or remove it."


def limit_pixels(count):
    """Refuse images of more pixels: --max_image_pixels, for this process and those it starts."""
    Image.MAX_IMAGE_PIXELS = count


def reading_rules():
    """What `limit_pixels` and `set_white` have set, for `set_reading_rules` in another process."""
    return Image.MAX_IMAGE_PIXELS, white()


def set_reading_rules(most_pixels, number):
    """Let this process read images as the one whose `reading_rules` these are."""
    limit_pixels(most_pixels)
    set_white(number)


def read_image(path):
    """The image at `path` as PIL RGB, as the official code reads it. Raises UnreadableImage.

    The first frame of an animation; no rotation by EXIF; transparency is dropped. Values of more
    than 8 bits, and floating-point numbers, are scaled by their type or range, see `to_rgb`; PIL
    alone would cut them off at 255.
    """
    with open_image(path) as image:
        return to_rgb(image)


def image_size(path):
    """(width, height) of what `read_image` gives, from the first bytes. Raises UnreadableImage."""
    with open_image(path) as image:
        return image.size


@contextlib.contextmanager
def open_image(path):
    """The PIL image of a file, not yet decoded. Any error, the caller's too: UnreadableImage."""
    try:
        check_is_regular(path)
        with FileOfScans(io.FileIO(path)) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes, which we check
            image = Image.open(file, formats=known_formats())
            check_pixels(*image.size)
            if isinstance(image, JpegImageFile):
                file.scans = 0
            if isinstance(image, TiffImageFile):
                check_decodable(image.tag_v2)
            yield image
    except UnidentifiedImageError:
        formats = ", ".join(known_formats())
        raise UnreadableImage(path, f"not {formats} of a kind that Pillow reads") from None
    except Image.DecompressionBombError:  # twice the limit, which Pillow checks by itself
        limit = Image.MAX_IMAGE_PIXELS
        reason = f"more than twice as many pixels as --max_image_pixels {limit}{RAISE_IT}"
        raise UnreadableImage(path, reason) from None
    except Exception as error:  # whatever a decoder may raise on somebody's bytes
        raise UnreadableImage(path, str(error) or type(error).__name__) from None


@functools.cache
def known_formats():
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def check_is_regular(path):
    """Raise ValueError for what is not a file; reading a pipe might never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("a folder, a pipe or a device, not a file")


def check_pixels(width, height):
    """Raise ValueError for no pixels, or more than the limit, before they are decoded."""
    limit = Image.MAX_IMAGE_PIXELS
    if width * height == 0:
        raise ValueError(f"{width} x {height} pixels")
    if limit is not None and width * height > limit:
        found = f"{width} x {height} pixels"
        raise ValueError(f"{found}, more than --max_image_pixels {limit}{RAISE_IT}")


class FileOfScans(io.BufferedReader):
    """A file that raises ValueError once more than MOST_SCANS of a JPEG were read from it.

    A scan of ten bytes may say that it changes nothing, and the decoder goes through all pixels for
    it. To count costs 0.2 % of decoding 12 megapixels, 1 % of 0.3; bytes.count is 5 times slower.
    """

    scans = None  # read so far, once the file is known to be a JPEG

    def read(self, size=-1):
        content = super().read(size)
        if self.scans is not None:
            values = np.frombuffer(content, np.uint8)
            first, second = START_OF_SCAN
            self.scans += np.count_nonzero((values[:-1] == first) & (values[1:] == second))
            if self.scans > MOST_SCANS:
                raise ValueError(f"a JPEG of more than {MOST_SCANS} scans")
        return content
