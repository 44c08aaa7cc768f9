# SPDX-License-Identifier: Apache-2.0
"""The job that submitit submits: what Slurm is asked for, and that a requeued run is exact."""

import os
import pickle
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, SMALL_RUN, run_launched, run_script
from helpers import assert_equal_states, final_state

import main_dino
import run_with_submitit
from dino.errors import UserError
from dino.training.flags import over_preset, parse_args

# Figures of the official script.
OFFICIAL_PARAMETERS = {
    "name": "dino",
    "nodes": 2,
    "gpus_per_node": 8,
    "tasks_per_node": 8,
    "cpus_per_task": 10,
    "mem_gb": 320,
    "timeout_min": 2800,
    "slurm_partition": "learnfair",
    "slurm_signal_delay_s": 120,
    "slurm_max_num_timeout": 30,
}


def parse(*flags):
    return over_preset(run_with_submitit.get_args_parser().parse_args([*map(str, flags)]))


def test_without_flags_the_job_is_the_official_one():
    found = run_with_submitit.executor_parameters(parse())
    assert found.pop("slurm_additional_parameters") == {"requeue": True}
    assert found == OFFICIAL_PARAMETERS


def test_official_flags_ask_for_what_they_asked_for():
    flags = ("--ngpus", 4, "--nodes", 3, "--timeout", 60, "--partition", "gpu")
    found = run_with_submitit.executor_parameters(
        parse(*flags, "--use_volta32", "--comment", "deadline")
    )
    del found["slurm_additional_parameters"]
    assert found == OFFICIAL_PARAMETERS | {
        "nodes": 3,
        "gpus_per_node": 4,
        "tasks_per_node": 4,
        "mem_gb": 160,
        "timeout_min": 60,
        "slurm_partition": "gpu",
        "slurm_constraint": "volta32gb",
        "slurm_comment": "deadline",
    }


def test_flags_of_training_and_presets_are_those_of_main_dino():
    flags = ["--preset", "boost", "--lr", "0.001"]
    assert vars(parse_args(flags)).items() <= vars(parse(*flags)).items()


@pytest.fixture
def slurm_commands(tmp_path, monkeypatch):
    """A folder, first in PATH, with an srun that does nothing and an sbatch that keeps the job."""
    for name, line in (("srun", ""), ("sbatch", f'cp "$1" {tmp_path}/job.sh; echo job 7')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path


def test_the_script_for_sbatch_asks_for_what_the_flags_say(slurm_commands, capsys):
    pytest.importorskip("submitit")
    flags = ("--partition", "", "--account", "lab", "--qos", "high", "--constraint", "a100")
    flags += ("--mem_gb", 0, "--cpus_per_task", 5, "--nodes", 4, "--device", "cpu")
    run_with_submitit.submit(parse(*flags, "--output_dir", slurm_commands / "%j"))
    lines = (slurm_commands / "job.sh").read_text().splitlines()
    asked = dict(line[10:].partition("=")[::2] for line in lines if line.startswith("#SBATCH --"))
    assert "partition" not in asked
    assert (asked["account"], asked["qos"], asked["constraint"]) == ("lab", "high", "a100")
    assert (asked["mem"], asked["cpus-per-task"], asked["nodes"]) == ("0GB", "5", "4")
    assert (asked["signal"], asked["time"], asked["ntasks-per-node"]) == ("USR2@120", "2800", "8")
    assert asked["gpus-per-node"] == "0"
    assert "#SBATCH --requeue" in lines
    log = slurm_commands / "7" / "7_0_log.out"
    assert capsys.readouterr().out == f"Submitted job 7. Its log: {log}\n"


def test_what_sbatch_says_against_a_job_is_passed_on(slurm_commands):
    pytest.importorskip("submitit")
    (slurm_commands / "sbatch").write_text("#!/bin/sh\necho no such partition >&2; exit 1\n")
    with pytest.raises(UserError, match=r"no such partition.*--partition"):
        run_with_submitit.submit(parse("--output_dir", slurm_commands / "%j"))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--use_volta32", "--constraint", "a100"), "exclude each other"),
        (("--cluster", "local"), "--nodes 2 must be 1"),
        (("--arch", "vit_smal"), "vit_small"),
        (("--output_dir", ""), "--output_dir '' is empty"),
        ((), "there is no srun here"),
    ],
)
def test_mistakes_are_named_before_there_is_a_job(flags, text, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=text):
        run_with_submitit.submit(parse(*flags))


def test_without_submitit_the_command_that_installs_it_is_named(slurm_commands, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="pip install submitit"):
        run_with_submitit.submit(parse())


@pytest.mark.parametrize(
    ("state", "preempted", "expected"),
    [
        ("RUNNING", "2026-01-02T03:04:05", True),
        ("RUNNING", "None", False),
        ("COMPLETING", "2026-01-02T03:04:05", False),  # preempted once, and now cancelled
    ],
)
def test_a_job_is_preempted_only_if_slurm_says_so(state, preempted, expected, slurm_commands):
    text = f"JobId=7 JobName=dino\n   JobState={state} Reason=None\n   PreemptTime={preempted}"
    (slurm_commands / "scontrol").write_text(f"#!/bin/sh\necho '{text}'\n")
    (slurm_commands / "scontrol").chmod(0o755)
    job = SimpleNamespace(cluster="slurm", job_id="7")
    assert run_with_submitit.is_preempted(job) is expected


# ---- a job of two processes, on this machine ----


def flags_of_run(folder, class_folders):
    flags = (*SMALL_RUN, "--epochs", 6, "--log_freq", 1, "--drop_path_rate", 0.1)
    flags += ("--data_path", class_folders / "train", "--output_dir", folder)
    return [str(flag) for flag in flags]


def train(flags):
    main_dino.main(parse_args(flags))


def wait_for(condition, seconds=600):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.02)
    return found


def tasks_of(job):
    """The processes that a job's controller, whose process number is the job's, has started."""
    return [int(pid) for pid in Path(f"/proc/{job}/task/{job}/children").read_text().split()]


def test_a_job_asked_to_stop_saves_is_requeued_and_ends_where_an_unbroken_run_ends(
    class_folders, tmp_path
):
    pytest.importorskip("submitit")
    flags = flags_of_run(tmp_path / "%j", class_folders)
    options = ("--cluster", "local", "--nodes", 1, "--ngpus", 2, "--timeout", 60)
    # from another folder: the job finds the project by itself
    submitted = run_script(ROOT / "run_with_submitit.py", *flags, *options, cwd=tmp_path)
    assert submitted.returncode == 0, submitted.stderr
    (log,) = wait_for(lambda: list(tmp_path.glob("*/*_0_log.out")))
    folder, job = log.parent, log.parent.name
    metrics = folder / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_bytes().splitlines()) >= 2)
    for pid in tasks_of(job):
        os.kill(pid, signal.SIGUSR2)
    result = folder / f"{job}_0_result.pkl"
    wait_for(result.exists)
    assert pickle.loads(result.read_bytes()) == ("success", None)
    text = log.read_text()
    assert text.count("Stopped by SIGUSR2") == 1
    assert text.index("Stopped by SIGUSR2") < text.index("Requeued job") < text.index("Resumed")
    assert "2 processes by torchrun" in text

    run_launched(train, 2, flags_of_run(tmp_path / "unbroken", class_folders))
    assert_equal_states(final_state(tmp_path / "unbroken"), final_state(folder))
