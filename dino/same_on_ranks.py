# SPDX-License-Identifier: Apache-2.0
"""What all ranks must have in common, or they wait for each other for ever, or train two runs."""

from dino.distributed import gather_objects
from dino.errors import UserError
from dino.printable import brief

# Flags that may differ: places, of which each node may have its own, and what changes no number.
FREE = (
    *("data_path", "knn_data_path", "output_dir", "output", "pretrained_weights", "init_from"),
    *("resume", "classifier", "dump_features", "load_features", "queries"),
    *("whitening_path", "distractors_path", "dist_url"),
    *("given", "local_rank", "rank", "gpu", "num_workers"),
)


def check_same_flags(args):
    """Raise UserError, on every rank, for a flag whose value is another one on another rank."""
    flags = {f"--{name}": repr(vars(args)[name]) for name in vars(args) if name not in FREE}
    check_same(flags, "Start all processes by the same command.")


def check_same(values, advice):
    """Raise UserError, on every rank, for the first of {name: value} that differs between ranks."""
    first, *others = gather_objects(values)
    for name, value in first.items():
        for rank, theirs in enumerate(others, start=1):
            if theirs.get(name) != value:
                raise UserError(
                    f"{name}: {brief(theirs.get(name))} on rank {rank} and {brief(value)} on rank"
                    f" 0. {advice}"
                )


def check_same_checkpoint(flag, content):
    """Raise UserError unless all ranks resume from the same point of a run.

    `content` is the checkpoint's, or None without one, as where the folder is on another node.
    """
    names = ("epoch", "iteration", "steps")
    entries = content if isinstance(content, dict) else {}
    place = ", ".join(f"{name} {brief(entries[name])}" for name in names if name in entries)
    found = "none" if content is None else f"one of {place}"
    advice = "All processes must see the same files there: give a folder that all nodes share."
    check_same({f"{flag}, the checkpoint to resume from": found}, advice)


def check_same_images(flag, described):
    """Raise UserError unless the text that describes the images of `flag` is the same everywhere.

    Ranks with fewer of them make fewer steps, and the others wait.
    """
    advice = "All processes must see the same files: give a folder that all nodes share, or copies."
    check_same({flag: described}, advice)
