# SPDX-License-Identifier: Apache-2.0
"""What interrupts a run costs only the steps since the last checkpoint, and no exactness."""

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_RUN, Started, run_script, start_under_slurm
from helpers import assert_equal_states, final_state

from dino.errors import UserError
from dino.training.saver import NEWEST, PREVIOUS, Saver, find_checkpoint
from dino.weights.files import read

# Twelve epochs of six steps, saved at every second one: long enough to be interrupted in.
LONG_RUN = (*SMALL_RUN, "--epochs", 12, "--saveckp_iters", 2, "--log_freq", 4, "--num_workers", 1)


def command_of(data, folder, *flags):
    return ("main_dino.py", *LONG_RUN, "--data_path", data, "--output_dir", folder, *flags)


def start(data, folder, *flags):
    return Started(*command_of(data, folder, *flags))


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def iterations(folder):
    """Number of the last logged iteration."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    # The run may be in the middle of writing the last one.
    whole = [line for line in lines if line.endswith("\n")]
    return max((json.loads(line).get("iteration", -1) for line in whole), default=-1)


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
        target = iterations(tmp_path) + int(rng.integers(4, 16))
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


def test_a_run_that_saves_every_fourth_epoch_resumes_from_there_when_killed(
    class_folders, tmp_path, unbroken
):
    flags = ("--saveckp_iters", 0, "--saveckp_freq", 0, "--resume_freq", 4, "--knn_freq", 12)
    process = start(class_folders / "train", tmp_path, *flags)
    of_epoch = final_state(unbroken)["iteration"] // 12
    wait_for(lambda: iterations(tmp_path) > 6 * of_epoch)
    process.kill()
    process.wait()
    assert final_state(tmp_path)["epoch"] in (4, 8)
    start(class_folders / "train", tmp_path, *flags).communicate(timeout=300)
    for part in ("student", "teacher", "optimizer"):
        assert_equal_states(final_state(unbroken)[part], final_state(tmp_path)[part])
    assert len(figures(tmp_path / "log.txt")) == 12


def test_a_numbered_checkpoint_is_never_newer_than_the_one_to_resume_from(class_folders, tmp_path):
    flags = ("--saveckp_iters", 0, "--saveckp_freq", 5, "--resume_freq", 4, "--knn_freq", 12)
    process = start(class_folders / "train", tmp_path, *flags)
    wait_for(lambda: (tmp_path / "checkpoint0005.pth").exists())
    process.kill()
    process.wait()
    assert final_state(tmp_path)["epoch"] >= 6


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
    os.killpg(process.pid, number)  # the loader's process too, as by scancel or a terminal
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert f"Stopped by {number.name}" in output
    assert "Traceback" not in output
    assert "--shm-size" not in output, "no memory ran out"
    saved = torch.load(tmp_path / NEWEST, weights_only=True)
    assert saved["iteration"] > 15
    if number == signal.SIGTERM:  # once is enough: the checkpoint does not know the signal
        start(class_folders / "train", tmp_path).communicate(timeout=300)
        assert_equal_states(final_state(unbroken), final_state(tmp_path))
        for name in ("log.txt", "metrics.jsonl"):
            assert figures(unbroken / name) == figures(tmp_path / name), "means of the same steps"


IMAGES_THAT_STOP_COMING = """
import os, signal, sys, time
from PIL import Image
from torch.utils.data import get_worker_info
from dino.data import image_loader
from main_dino import parse_args, train_dino

image_loader.LOOK = 0.2
args = parse_args()

class Images:
    def __len__(self):
        return 24

    def __getitem__(self, index):
        if get_worker_info() and os.path.exists(f"{args.output_dir}/checkpoint.pth"):
            time.sleep(2)  # until those that are loaded are used up
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(600)
        return Image.new("RGB", (32, 32), (index, 0, 0))

