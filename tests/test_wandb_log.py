# SPDX-License-Identifier: Apache-2.0
"""--wandb: what the library's own reader finds in the files of an offline run."""

import json
import struct
import sys

import pytest
from conftest import SMALL_RUN, run_script


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


def test_an_offline_run_has_the_same_figures(class_folders, tmp_path):
    pytest.importorskip("wandb")
    command = ("main_dino.py", *SMALL_RUN, "--data_path", class_folders / "train")
    command += ("--output_dir", tmp_path / "run", "--epochs", 1, "--warmup_epochs", 0, "--wandb")
    result = run_script(*command, WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob("run/wandb/offline-run-*/*.wandb")
    found = figures_of(path)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "loss" in line]
    assert found["iteration/loss"] == [step["loss"] for step in steps]
    assert found["iteration"] == [step["iteration"] for step in steps]
    assert len(found["epoch/train_loss"]) == 1


def test_without_the_library_the_flag_names_the_command_that_installs_it(monkeypatch):
    from dino.errors import UserError
    from dino.wandb_log import require_wandb

    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    with pytest.raises(UserError, match="pip install wandb"):
        require_wandb()
