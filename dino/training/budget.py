# SPDX-License-Identifier: Apache-2.0
"""How long a step takes, for runs whose length is given in hours."""

import itertools
import math
import time

import torch

from dino.distributed import gather_objects

WARM_UP, STEPS = 2, 8  # steps that are not timed, and that are, at least
FEW_SECONDS = 5.0  # in which a whole epoch is timed, if it can be
MOST_SECONDS = 30.0  # of timing


def seconds_per_step(step, loader, device):
    """Mean seconds of `step(images)` with the loading of the images, of the slowest process.

    The last steps of many tell more than the first, which find batches that were loaded ahead. The
    loading begins anew in every epoch, which counts where epochs are short: then whole ones are
    timed.
    """
    whole = len(loader) * math.ceil(STEPS / len(loader))
    began, times = time.monotonic(), []
    for images in endless(loader):
        step(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.monotonic())
        elapsed, count = max(gather_objects(times[-1] - began)), len(times)
        enough = count == WARM_UP + whole or (elapsed > FEW_SECONDS and count >= WARM_UP + STEPS)
        if enough or (elapsed > MOST_SECONDS and count > 1):
            break
    first = min(WARM_UP, len(times) - 1)
    timed = len(times) - first
    started = times[first - 1] if first else began
    return max(gather_objects((times[-1] - started) / timed))


def endless(loader):
    """The batches of one epoch after the other."""
    for epoch in itertools.count():
        loader.sampler.set_position(epoch)
        yield from loader
