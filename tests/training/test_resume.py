# SPDX-License-Identifier: Apache-2.0
"""Going on with a run on purpose: from which checkpoint, with what changed, from whose weights."""

import argparse
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN
from helpers import assert_equal_states, final_state
from PIL import Image

from dino.data.loaders import training_loader
from dino.errors import UserError
from dino.run_log import RunLog
from dino.training.checkpoint import Progress, restore_progress
from dino.training.flag_checks import check_training_flags
from dino.training.flags import parse_args
from dino.training.saver import NEWEST, find_checkpoint
from dino.weights.files import read, write_atomically
from main_dino import train_dino

# Three epochs of six steps; each end of an epoch stays.
RUN = (*SMALL_RUN, "--epochs", 3, "--saveckp_freq", 1, "--saveckp_iters", 4, "--log_freq", 4)


@pytest.fixture(scope="module")
def data(class_folders):
    return str(class_folders / "train")


def train(data, folder, *flags):
    """main_dino.py in this process."""
    flags = [*RUN, "--data_path", data, "--output_dir", folder, *flags]
    train_dino(parse_args([str(flag) for flag in flags]))


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    train(data, folder)
    return folder


# ---- what a new run may replace ----


@pytest.mark.parametrize("name", ["args.json", "log.txt", "report.html", "neighbours.png"])
def test_a_new_run_replaces_no_file_that_no_run_wrote(data, tmp_path, name):
    (tmp_path / name).write_text('{"lr": 1}')
    with pytest.raises(UserError, match=f"holds {name}, which would be lost"):
        train(data, tmp_path)
    assert (tmp_path / name).read_text() == '{"lr": 1}'


def test_what_a_run_left_that_was_killed_before_its_first_checkpoint_is_replaced(
    data, unbroken, tmp_path
):
    for name in ("args.json", "log.txt", "curves.png"):
        shutil.copy(unbroken / name, tmp_path)
    flags = (*RUN, "--data_path", data, "--output_dir", tmp_path)
    check_training_flags(parse_args([str(flag) for flag in flags]))


# ---- which checkpoint ----


def test_resume_path_goes_on_in_a_new_folder_from_a_checkpoint_elsewhere(
    data, unbroken, tmp_path, capsys
):
    path, folder = tmp_path / "kept" / "epoch0.pth", tmp_path / "deep" / "run"
    path.parent.mkdir()
    shutil.copy(unbroken / "checkpoint0000.pth", path)
    before = path.read_bytes()
    train(data, folder, "--resume", path)
    assert f"Resumed from {path}: 1 of 3 epochs are done" in capsys.readouterr().out
    assert_equal_states(final_state(unbroken), final_state(folder))
    assert path.read_bytes() == before
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_same_command_with_a_path_goes_on_with_what_it_began(data, unbroken, tmp_path, capsys):
    """Interrupted, as by Slurm, and started again: it does not begin at that path once more."""
    path = unbroken / "checkpoint0000.pth"
    train(data, tmp_path, "--resume", path)
    epoch1 = torch.load(tmp_path / "checkpoint0001.pth", weights_only=True)
    write_atomically(epoch1, tmp_path / NEWEST)  # as if it had come only so far
    capsys.readouterr()
    train(data, tmp_path, "--resume", path)
    assert f"Resumed from {tmp_path / NEWEST}: 2 of 3 epochs" in capsys.readouterr().out
    assert_equal_states(final_state(unbroken), final_state(tmp_path))


def test_the_best_and_the_numbered_checkpoint_of_a_save_that_was_cut_off_are_written_after_all(
    data, tmp_path
):
    numbered, best = tmp_path / "checkpoint0000.pth", tmp_path / "checkpoint_best_rank.pth"
    best.mkdir()  # which a file cannot replace
    with pytest.raises(UserError, match="the last checkpoint could not be written"):
        train(data, tmp_path, "--epochs", 1)
    assert not numbered.exists()
    best.rmdir()
    train(data, tmp_path, "--epochs", 1)
    assert_equal_states(read(best)["teacher"], final_state(tmp_path)["teacher"])
    assert read(best)["best_rank"] == final_state(tmp_path)["best_rank"] > 0
    numbered.unlink()  # as if the run had been killed while it wrote the file
    train(data, tmp_path, "--epochs", 1)
    assert_equal_states(read(numbered), read(tmp_path / NEWEST))


