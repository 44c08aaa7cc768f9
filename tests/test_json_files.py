# SPDX-License-Identifier: Apache-2.0
"""Logs and flags of a run as JSON: strict when written; whatever is in them when read."""

import json
import math
import os
import resource

import pytest
from conftest import SMALL_RUN, run_script

from dino.errors import UserError
from dino.json_files import dumps, is_number, parse, read_lines, read_object
from dino.run_log import KINDS, RunLog

# Lines that a damaged or foreign log may hold.
FOREIGN = (
    *("5", "null", "{}", "[]", '"text"', "{", "\x00\x01", "1e999", "NaN", '{"epoch": null}'),
    *('{"epoch": "x"}', '{"epoch": NaN}', '{"epoch": ' + "9" * 5000 + "}", "[" * 100_000),
    *('{"epoch": true}', '{"iteration": 1}', '{"epoch": 0.5, "loss": [1]}', "\xff\xfe"),
)


def test_a_number_that_json_does_not_have_is_written_as_null():
    written = dumps({"a": math.nan, "b": [math.inf, 1.5, {"c": -math.inf}], "d": 3})
    strict = json.loads(written, parse_constant=pytest.fail)
    assert strict == {"a": None, "b": [None, 1.5, {"c": None}], "d": 3}


@pytest.mark.parametrize("value", [True, "1", None, [1], math.nan, math.inf, 10**400, 1j])
def test_what_is_not_a_finite_number_is_told(value):
    assert not is_number(value)
    assert all(map(is_number, (0, -1.5, 2**70)))


@pytest.mark.parametrize("text", FOREIGN, ids=lambda text: ascii(text)[:20])
def test_no_line_is_too_odd_to_be_read(tmp_path, text):
    parse(text)
    (tmp_path / "log.txt").write_text(f'{{"epoch": 0}}\n{text}\n{{"epoch": 1}}\n', "latin-1")
    records, damaged = read_lines(tmp_path / "log.txt")
    whole = [record for record in records if is_number(record.get("epoch"))]
    assert [line["epoch"] for line in whole if "loss" not in line] == [0, 1]
    assert len(records) + damaged == 3


def test_a_pipe_a_folder_and_no_file_have_no_lines(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "nowhere"):
        assert read_lines(tmp_path / name) == ([], 0)


@pytest.mark.parametrize("text", ["[1]", "null", "", "{", "5", "{}x", "[" * 10**5])
def test_a_file_that_should_hold_an_object_is_named(tmp_path, text):
    (tmp_path / "args.json").write_text(text)
    with pytest.raises(UserError, match=r"args\.json is damaged: it does not hold a JSON object"):
        read_object(tmp_path / "args.json")
    (tmp_path / "args.json").unlink()
    os.mkfifo(tmp_path / "args.json")
    with pytest.raises(UserError, match=r"args\.json is not a file"):
        read_object(tmp_path / "args.json")


def test_a_rewound_log_keeps_what_is_done_and_drops_what_is_damaged(tmp_path, capsys):
    """Lines are compared by their epoch: another batch size counts iterations in another way."""
    log = RunLog(tmp_path)
    log.start({"epochs": 3})
    steps = [{"iteration": i, "epoch": (i + 1) / 8, "loss": 1.0} for i in range(16)]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(dumps(line) + "\n" for line in steps) + "\n".join(FOREIGN[:5]) + "\n"
    )
    log.rewind({"epochs": 3}, epochs=1, epochs_done=1.5)
    kept = [line["epoch"] for line in read_lines(tmp_path / "metrics.jsonl")[0]]
    assert kept == [(i + 1) / 8 for i in range(12)]
    assert "5 damaged lines of metrics.jsonl are dropped" in capsys.readouterr().out


def test_a_run_with_damaged_logs_resumes_and_is_compared_with_others(class_folders, tmp_path):
    run = tmp_path / "a$x^$b\x1b[31m"  # a name that is neither math nor a colour
    command = ("main_dino.py", *SMALL_RUN, "--data_path", class_folders / "train")
    command += ("--output_dir", run, "--log_freq", 1, "--epochs")
    assert run_script(*command, 1).returncode == 0
    whole = (run / "metrics.jsonl").read_text().splitlines()
    for name in ("metrics.jsonl", "log.txt"):
        with (run / name).open("a", encoding="latin-1") as file:
            file.writelines(f"{line}\n" for line in FOREIGN)
    compared = run_script("compare_runs.py", run, "--output", tmp_path / "curves.png")
    assert compared.returncode == 0, compared.stderr
    assert "\x1b" not in compared.stdout
    assert "a$x^$b\\x1b[31m" in compared.stdout
    assert (tmp_path / "curves.png").stat().st_size > 1000
    resumed = run_script(*command, 2)
    assert resumed.returncode == 0, resumed.stderr
    assert "damaged lines of metrics.jsonl are dropped" in resumed.stdout
    lines = (run / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "teacher_temp" in line]
    assert [step["iteration"] for step in steps] == list(range(12))
    assert lines[: len(whole)] == whole, "no line lost"


@pytest.mark.parametrize("args", ["[1]", "null", '{"out_dim": 0}', '{"out_dim": true}', "{}"])
def test_a_run_with_odd_flags_is_named_and_not_drawn(class_folders, tmp_path, args):
    line = dict.fromkeys(KINDS["loss"][0], 1.0)
    (tmp_path / "metrics.jsonl").write_text(dumps(line) + "\n")
    (tmp_path / "args.json").write_text(args)
    compared = run_script("compare_runs.py", tmp_path, "--output", tmp_path / "curves.png")
    assert compared.returncode == 2
    assert f"{tmp_path}/args.json" in compared.stderr
    assert "Traceback" not in compared.stderr


HUGE = [{"epoch": 0}, {"epoch": 1e308}, {"loss": 1e308}, {"iteration": 10**300}, {"lr": 1e16}]


@pytest.mark.parametrize("odd", HUGE, ids=map(str, range(len(HUGE))))
def test_figures_that_no_run_can_have_are_left_out_of_a_comparison(tmp_path, odd):
    line = dict.fromkeys(KINDS["loss"][0], 1.0)
    lines = [dumps(line | odd), dumps(line), dumps(line | {"epoch": 1e14})]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "args.json").write_text('{"out_dim": 64}')
    compared = run_script("compare_runs.py", tmp_path, "--output", tmp_path / "curves.png")
    assert compared.returncode == 0, compared.stderr


def test_a_line_that_a_full_disk_takes_in_part_damages_none_of_its_neighbours(tmp_path, capsys):
    log, limits = RunLog(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    log.append("log.txt", {"epoch": 0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    log.append("log.txt", {"epoch": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.append("log.txt", {"epoch": 2})
    assert read_lines(tmp_path / "log.txt") == ([{"epoch": 0}, {"epoch": 2}], 0)
    assert "log.txt could not be written" in capsys.readouterr().out
