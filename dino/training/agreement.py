# SPDX-License-Identifier: Apache-2.0
"""Agreement of all ranks on what one of them was asked for: to stop, or to save.

A signal, or a clock's minute, may reach one rank only, and all must act on it after the same step.
"""

from dino.data.image_loader import ImageLoader
from dino.distributed import Ballot, get_world_size, has_note, leave_note
from dino.signals import StopRequested

STOP = "stop requested"


class Agreement:
    """Asks all ranks after each step, and inside long measurements."""

    def __init__(self, interruption):
        self.interruption = interruption
        self.ballot = None

    def after_step(self, save):
        """Whether any rank wants to save. Raises StopRequested if any was asked to stop.

        The ranks exchange what they want while they compute the next step, so that none waits: with
        several processes the answer is to the question asked one step before.
        """
        before, self.ballot = self.ballot, Ballot([self.interruption.requested, save])
        return self.act_on(self.ballot if self.ballot.alone else before)

    def settle(self):
        """Act on the question asked after the last step, before work that takes long."""
        self.act_on(self.ballot)
        self.ballot = None

    def act_on(self, ballot):
        stop, save = ballot.result() if ballot else (False, False)
        if stop:
            self.ballot.result()  # no exchange stays under way
            raise StopRequested(self.interruption.name)
        return save

    def while_waiting(self):
        """Raise StopRequested in a run of one process, which need not wait for the next step.

        Several processes must: the others are in a step that takes this one.
        """
        if self.interruption.requested and get_world_size() == 1:
            raise StopRequested(self.interruption.name)

    def until_asked(self, iterable):
        """Yield from `iterable`; StopRequested, on all ranks together, once one is asked to stop.

        Between batches the ranks have no collective to meet in: the one that is asked leaves a note
        for the others, and all of them vote once their batches are done or given up.
        """
        if isinstance(iterable, ImageLoader):
            iterable.while_waiting = self.while_waiting
        for item in iterable:
            if self.interruption.requested:
                leave_note(STOP)
            if self.interruption.requested or has_note(STOP):
                break
            yield item
        (stop,) = Ballot([self.interruption.requested]).result()
        if stop:
            raise StopRequested(self.interruption.name)
