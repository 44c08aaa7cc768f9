# SPDX-License-Identifier: Apache-2.0
"""The figures of a run as TensorBoard events."""

from pathlib import Path


class TensorBoardLog:
    """Event files in `folder`/tensorboard. OSError where they cannot be written."""

    def __init__(self, folder):
        self.folder = Path(folder) / "tensorboard"
        self.writer = None

    def begin(self, flags, resumes):
        """Nothing: the files begin with the first figures."""

    def add(self, group, figures, step):
        """`figures`: {name: number} of one iteration or one epoch, whose number is `step`."""
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder))
        for name, value in figures.items():
            self.writer.add_scalar(f"{group}/{name}", value, step)
        self.writer.flush()
