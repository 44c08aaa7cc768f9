# SPDX-License-Identifier: Apache-2.0
"""Images/s of a whole run: files, loader and step together.

    python benchmarks/end_to_end.py FOLDER [--against OFFICIAL_CHECKOUT] [--compile ...]

Starts main_dino.py on the images of FOLDER, again and again until there are enough of them, and
reads what it logged: the median over its logged stretches of ten steps, after the first ones. One
JSON line. Flags that it does not know go to main_dino.py; nothing is compiled without --compile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import ROOT, describe_machine, eager_unless_asked, print_result, run_official

from dino.data.images import list_training_images

STRETCH = 10  # steps between two waits for the device
WARMUP = 2  # stretches: the loader fills its queue, CUDA chooses its kernels


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out_dim", type=int, default=65536)
    parser.add_argument("--local", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60, help="that count")
    parser.add_argument("--num_workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--against", metavar="OFFICIAL_CHECKOUT")
    args, flags = parser.parse_known_args()
    flags = eager_unless_asked(flags)
    shared = ["--arch", args.arch, "--out_dim", args.out_dim, "--num_workers", args.num_workers]
    shared += ["--device", args.device]
    result = {
        "benchmark": "end_to_end",
        **describe_machine(args.device),
        **{name: getattr(args, name) for name in ("arch", "batch", "out_dim", "local", "steps")},
        "num_workers": args.num_workers,
        "flags": " ".join(flags),
        "ours": run_ours(args, [*shared, *flags]),
    }
    if args.against:
        shared += ["--batch", args.batch, "--local", args.local, "--steps", args.steps]
        result["official"] = official = run_official(args.against, "loop", args.folder, *shared)
        ratio = result["ours"]["images_per_s"] / official["images_per_s"]
        result["ratio"] = round(ratio, 2)
    print_result(result)


def run_ours(args, flags):
    """Medians over the stretches that count, of a run of main_dino.py."""
    stretches = WARMUP + -(-args.steps // STRETCH)
    count = args.batch * (stretches * STRETCH + 1)
    paths = [os.path.abspath(path) for path in list_training_images(args.folder)]
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images.txt"
        images.write_text("\n".join((paths * (count // len(paths) + 1))[:count]))
        command = [sys.executable, "-W", "ignore", "main_dino.py", *flags]
        command += ["--data_path", images, "--output_dir", folder, "--log_freq", STRETCH]
        command += ["--batch_size_per_gpu", args.batch, "--local_crops_number", args.local]
        command += ["--epochs", 1, "--warmup_epochs", 0, "--freeze_last_layer", 0]
        subprocess.run(
            [str(part) for part in command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "images_per_s" in record]
    records = records[WARMUP + 1 :]  # the first stretch is one step long
    figures = {
        name: statistics.median(record[name] for record in records)
        for name in ("images_per_s", "data_wait", "peak_memory_mb")
    }
    return {
        "images_per_s": round(figures["images_per_s"], 1),
        "ms_per_step": round(1000 * args.batch / figures["images_per_s"], 2),
        "share_of_time_waiting_for_data": round(figures["data_wait"], 3),
        "peak_memory_gib": round(figures["peak_memory_mb"] / 1024, 2),
    }


if __name__ == "__main__":
    main()
