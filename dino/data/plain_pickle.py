# SPDX-License-Identifier: Apache-2.0
"""Pickles of plain values from strangers, read without running what is in them.

See `PickleMachine`.
"""

import io
import itertools
from pathlib import Path

from dino.errors import UserError
from dino.pickle_machine import PickleMachine
from dino.printable import printable

# The larger official ground truth has 276,508 bytes and 40,000 operations. Two million take 3 s.
MOST_BYTES, MOST_OPERATIONS = 2**24, 2**21


class NotPlain(ValueError):
    """An operation that does more than to put plain values together."""


def read_plain_pickle(path):
    """The dicts, lists, tuples, numbers, texts, truth values and None in the pickle at `path`.

    Keys are text. Raises UserError for a file that is absent, too large, damaged, or holds anything
    else; code in it does not run. A value may contain itself.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    if path.stat().st_size > MOST_BYTES:
        raise UserError(
            f"{path}: {path.stat().st_size} bytes, more than the {MOST_BYTES} that are read."
        )
    try:
        machine = PlainMachine()
        machine.run(io.BytesIO(path.read_bytes()), MOST_OPERATIONS)
        return machine.value()
    except NotPlain as error:
        raise UserError(
            f"{path}: holds more than plain values ({printable(error)}); refused, and nothing in it"
            " was run. Take it from its source; in one of your own, write lists, not numpy arrays."
        ) from None
    except Exception as error:  # whatever a parser may raise on somebody's bytes
        kind = type(error).__name__
        raise UserError(f"{path}: damaged, or not a pickle ({kind}).") from None


class PlainMachine(PickleMachine):
    """Builds plain values, and refuses every other operation."""

    def refuse(self, what):
        raise NotPlain(what)

    def other(self, name, argument):
        self.refuse(name if argument is None else f"{name} {argument!r:.60}")

    def check_keys(self, keys):
        if not all(isinstance(key, str) for key in keys):
            self.refuse("a dict with keys that are not text")

    def value(self):
        """The one value that the pickle has put together."""
        (value,) = [*itertools.chain(*self.below), *self.stack]
        return value
