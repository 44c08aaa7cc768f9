# SPDX-License-Identifier: Apache-2.0
"""Look at every image of a data set, each in a process that may die of it, or hang."""

import collections
import hashlib
import multiprocessing
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from PIL import Image

from dino.data.channels import RGB, read_any, size_of
from dino.data.images import ARRAYS, UnreadableImage, reading_rules, set_reading_rules
from dino.signals import leave_signals_to_parent

SECONDS = 60.0  # that an image may take
ORIENTATION, UPRIGHT = 0x0112, (None, 1)  # an EXIF tag, and its values that mean upright


@dataclass
class Facts:
    """What there is to know of a readable image."""

    width: int
    height: int
    format: str
    mode: str  # Pillow's: RGB, L, CMYK, ...
    digest: bytes  # of the file
    is_rotated: bool  # by EXIF, which training ignores
    chroma: float  # mean distance of a pixel's highest and lowest channel, of 255
    contrast: float  # standard deviation of the grey values, of 255
    brightest: int  # the highest value of any channel, of 255

    @property
    def short_side(self):
        return min(self.width, self.height)

    @property
    def elongation(self):
        return max(self.width, self.height) / self.short_side


def look_at_file(path, in_chans=RGB):
    """The Facts of an image. Raises UnreadableImage, or OSError for a file that vanishes."""
    image = read_any(path, in_chans)
    if in_chans == RGB:
        small = np.asarray(image.resize((32, 32), Image.Resampling.BOX), float)
        chroma = float((small.max(axis=2) - small.min(axis=2)).mean())
    else:  # none of the channels is a colour
        small, chroma = image, 255.0
    format, mode, is_rotated = read_header(path, in_chans)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    return Facts(
        *size_of(image),
        format=format,
        mode=mode,
        digest=digest,
        is_rotated=is_rotated,
        chroma=chroma,
        contrast=float(small.mean(axis=2).std()),
        brightest=int(np.asarray(image).max()),
    )


def read_header(path, in_chans):
    """(format, mode, whether EXIF rotates it) of a file."""
    if in_chans != RGB or str(path).lower().endswith(ARRAYS):  # not read by Pillow
        return Path(path).suffix.removeprefix(".").upper(), f"{in_chans} channels", False
    with Image.open(path) as header:
        return header.format, header.mode, orientation(header) not in UPRIGHT


def orientation(header):
    if header.format == "TIFF":  # Pillow rotates those while it decodes them
        return None
    try:
        return header.getexif().get(ORIENTATION)
    except Exception:  # broken metadata of a sound image
        return None


# ---- processes ----


class Worker:
    """A process that looks at one image at a time, and is `spent` once it died or hung."""

    def __init__(self, in_chans):
        self.connection, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(
            target=serve, args=(theirs, in_chans, reading_rules()), daemon=True
        )
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


def serve(connection, in_chans, rules):
    """Answer each path with Facts or with why there are none, for as long as the parent lives."""
    leave_signals_to_parent()
    set_reading_rules(*rules)
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
