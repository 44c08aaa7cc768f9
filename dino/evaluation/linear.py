# SPDX-License-Identifier: Apache-2.0
"""Linear heads on frozen features (Sec. 4.1): what they see, a step of all, what they get right.

B images, `dim` numbers that a head sees of an image, C classes. There is a head for each learning
rate: they share the features, which cost nearly all of the time, and nothing else.
"""

import torch
import torch.nn.functional as F

from backbones import is_vit
from dino import first_of
from distributed import all_reduce_sum, get_world_size
from errors import UserError
from metrics import MetricLogger, is_due, progress_bar

PRINT_FREQ = 20  # iterations between two lines of the console


class FrozenFeatures:
    """Images (B, 3, H, W) on any device -> what a head sees of them, (B, dim) float32.

    Of our ViTs [CLS] of the last `n_last_blocks` blocks, each after the final norm, side by side;
    with `avgpool_patchtokens`, which goes with one block only, [CLS] and the mean patch token of
    the last, number by number in turn. Of other networks their output. UserError for blocks that
    there are not.
    """

    def __init__(
        self,
        backbone,
        embed_dim,
        device,
        *,
        n_last_blocks=4,
        avgpool_patchtokens=False,
        amp_dtype=torch.float32,
    ):
        self.backbone, self.device, self.amp_dtype = backbone.to(device), device, amp_dtype
        self.n_last_blocks, self.avgpool_patchtokens = n_last_blocks, avgpool_patchtokens
        self.dim = embed_dim
        if is_vit(backbone):
            self.check_blocks()
            self.dim *= n_last_blocks + avgpool_patchtokens

    def check_blocks(self):
        depth = len(self.backbone.blocks)
        if self.n_last_blocks > depth:
            raise UserError(
                f"--n_last_blocks {self.n_last_blocks}: this backbone has {depth} blocks."
            )
        if self.avgpool_patchtokens and self.n_last_blocks != 1:
            raise UserError(
                f"--avgpool_patchtokens true and --n_last_blocks {self.n_last_blocks} exclude each"
                " other: the mean patch token goes with the [CLS] of the last block alone,"
                " --n_last_blocks 1."
            )

    @torch.no_grad()
    def __call__(self, images):
        images = images.to(self.device, non_blocking=True)
        enabled = self.amp_dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=enabled):
            return self.extract(images).float()

    def extract(self, images):
        if not is_vit(self.backbone):
            return first_of(self.backbone(images))
        blocks = self.backbone.get_intermediate_layers(images, self.n_last_blocks)
        features = torch.cat([tokens[:, 0] for tokens in blocks], dim=-1)
        if self.avgpool_patchtokens:
            mean_patch = blocks[-1][:, 1:].mean(dim=1)
            # [cls_0, mean_0, cls_1, mean_1, ...]: the order that the released heads were trained in
            features = torch.stack([features, mean_patch], dim=-1).flatten(1)
        return features


def train_one_epoch(features, heads, optimizer, loader, epoch, shown):
    """One step of every head per batch; returns each one's mean loss, over batches and processes.

    The console line shows the head number `shown`. Nothing waits for the device but that line.
    """
    total = torch.zeros(len(heads), device=features.device)
    logger = MetricLogger(delimiter="  ")
    batches = logger.log_every(loader, PRINT_FREQ, f"Epoch: [{epoch}]")
    for i, (images, labels) in enumerate(batches):
        labels = labels.to(features.device, non_blocking=True)
        losses = train_step(heads, optimizer, features(images), labels)
        total += losses
        if is_due(i, len(loader), PRINT_FREQ):
            logger.update(loss=losses[shown], lr=optimizer.param_groups[shown]["lr"])
    return (all_reduce_sum(total) / (len(loader) * get_world_size())).tolist()


def train_step(heads, optimizer, inputs, labels):
    """A step of every head, on this process's features (B, dim) and labels (B,); their losses."""
    losses = torch.stack([F.cross_entropy(head(inputs), labels) for head in heads])
    optimizer.zero_grad()
    losses.sum().backward()  # each head's gradient is that of its own loss, to the bit
    for param in heads.parameters():
        all_reduce_sum(param.grad).div_(get_world_size())
    optimizer.step()
    return losses.detach()


@torch.no_grad()
def evaluate(features, heads, loader, total):
    """{"loss", "acc1", "acc5"} of each head on `total` images, of which each rank has a share.

    Means over images, the accuracies in percent; no "acc5" where there are fewer than 5 classes.
    """
    sums = torch.zeros(len(heads), 3, dtype=torch.float64, device=features.device)
    for images, labels in progress_bar(loader, "validation"):
        inputs, labels = features(images), labels.to(features.device, non_blocking=True)
        for row, head in zip(sums, heads, strict=True):
            output = head(inputs)
            hits = output.topk(min(5, output.shape[1])).indices == labels.view(-1, 1)
            loss = F.cross_entropy(output, labels, reduction="sum")
            row += torch.stack([loss, hits[:, 0].sum(), hits.sum()])
    means = (all_reduce_sum(sums) / total).tolist()
    results = [dict(loss=loss, acc1=100 * top1, acc5=100 * top5) for loss, top1, top5 in means]
    if heads[0].num_labels < 5:
        for result in results:
            del result["acc5"]
    return results
