# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: what ran where, medians, peak memory, and the official code beside us.

Each benchmark prints one JSON line. Ratios to the official code compare two processes that ran one
after the other, with the same environment, on the same machine.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torchvision

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the project's modules are beside this folder


def describe_machine(device):
    """Device, processor and versions."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "CPU",
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda if cuda else None,
    }


def cpu_model():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def print_result(result):
    print(json.dumps(result), flush=True)


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_gib(device):
    """Of the GPU's allocator, or of this process."""
    if torch.device(device).type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def median_seconds(work, device, repeats, warmup=2):
    """Median time of `work()`, the device's share included."""
    seconds = []
    for repeat in range(warmup + repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        if repeat >= warmup:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def run_official(checkout, job, *options):
    """The JSON line of `official.py CHECKOUT JOB OPTIONS`: modules of its own, by our names."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("official.py"))]
    command += [str(part) for part in (checkout, job, *options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
