# SPDX-License-Identifier: Apache-2.0
"""The figures of a run as TensorBoard events."""

import threading
from pathlib import Path


class TensorBoardLog:
    """Event files in `folder`/tensorboard.

    OSError where they cannot be written, once: the rest of the figures is not sent.
    """

    def __init__(self, folder):
        self.folder = Path(folder) / "tensorboard"
        self.writer, self.failed = None, False

    def begin(self, flags, resumes):
        """Nothing: the files begin with the first figures."""

    def add(self, group, figures, step):
        """`figures`: {name: number} of one iteration or one epoch, whose number is `step`."""
        if self.failed:
            return
        try:
            if self.writer is None:
                from torch.utils.tensorboard import SummaryWriter

                leave_errors_to_callers()
                self.writer = SummaryWriter(str(self.folder))
            for name, value in figures.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)
            self.writer.flush()
        except OSError:
            self.failed = True
            raise


def leave_errors_to_callers():
    """Print no traceback for TensorBoard's thread, whose OSError the next call here raises too."""
    before = threading.excepthook

    def hook(error):
        of_tensorboard = type(error.thread).__module__.startswith("tensorboard.")
        if not (of_tensorboard and isinstance(error.exc_value, OSError)):
            before(error)

    threading.excepthook = hook
