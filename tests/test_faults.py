# SPDX-License-Identifier: Apache-2.0
"""What interrupts a run costs only the steps since the last checkpoint, and no exactness."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_RUN, photograph, run_script, run_torchrun
from PIL import Image
from test_training import assert_equal_states, final_state

from checkpoints import read, write_atomically
from data import UnreadableImage, list_training_images, read_image
from saving import NEWEST, PREVIOUS, Saver, find_checkpoint

# Fifteen epochs of six steps, saved at every second one: long enough to be interrupted in.
LONG_RUN = (*SMALL_RUN, "--epochs", 15, "--saveckp_iters", 2, "--log_freq", 4, "--num_workers", 1)


def start(data, folder, *flags, **environ):
    command = [sys.executable, "main_dino.py", *LONG_RUN, "--data_path", data]
    command += ["--output_dir", folder, *flags]
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def iterations(folder):
    """Number of the last logged iteration."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line).get("iteration", -1) for line in lines if line), default=-1)


@pytest.fixture(scope="module")
def unbroken(class_folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    process = start(class_folders / "train", folder)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return folder


def test_a_run_killed_again_and_again_ends_as_the_unbroken_one(class_folders, tmp_path, unbroken):
    rng = np.random.default_rng(0)
    kills = 0
    while kills < 4:
        process = start(class_folders / "train", tmp_path)
        target = iterations(tmp_path) + int(rng.integers(5, 20))
        while process.poll() is None and iterations(tmp_path) < target:
            time.sleep(0.005)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    output, _ = start(class_folders / "train", tmp_path).communicate(timeout=300)
    assert kills > 2
    assert "Resumed from" in output
    assert_equal_states(final_state(unbroken), final_state(tmp_path))
    for name in ("log.txt", "metrics.jsonl"):
        assert figures(unbroken / name) == figures(tmp_path / name), "no line lost, none twice"


def figures(path):
    """The lines of a log without what depends on the clock."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    clock = ("images_per_s", "data_wait", "peak_memory_mb")
    lines = [line for line in lines if "verdict" not in line]
    return [{key: line[key] for key in line if key not in clock} for line in lines]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_a_signal_saves_within_the_epoch_and_exits_with_its_code(
    class_folders, tmp_path, unbroken, number, code
):
    process = start(class_folders / "train", tmp_path, "--saveckp_iters", 0)
    wait_for(lambda: iterations(tmp_path) > 15)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert f"Stopped by {number.name}" in output
    assert "Traceback" not in output
    saved = torch.load(tmp_path / NEWEST, weights_only=True)
    assert saved["iteration"] > 15
    if number == signal.SIGTERM:  # once is enough: the checkpoint does not know the signal
        start(class_folders / "train", tmp_path).communicate(timeout=300)
        assert_equal_states(final_state(unbroken), final_state(tmp_path))


def test_no_process_outlives_a_run_that_ctrl_c_ends(class_folders, tmp_path):
    process = start(class_folders / "train", tmp_path, "--num_workers", 2)
    wait_for(lambda: iterations(tmp_path) > 5)
    children = children_of(process.pid)
    assert children
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children), seconds=20)


def children_of(pid):
    """Processes started by `pid`, and not its threads."""
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def test_a_killed_loader_worker_is_replaced_and_nothing_changes(class_folders, tmp_path, unbroken):
    process = start(class_folders / "train", tmp_path)
    wait_for(lambda: iterations(tmp_path) > 5)
    for child in children_of(process.pid):
        os.kill(child, signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "A loader process died, and is replaced" in output
    assert "--shm-size" in output
    assert_equal_states(final_state(unbroken), final_state(tmp_path))


def test_torchrun_restarts_a_killed_rank_and_the_run_ends_the_same(class_folders, tmp_path):
    flags = (*LONG_RUN, "--data_path", class_folders / "train", "--batch_size_per_gpu", 2)
    expected = run_torchrun(2, "main_dino.py", *flags, "--output_dir", tmp_path / "unbroken")
    assert expected.returncode == 0, expected.stderr
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max_restarts", 3]
    command += ["--nproc_per_node", 2, "main_dino.py", *flags, "--output_dir", tmp_path / "killed"]
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: iterations(tmp_path / "killed") > 20)
    os.kill(children_of(process.pid)[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "Resumed from" in output
    assert_equal_states(final_state(tmp_path / "unbroken"), final_state(tmp_path / "killed"))


def test_a_rank_that_dies_is_named_by_the_others_which_end(class_folders, tmp_path):
    slurm = {"SLURM_NTASKS": "2", "SLURM_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid())}
    ranks = [
        start(class_folders / "train", tmp_path, SLURM_PROCID=rank, SLURM_LOCALID=rank, **slurm)
        for rank in ("0", "1")
    ]
    wait_for(lambda: iterations(tmp_path) > 5)
    ranks[1].kill()
    output, _ = ranks[0].communicate(timeout=60)
    assert ranks[0].returncode == 1, output
    assert "rank 1 is gone" in output
    ranks[1].communicate()


# ---- files ----


def test_a_damaged_checkpoint_falls_back_to_the_one_before(class_folders, tmp_path, unbroken):
    for name in (NEWEST, PREVIOUS):
        shutil.copy(unbroken / name, tmp_path)
    content = (tmp_path / NEWEST).read_bytes()
    (tmp_path / NEWEST).write_bytes(content[: len(content) // 2])
    process = start(class_folders / "train", tmp_path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "checkpoint.pth: damaged" in output
    assert "Resumed from" in output
    assert_equal_states(final_state(unbroken), final_state(tmp_path))


def test_a_folder_with_damaged_checkpoints_only_is_an_error(tmp_path):
    for name in (NEWEST, PREVIOUS):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(Exception, match="none of its 2 checkpoints can be read"):
        find_checkpoint("auto", tmp_path)


def test_only_the_newest_numbered_checkpoints_are_kept(tmp_path):
    saver = Saver(tmp_path, keep=2)
    for epoch in range(4):
        saver.save({NEWEST: {"epoch": epoch}, f"checkpoint{epoch:04}.pth": {"epoch": epoch}})
    saver.finish()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint.pth", "checkpoint0002.pth", "checkpoint0003.pth", PREVIOUS]
    assert read(tmp_path / NEWEST)["epoch"] == 3
    assert read(tmp_path / PREVIOUS)["epoch"] == 2


def test_what_is_saved_is_the_moment_of_the_call(tmp_path):
    weights = torch.zeros(1000)
    saver = Saver(tmp_path)
    saver.save({NEWEST: {"weights": weights}})
    weights.fill_(1)  # as the next step does, while the file is being written
    saver.finish()
    assert torch.equal(read(tmp_path / NEWEST)["weights"], torch.zeros(1000))


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 14 MB, which holds one checkpoint of a small run and not two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_does_not_stop_a_run_but_its_end_says_so(class_folders, tiny_disk):
    flags = ("--epochs", 3, "--saveckp_freq", 0, "--saveckp_iters", 0)
    process = start(class_folders / "train", tiny_disk, *flags)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "could not be written (No space left on device)" in output
    assert "Epoch: [2/3]" in output, "it went on"
    assert "the end of this run is lost" in output
    assert read(tiny_disk / NEWEST)["epoch"] == 1, "the first one is whole"


def test_a_run_resumed_with_room_again_loses_nothing(class_folders, tiny_disk, tmp_path, unbroken):
    start(class_folders / "train", tiny_disk, "--saveckp_iters", 0).communicate(timeout=300)
    roomy = tmp_path / "roomy"
    shutil.copytree(tiny_disk, roomy)
    process = start(class_folders / "train", roomy)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert_equal_states(final_state(unbroken), final_state(roomy))


# ---- resuming on purpose ----


def small(data, folder, *flags):
    command = ("main_dino.py", *LONG_RUN, "--data_path", data, "--output_dir", folder)
    return run_script(*command, *flags)


def test_resume_never_refuses_a_folder_with_a_run(class_folders, unbroken):
    result = small(class_folders / "train", unbroken, "--resume", "never")
    assert result.returncode == 2
    assert "--resume never" in result.stderr
    assert "belongs to another run" in result.stderr


def test_changed_flags_are_listed_and_those_that_may_not_change_are_refused(
    class_folders, tmp_path, unbroken
):
    shutil.copy(unbroken / "checkpoint0000.pth", tmp_path / NEWEST)
    result = small(class_folders / "train", tmp_path, "--clip_grad", 1.5, "--epochs", 4)
    assert result.returncode == 0, result.stderr
    assert "--clip_grad was 3.0 when" in result.stdout
    assert "--epochs was 15 when" in result.stdout
    assert "--output_dir was" not in result.stdout
    result = small(class_folders / "train", tmp_path, "--optimizer", "sgd")
    assert result.returncode == 2
    assert "--optimizer sgd:" in result.stderr
    assert "is of a run with adamw" in result.stderr


def test_another_global_batch_goes_on_at_the_same_share_of_the_schedules(
    class_folders, tmp_path, unbroken
):
    checkpoint = torch.load(unbroken / NEWEST, weights_only=True)
    checkpoint |= {"epoch": 7, "iteration": 7 * 6 + 3}  # in the middle of epoch 7, of 6 iterations
    write_atomically(checkpoint, tmp_path / NEWEST)
    result = small(class_folders / "train", tmp_path, "--batch_size_per_gpu", 2, "--log_freq", 1)
    assert result.returncode == 0, result.stderr
    assert "An epoch had 6 iterations of 4 images, and has 12 of 2 now" in result.stdout
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["iteration"] == 7 * 12 + 6


def test_init_from_starts_a_new_run_from_weights_and_reports_what_matched(
    class_folders, tmp_path, unbroken
):
    result = small(
        *(class_folders / "train", tmp_path / "whole", "--init_from", unbroken / NEWEST),
        *("--epochs", 1, "--lr", 0, "--min_lr", 0, "--momentum_teacher", 1),
    )
    assert result.returncode == 0, result.stderr
    assert "backbone of the student, head of the student, backbone of the teacher" in result.stdout
    assert "starts afresh" not in result.stdout
    expected, found = final_state(unbroken), final_state(tmp_path / "whole")
    assert_equal_states(expected["teacher"], found["teacher"])
    assert_equal_states(expected["student"], found["student"])

    result = small(
        *(class_folders / "train", tmp_path / "bare", "--init_from", unbroken / "backbone.pth"),
        *("--epochs", 1, "--out_dim", 32, "--global_crop_size", 64),
    )
    assert result.returncode == 0, result.stderr
    assert (
        "backbone of the student, backbone of the teacher; the rest starts afresh" in result.stdout
    )
    assert "position embeddings resized from 16 patches" in result.stdout


# ---- images ----


def bad_images(folder):
    """One of each kind, beside 300 good ones; returns {name: how it is read, or None}."""
    folder.mkdir()
    tile = photograph().crop((0, 0, 40, 40))
    for i in range(300):
        tile.save(folder / f"good{i:03}.png")
    content = (folder / "good000.png").read_bytes()
    (folder / "truncated.png").write_bytes(content[: len(content) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    return folder


KINDS = {
    "cmyk.jpg": lambda path: photograph().convert("CMYK").save(path),
    "palette.png": lambda path: photograph().convert("P").save(path, transparency=0),
    "alpha.png": lambda path: photograph().convert("RGBA").save(path),
    "animated.gif": lambda path: (
        photograph()
        .resize((32, 32))
        .save(path, save_all=True, append_images=[Image.new("RGB", (32, 32))])
    ),
    "1x1.png": lambda path: Image.new("RGB", (1, 1)).save(path),
    "1x5000.png": lambda path: Image.new("RGB", (1, 5000)).save(path),
}


@pytest.mark.parametrize("name", KINDS)
def test_odd_images_are_read_and_cropped(tmp_path, name):
    from augmentations import DataAugmentationDINO

    KINDS[name](tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.mode == "RGB"
    views = DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 1, 32, 16)(image, 0)
    assert [tuple(view.shape) for view in views] == [(3, 32, 32)] * 2 + [(3, 16, 16)]


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path):
    values = (np.linspace(0, 65535, 256).astype(np.uint16)).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    found = np.asarray(read_image(tmp_path / "deep.png"))[:, :, 0]
    np.testing.assert_allclose(found, values / 257, atol=1)


def test_exif_rotation_is_left_alone_as_officially(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    photograph("coffee.png").save(tmp_path / "rotated.jpg", exif=exif)
    assert read_image(tmp_path / "rotated.jpg").size == (600, 400)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("no image"),
        lambda path: path.symlink_to(path),
        lambda path: None,
        lambda path: path.mkdir(),
    ],
    ids=["empty", "text", "a link to itself", "vanished", "a folder"],
)
def test_what_is_no_image_is_named(tmp_path, make):
    path = tmp_path / "image.jpg"
    make(path)
    with pytest.raises(UnreadableImage, match=r"image\.jpg: cannot be read as an image"):
        read_image(path)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    photograph().save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match=r"bomb\.png: .*decompression bomb"):
        read_image(tmp_path / "bomb.png")


def test_a_name_that_is_not_utf8_is_found_read_and_printed(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        photograph().resize((8, 8)).save(tmp_path / name)
    except OSError:
        pytest.skip("this file system wants UTF-8")
    (path,) = list_training_images(tmp_path)
    assert read_image(path).size == (8, 8)
    Path(path).write_bytes(b"")
    with pytest.raises(UnreadableImage) as error:
        read_image(path)
    str(error.value).encode("utf-8")


def test_a_bad_image_stops_the_run_with_its_name_or_is_skipped_and_listed(tmp_path):
    data = bad_images(tmp_path / "data")
    result = small(data, tmp_path / "error", "--epochs", 1, "--batch_size_per_gpu", 50)
    assert result.returncode == 2
    assert "cannot be read as an image" in result.stderr
    assert "Traceback" not in result.stderr
    flags = ("--epochs", 1, "--batch_size_per_gpu", 50, "--on_bad_image", "skip")
    result = small(data, tmp_path / "skip", *flags)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "skip/metrics.jsonl").open()]
    skipped = {Path(line["bad_image"]).name for line in lines if "bad_image" in line}
    assert skipped <= {"truncated.png", "empty.jpg", "text.jpg"}
    assert skipped, "an epoch of 300 of 303 images sees one at least"
    again = small(data, tmp_path / "again", *flags, "--num_workers", 0)
    assert again.returncode == 0, again.stderr
    assert_equal_states(final_state(tmp_path / "skip"), final_state(tmp_path / "again"))


def test_more_than_one_bad_image_in_a_hundred_stops_the_run(tmp_path):
    data = bad_images(tmp_path / "data")
    (data / "fourth.png").write_bytes(b"")
    result = small(data, tmp_path / "run", "--on_bad_image", "skip", "--epochs", 3)
    assert result.returncode == 2
    assert "4 of 304 images could not be read, more than 1%" in result.stderr
