# SPDX-License-Identifier: Apache-2.0
"""What makes a step faster or smaller leaves its numbers alone."""

import copy

import pytest
import torch
from conftest import run_processes
from helpers import state_for_a_step
from torch.nn.parallel import DistributedDataParallel

import main_dino
from dino.networks import compile_networks
from dino.optim import build_optimizer, get_params_groups
from vision_transformer import VisionTransformer, vit_nano

STEP = dict(
    lr=0.1,
    weight_decay=0.1,
    momentum=0.9,
    epoch=1,
    clip_grad=0.1,
    freeze_last_layer=1,
    amp_dtype=torch.float32,
)


def steps(state, batch=8, share=slice(None), **options):
    """Losses of two steps on the same random views, of which this process has a `share`."""
    losses = []
    for seed in range(2):
        torch.manual_seed(seed)
        images = [torch.randn(batch, 3, size, size)[share] for size in (32, 32, 16, 16)]
        losses.append(main_dino.train_step(state, images, **STEP | options)[0].item())
    return losses


def assert_equal_training(found, expected):
    """Weights, center and losses: sums in another order, through two steps, in float32."""
    (state, losses), (expected_state, expected_losses) = found, expected
    assert losses == pytest.approx(expected_losses, rel=1e-5, abs=1e-6)
    for name in ("student", "teacher", "dino_loss"):
        ours, reference = (getattr(s, name).state_dict() for s in (state, expected_state))
        for key, value in reference.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5, msg=f"{name} {key}")


@pytest.fixture(scope="module")
def plain():
    state = state_for_a_step()
    return state, steps(state)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_step_in_parts_equals_the_unsplit_step(plain, parts):
    state = state_for_a_step()
    state.dino_loss.accum_steps = parts
    assert_equal_training((state, steps(state, accum_steps=parts)), plain)


def half_of_the_batch_in_parts(rank_of):
    state = state_for_a_step()
    state.dino_loss.accum_steps = 2
    state.student = DistributedDataParallel(state.student, gradient_as_bucket_view=True)
    rank = torch.distributed.get_rank()
    losses = steps(state, share=slice(4 * rank, 4 * rank + 4), accum_steps=2)
    return state.student.module.state_dict(), state.dino_loss.center, losses


def test_parts_on_two_processes_equal_the_unsplit_step_of_one(plain, tmp_path):
    state, losses = plain
    ranks = run_processes(half_of_the_batch_in_parts, 2, tmp_path, None)
    for weights, center, _ in ranks:
        torch.testing.assert_close(center, state.dino_loss.center)
        for key, value in state.student.state_dict().items():
            torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-5, msg=key)
    means = torch.tensor([rank[2] for rank in ranks]).mean(dim=0)
    assert means.tolist() == pytest.approx(losses, rel=1e-5, abs=1e-6)


def test_checkpointed_gradients_equal_the_kept_ones(plain):
    state = state_for_a_step()
    state.student.backbone.set_grad_checkpointing()
    assert_equal_training((state, steps(state)), plain)


def test_checkpointing_drops_the_same_paths_when_it_computes_again():
    """The masks are drawn once more in the backward pass, from the state they were drawn from."""
    kept = vit_nano(8, img_size=32, drop_path_rate=0.5)
    again = copy.deepcopy(kept)
    again.set_grad_checkpointing()
    images = torch.randn(4, 3, 32, 32)
    for model in (kept, again):
        torch.manual_seed(0)
        model(images).square().sum().backward()
    for expected, found in zip(kept.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_checkpointing_keeps_less_for_the_backward_pass():
    kept = {}
    for enable in (False, True):
        model = VisionTransformer([32], 8, embed_dim=48, depth=4, num_heads=3)
        model.set_grad_checkpointing(enable)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: saved.append(tensor.nelement()) or tensor, lambda x: x
        ):
            model(torch.randn(4, 3, 32, 32))
        kept[enable] = sum(saved)
    assert kept[True] < kept[False] / 3


def test_compiled_networks_and_loss_give_the_same_numbers():
    """Two blocks suffice, since all are alike; fused kernels round in other places: 1e-4."""
    results = []
    for compiled in (False, True):
        state = state_for_a_step()
        for network in (state.student, state.teacher):
            del network.backbone.blocks[2:]
        if compiled:
            compile_networks(state.student, state.teacher, state.dino_loss)
        results.append((state, steps(state)))
    assert_equal_training(*reversed(results))
    assert results[0][0].student.state_dict().keys() == results[1][0].student.state_dict().keys()


@pytest.mark.cuda
@pytest.mark.parametrize("amp_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_on_a_gpu_never_waits_for_the_device(amp_dtype):
    device = torch.device("cuda", 0)
    state = state_for_a_step()
    for network in (state.student, state.teacher, state.dino_loss):
        network.to(device)
    state.optimizer = build_optimizer("adamw", get_params_groups(state.student))
    state.scaler = torch.amp.GradScaler("cuda", enabled=amp_dtype == torch.float16)
    images = [torch.randn(4, 3, size, size, device=device) for size in (32, 32, 16, 16)]
    options = STEP | dict(amp_dtype=amp_dtype)
    main_dino.train_step(state, images, **options)  # makes what is made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        main_dino.train_step(state, images, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
