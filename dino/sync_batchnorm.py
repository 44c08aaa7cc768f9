# SPDX-License-Identifier: Apache-2.0
"""Batch norm with the statistics of the global batch, on CUDA (torch's) and over gloo (ours)."""

import torch
import torch.nn.functional as F
from torch import nn

from dino.distributed import all_reduce_sum


def sync_batchnorms(model, device):
    """Make each batch norm of `model` use the statistics of all processes; returns the new model.

    torch's SyncBatchNorm, also when wrapped for gloo, refuses a CPU: there ours takes its place.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = GlooSyncBatchNorm  # same parameters, buffers and hooks
    return model


class AllReduceSum(torch.autograd.Function):
    """all_reduce_sum with a gradient, which is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx, tensor):
        return all_reduce_sum(tensor.clone())

    @staticmethod
    def backward(ctx, grad):
        return all_reduce_sum(grad.clone())


class GlooSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm of (B, C, *) over all processes' rows, on any device and backend."""

    def forward(self, x):
        if not self.training:
            statistics = (self.running_mean, self.running_var)
            return F.batch_norm(x, *statistics, self.weight, self.bias, eps=self.eps)
        rows = x.float()  # of bfloat16 the statistics are float32, as in torch's own
        dims = [dim for dim in range(x.ndim) if dim != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = all_reduce_sum(rows.new_tensor(float(x.numel() // x.shape[1])))
        mean = AllReduceSum.apply(rows.sum(dims)) / count
        centered = rows - mean.view(shape)
        variance = AllReduceSum.apply(centered.square().sum(dims)) / count
        if self.track_running_stats:
            self.update_running_stats(mean.detach(), variance.detach() * count / (count - 1))
        rows = centered * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            rows = rows * self.weight.view(shape) + self.bias.view(shape)
        return rows.to(x.dtype)

    def update_running_stats(self, mean, unbiased_variance):
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(unbiased_variance, momentum)
