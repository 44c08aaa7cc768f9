# SPDX-License-Identifier: Apache-2.0
"""Kills a run again and again, and compares what it ends with against a run left alone.

    python benchmarks/kill_and_resume.py [--kills 30] [--processes 2] [--seed 0]

Trains a small ViT on tiles of scikit-image's photographs, twice by the same command: once unbroken,
once with SIGKILL at random moments (while it starts, resumes, trains, writes a checkpoint) and the
same command after each. With --processes 2 that is `torchrun --max_restarts 3`: a random rank is
killed, torchrun restarts them all, and is started again itself once it has given up. Prints each
kill, the comparison of every entry of the checkpoints and of every logged figure, and one JSON
line. Exit code 0 if all of it is equal, bit for bit. Needs Linux's /proc.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import ROOT, print_result

from dino.data.demo import PHOTOGRAPHS, TILE, open_photograph

TILES = 8  # of each photograph
# A checkpoint, of 12 MB, is due at every step, so that one is being written most of the time.
# Stochastic depth is on, as it is by default.
FLAGS = (
    *("--arch", "vit_nano", "--patch_size", 8, "--global_crop_size", TILE, "--local_crop_size", 16),
    *("--local_crops_number", 2, "--out_dim", 1024, "--head_hidden_dim", 64),
    *("--head_bottleneck_dim", 64, "--epochs", 16, "--warmup_epochs", 2, "--num_workers", 1),
    *("--saveckp_iters", 1, "--saveckp_freq", 5, "--log_freq", 1, "--device", "cpu"),
)
BATCH = 8  # images of a step, over all processes
MAX_RESTARTS = 3  # torchrun's
AT_START = 0.25  # share of the kills that come before the run trains again
# The longest work between two kills, in shares of what is due: on average half of it, so that work
# is left at the end.
WORK = 1.0
BEING_WRITTEN = ".checkpoint.pth.tmp"
CLOCK = ("images_per_s", "data_wait", "peak_memory_mb")  # logged figures that differ at each run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments, and of the ranks")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tiles, unbroken, killed = (Path(folder) / name for name in ("tiles", "unbroken", "killed"))
        write_tiles(tiles)
        starting, training = time_unbroken(Job(tiles, unbroken, args.processes))
        print(f"Unbroken: {starting:.1f} s to the first step, {training:.1f} s of training.")
        begin = time.monotonic()
        job = Job(tiles, killed, args.processes)
        counts = kill_and_restart(job, args.kills, random.Random(args.seed), starting, training)
        seconds = time.monotonic() - begin
        differences, compared = compare(unbroken, killed)
    for line in differences[:20]:
        print(f"Different: {line}")
    print(
        f"{counts['kills']} kills, {counts['restarts']} restarts; {compared} values and tensors"
        f" compared, {len(differences)} of them different."
    )
    result = {"benchmark": "kill_and_resume", "processes": args.processes, "seed": args.seed}
    result |= {**counts, "compared": compared, "different": len(differences)}
    print_result({**result, "seconds": round(seconds), "torch": torch.__version__})
    sys.exit(1 if differences else 0)


def write_tiles(folder):
    folder.mkdir()
    rng = random.Random(0)
    for name in PHOTOGRAPHS:
        image = open_photograph(name)
        for i in range(TILES):
            x, y = rng.randrange(image.width - TILE), rng.randrange(image.height - TILE)
            tile = image.crop((x, y, x + TILE, y + TILE))
            tile.save(folder / f"{Path(name).stem}{i}.png")


class Job:
    """One command of main_dino.py, started as often as it takes."""

    def __init__(self, tiles, folder, processes, flags=FLAGS, restarts=MAX_RESTARTS):
        self.folder, self.processes = folder, processes
        self.output = folder.with_suffix(".txt")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--max_restarts", restarts]
        launcher = [*launcher, "--nproc_per_node", processes] if processes > 1 else []
        command = [sys.executable, *launcher, ROOT / "main_dino.py", *flags]
        command += ["--batch_size_per_gpu", BATCH // processes]
        command += ["--data_path", tiles, "--output_dir", folder]
        self.command = [str(part) for part in command]

    def start(self):
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def is_running(self):
        """False once it has ended well. Raises RuntimeError for a failure that is its own."""
        code = self.process.poll()
        if code:
            raise RuntimeError(f"exit code {code}:\n{self.output.read_text()[-3000:]}")
        return code is None

    def ranks(self):
        """Process numbers of those that train."""
        if self.processes == 1:
            return [self.process.pid] if self.process.poll() is None else []
        return [pid for pid in children(self.process.pid) if "main_dino.py" in command_line(pid)]

    def iterations(self):
        """How many are logged."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4000))
                return 1 + max(
                    map(int, re.findall(rb'{"iteration": (\d+)', file.read())), default=-1
                )
        except FileNotFoundError:
            return 0


