# SPDX-License-Identifier: Apache-2.0
"""Command lines: flags that several scripts share, numbers with ranges, which flags were given."""

import argparse
import difflib
import math
import os
import re
import sys
import tempfile
from multiprocessing.connection import Listener

from dino.distributed import print0
from dino.errors import UserError, print_and_exit
from dino.launch import environment_number
from dino.precision import AMP_DTYPES

MAX_PIXELS = 89_478_485  # of an image: Pillow's own limit; decoding so many takes 0.8 GB
PLACEHOLDER = "/path/to/"  # how the official defaults of folders begin


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default of a flag, unless that is nothing, or an official PLACEHOLDER."""

    def _get_help_string(self, action):
        if action.default in (None, "", []) or str(action.default).startswith(PLACEHOLDER):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose error is one paragraph, and whose result knows which flags were given.

    `parse_args(...).given` is {name: value} of the flags that the command line really has. An empty
    value, usually an unset shell variable, is refused, unless it is the flag's default or the flag
    is named in `empty`.
    """

    def __init__(self, *, empty=(), **kwargs):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)
        self.empty = empty
        # argparse's own takes -1e-3 for a flag
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)

    def parse_known_args(self, args=None, namespace=None):  # which parse_args calls
        self.words = sys.argv[1:] if args is None else list(args)
        parsed, unknown = super().parse_known_args(args, namespace)
        absent = object()
        blank = argparse.Namespace(**dict.fromkeys(vars(parsed), absent))
        given = vars(super().parse_known_args(args, blank)[0])
        parsed.given = {name: value for name, value in given.items() if value is not absent}
        for name, value in parsed.given.items():
            option = f"--{name}"
            if value == [] and option in self._option_string_actions:  # argparse drops a lone --
                raise UserError(f"{option} '--' is not a value: give one, or leave the flag out.")
            wanted = name in self.empty or self.get_default(name) == ""
            if value == "" and option in self._option_string_actions and not wanted:
                raise UserError(f"{option} '' is empty: give a value, or leave the flag out.")
        return parsed, unknown

    def error(self, message):
        unknown = message.partition("unrecognized arguments: ")[2].split()
        flags = [word.partition("=")[0] for word in unknown if re.match("--.", word)]
        close = [name for flag in flags if (name := self.closest(flag))]
        hint = f"did you mean {', '.join(close)}? " if close else self.too_many(unknown)
        print_and_exit(self.prog, f"{message} ({hint}see {self.prog} --help)")

    def closest(self, flag):
        """The known flag that `flag` abbreviates, if there is one, or is spelled most like."""
        names = [name for name in self._option_string_actions if name.startswith("--")]
        abbreviated = [name for name in names if name.startswith(flag)]
        if len(abbreviated) == 1:
            return abbreviated[0]
        return next(iter(difflib.get_close_matches(flag, names, n=1)), None)

    def too_many(self, unknown):
        """What the flag takes that one of the `unknown` words follows as one too many; or ""."""
        flag, room = None, 0
        for word in self.words:
            if word.startswith("--"):
                flag, equals, _ = word.partition("=")
                takes = values_of(self._option_string_actions.get(flag))
                room = takes - len(equals)
            elif room > 0:
                room -= 1
            elif flag and word in unknown:
                values = {0: "no value", 1: "one value"}.get(takes, f"{takes} values")
                return f"{flag} takes {values}; "
        return ""


def values_of(action):
    """How many values argparse gives a flag at most; None, an unknown flag, takes all there are."""
    if action is None or action.nargs in ("+", "*"):
        return math.inf
    return {None: 1, "?": 1}.get(action.nargs, action.nargs)


def bool_flag(text):
    """on, true, 1 or off, false, 0, in any case, for argparse."""
    if text.lower() in ("on", "true", "1"):
        return True
    if text.lower() in ("off", "false", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true (on, 1) nor false (off, 0)")


LARGEST = 2**31 - 1  # of a flag: what tensors' sizes and C's integers take
LARGEST_RATE = 1e38  # of learning and of weight decay: float32 ends at 3e38


def number(kind, low=-math.inf, high=math.inf, *, above=None):
    """An argparse type: `kind` (int or float), finite, in [low, high], and greater than `above`.

    Whole numbers are at most LARGEST.
    """
    high = min(high, LARGEST) if kind is int else high

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'a whole' if kind is int else 'a'} number"
            ) from None
        if kind is float and not math.isfinite(value):  # an integer may be too large for isfinite
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if kind is float and 0 < abs(value) < sys.float_info.min:  # 1 / value is not finite
            raise argparse.ArgumentTypeError(f"{text} is too close to 0 to compute with")
        if not low <= value <= high or (above is not None and value <= above):
            lowest = f"above {above}" if above is not None else f"at least {low}"
            highest = f" and at most {high}" if high != math.inf else ""
            raise argparse.ArgumentTypeError(
                f"{text} is out of range: it must be {lowest}{highest}"
            )
        return value

    return parse


