# SPDX-License-Identifier: Apache-2.0
"""main_dino.py as a user runs it: what it writes, how it resumes, what it refuses."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, photograph, run_script
from helpers import assert_equal_states, final_state, parse, state_for_a_step
from PIL import Image

import eval_knn
import main_dino
import utils
from dino.data.augmentations import LinearProbeAugmentation
from dino.errors import Diverged
from dino.training.failures import explain_divergence
from dino.training.finetuning import FineTuningAugmentation
from dino.training.flags import parse_args
from dino.weights.pretrained import open_backbone


def train(data, output_dir, *flags):
    command = ("main_dino.py", *SMALL_RUN, "--data_path", data, "--output_dir", output_dir)
    return run_script(*command, *flags)


@pytest.fixture(scope="module")
def finished(class_folders, tmp_path_factory):
    """A run of three epochs, each checkpoint kept, with its k-NN accuracy, and its output."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    flags = ("--epochs", 3, "--saveckp_freq", 1, "--log_freq", 2, "--knn_freq", 2)
    result = train(class_folders / "train", folder, *flags, "--knn_data_path", class_folders)
    assert result.returncode == 0, result.stderr
    return folder, flags, result


def test_a_run_leaves_the_files_that_the_readme_lists(finished):
    folder, _, _ = finished
    names = {path.name for path in folder.iterdir()}
    checkpoints = {"checkpoint.pth", *(f"checkpoint000{epoch}.pth" for epoch in range(3))}
    assert checkpoints | {"args.json", "backbone.pth", "log.txt"} <= names
    assert json.loads((folder / "args.json").read_text())["out_dim"] == 64


def test_log_has_the_official_keys_first_and_their_official_values(finished):
    folder, _, _ = finished
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    assert [list(line)[:4] for line in lines] == [
        ["train_loss", "train_lr", "train_wd", "epoch"]
    ] * 3
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    lrs = utils.cosine_scheduler(0.0005 * 4 / 256, 1e-6, 3, 6, warmup_epochs=1)
    for epoch, line in enumerate(lines):
        assert line["train_lr"] == pytest.approx(np.mean(lrs[6 * epoch : 6 * epoch + 6]))
        assert 0 < line["train_loss"] < 2 * math.log(64)


def test_output_says_what_follows_from_the_flags_and_where_the_result_is(finished, class_folders):
    folder, _, result = finished
    assert f"The result is {folder / 'backbone.pth'}; beside it curves.png" in result.stdout
    assert "24 images, 6 iterations of 4 images per epoch, 18 in all" in result.stdout
    assert "learning rate 0.0005 x 4 / 256 = 7.81e-06" in result.stdout
    assert "ln(out_dim) = 4.159" in result.stdout
    assert f"held-out images of {class_folders}" in result.stdout
    for name in ("raw pixels", "untrained backbone", "trained backbone"):
        assert f"  {name}" in result.stdout


def test_resumed_run_ends_where_the_unbroken_run_ends(finished, class_folders, tmp_path):
    """Also with loader workers where the other had none; stochastic depth is on."""
    folder, flags, _ = finished
    shutil.copy(folder / "checkpoint0000.pth", tmp_path / "checkpoint.pth")
    resumed = train(
        *(class_folders / "train", tmp_path, *flags, "--knn_data_path", class_folders),
        *("--num_workers", 2),
    )
    assert "1 of 3 epochs are done" in resumed.stdout
    assert_equal_states(final_state(folder), final_state(tmp_path))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    finished, class_folders, tmp_path
):
    folder, flags, _ = finished
    for seed in (0, 1):
        train(
            *(class_folders / "train", tmp_path / str(seed), *flags, "--seed", seed),
            *("--knn_data_path", class_folders),
        )
    assert_equal_states(final_state(folder), final_state(tmp_path / "0"))
    first = final_state(folder)["student"]["module.backbone.cls_token"]
    assert not torch.equal(
        first, final_state(tmp_path / "1")["student"]["module.backbone.cls_token"]
    )


def test_a_finished_run_has_nothing_left_to_do(finished, class_folders):
    folder, flags, _ = finished
    before = (folder / "checkpoint.pth").read_bytes()
    again = train(class_folders / "train", folder, *flags, "--knn_data_path", class_folders)
    assert again.returncode == 0, again.stderr
    assert "3 of 3 epochs are done" in again.stdout
    assert (folder / "checkpoint.pth").read_bytes() == before


def test_a_checkpoint_that_does_not_fit_is_an_error(finished, class_folders, tmp_path):
    folder, flags, _ = finished
    shutil.copy(folder / "checkpoint0000.pth", tmp_path / "checkpoint.pth")
    result = train(class_folders / "train", tmp_path, *flags, "--out_dim", 32)
    assert result.returncode == 2
    assert "--out_dim 32: " in result.stderr
    assert "checkpoint.pth is of a run with 64" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_checkpoint(
    finished, class_folders, tmp_path
):
    folder, _, _ = finished
    shutil.copy(folder / "checkpoint0000.pth", tmp_path / "checkpoint.pth")
    good = (tmp_path / "checkpoint.pth").read_bytes()
    flags = ("--epochs", 3, "--lr", 1e30, "--clip_grad", 0, "--optimizer", "adamw")
    result = train(class_folders / "train", tmp_path, *flags)
    assert result.returncode == 1
    assert "epoch 1, iteration" in result.stderr
    assert "--lr 1e+30" in result.stderr
    assert "Try a lower --lr" in result.stderr, "it was float32 already"
    assert "Traceback" not in result.stderr
    assert (tmp_path / "checkpoint.pth").read_bytes() == good


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        ("--amp_dtype float16", "Try --amp_dtype bfloat16 or, slower, float32, a lower --lr,"),
        ("--amp_dtype bfloat16", "Try --amp_dtype float32, a lower --lr,"),
        ("--amp_dtype float32", "Try a lower --lr,"),
        ("--use_fp16 false", "Try a lower --lr,"),
    ],
)
def test_another_precision_is_advised_where_there_is_a_safer_one(flags, advice):
    args = parse_args([*flags.split(), "--output_dir", "nowhere"])
    explained = str(explain_divergence(Diverged("the loss is nan"), args))
    assert explained.startswith("the loss is nan (--lr 0.0005 for 256 images")
    assert f"nothing is saved yet. {advice}" in explained


