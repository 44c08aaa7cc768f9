# SPDX-License-Identifier: Apache-2.0
"""What a run has logged, as its pictures, reports and comparisons read it."""

import math
from pathlib import Path

from dino.errors import UserError
from dino.printable import brief, printable
from dino.run_log import RunLog


class LoggedRun:
    """The flags and the figures of a run's folder.

    A run without `steps` has no flags either: it has not begun.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.name = printable(self.folder.resolve().name)
        log = RunLog(folder)
        lines = log.read_all()
        self.steps, self.verdicts = lines["loss"], lines["verdict"]
        self.knn, self.measures = lines["knn_teacher"], lines["rank_me"]
        self.bad_images = lines["bad_image"]
        for step in self.steps:
            step["1 - momentum"] = 1 - step["momentum"]
        self.flags = log.flags() if self.steps else {}
        self.ln_k = math.log(self.whole_number("out_dim", 2)) if self.steps else math.nan

    def whole_number(self, name, least):
        """The value of a flag, an int of at least `least`. UserError for any other."""
        value = self.flags.get(name)
        if type(value) is not int or value < least:
            raise UserError(f"{self.folder / 'args.json'} has an invalid {name}: {brief(value)}.")
        return value


def open_run(folder):
    """The LoggedRun of a RUN that somebody names. UserError for one without steps."""
    run = LoggedRun(folder)
    if not run.steps:
        found = "no metrics.jsonl with steps in it" if run.folder.is_dir() else "no such folder"
        raise UserError(f"RUN {folder}: {found}. Give the --output_dir of a run.")
    return run
