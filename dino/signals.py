# SPDX-License-Identifier: Apache-2.0
"""Signals that ask a run to stop: it ends its step, saves, and exits with a code that says so.

SIGTERM and SIGUSR1 (spot machines, Slurm's --signal) exit with REQUEUE, Ctrl-C with 130. A second
signal exits at once. Loader workers leave all of it to their parent.
"""

import os
import signal
import time

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: the same command again goes on
# torchrun passes a terminal's Ctrl-C on to processes that got it already: that is no second one.
SAME_SECONDS = 3.0


class StopRequested(Exception):
    """This process was asked to stop, and is between two steps; the text names the signal."""


class Interruption:
    """Whether this process was asked to stop, and by what."""

    def __init__(self):
        self.number = None
        self.time = 0.0

    def listen(self):
        """Take the signals over. Only the main thread may."""
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

    def unless_asked(self, iterable):
        """Yield from `iterable`; raises StopRequested once this process is asked to stop."""
        for item in iterable:
            if self.requested:
                raise StopRequested(self.name)
            yield item


def leave_signals_to_parent(worker_id):
    """For DataLoader's worker_init_fn."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # with which the parent ends its workers