def add_device_argument(group):
    group.add_argument(
        "--device",
        default="auto",
        choices=["auto", "cuda", "cpu"],
        help="auto takes CUDA if there is any",
    )


def add_launch_arguments(group):
    """Where and how to run: the same in every script of several processes."""
    add_device_argument(group)
    add = group.add_argument
    add(
        "--num_workers",
        default=10,
        type=number(int, 0),
        help="loader processes per GPU, at most one for each core",
    )
    add(
        "--dist_url",
        default="env://",
        help="where the processes meet; env:// is right for torchrun and for Slurm",
    )
    add(
        "--local_rank",
        "--local-rank",
        default=0,
        type=int,
        help="set by torch.distributed.launch; not used, as the environment says the same",
    )


def add_use_cuda_argument(group):
    group.add_argument(
        "--use_cuda",
        default=True,
        type=bool_flag,
        help="false is the official way to say --device cpu",
    )


def device_flag(args):
    """What --device and --use_cuda say together, for init_distributed."""
    if args.use_cuda:
        return args.device
    if args.device == "cuda":
        raise UserError("--use_cuda false and --device cuda contradict each other: drop one.")
    return "cpu"


def add_weights_arguments(group, patch_size=16, arch="vit_small"):
    """Which backbone to look at. Our checkpoints, and whole official ones, say what they hold."""
    add = group.add_argument
    add(
        "--pretrained_weights",
        default="",
        help="a checkpoint, ours or official, whole or backbone only; or a ViT of timm or"
        " transformers, its .pth or .safetensors file or its folder; without it, the weights that"
        " the authors published for --arch and --patch_size",
    )
    add("--checkpoint_key", default="teacher", help="the network of the checkpoint to take")
    add("--arch", default=arch, help="architecture; ignored if the checkpoint names its own")
    add(
        "--patch_size",
        default=patch_size,
        type=number(int, 1),
        help="side of a patch in pixels; ignored if the checkpoint names its own",
    )


def add_image_arguments(group):
    """What an image file may be."""
    group.add_argument(
        "--max_image_pixels",
        default=MAX_PIXELS,
        type=number(int, 1),
        help="images of more pixels are refused before they are decoded, for which each loader"
        " process needs about 9 bytes a pixel",
    )


def add_image_size_argument(group):
    """The size that a backbone sees, its own by default."""
    group.add_argument(
        "--image_size",
        default=None,
        type=number(int, 1, 2**13),
        help="pixels of the crops; by default what the backbone was trained with, else 224",
    )


def add_minutes_argument(group):
    """When a run saves inside its epochs, see Saver."""
    group.add_argument(
        "--saveckp_minutes",
        default=0.0,
        type=number(float, 0),
        help="minutes between two saves inside epochs; 0 for no such saves",
    )


def add_precision_argument(group, default="auto"):
    """Which type autocast computes in."""
    group.add_argument(
        "--amp_dtype",
        default=default,
        choices=AMP_DTYPES,
        help="type of mixed precision; auto is bfloat16 or else float16 on a GPU, float32 on a CPU;"
        " the official evaluations compute in float32",
    )


def tell_idle(args, names, cause):
    """Print which of the flags `names` the command line has, although they change nothing."""
    given = [f"--{name}" for name in names if name in getattr(args, "given", {})]
    if given:
        print0(f"{cause}: {', '.join(given)} ha{'s' if len(given) == 1 else 've'} no effect.")


def spaced(value):
    """A number, or several, as the value of a flag."""
    numbers = value if isinstance(value, tuple | list) else [value]
    return " ".join(f"{number:g}" for number in numbers)


def count_cores():
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def loader_workers(requested, *, silent=False):
    """`requested` loader processes, or fewer, with a message: this process's share of the cores."""
    available = max(1, count_cores() // max(1, environment_number("LOCAL_WORLD_SIZE", 1)))
    if requested > available and not silent:
        print0(
            f"--num_workers {requested}: {available} used, as many as there are cores for each"
            " process."
        )
    workers = min(requested, available)
    if workers:
        check_sockets_can_be_made()
    return workers


def check_sockets_can_be_made():
    """Raise UserError unless loader processes can hand over their images.

    They do that by sockets in a temporary folder of their own, whose paths have at most 107 bytes.
    Where none can be made Python prints a traceback, and the batch never comes.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="pymp-") as folder:  # multiprocessing's names
            Listener(os.path.join(folder, "listener-12345678")).close()
    except OSError as error:
        raise UserError(
            f"--num_workers: loader processes cannot make a socket in TMPDIR={os.getenv('TMPDIR')}"
            f" ({error.strerror or error}). Set TMPDIR to a folder with a short path that can be"
            " written to, or give --num_workers 0."
        ) from None


def loader_options(args, device):
    """What --batch_size_per_gpu and --num_workers mean for a loader that feeds `device`."""
    return dict(
        batch_size=args.batch_size_per_gpu,
        num_workers=loader_workers(args.num_workers),
        pin_memory=device.type == "cuda",
    )
