# SPDX-License-Identifier: Apache-2.0
"""--wandb: what the library's own reader finds in the files of an offline run."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SMALL_RUN, run_processes, run_script

from dino.run_log import RunLog


def records_in(path):
    """The records of an offline file: LevelDB's log format after a header of 7 bytes.

    Blocks of 32 KiB hold parts, each after its checksum (4 bytes), length (2) and kind (1): whole,
    first, middle, last.
    """
    data, at, record = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too short for another part
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def figures_of(path):
    """{name: values in order} of the history in an offline file of Weights & Biases."""
    from wandb.proto import wandb_internal_pb2

    found = {}
    for data in records_in(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            found.setdefault(name, []).append(json.loads(item.value_json))
    return found


def start(folder, data, home, **environ):
    """A run of 5 epochs of 6 steps as a process, once it has logged ten steps."""
    environ = {name: value for name, value in os.environ.items() if "WANDB" not in name} | environ
    process = subprocess.Popen(
        [sys.executable, *map(str, command(folder, data))],
        cwd=ROOT,
        env={**environ, "HOME": str(home), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while process.poll() is None and len(logged(folder)) < 10:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()
    return process


def command(folder, data):
    flags = ("--epochs", 5, "--log_freq", 1, "--knn_freq", 5, "--wandb")
    return ("main_dino.py", *SMALL_RUN, "--data_path", data, "--output_dir", folder, *flags)


def logged(folder):
    """The steps in metrics.jsonl; the last line may be half written."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    steps = [json.loads(line) for line in lines if line.endswith("\n")]
    return [step for step in steps if "loss" in step]


def test_a_stopped_run_resumes_as_the_same_run_and_no_figure_is_lost(class_folders, tmp_path):
    pytest.importorskip("wandb")
    home, folder, data = tmp_path / "home", tmp_path / "run", class_folders / "train"
    home.mkdir()
    process = start(folder, data, home, WANDB_MODE="offline")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "Stopped by SIGTERM" in output
    stopped_at = len(logged(folder))
    result = run_script(*command(folder, data), HOME=str(home), WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr
    assert "Resumed from" in result.stdout
    before, after = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert before.name == after.name == f"run-{(folder / 'wandb_id.txt').read_text()}.wandb"
    steps, first, second = logged(folder), figures_of(before), figures_of(after)
    for name in ("loss", "lr", "agreement"):
        values = first[f"iteration/{name}"] + second[f"iteration/{name}"]
        assert values == [step[name] for step in steps]
    assert first["iteration"] == [step["iteration"] for step in steps[:stopped_at]]
    assert len(first.get("epoch/train_loss", [])) + len(second["epoch/train_loss"]) == 5
    assert not list(home.rglob("*wandb*"))


def test_neither_missing_credentials_nor_a_killed_service_ends_a_run(class_folders, tmp_path):
    pytest.importorskip("wandb")
    process = start(tmp_path / "run", class_folders / "train", tmp_path)
    (service,) = [
        child
        for task in Path(f"/proc/{process.pid}/task").iterdir()
        for child in map(int, (task / "children").read_text().split())
        if "wandb-core" in Path(f"/proc/{child}/cmdline").read_text()
    ]
    os.kill(service, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "run `wandb login`. The figures go to" in output
    assert output.count("No more figures are sent") == 1
    assert len(logged(tmp_path / "run")) == 30


def log_a_step(folder):
    os.environ |= {"WANDB_MODE": "offline"}
    log = RunLog(folder, wandb=True)
    log.start({"lr": float("inf")})
    log.iteration({"iteration": 0, "loss": 1.0})


def test_only_rank_0_logs(tmp_path):
    pytest.importorskip("wandb")
    run_processes(log_a_step, 2, tmp_path, tmp_path)
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


def test_without_the_library_the_flag_names_the_command_that_installs_it(monkeypatch):
    from dino.errors import UserError
    from dino.wandb_log import require_wandb

    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    with pytest.raises(UserError, match="pip install wandb"):
        require_wandb()
