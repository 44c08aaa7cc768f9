# SPDX-License-Identifier: Apache-2.0
"""One owner of a run's folder at a time.

A POSIX lock on a file in the folder: the system releases it when its process ends, however that
ends, and NFS carries it between nodes. The file says who has it.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import time
from pathlib import Path

from dino.atomic import is_same, owned_folders
from dino.distributed import heartbeat, is_main_process, print0
from dino.errors import UserError
from dino.json_files import parse
from dino.printable import printable

NAME = ".lock"
PATIENCE = 20.0  # seconds for a run that is about to end, such as one that is being requeued
REFUSED = (errno.EACCES, errno.EAGAIN)  # somebody has the lock; any other error: there are no locks


@contextlib.contextmanager
def owned(output_dir, flag="--output_dir"):
    """Context that holds the lock of `output_dir`; UserError that names the owner if it is taken.

    Rank 0 holds it for all ranks, which wait for it here. On a file system without locks a warning
    takes its place.
    """
    if not is_main_process():
        heartbeat()
        yield
        return
    folder = Path(output_dir)
    refuse_pipes(folder, f"{flag} {output_dir}")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    file = lock(folder / NAME, f"{flag} {output_dir}")
    directory = os.open(folder, os.O_RDONLY)
    owned_folders[folder] = directory, file, folder / NAME
    try:
        heartbeat()
        yield
    finally:
        del owned_folders[folder]
        if is_same(file.fileno(), folder / NAME):  # not that of a run which begins in a new folder
            (folder / NAME).unlink(missing_ok=True)
        os.close(directory)
        file.close()  # which releases the lock
        for path in made:  # those that stayed empty, after an error
            with contextlib.suppress(OSError):
                path.rmdir()


def refuse_pipes(folder, given):
    """Raise UserError for a pipe or a socket in `folder`: to write to one may wait for ever."""
    for entry in os.scandir(folder) if folder.is_dir() else ():
        with contextlib.suppress(OSError):  # a broken link is replaced
            mode = entry.stat().st_mode
            if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
                raise UserError(f"{given}: {entry.name} in it is a pipe or a socket. Remove it.")


def lock(path, given):
    """The open file `path`, locked, with this process as its owner."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open_lock(path, given)
        except (FileExistsError, FileNotFoundError):  # its last owner is removing the empty folder
            if time.monotonic() > end or path.parent.is_file():
                raise
            time.sleep(0.05)
            continue
        refusal = try_lock(file)
        if refusal not in REFUSED and is_same(file.fileno(), path):  # not removed by its last owner
            break
        said = owner(file)
        file.close()
        if time.monotonic() > end:
            raise UserError(
                f"{given}: {said} is writing a run there. Wait for it, stop it, or give another"
                " folder."
            )
        time.sleep(0.5)
    if refusal:
        print0(
            f"Warning: {printable(path.parent)} is on a file system without locks"
            f" ({os.strerror(refusal)}). Make sure that no other run writes there."
        )
    file.truncate(0)
    file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid()}) + "\n")
    file.flush()
    return file


def open_lock(path, given):
    """The file `path`, for reading and writing; UserError for a link, a pipe or a device."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise UserError(f"{given}: {path.name} in it is not a regular file. Remove it.")
    # the link may have come in between: to follow it would empty what it points to
    return open(path, "a+", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def try_lock(file):
    """0, or the number of the error."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno
    return 0


def owner(file):
    file.seek(0)
    said = parse(file.read(1000))
    if not isinstance(said, dict):
        return "another process"
    return f"process {printable(said.get('process'))} of {printable(said.get('host'))}"
