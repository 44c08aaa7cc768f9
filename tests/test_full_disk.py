# SPDX-License-Identifier: Apache-2.0
"""No space on a disk, and nobody who reads the output: one paragraph, or a run that continues."""

import os
import subprocess
import sys
from functools import partial

import pytest
from conftest import ROOT, SMALL_RUN, Started, run_script

from dino.errors import exit_on_user_error
from dino.weights.files import read


@pytest.fixture
def disk(tmp_path):
    """A file system of 40 KiB: room for a log, not for a picture or a checkpoint."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk):
    with pytest.raises(OSError, match="No space left"), open(disk / "rest", "wb", 0) as file:
        while True:
            file.write(bytes(4096))


WRITERS = {
    "visualize_attention.py": ("--image_size", 64, "--output_dir", "{disk}/maps"),
    "eval_knn.py": ("--data_path", "{data}", "--dump_features", "{disk}/features"),
    "eval_linear.py": ("--data_path", "{data}", "--output_dir", "{disk}/linear", "--epochs", 1),
    "eval_attention.py": ("--data_path", "{pairs}", "--output", "{disk}/figures.json"),
}


@pytest.mark.parametrize("script", WRITERS)
def test_no_space_for_an_output_is_one_paragraph(script, disk, class_folders, checkpoint, tmp_path):
    pairs = tmp_path / "pairs"
    for name in ("images", "masks"):
        (pairs / name).mkdir(parents=True)
        (pairs / name / "a.png").symlink_to(class_folders / "val" / "coffee" / "0.png")
    fill(disk)
    places = {"disk": disk, "data": class_folders, "pairs": pairs}
    flags = [str(flag).format(**places) for flag in WRITERS[script]]
    weights = ("--pretrained_weights", checkpoint, "--device", "cpu")
    result = run_script(script, *flags, *weights)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"{script}: error: ")
    assert "No space left on device" in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_tiles_of_the_demo_on_a_full_disk_are_one_paragraph(disk):
    flags = ("--preset", "demo", "--device", "cpu", "--num_workers", 0)
    result = run_script("main_dino.py", *flags, "--output_dir", disk / "run")
    assert result.returncode == 2
    assert "No space left on device" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_run_without_room_for_anything_trains_to_its_end_and_says_what_is_lost(
    disk, class_folders
):
    (disk / "rest").write_bytes(bytes(16_384))  # the picture has 36 KB
    command = ("main_dino.py", *SMALL_RUN, "--data_path", class_folders / "train")
    result = run_script(*command, "--output_dir", disk / "run")
    assert result.returncode == 2
    picture = disk / "run" / "augmentations.png"
    assert f"Warning: {picture} could not be written (No space left on device)" in result.stdout
    assert "Epoch: [1/2]" in result.stdout
    assert "the end of this run is lost" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr


def test_tensorboard_without_room_is_one_warning(disk, class_folders):
    """Its writer has a thread of its own, which would print a traceback."""
    (disk / "rest").write_bytes(bytes(16_384))
    command = ("main_dino.py", *SMALL_RUN, "--data_path", class_folders / "train", "--tensorboard")
    result = run_script(*command, "--log_freq", 1, "--output_dir", disk / "run")
    assert result.returncode == 2
    assert "Epoch: [1/2]" in result.stdout
    assert result.stderr.startswith("main_dino.py: error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    warning = f"Warning: {disk}/run/tensorboard could not be written (No space left on device)"
    assert result.stdout.count(warning) == 1


def test_weights_that_do_not_fit_leave_no_tiles_of_the_demo_behind(tmp_path, class_folders):
    (tmp_path / "bad.pth").write_bytes(b"not weights")
    flags = ("--preset", "demo", "--device", "cpu", "--init_from", tmp_path / "bad.pth")
    result = run_script("main_dino.py", *flags, "--output_dir", tmp_path / "run")
    assert result.returncode == 2
    assert "bad.pth: damaged, or not a checkpoint" in result.stderr
    assert not (tmp_path / "run").exists()


# ---- standard streams ----


def left_pipe():
    """What is left of `| head -1` once head has ended."""
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "wb", 0)


@pytest.mark.parametrize("output", [partial(open, "/dev/full", "wb", 0), left_pipe])
def test_a_run_whose_output_nobody_reads_trains_to_its_end(output, class_folders, tmp_path):
    flags = (*SMALL_RUN, "--epochs", 1, "--data_path", class_folders / "train")
    with output() as file:
        run = Started("main_dino.py", *flags, "--output_dir", tmp_path / "run", output=file)
        assert run.wait() == 0
    assert read(tmp_path / "run" / "checkpoint.pth")["epoch"] == 1


def test_a_run_without_streams_trains_to_its_end(class_folders, tmp_path):
    flags = (*SMALL_RUN, "--epochs", 1, "--data_path", class_folders / "train")
    command = (sys.executable, "main_dino.py", *flags, "--output_dir", tmp_path / "run")
    run = subprocess.run(
        ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0
    assert read(tmp_path / "run" / "checkpoint.pth")["epoch"] == 1


def test_a_name_that_is_not_text_is_printed_on_a_strict_stream(tmp_path):
    name = os.fsdecode(b"\xff\xfe.png")
    (tmp_path / name).write_bytes(b"not an image")
    result = run_script("check_data.py", tmp_path, PYTHONIOENCODING="ascii:strict")
    assert result.returncode == 1
    assert "\\udcff\\udcfe.png" in result.stdout


def test_an_error_that_names_no_file_is_still_one_paragraph(capsys):
    with pytest.raises(SystemExit, match="2"), exit_on_user_error("a.py"):
        raise OSError(28, "No space left on device")
    assert capsys.readouterr().err.endswith("be read or written: No space left on device.\n")


@pytest.mark.parametrize(
    "error",
    [
        OSError(24, "Too many open files"),
        RuntimeError("Too many open files. Communication with the workers is no longer possible."),
    ],
)
def test_too_many_open_files_are_one_paragraph_with_advice(error, capsys):
    with pytest.raises(SystemExit, match="2"), exit_on_user_error("a.py"):
        raise error
    assert capsys.readouterr().err.endswith("(ulimit -n 4096), or lower --num_workers.\n")
