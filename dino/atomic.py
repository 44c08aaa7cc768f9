# SPDX-License-Identifier: Apache-2.0
"""Files that hold their old content or their new, never part of it."""

import contextlib
import os
from pathlib import Path


@contextlib.contextmanager
def replacing(path):
    """Yield a path beside `path` to write to: it becomes `path`, or is removed after an error.

    A device or a pipe, such as /dev/null, is yielded itself: root could replace it by a file.
    """
    path = Path(path)
    is_special = path.exists() and not path.is_file()
    temporary = path if is_special else path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        if not is_special:
            os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names no file
        raise
    finally:
        if not is_special:
            temporary.unlink(missing_ok=True)
