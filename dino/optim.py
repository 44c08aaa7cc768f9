# SPDX-License-Identifier: Apache-2.0
"""The small tools of a training step: schedules, parameter groups, clipping, LARS, seeds.

Code written for the official repository imports from `utils` what lives in other modules here:
these names stay.
"""

import argparse
import contextlib
import random

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from augmentations import GaussianBlur, Solarization
from backbones import has_batchnorms
from checkpoints import restart_from_checkpoint
from dino import MultiCropWrapper, cancel_gradients_last_layer
from distributed import get_rank, get_world_size, is_main_process
from metrics import MetricLogger, SmoothedValue, accuracy
from pretrained import load_pretrained_weights
from vision_transformer import trunc_normal_

__all__ = [
    "LARS",
    "GaussianBlur",
    "MetricLogger",
    "MultiCropWrapper",
    "SmoothedValue",
    "Solarization",
    "accuracy",
    "bool_flag",
    "cancel_gradients_last_layer",
    "choose_amp_dtype",
    "clip_gradients",
    "cosine_scheduler",
    "fix_random_seeds",
    "get_params_groups",
    "get_rank",
    "get_world_size",
    "has_batchnorms",
    "in_parts",
    "is_main_process",
    "load_pretrained_weights",
    "restart_from_checkpoint",
    "set_lr_and_weight_decay",
    "trunc_normal_",
]


def bool_flag(text):
    """on, true, 1 or off, false, 0, in any case, for argparse."""
    if text.lower() in ("on", "true", "1"):
        return True
    if text.lower() in ("off", "false", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true (on, 1) nor false (off, 0)")


def choose_amp_dtype(use_fp16, amp_dtype, device):
    """torch dtype of autocast on `device`; float32 means none.

    auto: bfloat16 where the GPU computes in it, else float16, which needs a GradScaler; float32 on
    a CPU.
    """
    if not use_fp16 or amp_dtype == "float32":
        return torch.float32
    if amp_dtype != "auto":
        return getattr(torch, amp_dtype)
    if device.type != "cuda":
        return torch.float32
    return (
        torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    )


def fix_random_seeds(seed=31):
    """Seed torch on every device, numpy and, unlike the official function, Python's random."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def cosine_scheduler(
    base_value, final_value, epochs, niter_per_ep, warmup_epochs=0, start_warmup_value=0
):
    """A value per iteration: linear warm-up to `base_value`, half a cosine to `final_value`.

    As officially, the base value comes twice (last of the warm-up, first of the cosine), and the
    final one would come one iteration after the end.
    """
    if warmup_epochs > epochs:
        raise ValueError(f"a warm-up of {warmup_epochs} epochs does not fit into {epochs}")
    warmup = np.linspace(start_warmup_value, base_value, warmup_epochs * niter_per_ep)
    iterations = np.arange((epochs - warmup_epochs) * niter_per_ep)
    progress = iterations / max(1, len(iterations))
    cosine = final_value + 0.5 * (base_value - final_value) * (1 + np.cos(np.pi * progress))
    return np.concatenate([warmup, cosine])


def in_parts(model, images, accum_steps):
    """Yield `images`, views (B, ...), in `accum_steps` equal parts of the batch.

    Under DistributedDataParallel only the backward pass of the last part averages the gradients.
    """
    parts = zip(*[view.chunk(accum_steps) for view in images], strict=True)
    for number, part in enumerate(parts, start=1):
        waits = number < accum_steps and isinstance(model, DistributedDataParallel)
        with model.no_sync() if waits else contextlib.nullcontext():
            yield list(part)


def set_lr_and_weight_decay(optimizer, lr, weight_decay):
    """For this step; only the first of the groups of get_params_groups has weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay


def get_params_groups(model):
    """Two groups of trainable parameters: with weight decay, and without.

    Without it are biases and all else with one dimension; so [CLS], the position embeddings and the
    head's last layer are decayed, as officially.
    """
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    free = [param for name, param in named if name.endswith(".bias") or param.ndim == 1]
    decayed = [param for name, param in named if not (name.endswith(".bias") or param.ndim == 1)]
    return [{"params": decayed}, {"params": free, "weight_decay": 0.0}]


@torch.no_grad()
def clip_gradients(model, clip):
    """Scale each gradient *tensor* down to norm `clip`, unless that is 0; return the norms before.

    Not the norm of all gradients together: the official code clips tensor by tensor, which is part
    of the recipe. The norms, one 0-d tensor each, stay on the device.
    """
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    norms = torch._foreach_norm(grads)
    if clip:
        coefficients = (clip / (torch.stack(norms) + 1e-6)).clamp_(max=1.0)
        torch._foreach_mul_(grads, list(coefficients.unbind()))
    return norms


class LARS(torch.optim.Optimizer):
    """SGD with momentum, its step scaled layer by layer by eta |w| / |gradient + decay|.

    (You et al. 2017.) Neither that scale nor weight decay touches parameters with one dimension.
    """

    def __init__(self, params, lr=0, weight_decay=0, momentum=0.9, eta=0.001):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, eta=eta))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                update = param.grad
                if param.ndim != 1:
                    update = update.add(param, alpha=group["weight_decay"])
                    param_norm, update_norm = param.norm(), update.norm()
                    trust = group["eta"] * param_norm / update_norm
                    # 1 where either norm is 0, chosen on the device: a Python `if` would wait for
                    # it
                    trust = torch.where(
                        (param_norm > 0) & (update_norm > 0), trust, torch.ones_like(trust)
                    )
                    update = update * trust
                buffer = self.state[param].setdefault("mu", torch.zeros_like(param))
                buffer.mul_(group["momentum"]).add_(update)
                param.add_(buffer, alpha=-group["lr"])
