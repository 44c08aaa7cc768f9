# SPDX-License-Identifier: Apache-2.0
"""The files that a run writes its figures to, and reading them back."""

import contextlib
import itertools
from pathlib import Path

from dino.atomic import append_line, replacing
from dino.distributed import gather_objects, is_main_process, print0
from dino.json_files import dumps, finite, is_number, read_lines, read_object
from dino.printable import printable
from dino.tensorboard_log import TensorBoardLog
from dino.versions import versions
from dino.wandb_log import WandbLog

# What a line of metrics.jsonl must have, by the key that tells its kind: numbers, texts.
KINDS = {
    "loss": (
        (
            *("iteration", "epoch", "loss", "teacher_entropy_share", "kl_share", "agreement"),
            *("outputs_used", "lr", "weight_decay", "momentum", "teacher_temp", "images_per_s"),
            "data_wait",
        ),
        (),
    ),
    "knn_teacher": (("iteration", "epoch", "knn_teacher", "knn_student"), ()),
    "rank_me": (("iteration", "epoch", "rank_me", "alignment", "uniformity"), ()),
    "verdict": (("iteration", "epoch"), ("verdict", "text")),
    "bad_image": (("iteration", "epoch"), ("bad_image", "text")),
}

MOST = 1e15  # of any figure; sums and squares of such stay finite
# What a run can log at least and at most, with rounding; other figures may have any value.
RANGES = dict.fromkeys(("teacher_entropy_share", "agreement", "data_wait"), (-0.001, 1.001))
RANGES |= dict.fromkeys(("knn_teacher", "knn_student"), (0, 100))
RANGES |= {"images_per_s": (1e-9, MOST), "epoch": (0, MOST), "kl_share": (-0.001, MOST)}


def is_figure(value):
    return is_number(value) and abs(value) < MOST


def is_in_range(name, value):
    low, high = RANGES.get(name, (-MOST, MOST))
    return is_figure(value) and low <= value <= high


def is_of(kind, line):
    """Whether a line has all that one of KINDS must have."""
    numbers, texts = KINDS[kind]
    return all(is_in_range(name, line.get(name)) for name in numbers) and all(
        isinstance(line.get(name), str) for name in texts
    )


def is_measurement(line):
    return "rank_me" in line or "knn_teacher" in line


