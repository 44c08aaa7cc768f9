# SPDX-License-Identifier: Apache-2.0
"""Meters, the console line, and the files that a run writes its figures to."""

import datetime
import json
import statistics
import sys
import time
from collections import defaultdict, deque
from pathlib import Path

import torch
from tqdm import tqdm

from distributed import all_reduce_sum, is_main_process, print0


class SmoothedValue:
    """A series of numbers: its last `window_size` values, and its mean over all of them."""

    def __init__(self, window_size=20, fmt="{median:.6f} ({global_avg:.6f})"):
        self.deque = deque(maxlen=window_size)
        self.total = 0.0
        self.count = 0
        self.fmt = fmt

    def update(self, value, n=1):
        """Add `value`, which counts `n` times in the global mean."""
        self.deque.append(value)
        self.count += n
        self.total += value * n

    def synchronize_between_processes(self):
        """Let count and total be those of all processes; the window stays this process's own."""
        device = torch.device("cuda") if torch.cuda.is_initialized() else torch.device("cpu")
        dtype = torch.float64
        count, self.total = all_reduce_sum(
            torch.tensor([self.count, self.total], dtype=dtype, device=device)
        ).tolist()
        self.count = int(count)

    @property
    def median(self):
        return statistics.median_low(self.deque)

    @property
    def avg(self):
        return statistics.fmean(self.deque)

    @property
    def global_avg(self):
        return self.total / self.count

    @property
    def max(self):
        return max(self.deque)

    @property
    def value(self):
        return self.deque[-1]

    def __str__(self):
        return self.fmt.format(
            median=self.median,
            avg=self.avg,
            global_avg=self.global_avg,
            max=self.max,
            value=self.value,
        )


class MetricLogger:
    """Named SmoothedValues, and a loop that prints them."""

    def __init__(self, delimiter="\t"):
        self.meters = defaultdict(SmoothedValue)
        self.delimiter = delimiter

    def update(self, **values):
        for name, value in values.items():
            self.meters[name].update(value.item() if isinstance(value, torch.Tensor) else value)

    def add_meter(self, name, meter):
        self.meters[name] = meter

    def __getattr__(self, name):
        if name in self.__dict__.get("meters", {}):
            return self.meters[name]
        raise AttributeError(f"{type(self).__name__} has no meter {name!r}")

    def __str__(self):
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def synchronize_between_processes(self):
        for meter in self.meters.values():
            meter.synchronize_between_processes()

    def log_every(self, iterable, print_freq, header=""):
        """Yield from `iterable`; after every `print_freq`-th item and the last, print a line on
        rank 0.

        The line has progress, time left, the meters, and seconds per iteration: in all, and
        waiting for data.
        """
        iteration_time, data_time = SmoothedValue(fmt="{avg:.4f}"), SmoothedValue(fmt="{avg:.4f}")
        total = len(iterable)
        start = end = time.time()
        for i, item in enumerate(iterable):
            data_time.update(time.time() - end)
            yield item
            iteration_time.update(time.time() - end)
            if is_due(i, total, print_freq):
                left = datetime.timedelta(seconds=int(iteration_time.global_avg * (total - i - 1)))
                fields = [header, f"[{i:{len(str(total))}d}/{total}]", f"eta: {left}", str(self)]
                fields += [f"time: {iteration_time}", f"data: {data_time}"]
                if torch.cuda.is_initialized():
                    fields.append(f"max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}")
                print0(self.delimiter.join(fields))
            end = time.time()
        seconds = time.time() - start
        per_iteration = seconds / max(1, total)
        print0(
            f"{header} Total time: {datetime.timedelta(seconds=int(seconds))}"
            f" ({per_iteration:.4f} s / it)"
        )


def is_due(i, total, print_freq):
    """Whether iteration `i` of `total` is logged: every `print_freq`-th is, and the last."""
    return i % print_freq == 0 or i == total - 1


def progress_bar(iterable, description):
    """tqdm around `iterable` on a terminal of rank 0; elsewhere `iterable` itself."""
    return (
        tqdm(iterable, description, leave=False)
        if is_main_process() and sys.stderr.isatty()
        else iterable
    )


def append_json_line(path, record):
    """Add one JSON object to a file of lines, from rank 0."""
    if is_main_process():
        with Path(path).open("a") as file:
            file.write(json.dumps(record) + "\n")


def accuracy(output, target, topk=(1,)):
    """Percentages of rows of `output` (B, C) whose `target` (B,) is among the k highest, for each
    k.
    """
    best = output.topk(min(max(topk), output.shape[1])).indices
    correct = best == target.view(-1, 1)
    return [100 * correct[:, :k].any(dim=1).float().mean() for k in topk]
