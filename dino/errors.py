# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can act on: one paragraph, exit code 2, no traceback."""

import contextlib
import errno
import os
import sys

import torch
import torch.distributed as dist

from dino.printable import printable

LONGEST = 2000  # characters of an error: somebody's file may name a network in 5 MB


class UserError(Exception):
    """A mistake that the user can fix: the text names the flag, the value and the next step."""

    exit_code = 2


class Diverged(UserError):
    """The loss or a weight is no longer a finite number."""

    exit_code = 1


class LostRank(UserError):
    """Another process of the run is gone."""

    exit_code = 1


TOO_MANY_FILES = (
    "too many files are open. Raise the limit (ulimit -n 4096), or lower --num_workers."
)
NO_MEMORY = "there is not enough memory for this. Lower sizes or batches."


@contextlib.contextmanager
def exit_on_user_error(program):
    """Print a UserError as `program: error: ...` on stderr and exit with its code.

    Files that cannot be read or written, and a lack of memory, count as user errors too. Before the
    processes have met, all of them make the same checks and only rank 0 prints; afterwards any
    rank may be the only one to know, and the first of those that say the same prints.
    """
    guard_standard_streams()  # before anything is opened, such as the socket of signals
    try:
        yield
    except UserError as error:
        print_and_exit(program, error, error.exit_code)
    except torch.OutOfMemoryError as error:
        reason = ". ".join(str(error).split(". ")[:2])
        advice = "Lower --batch_size_per_gpu, the crops or the network; or free the device."
        print_and_exit(program, f"{reason}. {advice}")
    except MemoryError:
        print_and_exit(program, NO_MEMORY)
    except RuntimeError as error:
        # torch's errors have no types of their own
        if os.strerror(errno.EMFILE) in str(error):  # of a loader
            print_and_exit(program, TOO_MANY_FILES)
        if "DefaultCPUAllocator: " not in str(error):
            raise
        print_and_exit(program, NO_MEMORY)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        print_and_exit(program, "nobody reads the output any more.")
    except OSError as error:
        print_and_exit(program, explain(error))


def explain(error):
    """An OSError in a sentence, with the file if it names one."""
    if error.errno == errno.EMFILE:
        return TOO_MANY_FILES
    unnamed = "a file could not be read or written"
    where = unnamed if error.filename is None else error.filename
    return f"{where}: {error.strerror or error}."


def print_and_exit(program, error, exit_code=UserError.exit_code):
    text = f"{program}: error: {printable(shorten(str(error)))}"
    if speaks_first(text):
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)
    sys.exit(exit_code)


def shorten(text):
    """At most LONGEST characters of `text`, its end too: that is where the advice stands."""
    if len(text) <= LONGEST:
        return text
    half = (LONGEST - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def speaks_first(text):
    """Whether no other rank has said the same."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # the store ended with rank 0
            return dist.distributed_c10d._get_default_store().add(f"said {text}", 1) == 1
        return True
    names = ("RANK", "WORLD_SIZE") if "RANK" in os.environ else ("SLURM_PROCID", "SLURM_NTASKS")
    numbers = [os.environ.get(name, "0") for name in names]
    if not all(map(is_whole_number, numbers)):
        return True
    rank, world_size = map(int, numbers)
    return rank == 0 or rank >= world_size  # no other rank knows that this one is out of range


def is_whole_number(text):
    """Whether it is written in ASCII digits, few enough for int() and for a tensor."""
    return text.isascii() and text.isdecimal() and len(text) < 10


# ---- standard streams that outlive their readers ----


def guard_standard_streams():
    """Let stdout and stderr take any text, and no run end because nobody reads them any more.

    A stream that was closed before the start would give its number to the next file that is opened,
    which would then receive what is printed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, this one
    for number, name in enumerate(("stdout", "stderr"), start=1):
        stream = getattr(sys, name) or open(number, "w", closefd=False)  # noqa: SIM115
        if hasattr(stream, "reconfigure"):
            with contextlib.suppress(OSError):  # what is buffered cannot be written
                stream.reconfigure(errors="backslashreplace")
        if not isinstance(stream, Unbreakable):
            setattr(sys, name, Unbreakable(stream))


class Unbreakable:
    """A text stream that becomes silent when a write fails: pipe closed, disk full."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream is closed
            self.silence()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.silence()

    def silence(self):
        """Send everything further, what is buffered too, nowhere."""
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)