def test_weights_that_a_resumed_run_does_not_start_from_are_named(data, unbroken, tmp_path, capsys):
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "backbone.pth"
    train(data, tmp_path, "--init_from", weights)
    said = capsys.readouterr().out
    assert f"--init_from {weights} has no effect" in said
    assert "whose run began from random weights" in said


@pytest.mark.parametrize("back", [False, True])
def test_a_command_that_leaves_nothing_to_train_changes_no_log(data, unbroken, tmp_path, back):
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    names = ("args.json", "log.txt", "metrics.jsonl")
    before = [(tmp_path / name).read_bytes() for name in names]
    first = ("--resume", tmp_path / "checkpoint0000.pth", "--epochs", 1)
    train(data, tmp_path, *(first if back else ()), "--center_momentum", 0.5)
    assert [(tmp_path / name).read_bytes() for name in names] == before


def test_resume_path_goes_back_within_a_folder_but_never_over_another_run(
    data, unbroken, tmp_path, capsys
):
    shutil.copytree(unbroken, tmp_path / "run")
    train(data, tmp_path / "run", "--resume", tmp_path / "run" / "checkpoint0000.pth")
    assert "checkpoint0000.pth: 1 of 3 epochs are done" in capsys.readouterr().out
    assert_equal_states(final_state(unbroken), final_state(tmp_path / "run"))
    before = (unbroken / NEWEST).read_bytes()
    with pytest.raises(UserError, match=r"--resume .*belongs to another run, which would be lost"):
        train(data, unbroken, "--resume", tmp_path / "run" / "checkpoint0001.pth")
    assert (unbroken / NEWEST).read_bytes() == before


def test_resume_never_refuses_a_folder_with_a_run_but_not_a_restart_of_its_own(
    data, unbroken, monkeypatch
):
    with pytest.raises(UserError, match=r"--resume never: .* belongs to another run"):
        train(data, unbroken, "--resume", "never")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun --max_restarts
    for resume in ("never", "somewhere/else.pth", "auto"):
        assert find_checkpoint(resume, unbroken)[0] == unbroken / NEWEST


@pytest.mark.cuda
def test_a_run_resumed_on_a_gpu_ends_where_the_unbroken_one_ends(data, tmp_path):
    """Up to the order of sums, which a GPU does not fix: on a CPU errors of 1e-6 in each layer move
    the losses by 1e-6 and the weights by 5e-4 of their way; without the states of the generators it
    is 2e-2 and 0.25.
    """
    flags = ("--device", "cuda", "--amp_dtype", "float32", "--compile", "false")
    folders = tmp_path / "unbroken", tmp_path / "resumed"
    train(data, folders[0], *flags)
    begun = folders[0] / "checkpoint0000.pth"
    train(data, folders[1], *flags, "--resume", begun)
    losses = [
        [json.loads(line)["train_loss"] for line in (folder / "log.txt").read_text().splitlines()]
        for folder in folders
    ]
    assert losses[1] == pytest.approx(losses[0][1:], rel=1e-3)
    start, expected, found = (
        torch.cat([weight.flatten() for weight in read(path)["student"].values()])
        for path in (begun, *(folder / NEWEST for folder in folders))
    )
    assert (found - expected).norm() < 0.02 * (expected - start).norm()


