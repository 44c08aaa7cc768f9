# SPDX-License-Identifier: Apache-2.0
"""Weights & Biases, an optional library: the figures of a run as one of its runs."""

import importlib.util
import os
import uuid
from pathlib import Path

from dino.atomic import replacing
from dino.distributed import print0
from dino.errors import UserError
from dino.printable import printable

ID_FILE = "wandb_id.txt"
INIT_SECONDS = 20  # the library takes up to three times as long, and the other ranks wait
FINISH_SECONDS = 15  # of the 30 that a scheduler gives between SIGTERM and SIGKILL


def require_wandb():
    """Raise UserError unless the library is installed."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb needs the package wandb: pip install wandb")


class WandbLog:
    """A run of Weights & Biases, whose files are in `folder`/wandb; a run that resumes keeps it.

    Project, name, user and mode are those of the library's own variables, such as WANDB_PROJECT and
    WANDB_MODE=offline. Each group of figures has its own axis, so that a resumed run may repeat
    steps. Without credentials or a network the figures go to files that `wandb sync` uploads; any
    other failure is a warning, and the rest of the figures is not sent.
    """

    def __init__(self, folder):
        self.folder = Path(folder).resolve()
        self.run = None

    def begin(self, flags, resumes):
        """Start the library's process; `flags` become the settings of its run."""
        os.environ.setdefault("WANDB_CACHE_DIR", str(self.folder / "wandb" / "cache"))
        try:
            self.run = self.open(flags, self.identity(resumes))
            for group in ("iteration", "epoch"):
                self.run.define_metric(f"{group}/*", step_metric=group)
        except Exception as error:  # of many kinds, among them those of pydantic
            self.give_up(error)

    def identity(self, resumes):
        """The name that the service knows the run by, from the run's folder."""
        path = self.folder / ID_FILE
        if not (resumes and path.exists()):
            with replacing(path) as temporary:
                temporary.write_text(uuid.uuid4().hex)
        return path.read_text().strip()

    def open(self, flags, identity):
        """The library's run: online if that is possible, else offline."""
        import wandb

        options = dict(
            dir=self.folder,
            id=identity,
            name=os.environ.get("WANDB_NAME", self.folder.name),
            config=flags,
            resume="allow",
            settings=wandb.Settings(
                console="off", init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS
            ),
        )
        try:
            # init() alone would ask for credentials on a terminal
            if wandb.setup().settings.mode == "online" and not wandb.login(
                prompt=False, verify=False
            ):
                raise wandb.errors.AuthenticationError("No credentials: run `wandb login`.")
            return wandb.init(**options)
        except wandb.Error as error:
            figures = f"The figures go to {self.folder}/wandb; `wandb sync` uploads them."
            warn(f"{str(error).rstrip('.')}. {figures}")
            wandb.teardown()  # its process still holds the name of the run
            return wandb.init(**options, mode="offline")

    def add(self, group, figures, step):
        """`figures`: {name: number} of one iteration or one epoch, whose number is `step`."""
        if self.run is None:
            return
        try:
            self.run.log(
                {f"{group}/{name}": value for name, value in figures.items()} | {group: step}
            )
        except Exception as error:  # the library's process may have been killed
            self.give_up(error)

    def give_up(self, error):
        self.run = None
        warn(f"{error or type(error).__name__}. No more figures are sent; continuing.")


def warn(text):
    print0(printable(f"Warning: Weights & Biases: {' '.join(text.split())}"))
