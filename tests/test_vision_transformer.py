# SPDX-License-Identifier: Apache-2.0
"""Backbone and head: official figures, official names, one meaning for both attention paths."""

import copy
import json
import math
import shutil
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from helpers import fill, numbered
from torch import nn

import vision_transformer as vits

FIGURES = json.loads((ROOT / "tests" / "official_figures.json").read_text())


@pytest.mark.parametrize("size", [(224, 224), (96, 96), (160, 224), (64, 32)])
@pytest.mark.parametrize("patch_size", [16, 8])
def test_outputs_equal_the_official_figures(patch_size, size):
    vit = fill(vits.vit_tiny(patch_size=patch_size))
    images = numbered((2, 3, *size), seed=1)
    expected = FIGURES[f"vit_tiny/{patch_size} {size[0]}x{size[1]}"]
    with torch.no_grad():
        attention = vit.get_last_selfattention(images)[0, :, 0, 1:]
        middle, last = vit.get_intermediate_layers(images, 2)
        found = {"cls": vit(images), "attention": attention, "middle": middle, "last": last}
    for name, tensor in found.items():
        # float32 rounding through 12 blocks; the figures have six significant digits
        assert summary(tensor) == pytest.approx(expected[name], rel=2e-5, abs=2e-5), name


def summary(tensor):
    """Mean magnitude and the first and last three numbers."""
    flat = tensor.double().flatten()
    return [flat.abs().mean().item(), *flat[:3].tolist(), *flat[-3:].tolist()]


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_head_equals_the_official_figures(norm_last_layer):
    head = fill(vits.DINOHead(64, 96, norm_last_layer=norm_last_layer, hidden_dim=128))
    features = numbered((5, 64), seed=1).requires_grad_()
    output = head(features)
    output.square().sum().backward()
    expected = FIGURES["head"]
    assert summary(output.detach()) == pytest.approx(expected["output"], rel=2e-5, abs=2e-5)
    assert summary(features.grad) == pytest.approx(expected["gradient"], rel=2e-5, abs=2e-5)
    assert head.last_layer.weight_g.requires_grad is not norm_last_layer
    assert list(head.state_dict())[-2:] == ["last_layer.weight_g", "last_layer.weight_v"]


def test_a_seed_gives_the_official_initial_weights():
    torch.manual_seed(0)
    vit, head = vits.vit_tiny(), vits.DINOHead(192, 512)
    expected = FIGURES["initial weights after manual_seed(0)"]
    found = {"vit": summed(vit), "head": summed(head)}
    for name, value in found.items():
        assert value == pytest.approx(expected[name], rel=1e-9), name


def summed(module):
    return sum(value.double().abs().sum().item() for value in module.state_dict().values())


def test_initial_weights_follow_their_distributions():
    vit, head = vits.vit_small(), vits.DINOHead(384, 4096)
    assert vit.blocks[3].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert vit.pos_embed.abs().max() > 0.06  # at std 0.02 nothing is cut off at 2 std
    bound = 1 / math.sqrt(3 * 16 * 16)  # the patch convolution keeps torch's default
    assert 0.99 * bound < vit.patch_embed.proj.weight.abs().max() <= bound
    assert vit.patch_embed.proj.bias.abs().max() > 0
    assert 0.99 / 16 < head.last_layer.weight_v.abs().max() <= 1 / 16
    assert (head.last_layer.weight_g == 1).all()


@pytest.mark.parametrize(
    ("name", "millions"),
    [("vit_tiny", 5.5), ("vit_small", 21.7), ("vit_base", 85.8), ("vit_large", 303.3)],
)
def test_sizes_are_those_of_the_paper(name, millions):
    with torch.device("meta"):
        vit = vars(vits)[name](patch_size=16, num_classes=0)
    assert sum(p.numel() for p in vit.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_fused_attention_agrees_with_the_attention_that_is_shown():
    vit = fill(vits.vit_tiny(patch_size=8))
    images = numbered((2, 3, 64, 48), seed=1)
    with torch.no_grad():
        fused = vit(images)
        for block in vit.blocks:
            block.attn.register_forward_hook(lambda *_: None)  # a watched map is computed
        explicit = vit(images)
    assert not torch.equal(fused, explicit), "both ran the same kernel: nothing was compared"
    # two orders of summation in float32, through 12 blocks; the outputs are of order 1
    torch.testing.assert_close(fused, explicit, rtol=0, atol=2e-5)


@pytest.mark.parametrize("where", ["attn_drop", "attn"])
def test_a_hook_sees_the_map_that_get_last_selfattention_gives(where):
    vit = fill(vits.vit_tiny(patch_size=8))
    images, seen = numbered((2, 3, 32, 32), seed=1), []
    attention = vit.blocks[-1].attn
    module = attention.attn_drop if where == "attn_drop" else attention
    handle = module.register_forward_hook(lambda _, __, output: seen.append(output))
    vit(images)
    handle.remove()
    found = seen[0] if where == "attn_drop" else seen[0][1]
    torch.testing.assert_close(found, vit.get_last_selfattention(images), rtol=0, atol=0)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3, 17))
    vit(images)
    assert len(seen) == 1


def test_a_replaced_attention_forward_is_the_one_that_runs():
    vit = fill(vits.vit_tiny(patch_size=8))
    calls = []

    def forward(self, x):
        calls.append(x.shape)
        return x, None

    attention = vit.blocks[-1].attn
    attention.forward = types.MethodType(forward, attention)
    vit(numbered((1, 3, 32, 32)))
    assert calls == [(1, 17, 192)]


