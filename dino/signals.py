# SPDX-License-Identifier: Apache-2.0
"""Signals that ask a run to stop: it finishes its step, saves, and exits with a code that says so.

SIGTERM, SIGUSR1, SIGUSR2 and SIGHUP (spot machines, Slurm's --signal, submitit, a lost terminal)
exit with REQUEUE, Ctrl-C with 130; nohup's SIGHUP stays ignored. Before training has begun there is
nothing to save, and the run exits at once. A second signal exits at once too, wherever the process
is: a thread hears it, since Python's own handlers wait for a collective to return. Loader workers
leave signals to their parent. The same thread ends a process that waits for the others before
training has begun.
"""

import contextlib
import functools
import os
import signal
import socket
import sys
import threading
import time

from dino.errors import UserError

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)
REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: rerun the same command to resume
# torchrun passes signals on to processes that may have got them already, as with a terminal's
# Ctrl-C: one more of them within so many seconds is not a second request.
COPY_SECONDS = 3.0
UNHEARD_SECONDS = 2.0  # after which nobody waits for a handler where there is nothing to save


class StopRequested(BaseException):
    """A rank was asked to stop; the text names the signal.

    Not an Exception, like KeyboardInterrupt: who catches whatever a damaged file may raise must not
    take a signal for damage, and go back to an older checkpoint.
    """


class Interruption:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self):
        self.number = None
        self.deferred = False

    def receive(self, number, frame):
        """The handler of all STOPPING signals."""
        if self.number is None:
            self.number = number
            if not self.deferred:
                raise StopRequested(self.name)

    def defer(self):
        """From now on a signal does not raise: training looks at `requested` between its steps."""
        self.deferred = True

    @property
    def requested(self):
        return self.number is not None

    @property
    def name(self):
        return signal.Signals(self.number).name if self.requested else "another rank's signal"

    @property
    def exit_code(self):
        return exit_code_after(self.number)


def exit_code_after(number):
    """That of a process which the signal `number`, or another rank's (None), asked to stop."""
    return 130 if number == signal.SIGINT else REQUEUE


@functools.cache
def listen():
    """The Interruption of this process. Its signals are heard from the first call on.

    Only the main thread can take signals over: called first in another, it hears none. Raises
    UserError if the thread that hears second signals cannot be started.
    """
    interruption = Interruption()
    if threading.current_thread() is threading.main_thread():
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        # What a child hears before it has handlers of its own is not for this process's thread.
        os.register_at_fork(
            before=block, after_in_parent=unblock, after_in_child=forget_and_unblock
        )
        for number in STOPPING:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, interruption.receive)
        sys.unraisablehook = functools.partial(end_if_dropped, interruption, sys.unraisablehook)
        args = interruption, ours, theirs
        watcher = threading.Thread(target=exit_without_handlers, args=args, daemon=True)
        try:
            watcher.start()
        except RuntimeError:
            text = "no thread can be started: the limit on processes and threads is reached."
            raise UserError(f"{text} Raise it (ulimit -u), or end other programs.") from None
    return interruption


@contextlib.contextmanager
def signals_blocked():
    """Hear no stop request meanwhile; processes that are started here never do."""
    block()
    try:
        yield
    finally:
        unblock()


def block():
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)


def unblock():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def forget_and_unblock():
    signal.set_wakeup_fd(-1)
    unblock()


def exit_without_handlers(interruption, ours, theirs):
    """Exit on a second signal, and on a first one that no handler hears before training begins.

    Reads the number of each signal from the socket `ours`; `theirs` is kept open, to write to.
    """
    times, first = [], None
    while True:
        try:
            number = ours.recv(1)[0]
        except TimeoutError:
            if not (interruption.requested or interruption.deferred):
                exit_with_word(first)
            ours.settimeout(None)
            continue
        if number not in STOPPING:
            continue
        if first is None:
            first = number
            ours.settimeout(UNHEARD_SECONDS)
        times.append(time.monotonic())
        copy = "TORCHELASTIC_RUN_ID" in os.environ and times[-1] - times[0] < COPY_SECONDS
        if len(times) > 1 + copy:
            os._exit(exit_code_after(first))


def end_if_dropped(interruption, print_it, unraisable):
    """A sys.unraisablehook: end this process where Python has dropped a StopRequested.

    Python drops what a destructor or a hook of fork raises. After a stop, what else they raise is
    of objects that it left half made, and is not printed.
    """
    if isinstance(unraisable.exc_value, StopRequested):
        exit_with_word(interruption.number)
    if not interruption.requested:
        print_it(unraisable)


def exit_with_word(number):
    """End this process, which the signal `number` asked to stop and which has nothing to save."""
    name = signal.Signals(number).name
    with contextlib.suppress(OSError):
        os.write(2, f"Stopped by {name} before training began.\n".encode())
    os._exit(exit_code_after(number))


@contextlib.contextmanager
def exit_when_stopped(program):
    """Hear signals from here on, and exit with their code where nothing catches StopRequested."""
    interruption = listen()
    try:
        yield
    except StopRequested as stop:
        print(f"{program}: stopped by {stop} before training began.", file=sys.stderr, flush=True)
        sys.exit(interruption.exit_code)


def leave_signals_to_parent():
    """Ignore stop requests in this worker, but for SIGTERM, by which its parent ends it."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
