# SPDX-License-Identifier: Apache-2.0
"""The switches of the paper's ablations against definitions typed out; the default uses none."""

import functools

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, run_processes
from helpers import assert_equal_states, final_state

import main_dino
from dino.ablations import AblatedLoss, build_loss, sinkhorn_knopp
from dino.distributed import get_rank, get_world_size
from dino.loss import DINOLoss
from dino.networks import unwrap
from dino.randomness import fix_random_seeds
from dino.training.flags import parse_args
from dino.weights.files import write_atomically

CPU = torch.device("cpu")


def small_args(*flags):
    return parse_args([str(flag) for flag in (*SMALL_RUN, "--drop_path_rate", 0, *flags)])


def small_state(*flags):
    args = small_args(*flags)
    fix_random_seeds(0)
    views = main_dino.build_augmentation(args).views
    return args, main_dino.build_state(args, views, CPU, torch.float32)


def steps(*flags, count=4, iterations_per_epoch=2):
    """Yield (student, teacher, state) after each of some steps, the first pair before them."""
    args, state = small_state(*flags)
    schedules = main_dino.build_schedules(args, 0.1, iterations_per_epoch)
    yield weights(state.student), weights(state.teacher), state
    for iteration in range(count):
        generator = torch.Generator().manual_seed(iteration)
        images = [torch.randn(4, 3, size, size, generator=generator) for size in (32, 32, 16, 16)]
        main_dino.train_step(
            state,
            [view[get_rank() :: get_world_size()] for view in images],
            **{name: line[iteration] for name, line in schedules.items()} | {"lr": 0.1},
            epoch=iteration // iterations_per_epoch,
            clip_grad=3.0,
            freeze_last_layer=0,
            amp_dtype=torch.float32,
        )
        yield weights(state.student), weights(state.teacher), state


def weights(network):
    return {name: value.clone() for name, value in unwrap(network).named_parameters()}


def is_equal(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


# ---- the teacher ----


def test_each_teacher_is_the_student_that_its_name_says():
    """The teacher with which iteration i begins, of two epochs of two iterations."""
    age = {"student": (0, 1, 2, 3), "previous_iteration": (0, 0, 1, 2), "previous_epoch": (0,) * 2}
    age["previous_epoch"] += (2, 2)
    for update, students in age.items():
        found = list(steps("--teacher_update", update, "--epochs", 2))
        history = [student for student, _, _ in found]
        assert not is_equal(history[0], history[1])
        for i, student in enumerate(students):
            assert is_equal(found[i][1], history[student]), (update, i)


def test_a_constant_momentum_is_the_same_at_every_iteration():
    args = small_args("--momentum_teacher", 0.9, "--momentum_teacher_end", 0.9)
    assert set(main_dino.build_schedules(args, 0.1, 5)["momentum"]) == {0.9}
    rising = main_dino.build_schedules(small_args("--momentum_teacher", 0.9), 0.1, 5)["momentum"]
    assert rising[0] == 0.9
    assert (np.diff(rising) > 0).all()


# ---- the loss ----


def logits(rows, seed, outputs=8):
    return torch.randn(rows, outputs, generator=torch.Generator().manual_seed(seed))


def test_a_center_momentum_of_1_is_a_loss_without_a_center():
    loss = build_loss("cross_entropy", 0, 8, 3, 0.04, 0.04, 0, 1, center_momentum=1.0)
    for seed in range(3):
        value = loss(logits(6, seed), logits(4, seed + 9), 0)
    targets = (logits(4, 11).double() / 0.04).softmax(1).chunk(2)
    students = (logits(6, 2).double() / 0.1).log_softmax(1).chunk(3)
    pairs = [(t, s) for t in range(2) for s in range(3) if t != s]
    expected = -sum((targets[t] * students[s]).sum(1).mean() for t, s in pairs) / len(pairs)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(loss.center, torch.zeros(1, 8))


def test_mean_squared_error_is_that_of_the_probabilities_of_each_pair_of_views():
    loss = build_loss("mse", 0, 8, 3, 0.04, 0.04, 0, 1)
    loss.center.copy_(logits(1, 5))
    center = loss.center.double()
    student, teacher = logits(6, 0).requires_grad_(), logits(4, 1)
    value = loss(student, teacher, 0)
    targets = ((teacher.double() - center) / 0.04).softmax(1).chunk(2)
    students = (student.double() / 0.1).softmax(1).chunk(3)
    pairs = [(t, s) for t in range(2) for s in range(3) if t != s]
    expected = sum((targets[t] - students[s]).pow(2).sum(1).mean() for t, s in pairs) / len(pairs)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    value.backward()
    assert student.grad.abs().sum() > 0
    torch.testing.assert_close(loss.center.double(), 0.9 * center + 0.1 * teacher.double().mean(0))


def test_sinkhorn_knopp_equals_its_definition_in_float64():
    """As pseudo-code of the paper's App. B: columns, then rows, are divided by their sums."""
    for iterations in (1, 3):
        expected = torch.exp(logits(6, 0).double() / 0.1)
        for _ in range(iterations):
            expected /= expected.sum(0, keepdim=True)
            expected /= expected.sum(1, keepdim=True)
        found = sinkhorn_knopp(logits(6, 0) / 0.1, iterations)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)
    batch_softmax = (logits(6, 0) / 0.1).softmax(0)
    expected = batch_softmax / batch_softmax.sum(1, keepdim=True)
    torch.testing.assert_close(sinkhorn_knopp(logits(6, 0) / 0.1, 1), expected)


