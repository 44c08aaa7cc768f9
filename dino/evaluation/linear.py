# SPDX-License-Identifier: Apache-2.0
"""Linear heads on frozen features (Sec. 4.1): a step of all of them, and their accuracies.

B images, `dim` numbers that a head sees of an image, C classes. There is a head for each learning
rate: they share the features, which cost nearly all of the time, and nothing else.
"""

import torch
import torch.nn.functional as F

from dino.distributed import all_reduce_sum, get_world_size
from dino.evaluation.features import require_finite
from dino.meters import MetricLogger, is_due, progress_bar

PRINT_FREQ = 20  # iterations between two lines of the console


def train_heads_one_epoch(features, heads, optimizer, loader, epoch, shown):
    """One step of every head per batch; returns each one's mean loss, over batches and processes.

    The console line shows the head number `shown`. Nothing waits for the device but that line.
    """
    total = torch.zeros(len(heads), device=features.device)
    logger = MetricLogger(delimiter="  ")
    batches = logger.log_every(loader, PRINT_FREQ, f"Epoch: [{epoch}]")
    for i, (images, labels) in enumerate(batches):
        labels = labels.to(features.device, non_blocking=True)
        losses = step_of_heads(heads, optimizer, features(images), labels)
        total += losses
        if is_due(i, len(loader), PRINT_FREQ):
            logger.update(loss=losses[shown], lr=optimizer.param_groups[shown]["lr"])
    return (all_reduce_sum(total) / (len(loader) * get_world_size())).tolist()


def step_of_heads(heads, optimizer, inputs, labels):
    """A step of every head, on this process's features (B, dim) and labels (B,); their losses."""
    losses = torch.stack([F.cross_entropy(head(inputs), labels) for head in heads])
    optimizer.zero_grad()
    losses.sum().backward()  # each head's gradient is that of its own loss, to the bit
    for param in heads.parameters():
        all_reduce_sum(param.grad).div_(get_world_size())
    optimizer.step()
    return losses.detach()


@torch.no_grad()
def evaluate_heads(features, heads, loader, total):
    """{"loss", "acc1", "acc5"} of each head on `total` images, of which each rank has a share.

    Means over images, the accuracies in percent; no "acc5" where there are fewer than 5 classes.
    An image with an output that is not finite counts as wrong: of only nan topk takes class 0.
    """
    sums = torch.zeros(len(heads), 3, dtype=torch.float64, device=features.device)
    for images, labels in progress_bar(loader, "validation"):
        inputs, labels = features(images), labels.to(features.device, non_blocking=True)
        for row, head in zip(sums, heads, strict=True):
            output = head(inputs)
            hits = output.topk(min(5, output.shape[1])).indices == labels.view(-1, 1)
            hits &= output.isfinite().all(dim=1, keepdim=True)
            loss = F.cross_entropy(output, labels, reduction="sum")
            row += torch.stack([loss, hits[:, 0].sum(), hits.sum()])
    means = (all_reduce_sum(sums) / total).tolist()
    results = [dict(loss=loss, acc1=100 * top1, acc5=100 * top5) for loss, top1, top5 in means]
    if heads[0].num_labels < 5:
        for result in results:
            del result["acc5"]
    return results


def evaluate_head(features, head, loader, total, what):
    """`evaluate_heads` of one head; UserError, which says `what` they are, for infinite outputs."""
    (result,) = evaluate_heads(features, [head.to(features.device)], loader, total)
    require_finite(torch.tensor(result["loss"]), what)
    return result