class RunLog:
    """The files of figures in --output_dir, written by rank 0.

    `metrics.jsonl` has a line for each logged iteration, measurement and verdict, `log.txt`
    one for each epoch. With `tensorboard` and `wandb` the same numbers go to these boards.
    """

    def __init__(self, output_dir, tensorboard=False, wandb=False):
        self.folder = Path(output_dir)
        self.boards = [TensorBoardLog(self.folder)] * tensorboard + [WandbLog(self.folder)] * wandb

    def start(self, args):
        """Begin a run: its flags and versions, and no figures."""
        self.describe(args, resumes=False)
        for name in ("metrics.jsonl", "log.txt"):
            self.write(name, "")

    def describe(self, args, resumes):
        """Write the flags, and the versions that this process runs with."""
        self.write("args.json", dumps(args, indent=1) + "\n")
        self.write("versions.json", dumps(versions(), indent=1) + "\n")
        for board in self.boards if is_main_process() else ():
            board.begin(finite(args), resumes)

    def rewind(self, args, epochs, epochs_done):
        """Resume a run: drop the lines of what is done again.

        What stays is of the first `epochs` epochs and of the iterations up to `epochs_done`, which
        has a fraction: with another batch size, their numbers would mean something else.
        """
        self.describe(args, resumes=True)
        self.keep("log.txt", lambda line: line["epoch"] < epochs)
        self.keep(
            "metrics.jsonl",
            lambda line: line["epoch"] <= (epochs if is_measurement(line) else epochs_done + 1e-9),
        )

    def keep(self, name, wanted):
        """Rewrite a file with the lines that are `wanted` and have a number `epoch`."""
        lines, damaged = read_lines(self.folder / name)
        whole = [line for line in lines if is_number(line.get("epoch"))]
        if damaged := damaged + len(lines) - len(whole):
            print0(f"Warning: {damaged} damaged lines of {name} are dropped.")
        self.write(name, "".join(dumps(line) + "\n" for line in whole if wanted(line)))

    def write(self, name, text):
        """Write a whole file atomically."""
        if is_main_process():
            path = self.folder / name
            with best_effort(path), replacing(path) as temporary:
                temporary.write_text(text)

    def iteration(self, record):
        self.append("metrics.jsonl", record)
        self.to_boards("iteration", record, record["iteration"])

    def epoch(self, record):
        self.append("log.txt", record)
        self.to_boards("epoch", record, record["epoch"])

    def measurement(self, progress, measured, labels):
        """What was measured on the features between two epochs: printed and logged.

        `labels`: {"knn_set": what images the k-NN accuracies are of}, or {} without any.
        """
        place = position(progress)
        done = f"{place['epoch']} epoch{'s' * (place['epoch'] != 1)}"
        knn = [f"{name[4:]} {measured[name]:.1f} %" for name in measured if name[:4] == "knn_"]
        if knn:
            print0(f"k-NN accuracy after {done}: {', '.join(knn)}")
        print0(
            f"Features after {done}: RankMe {measured['rank_me']:.1f},"
            f" alignment {measured['alignment']:.3f}, uniformity {measured['uniformity']:.2f}"
        )
        self.append("metrics.jsonl", place | measured | labels)

    def verdict(self, progress, name, text):
        """What the epoch that just ended has shown: printed and logged."""
        print0(text)
        self.append("metrics.jsonl", position(progress) | {"verdict": name, "text": text})

    def bad_images(self, progress, loader):
        """The images replaced since the last call, by any rank's loader: printed and logged."""
        for path, reason in sorted(set(itertools.chain(*gather_objects(loader.take_skipped())))):
            print0(f"Skipped: {printable(reason)}")
            line = {"bad_image": path, "text": reason}
            self.append("metrics.jsonl", position(progress) | line)

    def flags(self):
        """args.json, as a dict. OSError where there is none, UserError where it is damaged."""
        return read_object(self.folder / "args.json")

    def read(self, kind):
        """The lines of metrics.jsonl of one of KINDS that have all that a line of it must have."""
        return self.read_all()[kind]

    def read_all(self):
        """{kind: lines} of metrics.jsonl, which is parsed once, and "odd": those of no kind."""
        lines, damaged = read_lines(self.folder / "metrics.jsonl")
        found = {kind: [] for kind in KINDS} | {"odd": [None] * damaged}
        for line in of_the_last_labels(lines):
            kinds = [kind for kind in KINDS if is_of(kind, line)]
            for kind in kinds or ["odd"]:
                found[kind].append(line)
        found["loss"] = [line for line in found["loss"] if line["epoch"] > 0]
        return found

    def append(self, name, record):
        if is_main_process():
            with best_effort(self.folder / name):
                append_line(self.folder / name, dumps(record))

    def to_boards(self, group, record, step):
        """The numbers of a record, to the boards that the flags ask for."""
        figures = {name: value for name, value in record.items() if is_number(value)}
        for board in self.boards if is_main_process() else ():
            with best_effort(board.folder):
                board.add(group, figures, step)


def of_the_last_labels(lines):
    """`lines` without k-NN accuracies of other images than the last ones, which do not compare.

    Lines of earlier versions do not say what images theirs are of.
    """
    last = next((line["knn_set"] for line in reversed(lines) if "knn_set" in line), None)
    return [
        line
        if line.get("knn_set", last) == last
        else {key: value for key, value in line.items() if not key.startswith("knn_")}
        for line in lines
    ]


def before_training(lines):
    """The first of some measurements; None if it was not before the first step.

    It was later where a run was resumed in another folder, or got its labels then.
    """
    return lines[0] if lines and lines[0]["epoch"] == 0 else None


def position(progress):
    """Where a line at the end of an epoch stands."""
    epochs = progress.iteration // progress.iterations_per_epoch
    return {"iteration": progress.iteration - 1, "epoch": epochs}


@contextlib.contextmanager
def best_effort(path):
    """Print a warning and continue where a file beside the checkpoints cannot be written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        print0(printable(f"Warning: {path} could not be written ({reason}); continuing."))
