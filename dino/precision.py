# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: which type, the autocast context of it, and where it computes garbage."""

import torch
from torch import nn

from dino.backbones import evaluating
from dino.errors import UserError

AMP_DTYPES = ("auto", "bfloat16", "float16", "float32")


def choose_amp_dtype(use_fp16, amp_dtype, device):
    """torch dtype of autocast on `device`; float32 means none.

    `auto`: bfloat16 where the GPU computes in it, else float16, which needs a GradScaler; float32
    on a CPU.
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


def autocast(device, dtype):
    """torch.autocast in `dtype`, which does nothing for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def check_gradients(backbone, sizes, in_chans, device, amp_dtype):
    """Raise UserError where PyTorch would train `backbone`, on images of `sizes`, on garbage.

    In bfloat16 on a CPU, if the stride of a convolution is greater than the width of its input, the
    gradient of its weights is what was in memory. (Measured with PyTorch 2.15: kernels of 3 to 7,
    strides of 2 to 4. Its other gradient, kernels of 1 and float32 are right.)
    """
    if device.type != "cpu" or amp_dtype != torch.bfloat16:
        return
    for size in sizes:
        for name, convolution, width in convolved_widths(backbone, size, in_chans):
            stride = convolution.stride[-1]
            if width < stride and convolution.kernel_size[-1] > 1:
                raise UserError(
                    f"--amp_dtype bfloat16: images of {size} pixels are {width} wide before {name}"
                    f" of stride {stride}, for which PyTorch computes a wrong gradient on a CPU."
                    " Give larger crops, for a ResNet --stem small, or --amp_dtype float32."
                )


@torch.no_grad()
def convolved_widths(backbone, size, in_chans):
    """[(name, convolution, width of its input)] for a square image, in the order of the pass."""
    widths, hooks = [], []
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d):

            def look(module, inputs, name=name):
                widths.append((name, module, inputs[0].shape[-1]))

            hooks.append(module.register_forward_pre_hook(look))
    with evaluating(backbone):
        backbone(torch.zeros(1, in_chans, size, size))
    for hook in hooks:
        hook.remove()
    return widths
