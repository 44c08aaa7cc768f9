# SPDX-License-Identifier: Apache-2.0
"""The files that a run writes its figures to, and reading them back."""

import contextlib
import itertools
import json
from pathlib import Path

from dino.distributed import gather_objects, is_main_process, print0
from dino.errors import UserError


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
        """Resume after so many epochs and iterations: drop the lines of what is done again."""
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
        """Write a whole file atomically."""
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
        """What the epoch that just ended has shown: printed and logged."""
        print0(text)
        position = {"iteration": progress.iteration - 1, "epoch": progress.epoch + 1}
        self.append("metrics.jsonl", position | {"verdict": name, "text": text})

    def bad_images(self, progress, loader):
        """The images replaced since the last call, by any rank's loader: printed and logged."""
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
    """Print a warning and continue where a file beside the checkpoints cannot be written."""
    try:
        yield
    except OSError as error:
        print0(f"Warning: {path} could not be written ({error.strerror or error}); continuing.")


def read_json_lines(path):
    """The JSON objects of a file of lines; [] without the file. Lines cut short are left out."""
    records = []
    if not Path(path).exists():
        return records
    for line in Path(path).read_text(errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
