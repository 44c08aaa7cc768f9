# SPDX-License-Identifier: Apache-2.0
"""Files that hold their old content or their new, never part of it."""

import contextlib
import errno
import os
from pathlib import Path

# {folder: (the open folder, its open lock, the lock's path)} of those that this process owns, see
# run_lock
owned_folders = {}


@contextlib.contextmanager
def replacing(path):
    """Yield a path beside `path` to write to: it becomes `path`, or is removed after an error.

    A device or a pipe, such as /dev/null, is yielded itself: root could replace it by a file.
    OSError in a folder that this process owned, and that is another run's now.
    """
    path = Path(path)
    is_special = path.exists() and not path.is_file()
    temporary = path if is_special else path.with_name(f".{path.name}.tmp")
    check_still_owned(path.parent)
    try:
        yield temporary
        if not is_special:
            check_still_owned(path.parent)
            os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names no file
        raise
    finally:
        if not is_special:
            temporary.unlink(missing_ok=True)


def append_line(path, line):
    """Append a whole line to a file, or nothing and raise OSError, also where `replacing` does.

    With a part of a line, which a full disk may still take, the next would become one line.
    """
    path = Path(path)
    check_still_owned(path.parent)
    with open(path, "ab", buffering=0) as file:
        end, content = file.tell(), f"{line}\n".encode()
        if file.write(content) < len(content):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def check_still_owned(folder):
    """Raise OSError if `folder`, which this process owned, was moved or is another run's.

    After `mv runs/a runs/b` while a run writes there, the next run makes a new runs/a.
    """
    if folder not in owned_folders:
        return
    directory, lock, path = owned_folders[folder]
    if not is_same(directory, folder) or (
        os.path.exists(path) and not is_same(lock.fileno(), path)
    ):
        reason = "the folder was moved or removed, or another run has begun in it"
        raise OSError(errno.ESTALE, reason, str(folder))


def is_same(descriptor, path):
    """Whether `path` is still this open file or folder."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
