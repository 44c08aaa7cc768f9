# SPDX-License-Identifier: Apache-2.0
"""Which process this is, by its launcher's variables, and where it meets the others.

torchrun's variables, else Slurm's; without either this is the only process.
"""

import os
import re
import socket
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from dino.errors import UserError, is_whole_number

SECONDS_FOR_A_NAME = 20  # for which the name of the host where all meet may be unknown


@dataclass(frozen=True)
class Launch:
    """Which process this is and who started it: "torchrun", "slurm" or "python"."""

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


ALONE = Launch("python")


def environment_number(name, default=None, environ=os.environ):
    """The whole number in an environment variable; UserError if it holds something else."""
    text = str(environ.get(name, default))
    if not is_whole_number(text):
        raise UserError(
            f"environment variable {name}={text!r:.40}: not a whole number from 0 on."
            " Correct it, or unset it."
        )
    return int(text)


def read_launch(environ=os.environ):
    """The launch that the environment describes: torchrun's, else Slurm's, else one process.

    Raises UserError for variables that do not hold numbers, or not those of ranks.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        launcher, names = "torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_PROCID" in environ and environment_number("SLURM_NTASKS", 1, environ) > 1:
        launcher, names = "slurm", ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    else:
        return ALONE
    numbers = [environment_number(name, 0, environ) for name in names]
    if numbers[0] >= numbers[1]:
        raise UserError(
            f"environment variables {names[0]}={numbers[0]} and {names[1]}={numbers[1]}: ranks are"
            " counted from 0 to one less than their number."
        )
    return Launch(launcher, *numbers)


def is_restart():
    """Whether torchrun restarted these processes, by the same command, after one had failed."""
    return environment_number("TORCHELASTIC_RESTART_COUNT", 0) > 0


def meeting_place(launch, dist_url):
    """Where the processes of `launch` meet, as a text for messages.

    Sets MASTER_ADDR and MASTER_PORT where they follow from the launch. UserError where torch would
    fail later, or wait for ever.
    """
    if dist_url.startswith("file:"):
        check_meeting_file(dist_url)
    if dist_url != "env://":
        return dist_url
    if launch.launcher == "slurm" and "MASTER_ADDR" not in os.environ:
        host, port = slurm_rendezvous()
        check_host(host, "SLURM_NODELIST")
        os.environ["MASTER_ADDR"] = host
        os.environ.setdefault("MASTER_PORT", str(port))
    complete_environment(launch)
    return "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ)


def slurm_rendezvous(environ=os.environ):
    """(address, port) on which a Slurm job's processes meet: its first host, a port from its id.

    Slurm writes lists of hosts like `gpu[003-005,9],cpu1`.
    """
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST", "127.0.0.1")
    parts = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", hosts)
    if parts is None:
        raise UserError(f"environment variable SLURM_NODELIST={hosts!r}: not a list of hosts.")
    prefix, first_number = parts.groups()
    port = 20000 + environment_number("SLURM_JOB_ID", 0, environ) % 20000
    return prefix + (first_number or ""), port


def complete_environment(launch):
    """Let a single process meet itself. UserError where several do not know where to meet."""
    if launch.world_size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")  # a free one
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(
                f"environment variable {name} is not set, and {launch.world_size} processes must"
                " meet. Start them with torchrun, which sets it."
            )
    port = os.environ["MASTER_PORT"]
    if not is_whole_number(port) or int(port) >= 2**16:
        raise UserError(
            f"environment variable MASTER_PORT={port!r:.40}: not a port, 0 to 65535. Correct it, or"
            " start with torchrun, which sets it."
        )
    check_host(os.environ["MASTER_ADDR"])


def check_meeting_file(url):
    """Raise UserError for a file that cannot be made: torch would wait for it, deaf to signals."""
    path = urlsplit(url).path
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"--dist_url {url}: this is not a regular file. Give a new one.")
    try:
        open(path, "a").close()
    except OSError as error:
        raise UserError(
            f"--dist_url {url}: {error.strerror}. Give a file that all processes can write to."
        ) from None


def check_host(name, variable="MASTER_ADDR"):
    """Raise UserError for a host, from the environment's `variable`, that stays unknown.

    While a cluster starts, names may come late.
    """
    end = time.monotonic() + SECONDS_FOR_A_NAME
    while True:
        try:
            socket.getaddrinfo(name, None)
            return
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
        if time.monotonic() > end:
            raise UserError(
                f"environment variable {variable}={name!r:.80}: no such host was known within"
                f" {SECONDS_FOR_A_NAME} s ({reason})."
            )
        time.sleep(0.5)
