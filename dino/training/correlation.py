# SPDX-License-Identifier: Apache-2.0
"""Whether two views of an image have anything in common for a network that has learned nothing.

Near the start the student fits the mean of what the teacher says about the other views of an image.
If that is the same for all images, because the augmentation leaves too little of one, the signal
fades from step to step: uniform collapse. benchmarks/small_data.md has measurements.

B images, V views, K outputs of the head.
"""

import torch

from dino.distributed import gather_objects

BATCHES = 3  # in which it is measured


@torch.no_grad()
def view_correlation(student, loader):
    """Mean correlation of the outputs for the views that teach and learn, over all processes.

    In [-1, 1]: of each global view with each other view of the same image, the mean output for all
    images taken off, as centering does.
    """
    outputs = []
    loader.sampler.set_position(0)
    for number, views in enumerate(loader, start=1):
        outputs.append(torch.stack(student(views).float().chunk(len(views))))  # (V, B, K)
        if number == BATCHES:
            break
    outputs = torch.cat(outputs, dim=1)
    outputs = outputs - outputs.mean(dim=1, keepdim=True)
    outputs = outputs / outputs.flatten(1).norm(dim=1)[:, None, None].clamp(min=1e-12)
    pairs = torch.einsum("gbk,vbk->gv", outputs[:2], outputs)
    others = ~torch.eye(*pairs.shape, dtype=torch.bool, device=pairs.device)
    found = gather_objects(pairs[others].mean().item())
    return sum(found) / len(found)
