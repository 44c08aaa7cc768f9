# SPDX-License-Identifier: Apache-2.0
"""Flags of main_dino.py that change nothing because of another flag: told, not refused.

Official command lines have such flags, and must run.
"""

import argparse

from dino.distributed import print0
from dino.printable import printable
from dino.training.flags import get_args_parser
from dino.training.presets import PRESETS
from dino.training.view_flags import add_view_arguments


def names_of_view_flags():
    """The flags that say what the views are."""
    parser = argparse.ArgumentParser()
    add_view_arguments(parser)
    return tuple(name for name in vars(parser.parse_args([])) if not name.startswith("augment"))


def is_own_data(args):
    return ":" in (args.dataset or "")


def is_resnet(args):
    return args.arch.startswith("resnet")


def has_no_warmup(args):
    return not args.warmup_teacher_temp_epochs and args.warmup_teacher_temp != args.teacher_temp


# (a flag, whether its value makes others idle, these)
IDLE = (
    ("augmentation", lambda args: args.augmentation, names_of_view_flags()),
    ("dataset", is_own_data, ("data_path", "download")),
    ("arch", is_resnet, ("patch_size", "drop_path_rate")),
    ("in_chans", lambda args: args.in_chans == 1, ("grayscale_p",)),
    (
        "teacher_update",
        lambda args: args.teacher_update != "ema",
        ("momentum_teacher", "momentum_teacher_end"),
    ),
    ("warmup_teacher_temp_epochs", has_no_warmup, ("warmup_teacher_temp",)),
    ("sinkhorn_iterations", lambda args: args.sinkhorn_iterations, ("center_momentum",)),
    (
        "local_crops_number",
        lambda args: not args.local_crops_number,
        ("local_crops_scale", "local_crop_size"),
    ),
)


def tell_idle_flags(args):
    """Print a line for each flag that was changed, and changes nothing because of another flag."""
    for sentence in idle_flags(args):
        print0(printable(sentence))


def idle_flags(args):
    """The sentences of `tell_idle_flags`. The values of a preset are its defaults."""
    defaults = vars(get_args_parser().parse_args([]))
    if args.preset:
        defaults |= PRESETS[args.preset].flags
    for cause, makes_idle, names in IDLE:
        for name in names if makes_idle(args) else ():
            value = as_text(getattr(args, name))
            if value != as_text(defaults[name]):
                yield f"--{name} {value} has no effect with --{cause} {getattr(args, cause)}."


def as_text(value):
    """A number, or several, as on a command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
