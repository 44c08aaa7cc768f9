# SPDX-License-Identifier: Apache-2.0
"""Schedules, parameter groups, clipping and LARS, against official runs and formulas typed out."""

import argparse

import numpy as np
import pytest
import torch

import utils
from dino.networks import MultiCropWrapper
from dino.precision import choose_amp_dtype
from vision_transformer import DINOHead, vit_nano


@pytest.mark.parametrize(
    ("epoch", "lr", "weight_decay"),
    [
        (0, 4.99820136696111e-05, 0.04002958960483863),
        (1, 0.00014998601063191967, 0.04020716317255338),
        (49, 0.0005958076746498755, 0.2171716692678112),
    ],
)
def test_epoch_means_equal_those_in_the_log_of_an_official_run(epoch, lr, weight_decay):
    """8 GPUs of 64 images, 2502 iterations per epoch: facebookresearch/dino issues 76 and 280."""
    this_epoch = slice(2502 * epoch, 2502 * (epoch + 1))
    lrs = utils.cosine_scheduler(0.0005 * 512 / 256, 1e-6, 100, 2502, warmup_epochs=10)
    decays = utils.cosine_scheduler(0.04, 0.4, 100, 2502)
    assert lrs[this_epoch].mean() == pytest.approx(lr, rel=1e-12)
    assert decays[this_epoch].mean() == pytest.approx(weight_decay, rel=1e-12)


def test_schedule_has_its_base_value_twice_and_never_reaches_the_final_one():
    schedule = utils.cosine_scheduler(1.0, 0.1, epochs=4, niter_per_ep=5, warmup_epochs=1)
    assert len(schedule) == 20
    assert schedule[0] == 0
    np.testing.assert_array_equal(schedule[4:6], [1.0, 1.0])
    assert 0.1 < schedule[-1] < 0.12


def test_a_warm_up_as_long_as_the_run_is_all_warm_up_and_a_longer_one_is_refused():
    assert utils.cosine_scheduler(1.0, 0.0, 2, 3, warmup_epochs=2)[-1] == 1.0
    with pytest.raises(ValueError, match="3 epochs does not fit into 2"):
        utils.cosine_scheduler(1.0, 0.0, 2, 3, warmup_epochs=3)


def test_only_biases_and_one_dimensional_parameters_escape_weight_decay():
    model = MultiCropWrapper(vit_nano(8), DINOHead(96, 32, norm_last_layer=False, hidden_dim=16))
    names = {id(param): name for name, param in model.named_parameters()}
    decayed, free = utils.get_params_groups(model)
    decayed_names = {names[id(param)] for param in decayed["params"]}
    assert free["weight_decay"] == 0
    assert "weight_decay" not in decayed
    for name in ("backbone.cls_token", "backbone.pos_embed", "backbone.patch_embed.proj.weight"):
        assert name in decayed_names
    for name in ("head.last_layer.weight_v", "head.last_layer.weight_g"):
        assert name in decayed_names
    assert not any("norm" in name or name.endswith("bias") for name in decayed_names)
    assert len(decayed["params"]) + len(free["params"]) == len(names)


def test_a_fixed_norm_of_the_last_layer_is_in_no_group():
    head = DINOHead(96, 32, hidden_dim=16)
    in_groups = [param for group in utils.get_params_groups(head) for param in group["params"]]
    assert not any(param is head.last_layer.weight_g for param in in_groups)


def test_each_gradient_tensor_is_clipped_by_its_own_norm():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    for i, param in enumerate(model.parameters()):
        param.grad = torch.full_like(param, 10.0**i / 100)
    model[1].bias.grad = None
    before = [param.grad.clone() for param in model.parameters() if param.grad is not None]
    norms = utils.clip_gradients(model, 0.3)
    after = [param.grad for param in model.parameters() if param.grad is not None]
    for norm, was, now in zip(norms, before, after, strict=True):
        assert norm.item() == pytest.approx(was.norm().item())
        expected = was * min(1.0, 0.3 / (was.norm().item() + 1e-6))
        torch.testing.assert_close(now, expected)
    assert {round(grad.norm().item(), 3) for grad in after} == {0.04, 0.2, 0.3}


def test_lars_equals_its_formula_and_leaves_one_dimensional_parameters_to_sgd():
    torch.manual_seed(0)
    weight, bias = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(3))
    groups = [{"params": [weight, bias], "weight_decay": 0.1}]
    optimizer = utils.LARS(groups, lr=0.5, momentum=0.9, eta=0.02)
    expected_weight, expected_bias = weight.detach().double(), bias.detach().double()
    momentum_weight = momentum_bias = 0.0
    for step in range(3):
        weight.grad, bias.grad = torch.full((3, 4), 0.1 * step + 0.1), torch.full((3,), 0.3)
        optimizer.step()
        update = weight.grad.double() + 0.1 * expected_weight
        update = update * 0.02 * expected_weight.norm() / update.norm()
        momentum_weight = 0.9 * momentum_weight + update
        momentum_bias = 0.9 * momentum_bias + bias.grad.double()
        expected_weight = expected_weight - 0.5 * momentum_weight
        expected_bias = expected_bias - 0.5 * momentum_bias
    torch.testing.assert_close(weight.detach().double(), expected_weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias.detach().double(), expected_bias, rtol=1e-5, atol=1e-6)


def test_lars_takes_the_official_filters_which_change_nothing():
    weights = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    filtered = utils.LARS(
        [weights[0]], 0.5, 0.1, 0.9, 0.02, lambda param: False, lambda param: True
    )
    plain = utils.LARS([weights[1]], 0.5, 0.1, 0.9, 0.02)
    for weight, optimizer in zip(weights, (filtered, plain), strict=True):
        weight.grad = torch.full((2, 2), 0.3)
        optimizer.step()
    assert torch.equal(*weights)
    assert filtered.param_groups[0]["lars_adaptation_filter"](weights[0])
    assert plain.param_groups[0]["weight_decay_filter"] is None


def test_lars_takes_a_plain_step_where_a_norm_is_zero():
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    utils.LARS([weight], lr=0.5).step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), -0.5))


@pytest.mark.parametrize(
    ("text", "value"), [("True", True), ("on", True), ("1", True), ("OFF", False)]
)
def test_bool_flag_reads_the_official_words(text, value):
    assert utils.bool_flag(text) is value


def test_bool_flag_refuses_other_words_by_name():
    with pytest.raises(argparse.ArgumentTypeError, match="maybe"):
        utils.bool_flag("maybe")


@pytest.mark.parametrize(
    ("use_fp16", "amp_dtype", "device", "expected"),
    [
        (True, "auto", "cpu", torch.float32),
        (True, "bfloat16", "cpu", torch.bfloat16),
        (False, "auto", "cpu", torch.float32),
        (True, "float32", "cuda", torch.float32),
        pytest.param(True, "auto", "cuda", torch.bfloat16, marks=pytest.mark.cuda),
    ],
)
def test_mixed_precision_is_what_the_device_has(use_fp16, amp_dtype, device, expected):
    assert choose_amp_dtype(amp_dtype, torch.device(device), use_fp16) is expected
