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

sys.path.insert(0, str(Path(__file__).parent.parent))  # where the project's modules are

from dino.errors import UserError

ROOT = Path(__file__).parent.parent


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


def eager_unless_asked(flags):
    """Flags of main_dino.py, without its default on a GPU, which compiles for minutes first."""
    asked = any(flag.partition("=")[0] == "--compile" for flag in flags)
    return list(flags) if asked else ["--compile", "false", *flags]


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


def medians(work, device, repeats, warmup=2):
    """Of `work()`, the device's share included: median seconds, and median seconds of processors.

    Other processes lengthen the first, the second hardly.
    """
    spans = []
    for _ in range(warmup + repeats):
        synchronize(device)
        start = time.perf_counter(), time.process_time()
        work()
        synchronize(device)
        spans.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return tuple(statistics.median(kind) for kind in zip(*spans[warmup:], strict=True))


class OfficialFailed(UserError):
    """The official code ran out of memory, or does not run here at all."""

    exit_code = 1


def run_official(checkout, job, *options):
    """The JSON line of `official.py CHECKOUT JOB OPTIONS`: modules of its own, by our names.

    UserError if that is no checkout, OfficialFailed if the job does not end well.
    """
    if not (Path(checkout) / "main_dino.py").is_file():
        raise UserError(
            f"--against {checkout}: there is no main_dino.py. Give a checkout of the official code."
        )
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("official.py"))]
    command += [str(part) for part in (checkout, job, *options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last_words = (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1]
        raise OfficialFailed(f"--against {Path(checkout).name}: {last_words}")
    return json.loads(done.stdout.splitlines()[-1])


def run_official_or_say_why(*args):
    """run_official, or {"failed": its last words}: out of memory is a result too."""
    try:
        return run_official(*args)
    except OfficialFailed as error:
        return {"failed": str(error)}


def with_ratios(result):
    """`result` with its figures divided by those of its entry `official`, where there are such."""
    official = result.get("official", {})
    names = ("images_per_s", "seconds", "cpu_ms_per_step", "cpu_seconds", "peak_memory_gib")
    shared = [name for name in names if name in result and name in official]
    if shared:
        result["ratio"] = {name: round(result[name] / official[name], 3) for name in shared}
    return result
