# SPDX-License-Identifier: Apache-2.0
"""How long a step takes, for runs whose length is given in hours."""

import time

import torch

from dino.distributed import gather_objects

WARM_UP, STEPS = 2, 8  # steps that are not timed, and that are, if the epoch has so many
MOST_SECONDS = 30.0  # of timing


def seconds_per_step(step, loader, device):
    """Mean seconds of `step(images)` with the loading of the images, of the slowest process.

    The last steps of many tell more than the first, which find batches that were loaded ahead.
    """
    began, times = time.monotonic(), []
    loader.sampler.set_position(0)
    for number, images in enumerate(loader):
        step(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.monotonic())
        slow = gather_objects(times[-1] - began > MOST_SECONDS)
        if number + 1 == WARM_UP + STEPS or (any(slow) and number > 0):
            break
    first = min(WARM_UP, len(times) - 1)
    timed = len(times) - first
    started = times[first - 1] if first else began
    return max(gather_objects((times[-1] - started) / timed))
