# SPDX-License-Identifier: Apache-2.0
"""Stops a run of two ranks again and again with SIGTERM: no step may be lost.

    python benchmarks/stop_and_resume.py [--stops 10] [--slow] [--seed 0]

Trains a ViT under torchrun on tiles of scikit-image's photographs, twice by the same command: once
unbroken, and once with SIGTERM at random moments, to one rank or to torchrun (while it starts,
resumes, trains, or measures k-NN after each epoch), and the same command after each. A checkpoint
is written at the ends of epochs and when the run is stopped, no more often: so a stop must save the
steps since. `--slow`: steps of some seconds instead of tenths. Prints for each stop how long it
took and how many logged steps the checkpoint lacks, and one JSON line. Exit code 0 if that is never
more than one and all entries of the checkpoints and logs end as the unbroken run's. Needs Linux's
/proc.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import print_result
from kill_and_resume import Job, compare, time_unbroken, wait, write_tiles

COMMON = (
    *("--arch", "vit_nano", "--patch_size", 8, "--local_crops_number", 2, "--out_dim", 1024),
    *("--head_hidden_dim", 64, "--head_bottleneck_dim", 64, "--warmup_epochs", 1),
    *("--num_workers", 1, "--log_freq", 1, "--knn_freq", 1, "--device", "cpu"),
)
QUICK = (*COMMON, "--global_crop_size", 32, "--local_crop_size", 16, "--epochs", 12)
SLOW = (*COMMON, "--arch", "vit_small", "--patch_size", 16, "--epochs", 2)  # of 224 pixels
AT_START = 0.2  # share of the stops that come before the run trains again
RESUMES = "checkpoint.pth"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--slow", action="store_true", help="steps of some seconds")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tiles, unbroken, stopped = (
            Path(folder) / name for name in ("tiles", "unbroken", "stopped")
        )
        write_tiles(tiles)
        flags = (*(SLOW if args.slow else QUICK), "--knn_data_path", write_classes(tiles, folder))
        starting, training = time_unbroken(Job(tiles, unbroken, 2, flags, restarts=0))
        print(f"Unbroken: {starting:.1f} s to the first step, {training:.1f} s of training.")
        job = Job(tiles, stopped, 2, flags, restarts=0)
        lost, seconds = stop_and_restart(
            job, args.stops, random.Random(args.seed), starting, training
        )
        iterations = job.iterations()
        differences, compared = compare(unbroken, stopped)
    for line in differences[:20]:
        print(f"Different: {line}")
    result = {"benchmark": "stop_and_resume", "slow": args.slow, "seed": args.seed}
    result |= {"stops": len(lost), "most_steps_lost": max(lost), "iterations": iterations}
    result |= {"longest_stop_s": round(max(seconds), 1), "seconds_per_step": training / iterations}
    print_result(
        {**result, "compared": compared, "different": len(differences), "torch": torch.__version__}
    )
    sys.exit(1 if differences or max(lost) > 1 else 0)


def write_classes(tiles, folder):
    """A folder of train/ and val/ with a class for each photograph, linked to the tiles."""
    classes = Path(folder) / "classes"
    for number, tile in enumerate(sorted(tiles.iterdir())):
        place = classes / ("val" if number % 4 == 0 else "train") / tile.stem.rstrip("0123456789")
        place.mkdir(parents=True, exist_ok=True)
        (place / tile.name).symlink_to(tile)
    return classes


def stop_and_restart(job, stops, rng, starting, training):
    """Run `job` to its end through so many stops: (steps lost, seconds taken) of each."""
    lost, seconds = [], []
    job.start()
    while len(lost) < stops:
        before = job.iterations()
        if rng.random() < AT_START:
            wait(job, seconds=rng.uniform(0, starting))
        else:
            wait(job, until=lambda before=before: job.iterations() > before)
            wait(job, seconds=rng.uniform(0, training / stops))
        if not job.is_running():
            break  # it was faster than the stops
        ranks = job.ranks()
        victim, name = job.process.pid, "torchrun"
        if ranks and rng.random() < 0.5:
            number = rng.randrange(len(ranks))
            victim, name = ranks[number], f"rank {number}"
        begin = time.monotonic()
        os.kill(victim, signal.SIGTERM)
        job.process.wait()
        seconds.append(time.monotonic() - begin)
        lost.append(job.iterations() - saved(job.folder))
        print(
            f"Stop {len(lost)}: {name}, {seconds[-1]:.1f} s, {job.iterations()} steps logged,"
            f" {lost[-1]} of them not in the checkpoint"
        )
        job.start()
    wait(job, until=lambda: False)
    return lost or [0], seconds or [0.0]


def saved(folder):
    """How many iterations the checkpoint holds; 0 without one."""
    path = folder / RESUMES
    return torch.load(path, weights_only=True)["iteration"] if path.exists() else 0


if __name__ == "__main__":
    main()