def children(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, read_proc(task).split())
    return found


def command_line(pid):
    return read_proc(Path(f"/proc/{pid}/cmdline"))


def read_proc(path):
    try:
        return path.read_text()
    except OSError:  # gone meanwhile
        return ""


def time_unbroken(job):
    """(seconds to the first step, seconds from there to the end) of a run left alone."""
    begin = time.monotonic()
    job.start()
    while job.is_running() and not job.iterations():
        time.sleep(0.02)
    first = time.monotonic()
    while job.is_running():
        time.sleep(0.02)
    return first - begin, time.monotonic() - first


def kill_and_restart(job, kills, rng, starting, training):
    """Run `job` to its end through so many kills; counts of what happened."""
    counts = {"kills": 0, "restarts": 0, "launches": 1, "while_starting": 0, "while_writing": 0}
    job.start()
    while counts["kills"] < kills:
        before = job.iterations()
        at_start = rng.random() < AT_START
        if at_start:
            wait(job, seconds=rng.uniform(0, starting))
        else:
            wait(job, until=lambda before=before: job.iterations() > before)
            wait(job, seconds=rng.uniform(0, WORK * training / kills))
        ranks = job.ranks()
        if not ranks:
            if not job.is_running():
                break  # it was faster than the kills
            continue  # torchrun is about to start them
        victim = rng.randrange(len(ranks))
        os.kill(ranks[victim], signal.SIGKILL)
        writing = (job.folder / BEING_WRITTEN).exists()
        counts["kills"] += 1
        counts["while_starting"] += job.iterations() <= before
        counts["while_writing"] += writing
        note = ", a checkpoint half written" if writing else ""
        print(f"Kill {counts['kills']}: rank {victim} after {job.iterations()} steps{note}")
        counts["launches"] += restart(job, ranks)
        counts["restarts"] += 1
    wait(job, until=lambda: False)
    counts["iterations"] = job.iterations()
    return counts


def wait(job, until=None, seconds=float("inf")):
    """Until something is so, or for some seconds, or until the job has ended."""
    end = time.monotonic() + seconds
    while job.is_running() and time.monotonic() < end and not (until and until()):
        time.sleep(0.01)


def restart(job, ranks):
    """Have the job go on after the death of one of its `ranks`; returns the launches it took."""
    while job.process.poll() is None and (not job.ranks() or set(job.ranks()) & set(ranks)):
        time.sleep(0.02)  # torchrun ends the others, and starts new ones or gives up
    if job.process.poll() is None:
        return 0
    job.start()
    return 1


def compare(unbroken, killed):
    """(what differs, how many values were compared) of the checkpoints and logs of two folders.

    Left out: the folder's name, figures of the clock, and the checkpoint before the last one, which
    holds such figures.
    """
    differences, compared = [], 0
    contents = [dict(leaves(load(folder), "")) for folder in (unbroken, killed)]
    for name in sorted(contents[0].keys() | contents[1].keys()):
        a, b = (content.get(name) for content in contents)
        compared += 1
        if type(a) is not type(b) or not (
            torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        ):
            differences.append(name)
    return differences, compared


def load(folder):
    """{file: content} of what a run has left, and the names of all files."""
    files = {"names": sorted(path.name for path in folder.iterdir())}
    for path in folder.glob("*.pth"):
        if path.name != "checkpoint_previous.pth":
            files[path.name] = torch.load(path, weights_only=True)
            files[path.name].get("args", {}).pop("output_dir", None)
    for name in ("log.txt", "metrics.jsonl"):
        lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        lines = [line for line in lines if "verdict" not in line]  # some are about waiting
        files[name] = [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]
    return files


def leaves(value, name):
    """(name, value) of every leaf of nested dicts and lists, and of every container its length."""
    if isinstance(value, dict | list | tuple):
        yield f"{name} (length)", len(value)
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from leaves(item, f"{name}/{key}")
    else:
        yield name, value


if __name__ == "__main__":
    main()
