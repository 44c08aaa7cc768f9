# SPDX-License-Identifier: Apache-2.0
"""One owner of a run's folder: the second one refuses, and names the first."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

from dino import run_lock
from dino.atomic import replacing
from dino.errors import UserError
from dino.run_lock import owned
from dino.run_log import RunLog
from dino.training import plots

HOLD = """
import sys
from dino.run_lock import owned
from dino.run_log import RunLog
with owned(sys.argv[1]):
    print("owned", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that owns the folder until it is told, or killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "owned\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_owner_is_refused_with_the_first_ones_name_until_that_is_killed(
    holder, tmp_path, monkeypatch
):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.0)
    first = f"process {holder.pid} of {socket.gethostname()} is writing a run there"
    with pytest.raises(UserError, match=first), owned(tmp_path / "run"):
        pytest.fail("two owners")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with owned(tmp_path / "run"):
        said = json.loads((tmp_path / "run" / ".lock").read_text())
    assert said == {"host": socket.gethostname(), "process": os.getpid()}


def test_a_run_that_is_about_to_end_is_waited_for(holder, tmp_path, monkeypatch):
    """As by a requeued job."""
    monkeypatch.setattr(run_lock, "PATIENCE", 600.0)
    holder.stdin.close()
    with owned(tmp_path / "run"):
        holder.wait()
    # the folder goes with the owner that made it, be it the first or, where that was quick, this
    assert list(tmp_path.glob("run/*")) == [], "no lock is left"  # pathlib's * has hidden files


@pytest.mark.parametrize("text", ["", "null", "5", "{", '{"host": "a\\u001b[2J\\nb"}', "\x00" * 99])
def test_a_lock_file_that_holds_anything_is_no_obstacle_and_is_printed_safely(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    with (tmp_path / ".lock").open() as file:
        assert set(run_lock.owner(file)) & {"\x1b", "\n", "\x00"} == set()
    with owned(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()


def test_folders_that_an_error_leaves_empty_are_removed(tmp_path):
    with pytest.raises(UserError), owned(tmp_path / "a" / "b"):
        raise UserError("wrong weights")
    assert list(tmp_path.iterdir()) == []
    with owned(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "checkpoint.pth").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["checkpoint.pth"]


def test_a_lock_that_is_a_link_does_not_empty_what_it_points_to(tmp_path):
    (tmp_path / "letter").write_text("dear")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to(tmp_path / "letter")
    refused = pytest.raises(UserError, match=r".lock in it is not a regular file")
    with refused, owned(tmp_path / "run"):
        pytest.fail("owned by way of a link")
    assert (tmp_path / "letter").read_text() == "dear"


def test_a_pipe_in_the_folder_is_refused_as_writing_to_it_would_wait_for_ever(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics.jsonl in it is a pipe"), owned(tmp_path):
        pytest.fail("owned with a pipe in it")


def test_a_folder_that_its_last_owner_removes_at_this_moment_is_made_anew(tmp_path, monkeypatch):
    folder, mkdir = tmp_path / "run", os.mkdir
    folder.mkdir()

    def just_before(path, mode=0o777):
        monkeypatch.setattr(os, "mkdir", mkdir)
        folder.rmdir()
        raise FileExistsError(17, "File exists", path)

    monkeypatch.setattr(os, "mkdir", just_before)
    with owned(folder):
        assert (folder / ".lock").exists()


@pytest.mark.parametrize("change", ["folder moved", "lock removed"])
def test_a_run_writes_nothing_where_another_run_has_begun_in_its_folder(change, tmp_path, capsys):
    folder = tmp_path / "run"
    with owned(folder):
        if change == "folder moved":
            folder.rename(tmp_path / "moved")
            folder.mkdir()
        (folder / ".lock").unlink(missing_ok=True)
        (folder / ".lock").write_text("another's")
        RunLog(folder).append("log.txt", {"epoch": 0})
        refused = pytest.raises(OSError, match="another run has begun in it")
        with refused, replacing(folder / "checkpoint.pth") as path:
            path.write_text("ours")
    assert [path.name for path in folder.iterdir()] == [".lock"], "nor removes the other's lock"
    assert "log.txt could not be written (the folder was moved" in capsys.readouterr().out


def test_a_picture_makes_no_folder_where_that_of_the_run_was(tmp_path):
    figure, _ = plots.plt.subplots()
    with owned(tmp_path / "run"):
        (tmp_path / "run").rename(tmp_path / "moved")
        with pytest.raises(OSError, match="the folder was moved"):
            plots.save(figure, tmp_path / "run" / "curves.png")
        assert [path.name for path in tmp_path.iterdir()] == ["moved"]


def test_a_run_whose_lock_somebody_removed_goes_on_writing(tmp_path):
    with owned(tmp_path):
        (tmp_path / ".lock").unlink()
        RunLog(tmp_path).append("log.txt", {"epoch": 0})
    assert (tmp_path / "log.txt").exists()
