# SPDX-License-Identifier: Apache-2.0
"""What the Vision Transformer leaves out, or does otherwise, for speed: the numbers stay.

And whoever looks at what is left out still sees it.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import fill, numbered
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vision_transformer as vits


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


class Copies(TorchDispatchMode):
    """Counts the elements that `clone` copies."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.clone.default:
            self.elements += output.numel()
        return output


def test_unpacking_qkv_costs_one_copy_in_the_backward_pass_and_not_two(monkeypatch):
    """The official code permutes before it unpacks: one more copy of the gradient of all three."""

    def official(self, x):
        shape = *x.shape[:2], 3, self.num_heads, -1
        return self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)

    def copied():
        x = numbered((4, 37, 96), seed=1).requires_grad_()
        with Copies() as copies:
            attention.fused(x).square().sum().backward()
        return copies.elements / x.numel(), x.grad

    attention = fill(vits.Attention(96, 3, qkv_bias=True))
    found, gradient = copied()
    monkeypatch.setattr(vits.Attention, "queries_keys_values", official)
    expected, official_gradient = copied()
    assert found <= expected - 3
    torch.testing.assert_close(gradient, official_gradient)


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


@pytest.mark.parametrize(("tokens", "fused"), [(1024, False), (1025, True)])
def test_attention_in_bfloat16_on_a_cpu_is_fused_where_that_is_faster(tokens, fused, monkeypatch):
    attention, calls = vits.Attention(24, num_heads=3), []
    kernel = F.scaled_dot_product_attention
    counted = lambda *args, **options: calls.append(1) or kernel(*args, **options)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        attention.fused(numbered((1, tokens, 24), seed=1))
    assert bool(calls) == fused


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
