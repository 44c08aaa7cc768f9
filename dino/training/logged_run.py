# SPDX-License-Identifier: Apache-2.0
"""What a run has logged, as its pictures, reports and comparisons read it."""

import itertools
import math
from pathlib import Path

from dino.distributed import print0
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
        self.bad_images, self.odd_lines = lines["bad_image"], len(lines["odd"])
        for step in self.steps:
            step["1 - momentum"] = 1 - step["momentum"]
        self.flags = log.flags() if self.steps else {}
        self.ln_k = math.log(self.whole_number("out_dim", 2)) if self.steps else math.nan

    def warn_of_odd_lines(self):
        """Print how many lines of metrics.jsonl are left out, and how many go back in time."""
        pairs = itertools.pairwise(step["epoch"] for step in self.steps)
        back = sum(later <= earlier for earlier, later in pairs)
        path = self.folder / "metrics.jsonl"
        if self.odd_lines:
            print0(printable(f"Warning: {path}: {self.odd_lines} damaged lines are left out."))
        if back:
            print0(
                printable(
                    f"Warning: {path}: {back} steps do not come after the one before, as where logs"
                    " of two runs are joined. The last line counts as the end."
                )
            )

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
    run.warn_of_odd_lines()
    return run
