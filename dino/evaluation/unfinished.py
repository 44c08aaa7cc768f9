# SPDX-License-Identifier: Apache-2.0
"""An extraction of features while it runs: a folder that outlives its processes.

n images in batches of fixed members, so that a resumed extraction computes what an unbroken one
computes, bit for bit, with any number of processes (on a CPU, of as many threads). `features.npy`
and `labels.npy` have a row for each image, `done` a byte for each batch, `settings.json` what all
rows share. Rows are written to their place in a file, not into a map of it: a full disk is then an
error and not a signal, and two nodes do not overwrite each other's pages.
"""

import os
import shutil
from pathlib import Path

import numpy as np

from dino.distributed import gather_objects, heartbeat, is_main_process
from dino.errors import UserError
from dino.json_files import read_object, write_json
from dino.weights.files import sync_folder

FEATURES, LABELS, DONE, SETTINGS = "features.npy", "labels.npy", "done", "settings.json"
SAVE_EVERY = 16  # batches; a save costs an fsync
# Settings that may differ when an extraction resumes, as no number that is there depends on them.
RECORDED = ("pretrained_weights", "data_path", "on_bad_image", "torch")


class Unfinished:
    """The folder `folder`, made by rank 0 or found there with a batch done. UserError if it has
    other settings.

    `shape` and `dtype` are those of the features of one image.
    """

    def __init__(self, folder, settings, shape, dtype):
        self.folder, self.settings = Path(folder), settings
        self.count, self.batch_size = settings["images"], settings["batch_size"]
        if is_main_process():
            if self.is_begun():
                check_settings(read_object(self.folder / SETTINGS), settings, self.folder)
            else:
                self.create(shape, np.dtype(dtype))
        heartbeat()
        try:
            self.features = RowFile(self.folder / FEATURES, (self.count, *shape), np.dtype(dtype))
            self.labels = RowFile(self.folder / LABELS, (self.count,), np.dtype(np.int64))
            self.done = open(self.folder / DONE, "r+b")  # noqa: SIM115
            if os.fstat(self.done.fileno()).st_size != self.batches:
                raise ValueError("not a byte for each batch")  # a crash may have cut it
        except (FileNotFoundError, EOFError, ValueError):
            raise UserError(
                f"--output: {self.folder} is damaged. Remove it to start again."
            ) from None
        self.unsaved = []

    def is_begun(self):
        """Whether a batch may be done. Where none is, as the first image was bad, nothing is lost
        if the files are made anew.
        """
        done = self.folder / DONE
        none_done = done.is_file() and set(done.read_bytes()) == {0}
        return (self.folder / SETTINGS).exists() and not none_done

    def create(self, shape, dtype):
        self.check_space(dtype.itemsize * int(np.prod(shape)))
        for name, kind, row in ((FEATURES, dtype, shape), (LABELS, np.dtype(np.int64), ())):
            path = self.folder / name
            np.lib.format.open_memmap(path, "w+", kind, (self.count, *row)).flush()
        (self.folder / DONE).write_bytes(bytes(self.batches))
        write_json(self.folder / SETTINGS, self.settings)
        sync_folder(self.folder)

    def check_space(self, bytes_per_image):
        needed = 2 * self.count * bytes_per_image  # this folder's, and the finished file's
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"--output: {self.folder.parent} has {free / 1e9:.1f} GB left, and the features of"
                f" {self.count} images need {needed / 1e9:.1f} while they are written, twice their"
                " size. Free space, give another folder, or try --dtype float16."
            )

    @property
    def batches(self):
        return -(-self.count // self.batch_size)

    def missing(self):
        """Numbers of the batches that are not done yet, the same on every rank."""
        done = np.frombuffer((self.folder / DONE).read_bytes(), np.uint8)
        return gather_objects(np.flatnonzero(done != 1).tolist())[0]

    def rows(self, batch):
        """The range of a batch's images."""
        start = batch * self.batch_size
        return range(start, min(start + self.batch_size, self.count))

    def write(self, batch, features, labels):
        """The features (B, *F) and labels (B,) of all images of a batch, as arrays."""
        start = self.rows(batch).start
        self.features.write(start, features)
        self.labels.write(start, labels)
        self.unsaved.append(batch)
        if len(self.unsaved) >= SAVE_EVERY:
            self.save()

    def save(self):
        """Mark batches as done once their rows are safe on the disk."""
        self.features.sync()
        self.labels.sync()
        for batch in self.unsaved:
            self.done.seek(batch)
            self.done.write(b"\1")
        self.done.flush()
        self.unsaved = []

    def close(self):
        """Save what is not saved, and close the files, which NFS could not remove otherwise."""
        self.save()
        for file in (self.features.file, self.labels.file, self.done):
            file.close()

    def remove(self):
        """Remove the files. The folder, which may have a lock in it, stays."""
        for name in (SETTINGS, FEATURES, LABELS, DONE):
            (self.folder / name).unlink()


class RowFile:
    """The rows of a .npy file, to be written in any order. ValueError for another array."""

    def __init__(self, path, shape, dtype):
        array = np.load(path, mmap_mode="r")
        if (array.shape, array.dtype) != (shape, dtype) or not array.flags.c_contiguous:
            raise ValueError("another array than was made")
        self.start, self.dtype, self.row_bytes = array.offset, array.dtype, array[:1].nbytes
        self.file = open(path, "r+b")  # noqa: SIM115

    def write(self, row, values):
        self.file.seek(self.start + row * self.row_bytes)
        self.file.write(values.astype(self.dtype).tobytes())

    def sync(self):
        self.file.flush()
        os.fsync(self.file.fileno())


def check_settings(found, settings, path):
    """Raise UserError unless what is at `path` was made with these settings."""
    for name in settings:
        if name not in RECORDED and plain(found.get(name)) != plain(settings[name]):
            raise UserError(
                f"--output: {path} has features with other settings: {name} is"
                f" {found.get(name)!s:.60}, now {settings[name]!s:.60}. Give the same flags,"
                " give another --output, or remove it."
            )


def plain(value):
    """A value as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value
