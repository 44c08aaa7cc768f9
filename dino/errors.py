# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can act on: one paragraph, exit code 2, no traceback."""

import contextlib
import os
import sys

import torch
import torch.distributed as dist


class UserError(Exception):
    """A mistake that the user can fix: the text names the flag, the value and the next step."""

    exit_code = 2


class Diverged(UserError):
    """The loss or a weight is no longer a finite number."""

    exit_code = 1


class LostRank(UserError):
    """Another process of the run is gone."""

    exit_code = 1


@contextlib.contextmanager
def exit_on_user_error(program):
    """Print a UserError as `program: error: ...` on stderr and exit with its code.

    Files that cannot be read or written, and a lack of memory, count as user errors too. Before the
    processes have met, all of them make the same checks and only rank 0 prints; afterwards any
    rank may be the only one to know.
    """
    try:
        yield
    except UserError as error:
        print_and_exit(program, error, error.exit_code)
    except torch.OutOfMemoryError as error:
        reason = ". ".join(str(error).split(". ")[:2])
        advice = "Lower --batch_size_per_gpu, the crops or the network; or free the device."
        print_and_exit(program, f"{reason}. {advice}")
    except OSError as error:
        if error.filename is None:
            raise
        print_and_exit(program, f"{error.filename}: {error.strerror}.")


def print_and_exit(program, error, exit_code=UserError.exit_code):
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
    if rank == 0 or dist.is_initialized():
        print(f"{program}: error: {error}", file=sys.stderr, flush=True)
    sys.exit(exit_code)
