# SPDX-License-Identifier: Apache-2.0
"""Backbone and head: official figures, official names, one meaning for both attention paths."""

import copy
import json
import math
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

import vision_transformer as vits


def numbered(shape, seed=0, scale=1.0):
    """Numbers from numpy's RandomState, whose stream is the same in every version."""
    values = np.random.RandomState(seed).standard_normal(shape) * scale
    return torch.from_numpy(values.astype(np.float32))


def fill(module):
    """Give every weight a value that does not depend on how the module initialises itself."""
    with torch.no_grad():
        for i, (name, value) in enumerate(sorted(module.state_dict().items())):
            is_scale = (name.endswith("weight") and "norm" in name) or name.endswith("weight_g")
            value.copy_(numbered(value.shape, i, 0.05) + is_scale)
    return module.eval()


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


def outputs_and_gradients(vit, images, seed=0):
    """[CLS], and the gradients of a random projection of it, by name."""
    vit.zero_grad()
    torch.manual_seed(seed)  # of the dropped paths
    output = vit(images)
    (output * numbered(output.shape, seed=2).to(output.dtype)).sum().backward()
    return output.detach(), {name: p.grad.clone() for name, p in vit.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_last_block_for_cls_alone_equals_the_full_block(dtype, qkv_bias):
    torch.manual_seed(0)
    vit = vits.VisionTransformer(
        [48], 8, embed_dim=96, depth=3, num_heads=3, qkv_bias=qkv_bias, drop_path_rate=0.3
    ).to(dtype)
    images = numbered((4, 3, 48, 48), seed=1).to(dtype)
    output, gradients = outputs_and_gradients(vit, images)
    handle = vit.norm.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].shape[1]))
    sizes = []
    full_output, full_gradients = outputs_and_gradients(vit, images)
    assert sizes == [37], "all tokens were needed and computed"
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(output, full_output, rtol=0, atol=tolerance)
    largest = max(gradient.abs().max() for gradient in full_gradients.values())
    for name, gradient in full_gradients.items():
        difference = (gradients[name] - gradient).abs().max() / largest
        assert difference < 10 * tolerance, name
    handle.remove()


def test_intermediate_layers_for_cls_alone_equal_the_full_ones():
    vit = fill(vits.vit_tiny(patch_size=8))
    images = numbered((2, 3, 48, 32), seed=1)
    with torch.no_grad():
        full = vit.get_intermediate_layers(images, 4)
        for_cls = vit.get_intermediate_layers(images, 4, only_cls=True)
        found = vit(images)
    assert [tokens.shape[1] for tokens in full] == [25, 25, 25, 25]
    assert [tokens.shape[1] for tokens in for_cls] == [25, 25, 25, 1]
    for all_tokens, tokens in zip(full, for_cls, strict=True):
        torch.testing.assert_close(tokens[:, 0], all_tokens[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found, full[-1][:, 0], rtol=0, atol=1e-5)


PARTS = ("", ".norm1", ".attn", ".attn.qkv", ".attn.proj", ".norm2", ".mlp", ".mlp.act", ".mlp.fc2")


@pytest.mark.parametrize("name", ["norm", *(f"blocks.5{part}" for part in PARTS)])
@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward", "class"])
def test_whoever_looks_into_the_last_block_sees_all_tokens(name, how):
    vit = vits.vit_nano(8, img_size=32)
    module, seen = vit.get_submodule(name), []
    if how == "hook":
        module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    elif how == "pre-hook":
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    elif how == "forward":
        forward = module.forward
        module.forward = lambda x: seen.append(x.shape) or forward(x)
    else:
        kind = type(module)
        watched = {"forward": lambda self, x: seen.append(x.shape) or kind.forward(self, x)}
        module.__class__ = type("Watched", (kind,), watched)
    vit(numbered((2, 3, 32, 32)))
    assert [shape[:2] for shape in seen] == [(2, 17)]


def test_a_hook_on_all_modules_sees_all_tokens():
    vit, seen = vits.vit_nano(8, img_size=32), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, _: seen.append(inputs[0].shape[1]) if module is vit.norm else None
    )
    vit(numbered((2, 3, 32, 32)))
    handle.remove()
    assert seen == [17]


def test_dropout_in_the_last_block_draws_for_all_tokens():
    vit = vits.vit_nano(8, img_size=32, drop_rate=0.1)
    images = numbered((2, 3, 32, 32))
    states = []
    for hook in (False, True):
        if hook:
            vit.norm.register_forward_hook(lambda *_: None)
        torch.manual_seed(0)
        states.append((vit(images), torch.get_rng_state()))
    assert torch.equal(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])


@pytest.mark.parametrize("size", [32, 64])
def test_attention_in_bfloat16_on_a_cpu_is_that_of_torchs_fused_kernel(size):
    attention = vits.Attention(96, num_heads=3, qkv_bias=True)
    x = numbered((2, (size // 4) ** 2, 96), seed=1)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = attention.fused(x)
        q, k, v = attention.queries_keys_values(x)
        expected = attention.project(F.scaled_dot_product_attention(q, k, v))
    assert found.dtype == torch.bfloat16
    # both round to 8 bits, in other places; the outputs are of order 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=expected.abs().max().item() / 64)


@pytest.mark.parametrize(("patch_size", "channels"), [(8, 3), (5, 6)])
def test_patch_embedding_as_a_matrix_product_is_the_convolution(patch_size, channels):
    embed = vits.PatchEmbed(patch_size * 4, patch_size, channels, 24).double()
    images = numbered((2, channels, 3 * patch_size, 4 * patch_size)).double()
    product = F.linear(embed.pixels(images), embed.proj.weight.flatten(1), embed.proj.bias)
    torch.testing.assert_close(product, embed(images), rtol=0, atol=1e-12)


def test_patch_embedding_is_a_convolution_where_a_product_would_not_be_the_same():
    embed, images = vits.PatchEmbed(32, 8, 3, 24), numbered((2, 3, 32, 32))
    with torch.autocast("cpu", torch.bfloat16):
        assert embed.is_matrix_product(images)
        torch.testing.assert_close(
            embed(images).float(),
            F.conv2d(images, embed.proj.weight, embed.proj.bias, stride=8).flatten(2).mT.float(),
            rtol=0.02,
            atol=0.02,
        )
        embed.proj.stride = (4, 4)
        assert embed(images).shape == (2, 49, 24)
        embed.proj.stride, seen = (8, 8), []
        embed.proj.register_forward_hook(lambda _, __, output: seen.append(output.shape))
        embed(images)
    assert seen == [(2, 24, 4, 4)]
    assert not embed.is_matrix_product(images), "in float32 on a CPU the convolution is faster"


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


def test_stochastic_depth_drops_the_samples_that_the_official_formula_drops():
    for drop_prob in (0.0, 0.1, 0.9):
        torch.manual_seed(0)
        found = vits.DropPath(drop_prob)(torch.ones(1000, 1, 1))
        torch.manual_seed(0)
        keep_prob = 1 - drop_prob
        expected = torch.floor(keep_prob + torch.rand(1000, 1, 1)) / keep_prob
        torch.testing.assert_close(found, expected)


def test_a_rate_of_stochastic_depth_can_be_changed():
    drop_path = vits.DropPath(0.1)
    drop_path.drop_prob = 0.5
    assert set(drop_path(torch.ones(100, 1)).flatten().tolist()) == {0.0, 2.0}


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
