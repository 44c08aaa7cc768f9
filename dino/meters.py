# SPDX-License-Identifier: Apache-2.0
"""Meters, the console line and progress bars; top-k accuracy."""

import datetime
import resource
import statistics
import sys
import time
from collections import defaultdict, deque

import torch
from tqdm import tqdm

from dino.distributed import all_reduce_sum, is_main_process, print0


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
        device = "cuda" if torch.cuda.is_initialized() else "cpu"
        sums = torch.tensor([self.count, self.total], dtype=torch.float64, device=device)
        count, self.total = all_reduce_sum(sums).tolist()
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
        self.lap_start, self.waited, self.lap_iterations = time.monotonic(), 0.0, 0

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

    def means(self):
        """{name: mean over everything added}."""
        return {name: meter.global_avg for name, meter in self.meters.items()}

    def synchronize_between_processes(self):
        for meter in self.meters.values():
            meter.synchronize_between_processes()

    def log_every(self, iterable, print_freq, header="", start=0):
        """Yield from `iterable`, and show progress on rank 0: a bar on a terminal, else lines.

        The first item counts as number `start` of len(iterable). A line comes after every
        `print_freq`-th item and after the last: progress, time left, the meters, and seconds per
        iteration, in all and waiting for data.
        """
        iteration_time = SmoothedValue(fmt="{avg:.4f}")
        data_time = SmoothedValue(fmt="{avg:.4f}")
        total = len(iterable)
        bar = tqdm(total=total, initial=start, desc=header, disable=not on_terminal(), leave=False)
        self.lap()
        begin = end = time.monotonic()
        for i, item in enumerate(iterable, start):
            data_time.update(time.monotonic() - end)
            self.waited += data_time.value
            self.lap_iterations += 1
            yield item
            iteration_time.update(time.monotonic() - end)
            bar.update()
            if is_due(i, total, print_freq):
                bar.set_postfix_str(str(self))
                left = datetime.timedelta(seconds=int(iteration_time.global_avg * (total - i - 1)))
                fields = [header, f"[{i:{len(str(total))}d}/{total}]", f"eta: {left}", str(self)]
                fields += [f"time: {iteration_time}", f"data: {data_time}"]
                if torch.cuda.is_initialized():
                    fields.append(f"max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}")
                if bar.disable:
                    print0(self.delimiter.join(fields))
            end = time.monotonic()
        bar.close()
        seconds = time.monotonic() - begin
        took = datetime.timedelta(seconds=int(seconds))
        print0(f"{header} Total time: {took} ({seconds / max(1, total - start):.4f} s / it)")

    def lap(self):
        """(seconds, seconds of them spent waiting for data, iterations) since the last call."""
        now = time.monotonic()
        lap = now - self.lap_start, self.waited, self.lap_iterations
        self.lap_start, self.waited, self.lap_iterations = now, 0.0, 0
        return lap


def is_due(i, total, print_freq):
    """Whether iteration `i` of `total` is logged: every `print_freq`-th is, and the last."""
    return i % print_freq == 0 or i == total - 1


def on_terminal():
    """Whether this is rank 0 with a person watching."""
    return is_main_process() and sys.stderr.isatty()


def progress_bar(iterable, description, total=None):
    """tqdm around `iterable` where a person watches, for loops that print nothing."""
    return tqdm(iterable, description, total, leave=False, disable=not on_terminal())


def peak_memory_mb():
    """Most memory that this process has held, on the GPU if it uses one: MiB."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / 2**10 if sys.platform != "darwin" else kilobytes / 2**20


def accuracy(output, target, topk=(1,)):
    """Percent of the rows of `output` (B, C) with `target` (B,) among the k highest, for each k."""
    best = output.topk(min(max(topk), output.shape[1])).indices
    correct = best == target.view(-1, 1)
    return [100 * correct[:, :k].any(dim=1).float().mean() for k in topk]
