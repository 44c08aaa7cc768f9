# SPDX-License-Identifier: Apache-2.0
"""Signals that ask a run to stop: it finishes its step, saves, and exits with a code that says so.

SIGTERM and SIGUSR1 (spot machines, Slurm's --signal) exit with REQUEUE, Ctrl-C with 130. A second
signal exits at once. Loader workers leave signals to their parent.
"""

import os
import signal
import time

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: rerun the same command to resume
# torchrun passes a terminal's Ctrl-C on to processes that got it already: not a second request.
SAME_SECONDS = 3.0


class StopRequested(Exception):
    """A rank was asked to stop, and all are between two steps; the text names the signal."""


class Interruption:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self):
        self.number = None
        self.time = 0.0

    def listen(self):
        """Install the handlers. Only the main thread may."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        now = time.monotonic()
        if self.number is None:
            self.number, self.time = number, now
        elif now - self.time > SAME_SECONDS:
            os._exit(self.exit_code)

    @property
    def requested(self):
        return self.number is not None

    @property
    def name(self):
        return signal.Signals(self.number).name if self.requested else "another rank's signal"

    @property
    def exit_code(self):
        return 130 if self.number == signal.SIGINT else REQUEUE


def leave_signals_to_parent(worker_id):
    """For DataLoader's worker_init_fn."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # with which the parent ends its workers
