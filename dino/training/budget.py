# SPDX-License-Identifier: Apache-2.0
"""How long a step takes, for runs whose length is given in hours."""

import itertools
import math
import time

import torch

from dino.distributed import gather_objects

WARM_UP, STEPS = 2, 8  # steps that are not timed, and that are, at least
FEW_SECONDS = 5.0  # in which a whole epoch is timed, if it can be
MOST_SECONDS = 30.0  # of timing, after the first step


def seconds_per_step(step, loader, device):
    """Mean seconds of `step(images)` with the loading of the images, of the slowest process.

    The first steps are not timed: they use batches that were loaded ahead.
    Where epochs are short, whole ones are timed, with what the beginning of one costs.
    """
    whole = len(loader) * math.ceil(STEPS / len(loader))
    times = []
    for images in endless(loader):
        step(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.monotonic())
        # without the first step, which may compile the networks for longer than all others take
        elapsed, count = max(gather_objects(times[-1] - times[0])), len(times)
        enough = count == WARM_UP + whole or (elapsed > FEW_SECONDS and count >= WARM_UP + STEPS)
        if enough or elapsed > MOST_SECONDS:
            break
    first = min(WARM_UP, len(times) - 1)
    timed = len(times) - first
    return max(gather_objects((times[-1] - times[first - 1]) / timed))


def endless(loader):
    """The batches of one epoch after the other."""
    for epoch in itertools.count():
        loader.sampler.set_position(epoch)
        yield from loader