def test_a_divergence_names_what_auto_decided(class_folders, tmp_path):
    flags = ("--preset", "auto", "--epochs", 3, "--num_workers", 0, "--weight_decay", 1e30)
    flags += ("--device", "cpu")
    data = ("--data_path", class_folders / "train", "--output_dir", tmp_path)
    result = run_script("main_dino.py", *flags, *data)
    assert result.returncode == 1, result.stderr
    assert "(--lr 0.006 for 256 images)" in result.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ("--arch", "resnet18", "--optimizer", "lars"),
        ("--arch", "xcit_nano_12_p16", "--optimizer", "sgd"),
        ("--local_crops_number", 0, "--amp_dtype", "bfloat16", "--norm_last_layer", "false"),
    ],
)
def test_other_networks_optimizers_and_precisions_train(class_folders, tmp_path, flags):
    result = train(class_folders / "train", tmp_path, *flags, "--epochs", 1)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "backbone.pth").exists()


def test_a_step_equals_algorithm_1_written_out_in_its_order():
    """Against plain autograd and loops; three steps, the first with a frozen last layer."""
    ours, by_hand = state_for_a_step(), state_for_a_step()
    for step in range(3):
        torch.manual_seed(step)
        images = [torch.randn(4, 3, size, size) for size in (32, 32, 16, 16)]
        epoch, lr, weight_decay, momentum = min(step, 1), 0.1, 0.1, 0.9
        loss, _ = main_dino.train_step(
            ours,
            images,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            epoch=epoch,
            clip_grad=0.1,
            freeze_last_layer=1,
            amp_dtype=torch.float32,
        )
        expected = step_by_hand(by_hand, images, lr, weight_decay, momentum, epoch)
        # the loss is a difference of sums that are up to a hundred times as large
        assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for name in ("student", "teacher"):
        pairs = zip(
            getattr(ours, name).named_parameters(),
            getattr(by_hand, name).parameters(),
            strict=True,
        )
        for (key, value), expected in pairs:
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=f"{name} {key}")
    torch.testing.assert_close(ours.dino_loss.center, by_hand.dino_loss.center)


def step_by_hand(state, images, lr, weight_decay, momentum, epoch):
    student, teacher, center = state.student, state.teacher, state.dino_loss.center
    t = [teacher([image]).detach() for image in images[:2]]
    s = [student([image]) for image in images]
    pairs = [(i, j) for i in range(2) for j in range(4) if i != j]
    loss = 0.0
    for i, j in pairs:
        target = torch.softmax((t[i] - center) / 0.04, dim=1)
        loss = loss - (target * torch.log_softmax(s[j] / 0.1, dim=1)).sum(1).mean() / len(pairs)
    center.copy_(0.9 * center + 0.1 * torch.cat(t).mean(0, keepdim=True))
    state.optimizer.zero_grad()
    loss.backward()
    for name, param in student.named_parameters():
        if param.grad is None:
            continue
        norm = param.grad.norm().item()
        if norm > 0.1:
            param.grad.mul_(0.1 / (norm + 1e-6))
        if epoch < 1 and "last_layer" in name:
            param.grad = None
    for group, decay in zip(state.optimizer.param_groups, (weight_decay, 0.0), strict=True):
        group.update(lr=lr, weight_decay=decay)
    state.optimizer.step()
    with torch.no_grad():
        for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
            mine.copy_(momentum * mine + (1 - momentum) * theirs)
    return loss.item()


def test_evaluations_shrink_images_as_the_run_did(class_folders, tmp_path):
    flags = ("--shrink_images", "20", "--epochs", "1", "--device", "cpu", "--report", "false")
    data = ("--data_path", class_folders / "train", "--output_dir", tmp_path)
    main_dino.train_dino(parse_args([str(flag) for flag in (*SMALL_RUN, *flags, *data)]))
    large = photograph().resize((45, 60))
    small = large.resize((20, 26), Image.BICUBIC)
    for name in ("backbone.pth", "checkpoint.pth"):
        args = parse(eval_knn, "--pretrained_weights", tmp_path / name)
        pretrained = open_backbone(args)
        assert torch.equal(pretrained.transform(large), pretrained.transform(small))
    mean, std = pretrained.mean, pretrained.std
    for build in (
        lambda **options: LinearProbeAugmentation(32, mean, std, **options),
        lambda **options: FineTuningAugmentation(32, mean, std, (0.3, 1.0), "", **options),
    ):
        found, expected = build(shorter_side=20)(large, (1, 2)), build()(small, (1, 2))
        assert torch.equal(found, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("amp_dtype", ["float32", "bfloat16", "float16"])
def test_a_run_on_a_gpu_writes_what_a_run_on_a_cpu_writes(class_folders, tmp_path, amp_dtype):
    flags = ("--device", "cuda", "--amp_dtype", amp_dtype, "--compile", "false")
    result = train(class_folders / "train", tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert ("fp16_scaler" in checkpoint) is (amp_dtype == "float16")
    assert "max mem" in result.stdout
