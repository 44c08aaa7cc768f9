# SPDX-License-Identifier: Apache-2.0
"""Flags that a preset decides when a run begins, each with its reason; a resumed run keeps them."""

import argparse

from dino.backbones import canonical_name
from dino.distributed import print0
from dino.printable import printable
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
        settings.adopt(saved)
        print0(
            f"--preset {args.preset}: the settings of {printable(found[0])}, decided when that run"
            " began."
        )
    return settings, resumes


class Settings:
    """Flags while they are decided: those the user gave are kept, `reasons` explains the others."""

    def __init__(self, flags, given):
        self.flags, self.given, self.reasons = dict(flags), set(given), {}
        self.locked = set(given)

    def __getitem__(self, name):
        return self.flags[name]

    def decide(self, name, value, reason):
        if name not in self.locked:
            self.flags[name], self.reasons[name] = value, reason

    def fix(self, name, value, reason):
        """Decide for good: later decisions about `name` change nothing."""
        self.decide(name, value, reason)
        self.locked.add(name)

    def adopt(self, saved):
        """Take what was decided in the flags `saved` of an earlier run."""
        for name, reason in saved[REASONS].items():
            if name in self.flags and name in saved:
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


def shown(value):
    if isinstance(value, list | tuple):
        return " ".join(map(shown, value))
    return f"{value:.5g}" if isinstance(value, float) else str(value).lower()
