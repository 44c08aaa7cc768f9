# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a training step, and what GPUs can do of them.

Matrix products and convolutions are counted, a multiplication and an addition as two: those that
the loss needs, so of the last block's only the ones for [CLS]. What is done only to save memory,
such as a second forward pass, does not count.
"""

from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vision_transformer
from dino.backbones import build_backbone
from dino.networks import MultiCropWrapper

# Dense TFLOP/s with float32 sums, in half precision and in float32 without TF32, from NVIDIA's data
# sheets; the first name that is in the device's counts.
PEAK_TFLOPS = {
    "B200": (2250, 75),
    "H200": (989, 67),
    "H100 PCIe": (756, 51),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "L40S": (362, 91.6),
    "RTX 4090": (165, 82.6),
    "V100": (125, 15.7),
}


def peak_flops(device_name, amp_dtype):
    """FLOP/s of the device at most, or None if it is not in the table."""
    for name, (half, single) in PEAK_TFLOPS.items():
        if name in device_name:
            return 1e12 * (single if amp_dtype == torch.float32 else half)
    return None


def training_flops(arch, patch_size, out_dim, crop_sizes, hidden_dim=2048, bottleneck_dim=256):
    """Of one image: the student forward and backward on every crop, the teacher on the first two.

    Counted by torch on networks without storage.
    """
    with torch.device("meta"):
        backbone, embed_dim = build_backbone(arch, patch_size, img_size=crop_sizes[0])
        head = vision_transformer.DINOHead(
            embed_dim, out_dim, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim
        )
        network = MultiCropWrapper(backbone, head)
        images = [torch.empty(2, 3, size, size) for size in crop_sizes]  # two: for batch norms
    # of the other kernels the counter knows some, and in the backward pass counts products twice
    plain_attention = sdpa_kernel(SDPBackend.MATH)
    # the counter's own hooks would make the full last block run
    no_hooks = patch.object(vision_transformer, "_has_any_global_hook", return_value=False)
    with FlopCounterMode(display=False) as counter, plain_attention, no_hooks:
        with torch.no_grad():
            network(images[:2])
        network(images).sum().backward()
    return counter.get_total_flops() / 2
