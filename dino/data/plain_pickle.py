# SPDX-License-Identifier: Apache-2.0
"""Pickles of plain values from strangers, read without running what is in them.

An Unpickler that refuses every class keeps code out, but a few bytes still make it reserve 32 GiB
(a memo slot of number 2^32) or compute for hours (keys of a dict that collide). So the operations
are carried out here, one by one, from the list that `pickletools` makes of them.
"""

import io
import pickletools
from pathlib import Path

from dino.errors import UserError
from dino.printable import printable

# The larger official ground truth has 276,508 bytes and 40,000 operations. Two million take 3 s.
MOST_BYTES, MOST_OPERATIONS = 2**24, 2**21

VALUES = {  # operations that push their argument
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),  # of Python 2
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
LAST_ITEMS = {"APPEND": 1, "SETITEM": 2, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
ITEMS_FROM_MARK = {"APPENDS", "SETITEMS", "LIST", "TUPLE", "DICT"}
PUT = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
GET = {"GET", "BINGET", "LONG_BINGET"}
NOTHING = {"PROTO", "FRAME", "STOP"}


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
        return build(pickletools.genops(io.BytesIO(path.read_bytes())))
    except NotPlain as error:
        raise UserError(
            f"{path}: holds more than plain values ({printable(error)}); refused, and nothing in it"
            " was run. Take it from its source; in one of your own, write lists, not numpy arrays."
        ) from None
    except Exception as error:  # whatever a parser may raise on somebody's bytes
        kind = type(error).__name__
        raise UserError(f"{path}: damaged, or not a pickle ({kind}).") from None


def build(operations):
    """The value that `operations`, as pickletools.genops gives them, put together."""
    stack, marks, memo = [], [], {}
    for count, (operation, argument, _) in enumerate(operations):
        name = operation.name
        if count == MOST_OPERATIONS:
            raise NotPlain(f"more than {MOST_OPERATIONS} operations")
        if name in VALUES:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name == "MARK":
            marks.append(len(stack))
        elif name in LAST_ITEMS or name in ITEMS_FROM_MARK:
            start = len(stack) - LAST_ITEMS[name] if name in LAST_ITEMS else marks.pop()
            if start < 0:
                raise ValueError("an operation on values that are not there")
            items = stack[start:]
            del stack[start:]
            combine(name, stack, items)
        elif name in PUT:
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in GET:
            stack.append(memo[argument])
        elif name not in NOTHING:
            raise NotPlain(name if argument is None else f"{name} {argument!r:.60}")
    (value,) = stack
    return value


def combine(name, stack, items):
    """Add `items` to the list or dict on top of the `stack`, or put one made of them there."""
    if name in ("APPEND", "APPENDS"):
        stack[-1].extend(items)
    elif name in ("SETITEM", "SETITEMS"):
        stack[-1].update(pairs(items))
    elif name == "LIST":
        stack.append(items)
    elif name == "DICT":
        stack.append(dict(pairs(items)))
    else:
        stack.append(tuple(items))


def pairs(items):
    """[(key, value)] of keys and values in turn."""
    keys = items[::2]
    if not all(isinstance(key, str) for key in keys):
        raise NotPlain("a dict with keys that are not text")
    return zip(keys, items[1::2], strict=True)