def test_sinkhorn_knopp_gives_every_output_its_share_of_the_images():
    probs = sinkhorn_knopp(3 * logits(64, 0), 100)
    torch.testing.assert_close(probs.sum(1), torch.ones(64))
    torch.testing.assert_close(probs.sum(0), torch.full((8,), 8.0), rtol=1e-3, atol=0)
    assert sinkhorn_knopp(1000 * logits(64, 0), 3).isfinite().all(), "exp of it is infinite"


def test_sinkhorn_knopp_takes_the_place_of_the_center():
    loss = build_loss("cross_entropy", 3, 8, 3, 0.04, 0.04, 0, 1)
    student, teacher = logits(6, 0), logits(4, 1)
    value = loss(student, teacher, 0)
    targets = sinkhorn_knopp(teacher / 0.04, 3).chunk(2)
    students = (student / 0.1).log_softmax(1).chunk(3)
    pairs = [(t, s) for t in range(2) for s in range(3) if t != s]
    expected = -sum((targets[t] * students[s]).sum(1).mean() for t, s in pairs) / len(pairs)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(loss.center, torch.zeros(1, 8))


# ---- the predictor ----


def test_a_predictor_is_the_students_alone_and_learns():
    for use_bn in ("false", "true"):
        found = list(steps("--predictor", "true", "--use_bn_in_head", use_bn, count=2))
        (student, teacher, state), (after, teacher_after, _) = found[0], found[-1]
        extra = student.keys() - teacher.keys()
        assert extra
        assert all(name.startswith("head.predictor.") for name in extra)
        assert is_equal(teacher, student), "they begin alike, but for it"
        assert not torch.equal(after["head.predictor.0.weight"], student["head.predictor.0.weight"])
        for name in teacher:  # momentum 0.996 at the first step, then the middle of its cosine to 1
            moved = (teacher_after[name] - teacher[name]).abs().max()
            assert moved <= 0.01 * (after[name] - student[name]).abs().max() + 1e-7, name
        features = torch.randn(5, 96)
        by_hand = state.student.eval().head
        bottleneck = by_hand.predictor(torch.nn.Sequential(*by_hand.mlp)(features))
        expected = by_hand.last_layer(torch.nn.functional.normalize(bottleneck, dim=-1))
        torch.testing.assert_close(by_hand(features), expected)


# ---- what they must not disturb ----


def test_the_default_uses_none_of_them():
    _, state = small_state()
    assert type(state.dino_loss) is DINOLoss
    assert not isinstance(state.dino_loss, AblatedLoss)
    assert not state.optimizer._optimizer_step_pre_hooks
    assert weights(state.student).keys() == weights(state.teacher).keys()


def sinkhorn_steps():
    flags = ("--sinkhorn_iterations", 3, "--loss", "mse", "--predictor", "true")
    found = list(steps(*flags, "--optimizer", "sgd", "--use_bn_in_head", "true"))
    return found[-1][0], found[-1][1]


def test_two_processes_take_the_steps_of_one_with_every_switch(tmp_path):
    student, teacher = sinkhorn_steps()
    for found in run_processes(sinkhorn_steps, 2, tmp_path):
        for expected, values in zip((student, teacher), found, strict=True):
            for name, value in expected.items():
                torch.testing.assert_close(values[name], value, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    "flags",
    [
        ("--teacher_update", "previous_epoch"),
        (
            *("--teacher_update", "previous_iteration", "--sinkhorn_iterations", 3),
            *("--loss", "mse", "--predictor", "true"),
        ),
    ],
    ids=["previous_epoch", "all the others"],
)
def test_a_run_resumed_inside_an_epoch_ends_where_the_unbroken_run_ends(
    flags, class_folders, tmp_path, monkeypatch
):
    train = functools.partial(train_in, class_folders / "train", flags)
    kept = []

    def write_and_keep(payload, path, keep_as=None):
        kept.append(payload)
        write_atomically(payload, path, keep_as=keep_as)

    monkeypatch.setattr("dino.training.saver.write_atomically", write_and_keep)
    train(tmp_path / "unbroken")
    inside = [payload for payload in kept if payload.get("iteration") == 8]
    assert inside, "6 steps in an epoch, a save at every fourth"
    (tmp_path / "resumed").mkdir()
    write_atomically(inside[0], tmp_path / "resumed" / "checkpoint.pth")
    train(tmp_path / "resumed")
    assert_equal_states(final_state(tmp_path / "unbroken"), final_state(tmp_path / "resumed"))


def train_in(data, flags, folder):
    flags = (*SMALL_RUN, "--saveckp_iters", 4, *flags, "--data_path", data, "--output_dir", folder)
    main_dino.train_dino(parse_args([str(flag) for flag in flags]))


def test_kl_of_a_run_with_squared_error_is_that_of_the_distributions(class_folders, tmp_path):
    from dino.run_log import RunLog

    train_in(class_folders / "train", ("--loss", "mse", "--log_freq", 3), tmp_path)
    for record in RunLog(tmp_path).read("loss"):
        assert record["loss"] < 2, "the squared distance of two distributions is at most 2"
        assert record["kl"] > -1e-5
        assert record["teacher_entropy"] > 0
