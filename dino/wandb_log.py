# SPDX-License-Identifier: Apache-2.0
"""Weights & Biases, an optional library: the figures of a run as one of its runs."""

import importlib.util
import uuid
from pathlib import Path

from dino.errors import UserError

ID_FILE = "wandb_id.txt"  # so that a resumed run goes to the same place


def require_wandb():
    """Raise UserError unless the library is installed."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb needs the package wandb: pip install wandb")


class WandbLog:
    """A run of Weights & Biases, whose files are in `folder`/wandb.

    Project, user and mode are those of the library's own variables, such as WANDB_PROJECT and
    WANDB_MODE=offline. Each group of figures has its own axis, so that a resumed run may repeat
    steps: both are shown. UserError if the library refuses to begin.
    """

    def __init__(self, folder, flags):
        import wandb

        folder = Path(folder).resolve()
        id_file = folder / ID_FILE
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        try:
            self.run = wandb.init(
                dir=folder,
                id=id_file.read_text().strip(),
                name=folder.name,
                config=flags,
                resume="allow",
                settings=wandb.Settings(console="off"),
            )
        except (wandb.Error, ValueError) as error:
            raise UserError(
                f"--wandb: {error} Run `wandb login`, or set WANDB_MODE=offline to write files that"
                " `wandb sync` uploads."
            ) from None
        for group in ("iteration", "epoch"):
            self.run.define_metric(f"{group}/*", step_metric=group)

    def add(self, group, figures, step):
        """`figures`: {name: number} of one iteration or one epoch, whose number is `step`."""
        self.run.log({f"{group}/{name}": value for name, value in figures.items()} | {group: step})