train_dino(args, images=Images())
"""


def test_a_run_whose_images_do_not_come_saves_and_stops_when_asked(tmp_path):
    run = run_script("-c", IMAGES_THAT_STOP_COMING, *LONG_RUN, "--output_dir", tmp_path)
    assert run.returncode == 75, run.stderr
    done = int(re.search(r"Stopped by SIGTERM: (\d+) iterations are done", run.stdout)[1])
    assert torch.load(tmp_path / NEWEST, weights_only=True)["iteration"] == done


def start_on_a_terminal(data, folder, *prefix, epochs=12):
    """(process, the other end of its terminal), as after ssh."""

    def take_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may be under nohup

    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    flags = (*LONG_RUN, "--saveckp_iters", 0, "--epochs", epochs)
    flags += ("--data_path", data, "--output_dir", folder)
    command = [*prefix, sys.executable, ROOT / "main_dino.py", *flags]
    process = subprocess.Popen(
        list(map(str, command)),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(theirs)
    return process, ours


def lose_terminal(terminal, folder):
    """Close it in the middle of a run; until then read what the run prints, or it would wait."""

    def in_the_middle():
        with contextlib.suppress(OSError):  # nothing to read; or nobody writes, as under nohup
            os.read(terminal, 2**16)
        return iterations(folder) > 15

    wait_for(in_the_middle)
    os.close(terminal)


def test_a_lost_terminal_saves_as_sigterm_does(class_folders, tmp_path):
    process, terminal = start_on_a_terminal(class_folders / "train", tmp_path)
    lose_terminal(terminal, tmp_path)
    assert process.wait(timeout=60) == 75
    assert torch.load(tmp_path / NEWEST, weights_only=True)["iteration"] > 15


def test_under_nohup_a_lost_terminal_stops_nothing(class_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for nohup.out
    folder = tmp_path / "run"
    process, terminal = start_on_a_terminal(class_folders / "train", folder, "nohup", epochs=5)
    lose_terminal(terminal, folder)
    assert process.wait(timeout=120) == 0


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
    assert "a loader process died and is replaced" in output
    assert "--shm-size" in output
    assert_equal_states(final_state(unbroken), final_state(tmp_path))


def start_two_ranks(data, folder, *flags):
    return start_under_slurm(*command_of(data, folder, *flags))


def test_torchrun_restarts_a_killed_rank_and_the_run_ends_the_same(class_folders, tmp_path):
    flags = (*LONG_RUN, "--data_path", class_folders / "train", "--batch_size_per_gpu", 2)
    flags += ("--epochs", 5)
    for rank in start_two_ranks(class_folders / "train", tmp_path / "unbroken", *flags):
        output, _ = rank.communicate()
        assert rank.returncode == 0, output
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
    ranks = start_two_ranks(class_folders / "train", tmp_path)
    wait_for(lambda: iterations(tmp_path) > 5)
    ranks[1].kill()
    output, _ = ranks[0].communicate(timeout=60)
    assert ranks[0].returncode == 1, output
    assert "lost contact with rank 1" in output
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


def test_a_checkpoint_that_no_reader_knows_is_replaced_by_the_next_save(tmp_path):
    """Its directory asks for version 99 of zip, which is no BadZipFile."""
    saver = Saver(tmp_path)
    saver.save({NEWEST: {"epoch": 1}})
    saver.finish()
    content = bytearray((tmp_path / NEWEST).read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 99
    (tmp_path / NEWEST).write_bytes(content)
    saver.save({NEWEST: {"epoch": 2}})
    saver.finish()
    assert read(tmp_path / NEWEST)["epoch"] == 2
    assert not (tmp_path / PREVIOUS).exists(), "the damaged one"


def test_a_save_that_fails_for_any_reason_is_reported(tmp_path, capsys):
    saver = Saver(tmp_path)
    saver.save({NEWEST: {"epoch": 1, "cannot be pickled": lambda: 1}})
    with pytest.raises(UserError, match="the last checkpoint could not be written"):
        saver.finish()
    assert "Warning" in capsys.readouterr().out


def test_where_no_thread_can_be_started_a_checkpoint_is_written_all_the_same(tmp_path):
    saver, size = Saver(tmp_path), threading.stack_size(2**46)  # more than there are addresses
    try:
        saver.save({NEWEST: {"epoch": 1}})
    finally:
        threading.stack_size(size)
    saver.finish()
    assert read(tmp_path / NEWEST)["epoch"] == 1


def test_the_best_checkpoint_and_a_numbered_one_are_written_once_there_is_room(tmp_path):
    names = ["checkpoint0001.pth", "checkpoint0002.pth", "checkpoint_best_knn.pth"]
    saver = Saver(tmp_path / "run")
    for epoch in (1, 2):  # where nothing can be written
        saver.save({name: {"epoch": epoch} for name in (names[epoch - 1], names[2], NEWEST)})
        saver.wait()
    (tmp_path / "run").mkdir()
    saver.save({NEWEST: {"epoch": 3}})
    saver.finish()
    found = {path.name: read(path)["epoch"] for path in (tmp_path / "run").iterdir()}
    assert found == {NEWEST: 3, names[1]: 2, names[2]: 2}, "one numbered is kept in memory"


def test_a_folder_with_damaged_checkpoints_only_is_an_error(tmp_path):
    for name in (NEWEST, PREVIOUS):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(Exception, match="none of its 2 checkpoints can be read"):
        find_checkpoint("auto", tmp_path)


def test_only_the_newest_numbered_checkpoints_are_kept(tmp_path):
    theirs = ["checkpoint0001_keep_this.pth", "checkpoint1.pth", "checkpoint_best.pth"]
    for name in theirs:
        (tmp_path / name).write_text("junk, or what a user keeps")
    assert find_checkpoint("auto", tmp_path) is None, "a run can begin here"
    saver = Saver(tmp_path, keep=2)
    for epoch in range(4):
        saver.save({NEWEST: {"epoch": epoch}, f"checkpoint{epoch:04}.pth": {"epoch": epoch}})
    saver.finish()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {NEWEST, PREVIOUS, "checkpoint0002.pth", "checkpoint0003.pth", *theirs}
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


def test_a_run_whose_figures_cannot_be_written_ends_well(class_folders, tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    data = ("--data_path", class_folders / "train", "--knn_data_path", class_folders)
    run = run_script("main_dino.py", *SMALL_RUN, *data, "--output_dir", tmp_path)
    assert run.returncode == 0, run.stderr
    assert "metrics.jsonl could not be written" in run.stdout


def test_a_run_resumed_with_room_again_loses_nothing(class_folders, tiny_disk, tmp_path, unbroken):
    start(class_folders / "train", tiny_disk, "--saveckp_iters", 0).communicate(timeout=300)
    roomy = tmp_path / "roomy"
    shutil.copytree(tiny_disk, roomy)
    process = start(class_folders / "train", roomy)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert_equal_states(final_state(unbroken), final_state(roomy))
