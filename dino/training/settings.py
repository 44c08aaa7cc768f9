# SPDX-License-Identifier: Apache-2.0
"""Flags that a preset decides when a run begins, each with its reason; a resumed run keeps them."""

import argparse

from dino.backbones import canonical_name
from dino.distributed import print0
from dino.errors import UserError
from dino.printable import brief, printable
from dino.training.flags import get_args_parser
from dino.training.saver import find_checkpoint
from dino.weights.files import flags_in
from vision_transformer import ARCHITECTURES

REASONS = "auto"  # the entry of args.json that has them


def open_settings(args):
    """(Settings of `args`, whether they were restored from the run that is being resumed).

    `args.given` has the names of the flags that were given.
    """
    flags = {name: value for name, value in vars(args).items() if name != "given"}
    settings = Settings(flags, getattr(args, "given", ()))
    found = find_checkpoint(args.resume, args.output_dir)
    saved = flags_in(found[1]) if found else {}
    resumes = isinstance(saved.get(REASONS), dict)
    if resumes:
        settings.adopt(saved, printable(found[0]))
        print0(
            f"--preset {args.preset}: the settings of {printable(found[0])}, decided when that run"
            " began."
        )
        warn_of_other_hours(settings, saved)
    return settings, resumes


def warn_of_other_hours(settings, saved):
    """Print a warning if --hours asks for another length than that of the run that is resumed."""
    hours = settings["hours"]
    if "hours" in settings.given and "epochs" not in settings.given and hours != saved.get("hours"):
        print0(
            f"Warning: --hours {hours:g} does not change this run, whose --epochs"
            f" {settings['epochs']} was decided when it began. Give --epochs to train longer, or"
            " another --output_dir to begin anew."
        )


# The flags that presets decide. A checkpoint may state these: none is a path, or names code.
DECIDABLE = frozenset(
    (
        *("arch", "stem", "patch_size", "in_chans", "out_dim", "use_bn_in_head"),
        *("head_hidden_dim", "head_bottleneck_dim", "global_crop_size", "local_crop_size"),
        *("local_crops_number", "global_crops_scale", "local_crops_scale", "min_crop_pixels"),
        *("shrink_images", "white"),
        *("jitter", "blur_radius", "solarize_p", "grayscale_p", "mean", "std", "augment"),
        *("batch_size_per_gpu", "lr", "amp_dtype", "epochs", "warmup_epochs"),
        *("momentum_teacher", "momentum_teacher_end", "freeze_last_layer", "freeze_backbone"),
        *("knn_freq", "resume_freq", "saveckp_freq"),
    )
)


class Settings:
    """Flags while they are decided: those the user gave are kept, `reasons` explains the others."""

    def __init__(self, flags, given):
        self.flags, self.given, self.reasons = dict(flags), set(given), {}
        self.locked = set(given)

    def __getitem__(self, name):
        return self.flags[name]

    def decide(self, name, value, reason):
        if name not in DECIDABLE:
            raise KeyError(name)
        if name not in self.locked:
            self.reasons.pop(name, None)  # the table has the order of the last decisions
            self.flags[name], self.reasons[name] = value, reason

    def fix(self, name, value, reason):
        """Decide for good: later decisions about `name` change nothing."""
        self.decide(name, value, reason)
        self.locked.add(name)

    def adopt(self, saved, source):
        """Take what was decided, and --epochs, in the flags `saved` of a run, of the file `source`.

        UserError for a flag that no preset decides, or a value that a command line could not give.
        """
        flags = {flag.dest: flag for flag in get_args_parser()._actions}
        # under these presets --epochs has no default: one that was given then is kept as well
        reasons = dict(saved[REASONS])
        reasons.setdefault("epochs", "given when that run began")
        for name, reason in reasons.items():
            if name not in DECIDABLE or not is_valid(flags[name], saved.get(name)):
                raise UserError(
                    f"{source}: says that --{name} was decided to be {brief(saved.get(name))},"
                    " which no preset does. Restore the file, or give another --output_dir."
                )
            self.decide(name, saved[name], str(reason))

    def namespace(self):
        return argparse.Namespace(**self.flags)

    @property
    def is_vit(self):
        return canonical_name(self["arch"]) in ARCHITECTURES

    def conclude(self):
        """The flags, all decided, and their reasons as one more of them; prints the table."""
        print0(self.table())
        flags = self.namespace()
        setattr(flags, REASONS, self.reasons)
        return flags

    def table(self):
        """A line for each decided setting: name, value, reason."""
        rows = [("--" + name, shown(self[name]), why) for name, why in self.reasons.items()]
        rows = [("setting", "value", "reason"), *rows]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join(
            printable(f"{name:{widths[0]}}  {value:{widths[1]}}  {why}")
            for name, value, why in rows
        )


def is_valid(flag, value):
    """Whether `value` is one that a command line may give as this `flag` of argparse."""
    if isinstance(value, list | tuple) != bool(flag.nargs):
        return False
    return all(is_valid_item(flag, item) for item in (value if flag.nargs else [value]))


def is_valid_item(flag, item):
    if not isinstance(item, str | int | float) or (flag.choices and item not in flag.choices):
        return False
    try:
        return (flag.type or str)(str(item)) == item
    except (argparse.ArgumentTypeError, ValueError):  # ValueError: an integer of too many digits
        return False


def shown(value):
    if isinstance(value, list | tuple):
        return " ".join(map(shown, value))
    return f"{value:.5g}" if isinstance(value, float) else str(value).lower()
