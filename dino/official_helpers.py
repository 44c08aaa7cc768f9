# SPDX-License-Identifier: Apache-2.0
"""What code for the official repository calls, by the official names, and nothing here uses.

dino/distributed.py and dino/data/augmentations.py have what is used instead.
"""

import builtins
import functools
import os
import random
import subprocess
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import ImageFilter, ImageOps

from dino.distributed import get_world_size, init_distributed, is_main_process
from dino.launch import read_launch

# ---- around the processes ----


def init_distributed_mode(args):
    """Meet the other processes at `args.dist_url`; set `args.rank`, `world_size` and `gpu`.

    A single process gets a process group too, and only rank 0 prints from then on. Unlike the
    official function it runs on a CPU, with gloo, and `gpu` is None there; and under Slurm the
    number of processes is Slurm's, not `args.world_size`.
    """
    alone = {"RANK": "0", "WORLD_SIZE": "1"} if read_launch().launcher == "python" else {}
    os.environ.update(alone)
    try:
        places = getattr(args, "device", "auto"), getattr(args, "dist_url", "env://")
        launch, device = init_distributed(*places)
    finally:
        for name in alone:
            del os.environ[name]
    args.rank, args.world_size, args.gpu = launch.rank, launch.world_size, device.index
    print(f"rank {launch.rank} of {launch.world_size} on {device}, by {places[1]}", flush=True)
    dist.barrier()
    setup_for_distributed(launch.rank == 0)


def is_dist_avail_and_initialized():
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def setup_for_distributed(is_master):
    """Replace the built-in `print`: it prints if `is_master`, else only what has `force=True`."""
    builtin_print = builtins.print

    @functools.wraps(builtin_print)
    def print_if_master(*values, force=False, **options):
        if is_master or force:
            builtin_print(*values, **options)

    builtins.print = print_if_master


def save_on_master(*args, **kwargs):
    """torch.save on rank 0 alone."""
    if is_main_process():
        torch.save(*args, **kwargs)


@torch.no_grad()
def reduce_dict(input_dict, average=True):
    """{name: tensor} -> the same names with the means, or sums, of all processes' tensors.

    All tensors have one shape. A single process gets `input_dict` itself.
    """
    if get_world_size() < 2:
        return input_dict
    names = sorted(input_dict)  # the same order on every rank
    values = torch.stack([input_dict[name] for name in names])
    dist.all_reduce(values)
    if average:
        values /= get_world_size()
    return dict(zip(names, values, strict=True))


def get_sha():
    """The commit, state and branch of this checkout in a line; N/A where git does not know."""

    def git(*command):
        options = dict(cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True)
        return subprocess.check_output(["git", *command], **options).strip()

    sha, status, branch = "N/A", "clean", "N/A"
    try:
        sha = git("rev-parse", "HEAD")
        git("diff")  # refreshes what git remembers of the files' times
        # spelled as in the official code: logs are searched for it
        status = "has uncommited changes" if git("diff-index", "HEAD") else "clean"
        branch = git("rev-parse", "--abbrev-ref", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        pass
    return f"sha: {sha}, status: {status}, branch: {branch}"


# ---- augmentations ----


class GaussianBlur:
    """Blurs a PIL image with probability `p` by a radius from U(radius_min, radius_max) pixels.

    Draws from Python's `random`.
    """

    def __init__(self, p=0.5, radius_min=0.1, radius_max=2.0):
        self.p, self.radius_min, self.radius_max = p, radius_min, radius_max

    def __call__(self, image):
        if random.random() > self.p:
            return image
        return image.filter(
            ImageFilter.GaussianBlur(random.uniform(self.radius_min, self.radius_max))
        )


class Solarization:
    """Inverts the values of a PIL image from 128 up, with probability `p`. See GaussianBlur."""

    def __init__(self, p):
        self.p = p

    def __call__(self, image):
        return ImageOps.solarize(image) if random.random() < self.p else image
