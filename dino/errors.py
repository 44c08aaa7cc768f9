# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can act on, and how a script ends on one: one paragraph, exit code 2, no
traceback.
"""

import contextlib
import os
import sys

import torch
import torch.distributed as dist


class UserError(Exception):
    """Something that the user can put right. The text names the flag, the value found and what to
    do next.
    """

    exit_code = 2


class Diverged(UserError):
    """The loss or a weight is no longer a finite number."""

    exit_code = 1


class LostRank(UserError):
    """Another process of the run is gone."""

    exit_code = 1


@contextlib.contextmanager
def exit_on_user_error(program):
    """Turn a UserError into `program: error: ...` on stderr and its exit code.

    Before the processes have met, all of them make the same checks and the first speaks for all;
    after that any of them may be the only one to know. A file that cannot be read or written, and
    a device whose memory is full, are a user's to put right as well.
    """
    try:
        yield
    except UserError as error:
        say_and_exit(program, error, error.exit_code)
    except torch.OutOfMemoryError as error:
        reason = ". ".join(str(error).split(". ")[:2])
        advice = "Lower --batch_size_per_gpu, the crops or the network; or free the device."
        say_and_exit(program, f"{reason}. {advice}")
    except OSError as error:
        if error.filename is None:
            raise
        say_and_exit(program, f"{error.filename}: {error.strerror}.")


def say_and_exit(program, error, exit_code=UserError.exit_code):
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
    if rank == 0 or dist.is_initialized():
        print(f"{program}: error: {error}", file=sys.stderr, flush=True)
    sys.exit(exit_code)
