# SPDX-License-Identifier: Apache-2.0
"""Stops runs in every way that Slurm has, and compares what they end with against one left alone.

    apt-get install slurm-wlm munge && pip install submitit
    benchmarks/slurm_on_one_machine.sh start FOLDER
    SLURM_CONF=FOLDER/slurm.conf python benchmarks/slurm_jobs.py FOLDER/runs [--only srun ...]

Two processes train a small ViT on tiles of scikit-image's photographs: left alone under srun, by a
script for sbatch, and by run_with_submitit.py. A job is stopped in mid-epoch by its time limit, by
scancel, or by a job of higher priority, and goes on: by itself where it was requeued, after scancel
by the same command. Prints what happened to each, and one JSON line. Exit code 0 if all of them end
with the files of the one left alone, bit for bit, and no step was done twice.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import ROOT, print_result
from kill_and_resume import FLAGS, compare, write_tiles

STEPS_BEFORE = 10  # a job is stopped after so many
# What README advises, for two processes on this node. Nothing is saved inside epochs unless a
# signal asks for it.
TRAINING = (*FLAGS, "--saveckp_iters", 0, "--batch_size_per_gpu", 4)
SCRIPT = """#!/bin/bash
#SBATCH --ntasks=2 --time=30 --signal=USR1@60
#SBATCH --requeue --open-mode=append --output={folder}/job.txt
srun {command}
code=$?
if [ $code = 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for the runs")
    parser.add_argument("--only", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument(
        "--epochs", type=int, default=20, help="with fewer, a time limit is too late"
    )
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = args.folder.resolve()
    tiles, unbroken = folder / "tiles", folder / "unbroken"
    if not tiles.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_tiles(tiles)
    if not unbroken.exists():
        run("srun", "--ntasks=2", *training(tiles, unbroken, args.epochs))
        print("srun: trained to the end.", flush=True)
    results = {}
    for name in args.only:
        start, stop = SCENARIOS[name]
        job = start(tiles, folder / name.replace(" ", "_"), args.epochs)
        results[name] = stop_and_compare(name, job, stop, unbroken)
    version = run("sinfo", "--version").split()[1]
    print_result(
        {"benchmark": "slurm_jobs", **results, "slurm": version, "torch": torch.__version__}
    )
    sys.exit(any(result["different"] or result["repeated_steps"] for result in results.values()))


def training(tiles, folder, epochs):
    """The command that trains in `folder`."""
    return [sys.executable, str(ROOT / "main_dino.py"), *flags(tiles, folder, epochs)]


def flags(tiles, folder, epochs):
    places = ("--data_path", tiles, "--output_dir", folder)
    return [str(flag) for flag in (*TRAINING, "--epochs", epochs, *places)]


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


# ---- how a job is started, and again by the same command ----


class Batch:
    """The script above, by sbatch."""

    def __init__(self, tiles, folder, epochs):
        self.folder, self.log = folder, folder / "job.txt"
        folder.mkdir()
        self.script = folder.with_suffix(".sh")
        command = " ".join(training(tiles, folder / "run", epochs))
        self.script.write_text(SCRIPT.format(folder=folder, command=command))
        self.run = folder / "run"

    def submit(self):
        return run("sbatch", "--parsable", self.script).strip()


class Submitit:
    """run_with_submitit.py."""

    def __init__(self, tiles, folder, epochs):
        self.folder = self.run = folder
        job = ("--ngpus", 2, "--nodes", 1, "--mem_gb", 2, "--cpus_per_task", 1, "--timeout", 30)
        job += ("--partition", "")
        script = ROOT / "run_with_submitit.py"
        self.command = (sys.executable, script, *flags(tiles, folder, epochs), *job)

    def submit(self):
        self.log = Path(run(*self.command).split()[-1])
        return self.log.name.split("_")[0]


# ---- how a job is stopped ----


def by_time_limit(job_id):
    """Lower the job's limit, so that Slurm gives the signal of its end soon, and kills it later."""
    minutes = (seconds_run(job_id) + 30) // 60 + 1
    run("scontrol", "update", f"JobId={job_id}", f"TimeLimit={minutes}")
    wait(lambda: outcome(job_id))
    run("scontrol", "update", f"JobId={job_id}", "TimeLimit=30")


def by_scancel(job_id):
    run("scancel", job_id)


def by_urgent_job(job_id):
    where = ("--parsable", "--partition=urgent", "--ntasks=2", "--output=/dev/null")
    other = run("sbatch", *where, "--wrap=sleep 5").strip()
    wait(lambda: field(other, "JobState") == "COMPLETED")


def seconds_run(job_id):
    *_, hours, minutes, seconds = map(int, re.split("[-:]", field(job_id, "RunTime")))
    return seconds + 60 * (minutes + 60 * hours)  # of less than a day


def field(job_id, name):
    """A field of `scontrol show job`."""
    return re.search(rf"\b{name}=(\S+)", run("scontrol", "show", "job", job_id))[1]


SCENARIOS = {
    f"{way} {how.__name__.removeprefix('by_')}": (start, how)
    for way, start in (("sbatch", Batch), ("submitit", Submitit))
    for how in (by_time_limit, by_scancel, by_urgent_job)
}


# ---- what becomes of it ----


def stop_and_compare(name, job, stop, unbroken):
    """Stop a job once in mid-epoch, let it end, and compare: a dict of what was seen."""
    job_id = job.submit()
    wait(lambda: steps(job.run) >= STEPS_BEFORE)
    before = time.monotonic()
    stop(job_id)
    stopped = wait(lambda: outcome(job_id))
    first = job.log.read_text()
    said = re.findall(r"[Ss]topped by .*", first)
    took = time.monotonic() - before
    print(f"{name}: {stopped} after {took:.0f} s; {said}", flush=True)
    if stopped != "REQUEUED":
        job_id = job.submit()
    wait(lambda: field(job_id, "JobState") in ENDED)
    ended = field(job_id, "JobState")
    text = job.log.read_text()
    text = text if text.startswith(first) else first + text
    printed = re.findall(r"^Epoch: \[(\d+)/\d+\] +\[ *(\d+)/", text, re.MULTILINE)
    repeated = len(printed) - len(set(printed))
    differences, compared = compare(unbroken, job.run)
    differences = [line for line in differences if not line.startswith("/names")]  # and logs
    resumed = re.findall(r"Resumed .*/(.*)", text)
    print(f"{name}: {ended}; {resumed}; {repeated} steps done twice")
    for line in differences[:5]:
        print(f"Different: {line}")
    print(
        f"{name}: {compared} values and tensors compared, {len(differences)} different", flush=True
    )
    return {
        "outcome": stopped,
        "repeated_steps": repeated,
        "compared": compared,
        "different": len(differences),
    }


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED")


def outcome(job_id):
    """REQUEUED, or the state in which a job has ended; None while it does neither."""
    state = field(job_id, "JobState")
    return "REQUEUED" if field(job_id, "Restarts") != "0" else state if state in ENDED else None


def steps(folder):
    path = folder / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def wait(condition, seconds=600):
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise RuntimeError("nothing came of it")
        time.sleep(0.2)
    return found


if __name__ == "__main__":
    main()
