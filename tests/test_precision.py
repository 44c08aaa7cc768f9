# SPDX-License-Identifier: Apache-2.0
"""bfloat16 on a CPU: refused where PyTorch's gradients are wrong, right everywhere else."""

import pytest
import torch
from conftest import run_script

from dino.backbone_checks import check_gradients
from dino.backbones import build_backbone
from dino.errors import UserError
from dino.precision import autocast

CPU = torch.device("cpu")


def build(arch, stem):
    torch.manual_seed(0)
    return build_backbone(arch, stem=stem)[0]


def check(backbone, size, amp_dtype=torch.bfloat16, device=CPU):
    check_gradients(backbone, [size], 3, device, amp_dtype)


@pytest.mark.parametrize("arch", ["resnet_nano", "resnet18"])
@pytest.mark.parametrize(("stem", "size"), [("small", 4), ("imagenet", 16)])
def test_crops_that_a_network_shrinks_too_far_are_refused(arch, stem, size):
    """There the gradient of layer4.0.conv1 is what was in memory, with PyTorch 2.15."""
    backbone = build(arch, stem)
    with pytest.raises(UserError, match=f"{size} pixels are 1 wide before layer4.0.conv1"):
        check(backbone, size)
    check(backbone, 2 * size)
    check(backbone, size, torch.float32)
    check(backbone, size, device=torch.device("cuda"))


@pytest.mark.parametrize(
    ("arch", "stem", "size"),
    [
        ("resnet_nano", "small", 8),
        ("resnet_nano", "imagenet", 32),
        ("resnet18", "imagenet", 32),
        ("vit_nano", "auto", 16),
    ],
)
def test_where_bfloat16_is_allowed_its_gradients_are_those_of_float32_but_for_rounding(
    arch, stem, size
):
    backbone = build(arch, stem).eval()
    images = torch.randn(8, 3, size, size)
    check(backbone, size)
    direction = torch.randn(backbone(images).shape)
    gradients = []
    for amp_dtype in (torch.float32, torch.bfloat16):
        with autocast(CPU, amp_dtype):
            features = backbone(images)
        loss = (features.float() * direction).sum()
        gradients.append(torch.autograd.grad(loss, list(backbone.parameters()), allow_unused=True))
    for exact, rounded in zip(*gradients, strict=True):
        if exact is not None:  # as that of unused positions
            # rounding flips ReLUs: up to 0.3; garbage is off by orders of magnitude
            assert (exact - rounded).norm() <= 0.5 * exact.norm() + 1e-6


def test_auto_refuses_such_crops_before_it_trains(class_folders, tmp_path):
    data = ("--data_path", class_folders / "train", "--output_dir", tmp_path / "run")
    flags = ("--preset", "auto", "--epochs", 1, "--num_workers", 0, "--amp_dtype", "bfloat16")
    flags += ("--device", "cpu")
    result = run_script("main_dino.py", *flags, *data, "--local_crop_size", 4, "--stem", "small")
    assert result.returncode == 2, result.stderr
    assert "4 pixels are 1 wide before layer4.0.conv1 of stride 2" in result.stderr
    assert not (tmp_path / "run").exists()
