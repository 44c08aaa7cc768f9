# SPDX-License-Identifier: Apache-2.0
"""What a backbone is tried on before it is used: sizes of images, gradients on this device."""

import contextlib

import torch
from torch import nn

from dino.backbones import evaluating, first_of, is_vit
from dino.errors import UserError

# of an image: 2048 pixels in patches of 8. The time that attention takes grows with the square.
MOST_PATCHES = 2**16


def check_takes_sizes(backbone, arch, sizes, in_chans=3, source=None):
    """Raise UserError unless `backbone` makes one vector of a square image of each of `sizes`.

    The error begins with `source`, or else with the arch as the flag that is to blame.
    """
    source = source or f"--arch {arch}"
    for size in sizes:
        try:
            check_patches(backbone, size)
            if is_vit(backbone):  # which takes any other size; a pass of 2^16 patches takes minutes
                continue
            features = features_of_blank(backbone, size, in_chans)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise UserError(f"{source} does not take crops of {size} pixels: {error}") from None
        if features.ndim != 2:
            shape = tuple(features.shape)
            raise UserError(f"{source} makes {shape} of an image, not one vector.")


def check_patches(backbone, size):
    """Raise ValueError for a size that our ViT's patches do not divide, or of too many patches."""
    embed = getattr(backbone, "patch_embed", None)
    if is_vit(backbone):
        embed.check_divisible(size, size)
    side = getattr(embed, "patch_size", size)  # timm's is (height, width)
    patches = (size // (side[0] if isinstance(side, tuple | list) else side)) ** 2
    if patches > MOST_PATCHES:
        raise ValueError(f"{patches} patches, more than {MOST_PATCHES}; give a smaller size")


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


def convolved_widths(backbone, size, in_chans):
    """[(name, convolution, width of its input)] for a square image, in the order of the pass."""
    widths = []
    names = {m: name for name, m in backbone.named_modules() if isinstance(m, nn.Conv2d)}

    def look(convolution, inputs):
        widths.append((names[convolution], convolution, inputs[0].shape[-1]))

    with contextlib.ExitStack() as hooks:
        for convolution in names:
            hooks.enter_context(convolution.register_forward_pre_hook(look))
        features_of_blank(backbone, size, in_chans)
    return widths


@torch.no_grad()
def features_of_blank(backbone, size, in_chans):
    """The features of one square image without content: a trial."""
    with evaluating(backbone):
        return first_of(backbone(torch.zeros(1, in_chans, size, size)))
