# SPDX-License-Identifier: Apache-2.0
"""When checkpoints are written, by whom, which are kept, and which one a run resumes from.

Rank 0 writes, in a thread of its own from a copy on the host, while training continues. A write
that fails (no space, no permission) is reported, and the next save tries again: with the state of
its moment, but for the best and the numbered checkpoints, which it writes as they were to be.
"""

import re
import threading
import time
from pathlib import Path

import torch

from dino.distributed import is_main_process, print0
from dino.errors import UserError
from dino.launch import is_restart
from dino.printable import printable
from dino.same_on_ranks import check_same_checkpoint
from dino.weights.files import (
    DamagedFile,
    check_is_file,
    flags_in,
    read,
    write_atomically,
)

NEWEST, PREVIOUS = "checkpoint.pth", "checkpoint_previous.pth"
NUMBERED = re.compile(r"checkpoint(\d{4,})\.pth")
MADE_ANEW = (NEWEST, "backbone.pth")  # by every save


class Saver:
    """Writes checkpoints into a run's folder.

    `iterations` and `minutes` are the intervals inside epochs, 0 for none. `keep` is how many of
    the numbered checkpoints stay, 0 for all of them.
    """

    def __init__(self, output_dir, iterations=0, minutes=0.0, keep=0):
        self.folder = Path(output_dir)
        self.iterations, self.seconds, self.keep = iterations, 60 * minutes, keep
        self.last_time = time.monotonic()
        self.thread = None
        self.failure = None  # why the last write failed
        self.owed = {}  # {name: payload} that no later save makes, of writes that failed

    def is_due(self, iterations_done):
        """Whether --saveckp_iters asks for a checkpoint now; the same on every rank."""
        return self.iterations > 0 and iterations_done % self.iterations == 0

    def is_time(self):
        """Whether --saveckp_minutes does, by this process's clock."""
        return self.seconds > 0 and time.monotonic() - self.last_time >= self.seconds

    def save(self, payloads):
        """Write {name: payload}, in order. Returns once the payloads are copied to the host."""
        self.last_time = time.monotonic()
        if not is_main_process():
            return
        self.wait()
        copies = {}  # a payload that goes to two files is copied once
        for payload in payloads.values():
            if id(payload) not in copies:
                copies[id(payload)] = on_host(payload)
        files = {name: copies[id(payload)] for name, payload in payloads.items()}
        self.thread = threading.Thread(target=self.write, args=(files,))
        try:
            self.thread.start()
        except RuntimeError:  # there is no room for a thread
            self.thread = None
            self.write(files)

    def write(self, files):
        self.failure = None
        left = files | {name: self.owed[name] for name in self.owed if name not in files}
        try:
            for name, payload in list(left.items()):
                write_atomically(payload, self.folder / name, keep_as=self.previous(name))
                del left[name]
            self.drop_old()
        except Exception as error:  # of any kind: it would end this thread, and nobody would know
            self.failure = getattr(error, "strerror", None) or repr(error)
            text = f"a checkpoint could not be written ({self.failure})."
            print0(printable(f"Warning: {self.folder}: {text}"), "The next save tries again.")
        self.owe(left)

    def owe(self, files):
        """Keep what the next save would not make anew. Of numbered ones the newest: each is as
        large as the networks.
        """
        self.owed = {name: files[name] for name in files if name not in MADE_ANEW}
        numbered = sorted(filter(NUMBERED.fullmatch, self.owed), key=number_of)
        for name in numbered[:-1]:
            print0(printable(f"Warning: {self.folder}: {name} will not be written."))
            del self.owed[name]

    def previous(self, name):
        return self.folder / PREVIOUS if name == NEWEST else None

    def drop_old(self):
        """Delete all but the newest `keep` of the numbered checkpoints."""
        for path in numbered_checkpoints(self.folder)[self.keep :] if self.keep else []:
            path.unlink()

    def wait(self):
        """Wait for the write in progress."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def finish(self):
        """Wait for the last write. UserError if it failed: then the end of the run is lost."""
        self.wait()
        if self.failure is not None:
            raise UserError(
                f"--output_dir {self.folder}: the last checkpoint could not be written"
                f" ({self.failure}), so the end of this run is lost."
                " Make room or give another folder, and run the same command again."
            )


def numbered_checkpoints(folder):
    """Paths of the checkpoints that a run kept by number, the newest first; of no other files."""
    paths = Path(folder).glob("checkpoint*.pth")
    numbered = [path for path in paths if NUMBERED.fullmatch(path.name)]
    return sorted(numbered, key=lambda path: number_of(path.name), reverse=True)


def number_of(name):
    return int(NUMBERED.fullmatch(name)[1])


def own_checkpoints(folder):
    """Paths of all checkpoints in a run's folder, the newest first."""
    newest = [Path(folder) / name for name in (NEWEST, PREVIOUS)]
    return [path for path in newest if path.exists()] + numbered_checkpoints(folder)


def on_host(value):
    """A copy of nested dicts and lists, with tensors on the CPU that nothing changes any more."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_host(item) for item in value)
    return value


ANOTHER = (
    "belongs to another run, which would be lost. Give another --output_dir, or leave the flag out"
    " to resume that run."
)


def find_checkpoint(resume, output_dir):
    """(path, content) of the checkpoint to resume from, or None for a new run.

    `resume` is --resume: auto takes the newest readable one in `output_dir`; never wants a folder
    without any; else it is a path. The same path given again, or a restart by torchrun, resumes the
    run in `output_dir` that it began. UserError where another run would be lost.
    """
    check_resume(resume, output_dir)
    folder = Path(output_dir)
    own = own_checkpoints(folder)
    if resume == "auto" or (own and is_restart()):
        return newest_whole(own)
    if resume == "never":
        return None
    found = newest_whole(own)
    if found and flags_in(found[1]).get("resume") == resume:
        return found
    if found and Path(resume).resolve().parent != folder.resolve():
        raise UserError(f"--resume {resume}: {found[0]} {ANOTHER}")
    return resume, read(resume, "--resume")


def check_resume(resume, output_dir):
    """Raise the UserErrors of `find_checkpoint` that need no checkpoint to be read: at once."""
    own = own_checkpoints(Path(output_dir))
    if resume == "never" and own and not is_restart():
        raise UserError(f"--resume never: {own[0]} {ANOTHER}")
    if resume not in ("auto", "never") and not own:
        check_is_file(Path(resume), f"--resume {resume}", usual="checkpoint.pth")


def newest_whole(paths):
    """(path, content) of the first readable checkpoint, or None if `paths` is empty.

    Prints a warning for each damaged one; UserError if all are, or if ranks find different ones.
    """
    found = first_whole(paths)
    check_same_checkpoint("--output_dir", found and found[1])
    return found


def first_whole(paths):
    """`newest_whole` of what this rank sees."""
    for path in paths:
        try:
            return path, read(path, "--output_dir")
        except DamagedFile as error:
            print0(printable(f"Warning: {error} Looking for an older one."))
    if paths:
        raise UserError(
            f"--output_dir {paths[0].parent}: none of its {len(paths)} checkpoints can be read."
            " Restore one, or give another folder."
        )
    return None
