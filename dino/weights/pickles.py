# SPDX-License-Identifier: Apache-2.0
"""What the pickle of a checkpoint would do, found out before torch.load does it.

torch.load(weights_only=True) runs no code, but a few bytes still make it reserve any memory
(`bytearray` of a number) or compute for hours (keys of a dict whose hash takes 2^45 steps). So the
operations are carried out first (see `PickleMachine`), with stand-ins for what is called.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from dino.pickle_machine import PickleMachine

MOST_DIMENSIONS = 64  # of a tensor, in PyTorch
MOST_OPERATIONS = 2_000_000  # of a pickle; a checkpoint of ViT-B/16 has 60,000
# The plain operations of protocol 2 that torch.load knows.
KNOWN = frozenset(
    (
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"),
        *("NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "MARK"),
        *("APPEND", "APPENDS", "SETITEM", "SETITEMS", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "PROTO", "STOP"),
    )
)


class NotWhole(Exception):
    """Why a file is not a whole checkpoint."""


class Refused(NotWhole):
    """What a file does besides holding tensors and plain values."""


@dataclass(frozen=True, eq=False)
class Global:
    """A module and a name in it, not imported."""

    name: str


@dataclass(frozen=True, eq=False)
class Made:
    """What a call of `name` would make; of "storage", what the file has under `args`."""

    name: str
    args: tuple

    def update(self, items):
        """The items of an OrderedDict, which nobody reads."""


def check_pickle(file):
    """Raise Refused or NotWhole unless the pickle that begins here can be loaded at little cost."""
    try:
        CheckpointMachine().run(file, MOST_OPERATIONS)
    except NotWhole:
        raise
    except Exception as error:  # whatever a parser may raise on somebody's bytes
        raise NotWhole(f"{type(error).__name__} in a pickle") from None


class CheckpointMachine(PickleMachine):
    """Puts stand-ins in the place of what torch.load would call."""

    known = KNOWN

    def refuse(self, what):
        raise NotWhole(f"a pickle of {what}")

    def other(self, name, argument):
        stack = self.stack
        if name == "GLOBAL":
            stack.append(Global(argument.replace(" ", ".")))
        elif name in ("REDUCE", "NEWOBJ"):
            args, function = stack.pop(), stack.pop()
            stack.append(call(function, args))
        elif name == "BUILD":
            state = stack.pop()
            check_state(stack[-1], state)
        elif name == "BINPERSID":
            stack.append(Made("storage", stack.pop()))
        else:
            raise NotWhole(f"a pickle with {name}, which torch.save does not write")

    def check_keys(self, keys):
        check_keys(keys)


def check_keys(keys):
    """Raise Refused for keys of a dict but text and small integers, whose hashes can be chosen."""
    for key in keys:
        if type(key) is not str and not (type(key) is int and -(2**31) <= key < 2**31):
            kind = "large number" if type(key) is int else kind_of(key)
            raise Refused(f"contains a dict with a {kind} as a key")


def kind_of(value):
    """The name of a Global, or of what made a Made; else of a value's type."""
    return value.name if isinstance(value, Global | Made) else type(value).__name__


def call(function, args):
    """The stand-in of what `function` makes; Refused unless the table below allows the call."""
    name = kind_of(function)
    if name not in CALLS or not isinstance(args, tuple) or not CALLS[name](args):
        raise Refused(f"contains pickled code ({name})")
    return Made(name, args)


def check_state(made, state):
    """Raise Refused for attributes that checkpoints do not set; they could hide methods."""
    allowed = {
        "collections.OrderedDict": lambda: type(state) is dict and set(state) == {"_metadata"},
        "argparse.Namespace": lambda: type(state) is dict,
        "numpy.dtype": lambda: state in DTYPE_STATES,
    }
    name = kind_of(made)
    if name not in allowed or not allowed[name]():
        raise Refused(f"contains pickled code (attributes of {name})")


# ---- what may be called ----

DTYPE_STATES = [(3, order, None, None, None, -1, -1, 0) for order in "<>"]


def anything(args):
    return True


def nothing(args):
    return args == ()


def pairs(args):
    """Nothing, or, in files of Python 2, one list of keys and values."""
    if not nothing(args):
        (items,) = args
        check_keys([key for key, _ in items])
    return True


def one_dict(args):
    return len(args) == 1 and type(args[0]) is dict


def latin1(args):
    """How protocol 2 writes bytes; other codecs may take quadratic time."""
    return len(args) == 2 and args[1] in ("latin1", "latin-1")


def float64(args):
    """The type of numpy's numbers in official checkpoints; others have any size."""
    return args[:1] == ("f8",)


def dense_parts(args):
    """A sparse tensor's parts are not expanded: torch.load looks at every number of them."""
    parts = [part for part in args[1] if isinstance(part, Made) and len(part.args) > 2]
    return all(is_dense(storage, size) for storage, _, size, *_ in (part.args for part in parts))


def is_dense(storage, size):
    """Whether a tensor of this size has no more numbers than its storage."""
    if isinstance(size, Made):  # a torch.Size
        (size,) = size.args
    small = len(size) <= MOST_DIMENSIONS and all(0 <= length < 2**63 for length in size)
    return small and math.prod(size) <= storage.args[4]


CALLS: dict[str, Callable] = {
    "collections.OrderedDict": pairs,
    "collections.Counter": one_dict,  # in learning-rate schedulers
    "argparse.Namespace": nothing,
    "_codecs.encode": latin1,
    "__builtin__.complex": anything,
    "builtins.complex": anything,
    "numpy.dtype": float64,
    "numpy.core.multiarray.scalar": anything,
    "numpy._core.multiarray.scalar": anything,
    "torch.Size": anything,
    "torch.device": anything,
    "torch.serialization._get_layout": anything,
    "torch._utils._rebuild_tensor": anything,
    "torch._utils._rebuild_tensor_v2": anything,
    "torch._utils._rebuild_tensor_v3": anything,  # of dtypes newer than torch's storages
    "torch._utils._rebuild_parameter": anything,
    # Of the tensors that these make the reader names the place, and refuses them.
    "torch._utils._rebuild_meta_tensor_no_storage": anything,
    "torch._utils._rebuild_qtensor": anything,
    "torch._utils._rebuild_sparse_tensor": dense_parts,
}
