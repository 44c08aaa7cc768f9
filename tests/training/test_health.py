# SPDX-License-Identifier: Apache-2.0
"""The monitor's figures against the logits they come from; its verdicts on runs that collapse."""

import functools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, photograph, run_script
from PIL import Image, ImageDraw, ImageFont

import main_dino
from dino.loss import DINOLoss
from dino.training import run
from dino.training.flags import parse_args
from dino.training.health import VERDICTS, Health, Monitor


def test_figures_equal_those_computed_from_the_logits():
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(4 * 6, 32, generator=generator)
    teacher = 0.2 * torch.randn(2 * 6, 32, generator=generator)
    loss = DINOLoss(32, 4, 0.04, 0.04, 0, 1)
    loss.center.normal_(0, 0.1, generator=generator)
    center = loss.center.double()
    monitor = Monitor(loss)
    monitor.watching = True
    value = loss(student, teacher, 0).item()

    targets = torch.softmax((teacher.double() - center) / 0.04, dim=1)
    entropy = -(targets * targets.log()).sum(1).mean().item()
    divergences = []
    students = torch.log_softmax(student.double() / 0.1, dim=1).chunk(4)
    for i, target in enumerate(targets.chunk(2)):
        for j, log_probs in enumerate(students):
            if i != j:
                divergences.append((target * (target.log() - log_probs)).sum(1).mean().item())
    mean = targets.mean(0)
    found = {name: figure.item() for name, figure in monitor.take().items()}
    assert found["teacher_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert value - found["teacher_entropy"] == pytest.approx(np.mean(divergences), rel=1e-5)
    assert found["outputs_used"] == pytest.approx(math.exp(-(mean * mean.log()).sum()), rel=1e-5)
    assert found["center_norm"] == pytest.approx(center.norm().item(), rel=1e-5), (
        "the center before"
    )
    first, second = targets.argmax(1).chunk(2)
    choices = student.argmax(1).chunk(4)
    agree = torch.cat([first == choices[1], second == choices[0]]).double().mean().item()
    assert found["agreement"] == pytest.approx(agree)


def test_a_run_is_the_same_however_often_it_is_looked_at(class_folders, tmp_path):
    weights = []
    for log_freq in (1, 1000):
        folder = tmp_path / str(log_freq)
        result = run_script(
            *("main_dino.py", *SMALL_RUN, "--data_path", class_folders / "train"),
            *("--output_dir", folder, "--log_freq", log_freq),
        )
        assert result.returncode == 0, result.stderr
        checkpoint = torch.load(folder / "checkpoint.pth", weights_only=True)
        weights.append([*checkpoint["student"].values(), *checkpoint["teacher"].values()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    lines = [json.loads(line) for line in (tmp_path / "1/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["iteration"] for line in steps] == list(range(12))
    for line in steps:
        assert line["loss"] == pytest.approx(line["teacher_entropy"] + line["kl"], abs=1e-6)
        assert line["kl_share"] == pytest.approx(line["kl"] / math.log(64))


def write_digits(folder, count):
    """Grey digits of several sizes and places on black, 32 pixels a side."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        image = Image.new("L", (32, 32))
        font = ImageFont.load_default(int(rng.integers(14, 26)))
        place = tuple(int(value) for value in rng.integers(2, 12, 2))
        ImageDraw.Draw(image).text(place, str(i % 10), fill=int(rng.integers(120, 255)), font=font)
        image.save(folder / f"{i:04}.png")


def verdicts(folder):
    """(names of the verdicts, all lines); on a busy machine any run may wait for its data."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = [line["verdict"] for line in lines if "verdict" in line]
    return [name for name in names if name != "waiting for data"], lines


# A small ViT and small crops, with the strengths that were made for large ones.
VIT_RUN = (
    *("--arch", "vit_nano", "--patch_size", 8, "--global_crop_size", 32, "--local_crop_size", 16),
    *("--local_crops_number", 2, "--out_dim", 1024, "--head_hidden_dim", 512, "--num_workers", 1),
    *("--head_bottleneck_dim", 128, "--momentum_teacher", 0.98, "--warmup_epochs", 2),
    *("--device", "cpu", "--report", "false"),
)


def test_grey_digits_with_the_official_head_are_called_a_uniform_collapse(tmp_path):
    write_digits(tmp_path / "digits", 352)
    result = run_script(
        *("main_dino.py", *VIT_RUN, "--use_bn_in_head", "false", "--lr", 0.004, "--epochs", 5),
        *("--batch_size_per_gpu", 32),
        *("--data_path", tmp_path / "digits", "--output_dir", tmp_path / "run", "--log_freq", 5),
    )
    assert result.returncode == 0, result.stderr
    names, lines = verdicts(tmp_path / "run")
    assert names == ["uniform collapse"], "once"
    said = next(line["epoch"] for line in lines if line.get("verdict") == "uniform collapse")
    steps = [line for line in lines if "loss" in line]
    uniform = [s["teacher_entropy_share"] > 0.99 and s["kl_share"] < 0.01 for s in steps]
    reached = steps[len(uniform) - uniform[::-1].index(False)]["epoch"]
    assert said <= math.ceil(reached) + 2
    assert "stays at ln(out_dim) = 6.931" in result.stdout
    assert "--use_bn_in_head true" in result.stdout


def test_digits_whose_features_get_worse_behind_a_sound_loss_are_called(tmp_path):
    """Batch norm in the head keeps the entropies of grey digits apart from any collapse."""
    write_digits(tmp_path / "all", 1104)
    for i, path in enumerate(sorted((tmp_path / "all").iterdir())):
        folder = tmp_path / ("train" if i < 704 else "val") / str(i % 10)
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / path.name)
    result = run_script(
        *("main_dino.py", *VIT_RUN, "--use_bn_in_head", "true", "--lr", 0.004, "--epochs", 5),
        *("--data_path", tmp_path / "train", "--knn_data_path", tmp_path),
        *("--output_dir", tmp_path / "run", "--log_freq", 5),
    )
    assert result.returncode == 0, result.stderr
    names, lines = verdicts(tmp_path / "run")
    assert names == ["worse than untrained"]
    before, after = [line["knn_student"] for line in lines if "knn_student" in line]
    assert after < before - 8
    assert "below that of the backbone before training" in result.stdout


def train_in_this_process(folder, data, *flags):
    """The last few figures of a run whose loss module a test has changed."""
    flags = [str(flag) for flag in (*SMALL_RUN, *flags)]
    args = parse_args([*flags, "--data_path", str(data), "--output_dir", str(folder)])
    main_dino.train_dino(args)
    return verdicts(folder)


def test_without_centering_one_output_takes_all(class_folders, tmp_path):
    names, lines = train_in_this_process(
        *(tmp_path, class_folders / "train", "--epochs", 25, "--lr", 0.3, "--log_freq", 3),
        *("--freeze_last_layer", 0, "--momentum_teacher", 0.5, "--center_momentum", 1),
    )
    assert names in (["one-output collapse"], ["one-output collapse", "features lose rank"])
    steps = [line for line in lines if "loss" in line]
    assert steps[-1]["outputs_used"] < 1.1


def test_without_sharpening_all_outputs_become_alike(class_folders, tmp_path):
    names, _ = train_in_this_process(
        *(tmp_path, class_folders / "train", "--epochs", 12, "--lr", 0.5, "--log_freq", 3),
        *("--warmup_teacher_temp", 5, "--teacher_temp", 5, "--momentum_teacher", 0.5),
    )
    assert names in (["uniform collapse"], ["uniform collapse", "features lose rank"])


def test_a_run_that_waits_for_its_images_says_so(tmp_path):
    large = photograph().resize((3000, 3000))
    for i in range(16):
        large.save(tmp_path / f"{i}.jpg")  # each takes longer to decode than a step of all
    flags = ("--epochs", 1, "--warmup_epochs", 0, "--log_freq", 1)
    _, lines = train_in_this_process(tmp_path / "run", tmp_path, *flags)
    (text,) = [line["text"] for line in lines if line.get("verdict") == "waiting for data"]
    assert "--num_workers" in text


def test_a_sound_run_raises_no_verdict_and_learns(tmp_path):
    result = run_script(
        *("main_dino.py", "--preset", "demo", "--output_dir", tmp_path, "--epochs", 1),
        *("--warmup_epochs", 0, "--log_freq", 2),
        *("--knn_freq", 100, "--num_workers", 1, "--device", "cpu", "--report", "false"),
        *("--local_crops_number", 2),
    )
    assert result.returncode == 0, result.stderr
    names, lines = verdicts(tmp_path)
    assert names == []
    before, after = [line["knn_teacher"] for line in lines if "knn_teacher" in line]
    assert after > before + 3
    for picture in ("augmentations.png", "curves.png"):
        with Image.open(tmp_path / picture) as image:
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(2**24)) > 50, "not blank"


@pytest.mark.parametrize(("seconds", "times"), [(1e6, 1), (0, 4)])
def test_the_curves_are_drawn_at_most_once_a_minute_and_at_the_end(
    monkeypatch, tmp_path, class_folders, seconds, times
):
    """Other ranks wait for the drawing, which takes 1.9 s with 25,000 lines."""
    drawn = []
    monkeypatch.setattr(run, "SECONDS_PER_PICTURE", seconds)
    monkeypatch.setattr(run, "draw_run", drawn.append)
    flags = ("--epochs", 4, "--warmup_epochs", 0, "--knn_freq", 4)
    train_in_this_process(tmp_path, class_folders / "train", *flags)
    assert len(drawn) == times


def health_after(losses, freeze=1, **figures):
    """Verdicts of a Health that sees 30 records of each loss, epoch by epoch; ln K is 5."""
    health = Health(5.0, freeze)
    record = {"teacher_entropy": 3.0, "outputs_used": 20.0, "data_wait": 0.0} | figures
    said = []
    for epoch, loss in enumerate(losses):
        for i in range(30):
            kl = loss - record["teacher_entropy"]
            health.add({**record, "iteration": 30 * epoch + i, "loss": loss, "kl": kl})
        said += [(epoch, name) for name, _ in health.end_epoch(epoch)]
    return said


def test_the_jump_when_the_last_layer_unfreezes_is_explained_once():
    assert health_after([3.6, 4.4, 4.0, 4.3]) == [(1, "unfreezing")]
    assert health_after([3.6, 3.5, 4.4]) == []
    assert health_after([3.6, 4.4], freeze=0) == []


def test_alike_outputs_while_the_last_layer_is_frozen_are_no_collapse_yet():
    assert health_after([5.0, 5.0, 5.0], teacher_entropy=5.0) == [(1, "uniform collapse")]
    assert health_after([5.0, 5.0], freeze=3, teacher_entropy=5.0) == []


def test_a_confident_teacher_that_uses_many_outputs_has_not_collapsed():
    assert health_after([0.1] * 4, teacher_entropy=0.02) == []
    assert health_after([0.1] * 4, teacher_entropy=0.02, outputs_used=1.02) == [
        (1, "one-output collapse")
    ]


def test_two_outputs_that_share_all_images_are_a_collapse():
    two = dict(teacher_entropy=0.0, outputs_used=2.0)
    assert health_after([0.0] * 3, **two) == [(1, "few-output collapse")]
    assert health_after([0.3] * 3, **two) == [], "the student still learns"


def test_uniform_outputs_with_noise_in_their_logits_are_a_collapse():
    assert health_after([5.0] * 3, teacher_entropy=0.989 * 5) == [(1, "uniform collapse")]
    assert health_after([4.9] * 3, teacher_entropy=0.989 * 5) == [], "the loss falls"


def test_a_loss_that_stays_at_ln_k_is_reported_after_the_warm_up():
    """As of digits, h 95.7 % and KL 3.4 % of ln K."""
    flat = [0.991 * 5] * 3
    assert health_after(flat, teacher_entropy=0.957 * 5) == [(1, "nothing learned")]
    assert health_after(flat, teacher_entropy=0.957 * 5, freeze=3) == []


def test_the_warning_of_a_loss_at_ln_k_is_true_of_one_that_is_just_below_it():
    said = VERDICTS["nothing learned"].format(loss=5.525, ln_k=5.545)
    assert "5.525, is above ln(out_dim) = 5.545 or less than 1 % below it" in said


def test_a_resumed_run_repeats_no_verdict_and_one_begun_anew_gives_them_all(
    tmp_path, class_folders
):
    folder, still = tmp_path / "run", ("--lr", 0, "--min_lr", 0, "--warmup_epochs", 0)
    begun, resumed = (
        train_in_this_process(folder, class_folders / "train", *still, "--epochs", epochs)[0]
        for epochs in (2, 4)
    )
    assert "nothing learned" in begun
    assert resumed[: len(begun)] == begun
    assert len(set(resumed)) == len(resumed)
    for checkpoint in folder.glob("*.pth"):
        checkpoint.unlink()
    anew, _ = train_in_this_process(folder, class_folders / "train", *still, "--epochs", 2)
    assert anew == begun


def feature_verdicts(measured, epochs=10, test_images=1000, freeze=1, warmup=2):
    """[(epoch, verdict)] of a Health that gets [(k-NN accuracy or None, RankMe)] epoch by epoch.

    Teacher and student are alike.
    """
    health, lines, said = Health(5.0, freeze, warmup), [], []
    for epoch, (knn, rank) in enumerate(measured):
        line = {"epoch": epoch, "rank_me": rank} | (
            {"knn_teacher": knn, "knn_student": knn} if knn else {}
        )
        lines.append(line)
        found = health.judge_features(lines, test_images if knn else 0, epoch == epochs)
        said += [(epoch, name) for name, _ in found] if epoch else []
    return said


def test_features_that_stay_worse_than_untrained_are_reported():
    worse = [(40.0, 10), (30.0, 10), (30.0, 10), (30.0, 10), (30.0, 10), (30.0, 10)]
    assert feature_verdicts(worse) == [(4, "worse than untrained")], "once, after the warm-up"
    assert feature_verdicts(worse[:2], epochs=1) == [(1, "worse than untrained")], "the last one"
    again_good = [(40.0, 10), (30.0, 10), (30.0, 10), (30.0, 10), (45.0, 10), (30.0, 10)]
    assert feature_verdicts(again_good) == [], "not two in a row"
    by_chance = [(40.0, 10), *[(37.0, 10)] * 5]
    assert feature_verdicts(by_chance, test_images=100) == [], "within two standard errors"
    assert feature_verdicts(by_chance, test_images=10_000) != []


def test_features_that_lose_their_rank_are_reported_without_labels():
    assert feature_verdicts([(None, 10.8), *[(None, 2.2)] * 5]) == [(4, "features lose rank")]
    assert feature_verdicts([(None, 14.3), *[(None, 9.3)] * 5]) == []


def test_a_fall_of_the_rank_is_silent_where_labels_show_that_the_features_are_better():
    """As of the demo with 2 + 10 crops for two epochs, and of the run without a momentum."""
    sound, collapsed = [(49.3, 16.3), (59.6, 4.9), (60.8, 5.1)], [(49.3, 16.3), (49.1, 1.8)]
    short = dict(warmup=0, freeze=0, test_images=760)
    assert feature_verdicts(sound, epochs=2, **short) == []
    of_another_seed = [(54.4, 15.0), (57.9, 4.0)]
    assert feature_verdicts(of_another_seed, epochs=1, **short) == []
    unlabelled = [(None, rank) for _, rank in sound]
    assert feature_verdicts(unlabelled, epochs=2, **short) == [(2, "features lose rank")]
    assert feature_verdicts(collapsed, epochs=1, **short) == [(1, "features lose rank")]


def test_steps_that_float16_skips_are_counted_and_kept_out_of_the_mean_norm(
    class_folders, tmp_path, monkeypatch
):
    """The scaler skips a step whose gradients overflow; their norm is inf or nan."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**16, growth_interval=1)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    _, lines = train_in_this_process(
        tmp_path, class_folders / "train", "--amp_dtype", "float16", "--log_freq", 1
    )
    norms = [line["grad_norm"] for line in lines if "loss" in line]
    skipped = [norm is None for norm in norms]
    assert 0 < sum(skipped) < len(norms)
    for text in (tmp_path / "log.txt").read_text().splitlines():
        line = json.loads(text, parse_constant=pytest.fail)  # NaN and Infinity are not JSON
        here = slice(6 * line["epoch"], 6 * line["epoch"] + 6)
        assert line["skipped_steps"] == sum(skipped[here])
        finite = [norm for norm in norms[here] if norm is not None]
        assert line.get("grad_norm", 0) == pytest.approx(np.mean(finite) if finite else 0)


def test_runs_are_compared_in_a_table_and_a_picture(class_folders, tmp_path):
    train_in_this_process(tmp_path / "a", class_folders / "train", "--epochs", 1)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    picture = tmp_path / "comparison.png"
    result = run_script("compare_runs.py", tmp_path / "a", tmp_path / "b", "--output", picture)
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["run", "a", "b", "Curves:"]
    assert picture.exists()
    result = run_script("compare_runs.py", tmp_path)
    assert result.returncode == 2
    assert "no metrics.jsonl with steps in it" in result.stderr


def test_tensorboard_gets_the_same_figures(class_folders, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, lines = train_in_this_process(
        tmp_path, class_folders / "train", "--epochs", 1, "--warmup_epochs", 0, "--tensorboard"
    )
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    expected = [line["loss"] for line in lines if "loss" in line]
    assert [e.value for e in events.Scalars("iteration/loss")] == pytest.approx(expected, rel=1e-6)