def test_the_means_of_an_epoch_hold_nothing_of_the_epoch_before(data, unbroken, tmp_path):
    """A save inside an epoch has its sums so far; no save at its end may follow."""
    train(data, tmp_path, "--resume_freq", 3, "--saveckp_freq", 0)
    expected, found = (
        [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
        for folder in (unbroken, tmp_path)
    )
    for name in ("train_loss", "train_lr", "train_wd", "grad_norm", "kl"):
        assert [line[name] for line in found] == [line[name] for line in expected]


def test_the_pictures_of_a_run_that_was_killed_before_it_drew_them_are_drawn(data, tmp_path):
    train(data, tmp_path, "--epochs", 1)
    (tmp_path / "curves.png").unlink()
    train(data, tmp_path, "--epochs", 1)
    assert Image.open(tmp_path / "curves.png").size[0] > 1000


# ---- with what changed ----


def test_other_images_are_told_also_where_they_are_as_many(
    class_folders, unbroken, tmp_path, capsys
):
    images, run = tmp_path / "images", tmp_path / "run"
    run.mkdir()
    shutil.copytree(class_folders / "train", images)
    shutil.copy(unbroken / "checkpoint0001.pth", run / NEWEST)
    train(images, run, "--epochs", 2)
    assert "What is trained on" not in capsys.readouterr().out, "the folder has moved"
    path = next(images.rglob("*.png"))
    path.rename(path.with_name("another.png"))
    train(images, run, "--epochs", 2)
    assert "What is trained on was 24 images, names " in capsys.readouterr().out


def test_an_accuracy_is_called_untrained_only_if_it_was_measured_before_training(
    class_folders, data, unbroken, tmp_path, capsys
):
    labelled = ("--knn_data_path", class_folders, "--knn_freq", 1, "--epochs", 2)
    train(data, tmp_path, "--resume", unbroken / "checkpoint0000.pth", *labelled)
    said = capsys.readouterr().out
    assert "trained backbone  " in said
    assert "untrained backbone" not in said


def test_k_nn_accuracies_of_other_images_are_not_compared(class_folders, data, tmp_path, capsys):
    some, others = tmp_path / "some", tmp_path / "others"
    for folder in (some, others):
        shutil.copytree(class_folders, folder)
    next((others / "val").rglob("*.png")).unlink()
    run = tmp_path / "run"
    train(data, run, "--epochs", 1, "--knn_data_path", some)
    checkpoint = torch.load(run / NEWEST, weights_only=True)
    write_atomically(checkpoint | {"best_knn": 99.0}, run / NEWEST)
    capsys.readouterr()
    train(data, run, "--epochs", 2, "--knn_data_path", others)
    said = capsys.readouterr().out
    assert "What the k-NN accuracy is of was " in said
    assert "untrained backbone" not in said
    assert [line["epoch"] for line in RunLog(run).read("knn_teacher")] == [2]
    assert [line["epoch"] for line in RunLog(run).read("rank_me")] == [0, 1, 2]
    assert read(run / NEWEST)["best_knn"] < 99


@pytest.mark.parametrize("resume", ["never", "absent.pth"])
def test_what_cannot_be_resumed_is_refused_before_the_images_are_looked_for(
    unbroken, tmp_path, resume
):
    folder = unbroken if resume == "never" else tmp_path
    with pytest.raises(UserError, match=f"--resume {resume}: "):
        train(tmp_path / "no such folder", folder, "--resume", resume)


def test_fewer_epochs_than_were_begun_are_refused(data, unbroken, tmp_path):
    checkpoint = torch.load(unbroken / NEWEST, weights_only=True)
    checkpoint |= {"epoch": 1, "iteration": 6 + 3, "images": 3 * 4}
    write_atomically(checkpoint, tmp_path / NEWEST)
    with pytest.raises(UserError, match=r"--epochs 1: .* has done 1 and 3 iter.* at least 2, or"):
        train(data, tmp_path, "--epochs", 1)


def test_changed_flags_are_listed_and_those_that_may_not_change_are_refused(
    data, unbroken, tmp_path, capsys
):
    shutil.copy(unbroken / "checkpoint0000.pth", tmp_path / NEWEST)
    train(data, tmp_path, "--clip_grad", 1.5, "--epochs", 2)
    said = capsys.readouterr().out
    assert "--clip_grad was 3.0 when" in said
    assert "--epochs was 3 when" in said
    assert "--output_dir was" not in said
    with pytest.raises(UserError, match=r"--optimizer sgd: .* is of a run with adamw"):
        train(data, tmp_path, "--optimizer", "sgd")


def test_another_global_batch_goes_on_at_the_same_share_of_the_schedules(
    data, unbroken, tmp_path, capsys
):
    checkpoint = torch.load(unbroken / NEWEST, weights_only=True)
    checkpoint |= {"epoch": 1, "iteration": 1 * 6 + 3, "images": 3 * 4}  # half of epoch 1
    write_atomically(checkpoint, tmp_path / NEWEST)
    train(data, tmp_path, "--batch_size_per_gpu", 2, "--log_freq", 1)
    said = capsys.readouterr().out
    assert "An epoch had 6 iterations of 4 images, and has 12 of 2 now" in said
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["iteration"] == 1 * 12 + 6


@pytest.mark.parametrize(("before", "steps", "now"), [(4, 3, 10), (4, 3, 2), (3, 5, 8), (8, 3, 3)])
def test_the_rest_of_an_epoch_is_the_rest_of_its_images_whatever_the_batch(before, steps, now):
    """Of 32 images, so many steps in batches of `before` and then the epoch's end in others."""

    def epoch(batch, used):
        loader = training_loader(
            [Image.new("RGB", (8, 8))] * 32,
            lambda image, key: key[2],  # its number
            **dict(batch_size=batch, num_workers=0, seed=0, pin_memory=False),
        )
        loader.sampler.set_position(1, used)
        return [numbers.tolist() for numbers in loader]

    progress = Progress(epoch=1, iterations_per_epoch=32 // before, global_batch=before)
    progress.iteration = progress.iterations_per_epoch
    for _ in range(steps):
        progress.count_step()
    resumed = Progress(iterations_per_epoch=32 // now, global_batch=now)
    restore_progress(resumed, vars(progress), "checkpoint.pth", images=32)
    rest = epoch(now, resumed.images)
    seen = [*itertools.chain(*epoch(before, 0)[:steps], *rest)]
    assert len(set(seen)) == len(seen), "none twice"
    assert 32 - len(seen) < now, "only the last, smaller batch is left out"
    assert resumed.steps + len(rest) == resumed.iterations_per_epoch


def test_a_run_of_the_official_code_is_resumed_at_its_epoch(data, unbroken, tmp_path, capsys):
    """Whose flags are a Namespace, with names of its time, and who knows no iterations."""
    ours = torch.load(unbroken / "checkpoint0000.pth", weights_only=True)
    official = {name: ours[name] for name in ("student", "teacher", "optimizer", "dino_loss")}
    for group in official["optimizer"]["param_groups"]:
        group["lr"] = np.float64(group["lr"])
    flags = argparse.Namespace(**{**ours["args"], "lr": 0.001})
    torch.save({**official, "epoch": 1, "args": flags}, tmp_path / NEWEST)
    train(data, tmp_path)
    said = capsys.readouterr().out
    assert "1 of 3 epochs are done" in said
    assert "--lr was 0.001 when" in said
    assert_equal_states(
        final_state(unbroken)["optimizer"]["param_groups"],
        final_state(tmp_path)["optimizer"]["param_groups"],
    )
    assert final_state(tmp_path)["iteration"] == 18


def test_an_old_name_of_a_network_is_the_same_network(data, unbroken, tmp_path):
    checkpoint = torch.load(unbroken / "checkpoint0001.pth", weights_only=True)
    checkpoint["args"]["arch"] = "deit_nano"
    write_atomically(checkpoint, tmp_path / NEWEST)
    train(data, tmp_path)
    assert_equal_states(final_state(unbroken), final_state(tmp_path))


# ---- from whose weights ----


def test_init_from_starts_a_new_run_from_weights_and_reports_what_matched(
    data, unbroken, tmp_path, capsys
):
    still = ("--epochs", 1, "--lr", 0, "--min_lr", 0, "--momentum_teacher", 1)
    train(data, tmp_path / "whole", "--init_from", unbroken / NEWEST, *still)
    said = capsys.readouterr().out
    assert "backbone of the student, head of the student, backbone of the teacher" in said
    assert "starts afresh" not in said
    expected, found = final_state(unbroken), final_state(tmp_path / "whole")
    assert_equal_states(expected["teacher"], found["teacher"])
    assert_equal_states(expected["student"], found["student"])
    other = ("--epochs", 1, "--out_dim", 32, "--global_crop_size", 64)
    train(data, tmp_path / "bare", "--init_from", unbroken / "backbone.pth", *other)
    said = capsys.readouterr().out
    assert "backbone of the student, backbone of the teacher; the rest starts afresh" in said
    assert "position embeddings resized from 16 patches" in said
