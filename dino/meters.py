# SPDX-License-Identifier: Apache-2.0
"""Meters, the console line, and the files that a run writes its figures to.

python metrics.py runs/a runs/b     # compares finished or running runs
"""

import contextlib
import datetime
import itertools
import json
import resource
import statistics
import sys
import time
from collections import defaultdict, deque
from pathlib import Path

import torch
from tqdm import tqdm

from distributed import all_reduce_sum, gather_objects, is_main_process, print0
from errors import UserError, exit_on_user_error


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
        self.lap_start, self.waited, self.lap_iterations = time.time(), 0.0, 0

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
        begin = end = time.time()
        for i, item in enumerate(iterable, start):
            data_time.update(time.time() - end)
            self.waited += data_time.value
            self.lap_iterations += 1
            yield item
            iteration_time.update(time.time() - end)
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
            end = time.time()
        bar.close()
        seconds = time.time() - begin
        took = datetime.timedelta(seconds=int(seconds))
        print0(f"{header} Total time: {took} ({seconds / max(1, total - start):.4f} s / it)")

    def lap(self):
        """(seconds, seconds of them spent waiting for data, iterations) since the last call."""
        now = time.time()
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


class RunLog:
    """The files of figures in --output_dir, written by rank 0.

    `metrics.jsonl` has a line for each logged iteration, k-NN measurement and verdict, `log.txt`
    one for each epoch; with `tensorboard` the same numbers go to its event files.
    """

    def __init__(self, output_dir, tensorboard=False):
        self.folder = Path(output_dir)
        self.tensorboard, self.writer = tensorboard, None

    def start(self, args):
        """Begin a run: its flags, and no figures."""
        self.write("args.json", json.dumps(args, indent=1) + "\n")
        for name in ("metrics.jsonl", "log.txt"):
            self.write(name, "")

    def rewind(self, args, epoch, iteration):
        """Go on after so many epochs and iterations: drop the lines of what is done again."""
        self.write("args.json", json.dumps(args, indent=1) + "\n")
        self.keep("log.txt", lambda line: line["epoch"] < epoch)
        self.keep(
            "metrics.jsonl",
            lambda line: (
                line["iteration"] < iteration
                and not ("knn_teacher" in line and line["epoch"] > epoch)
            ),
        )

    def keep(self, name, wanted):
        lines = [line for line in read_json_lines(self.folder / name) if wanted(line)]
        self.write(name, "".join(json.dumps(line) + "\n" for line in lines))

    def write(self, name, text):
        """All of a file, or what it was before."""
        if is_main_process():
            temporary = self.folder / f".{name}.tmp"
            with best_effort(self.folder / name):
                temporary.write_text(text)
                temporary.replace(self.folder / name)

    def iteration(self, record):
        self.append("metrics.jsonl", record)
        self.to_tensorboard("iteration", record, record["iteration"])

    def epoch(self, record):
        self.append("log.txt", record)
        self.to_tensorboard("epoch", record, record["epoch"])

    def knn(self, progress, accuracies):
        """A k-NN measurement between two epochs."""
        epochs = progress.iteration // progress.iterations_per_epoch
        values = ", ".join(f"{name[4:]} {value:.1f} %" for name, value in accuracies.items())
        print0(f"k-NN accuracy after {epochs} epochs: {values}")
        self.append(
            "metrics.jsonl", {"iteration": progress.iteration - 1, "epoch": epochs, **accuracies}
        )

    def verdict(self, progress, name, text):
        """What the epoch that just ended has shown."""
        print0(text)
        position = {"iteration": progress.iteration - 1, "epoch": progress.epoch + 1}
        self.append("metrics.jsonl", position | {"verdict": name, "text": text})

    def bad_images(self, progress, loader):
        """The images that were replaced since the last call, by any rank's loader."""
        for path, reason in sorted(set(itertools.chain(*gather_objects(loader.take_skipped())))):
            print0(f"Skipped: {reason}")
            position = {"iteration": progress.iteration - 1, "epoch": progress.epoch + 1}
            self.append("metrics.jsonl", position | {"bad_image": path, "text": reason})

    def flags(self):
        """args.json, as a dict. OSError where there is none, UserError where it is damaged."""
        try:
            return json.loads((self.folder / "args.json").read_text())
        except json.JSONDecodeError:
            raise UserError(f"{self.folder / 'args.json'} is damaged.") from None

    def read(self, name):
        """The lines of metrics.jsonl that have a value of this name."""
        return [line for line in read_json_lines(self.folder / "metrics.jsonl") if name in line]

    def append(self, name, record):
        if is_main_process():
            with best_effort(self.folder / name), (self.folder / name).open("a") as file:
                file.write(json.dumps(record) + "\n")

    def to_tensorboard(self, group, record, step):
        if not self.tensorboard or not is_main_process():
            return
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder / "tensorboard"))
        for name, value in record.items():
            self.writer.add_scalar(f"{group}/{name}", value, step)
        self.writer.flush()


@contextlib.contextmanager
def best_effort(path):
    """Let the run go on, with a notice, where a file beside its checkpoints cannot be written."""
    try:
        yield
    except OSError as error:
        print0(f"{path} could not be written ({error.strerror or error}). The run goes on.")


def read_json_lines(path):
    """The objects in a file of lines, if there is one; what a crash cut short is left out."""
    records = []
    if not Path(path).exists():
        return records
    for line in Path(path).read_text(errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def accuracy(output, target, topk=(1,)):
    """Percentages of rows of `output` (B, C) whose `target` (B,) is among the k highest, for each
    k.
    """
    best = output.topk(min(max(topk), output.shape[1])).indices
    correct = best == target.view(-1, 1)
    return [100 * correct[:, :k].any(dim=1).float().mean() for k in topk]


def summarise(folder):
    """One line of a run: name, epochs, last loss, entropy and KL, best k-NN, images/s."""
    log = RunLog(folder)
    steps, knn = log.read("loss"), log.read("knn_teacher")
    if not steps:
        found = "no metrics.jsonl with steps in it, so not the folder of a run"
        raise UserError(f"RUN {folder}: {found if Path(folder).is_dir() else 'no such folder'}.")
    last = steps[-1]
    best = f"{max(line['knn_teacher'] for line in knn):.1f}" if knn else "-"
    rate = statistics.median(step["images_per_s"] for step in steps)
    return (
        Path(folder).resolve().name,
        f"{last['epoch']:.1f}",
        f"{last['loss']:.3f}",
        f"{100 * last['teacher_entropy_share']:.1f}",
        f"{100 * last['kl_share']:.1f}",
        best,
        f"{rate:.0f}",
    )


def main():
    """Print and draw what runs have logged, one beside the other."""
    from flags import Parser, check_output_file
    from plots import Run, draw_curves

    parser = Parser(prog="metrics.py", description="Compare runs: a table, and a picture.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="an --output_dir of main_dino.py")
    parser.add_argument("--output", default="comparison.png", help="where to draw their curves")
    args = parser.parse_args()
    with exit_on_user_error("metrics.py"):
        check_output_file(args.output)
        header = ("run", "epochs", "loss", "h % ln K", "KL % ln K", "best k-NN %", "images/s")
        table = [header, *map(summarise, args.runs)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
        draw_curves(args.output, [Run(folder) for folder in args.runs])
        print(f"Curves: {args.output}")


if __name__ == "__main__":
    main()