def test_hook_on_qkv_of_the_last_block_gets_queries_keys_and_values():
    vit, seen = vits.vit_small(patch_size=8, num_classes=0), []
    vit.blocks[-1].attn.qkv.register_forward_hook(lambda _, __, output: seen.append(output))
    vit(numbered((2, 3, 32, 32)))
    assert seen[0].shape == (2, 17, 3 * 384)


def test_overlapping_patches_with_own_positions_run_as_in_feature_extractors():
    """Dense features with a smaller stride: what dino-vit-features and its descendants do."""
    vit = fill(vits.vit_tiny(patch_size=8))
    vit.patch_embed.proj.stride = (4, 4)

    def interpolate(self, x, w, h):
        grid = self.pos_embed[:, 1:].reshape(1, 28, 28, -1).permute(0, 3, 1, 2)
        size = (1 + (w - 8) // 4, 1 + (h - 8) // 4)
        grid = F.interpolate(grid, size=size, mode="bicubic").flatten(2).transpose(1, 2)
        return torch.cat([self.pos_embed[:, :1], grid], dim=1)

    vit.interpolate_pos_encoding = types.MethodType(interpolate, vit)
    assert vit.get_intermediate_layers(numbered((1, 3, 64, 40)))[0].shape == (1, 1 + 15 * 9, 192)


def test_an_image_that_patches_do_not_divide_is_refused_with_a_size_that_fits():
    with pytest.raises(ValueError, match=r"100 x 64 pixels .* 16 x 16; 96 x 64 would"):
        vits.vit_tiny()(torch.zeros(1, 3, 100, 64))
    with pytest.raises(ValueError, match=r"7 x 64 pixels .* 16 x 64 would"):
        vits.vit_tiny()(torch.zeros(1, 3, 7, 64))


@pytest.mark.parametrize(("patch_size", "in_chans", "img_size"), [(4, 1, 32), (5, 6, [40, 20])])
def test_other_patches_channels_and_rectangular_models(patch_size, in_chans, img_size):
    vit = vits.vit_nano(patch_size=patch_size, in_chans=in_chans, img_size=img_size)
    height, width = (32, 32) if img_size == 32 else img_size
    for factor in (1, 2):
        images = numbered((2, in_chans, factor * height, factor * width))
        assert vit(images).shape == (2, 96)
    tokens = torch.zeros(1, vit.pos_embed.shape[1], 96)
    assert vit.interpolate_pos_encoding(tokens, height, width) is vit.pos_embed


def test_a_mistyped_argument_is_an_error():
    with pytest.raises(TypeError, match="drop_path"):
        vits.vit_small(drop_path=0.1)


def test_stochastic_depth_drops_whole_samples_at_the_rate_of_their_block():
    vit = vits.vit_tiny(drop_path_rate=0.3)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in vit.blocks]
    assert rates == pytest.approx([0.3 * i / 11 for i in range(12)])
    drop_path = vit.blocks[-1].drop_path
    torch.manual_seed(0)
    output = drop_path(torch.ones(20000, 2, 3))
    per_sample = output.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    assert set(per_sample[:, 0].tolist()) == {0.0, per_sample.max().item()}
    assert per_sample.max().item() == pytest.approx(1 / 0.7)
    assert (per_sample == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    drop_path.eval()
    assert torch.equal(drop_path(output), output)


def test_last_layer_equals_torchs_own_weight_norm():
    ours = vits.WeightNormLinear(16, 32)
    theirs = nn.utils.parametrizations.weight_norm(nn.Linear(16, 32, bias=False))
    with torch.no_grad():
        ours.weight_g.uniform_(0.5, 2)
        theirs.parametrizations.weight.original0.copy_(ours.weight_g)
        theirs.parametrizations.weight.original1.copy_(ours.weight_v)
    x = numbered((4, 16))
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.weight_v.grad, theirs.parametrizations.weight.original1.grad)
    torch.testing.assert_close(ours.weight_g.grad, theirs.parametrizations.weight.original0.grad)


def test_head_can_be_copied_and_the_copy_learns_by_itself():
    head = vits.DINOHead(16, 8, hidden_dim=12, bottleneck_dim=4)
    twin = copy.deepcopy(head)
    with torch.no_grad():
        twin.last_layer.weight_v.add_(1)
    x = numbered((2, 16))
    assert not torch.equal(head(x), twin(x))


def test_head_normalises_in_float32_under_autocast():
    """In float16 the squares of 300 overflow; a feature that is all zero must not give nan."""
    head = vits.DINOHead(16, 8, nlayers=1, bottleneck_dim=16)
    with torch.no_grad():
        head.mlp.weight.copy_(300 * torch.eye(16))
    features = torch.stack([torch.ones(16), torch.zeros(16)])
    with torch.autocast("cpu", dtype=torch.float16):
        output = head(features)
    assert output.isfinite().all()
    torch.testing.assert_close(output.float(), head(features), rtol=0, atol=2e-3)


def test_the_file_works_alone_in_a_project_with_its_own_utils(tmp_path):
    shutil.copy(ROOT / "vision_transformer.py", tmp_path)
    (tmp_path / "utils.py").write_text("raise ImportError('somebody else')")
    code = "import vision_transformer as vits; print(vits.__dict__['vit_tiny'](8).embed_dim)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout == "192\n"


def test_drop_path_keeps_and_scales_the_samples_that_the_official_formula_keeps():
    x = torch.randn(64, 3, 5)
    torch.manual_seed(1)
    found = vits.drop_path(x, 0.3, training=True)
    torch.manual_seed(1)
    kept = (0.7 + torch.rand(64, 1, 1)).floor()
    assert 0 < kept.sum() < 64
    torch.testing.assert_close(found, x / 0.7 * kept)
    assert vits.drop_path(x, 0.3) is x
    assert vits.drop_path(x, training=True) is x
