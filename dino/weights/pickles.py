# SPDX-License-Identifier: Apache-2.0
"""What the pickle of a checkpoint would do, found out before torch.load does it.

torch.load(weights_only=True) runs no code, but a few bytes still make it reserve any memory
(`bytearray` of a number) or compute for hours (keys of a dict that collide, or whose hash takes
2^45 steps). So the operations are carried out here first, with stand-ins for what is called.
"""

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass

MOST_DIMENSIONS = 64  # of a tensor, in PyTorch

# The operations of protocol 2 that torch.load knows, by what is done here.
VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict}
LAST_ITEMS = {
    **{"APPEND": 1, "SETITEM": 2, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3},
    **{"REDUCE": 2, "NEWOBJ": 2, "BUILD": 2, "BINPERSID": 1},
}
ITEMS_FROM_MARK = {"APPENDS", "SETITEMS", "TUPLE"}
PUT, GET = {"BINPUT", "LONG_BINPUT"}, {"BINGET", "LONG_BINGET"}
NOTHING = {"PROTO", "STOP"}


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


def check_pickle(file, most_operations):
    """Raise Refused or NotWhole unless the pickle that begins here can be loaded at little cost."""
    machine = Machine()
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
            if count == most_operations:
                raise NotWhole(f"a pickle of more than {most_operations} operations")
            machine.step(operation.name, argument)
    except NotWhole:
        raise
    except Exception as error:  # whatever a parser may raise on somebody's bytes
        raise NotWhole(f"{type(error).__name__} in a pickle") from None


class Machine:
    """The stacks and the memo of an unpickler that calls nothing."""

    def __init__(self):
        self.stack, self.below, self.memo = [], [], {}  # `below`: the stacks under the marks

    def step(self, name, argument):
        stack = self.stack
        if name in VALUES:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name == "GLOBAL":
            stack.append(Global(argument.replace(" ", ".")))
        elif name == "MARK":
            self.below.append(stack)
            self.stack = []
        elif name in LAST_ITEMS:
            items = [stack.pop() for _ in range(LAST_ITEMS[name])][::-1]
            combine(name, stack, items)
        elif name in ITEMS_FROM_MARK:
            self.stack = self.below.pop()
            combine(name, self.stack, stack)
        elif name in PUT:
            self.memo[argument] = stack[-1]
        elif name in GET:
            stack.append(self.memo[argument])
        elif name not in NOTHING:
            raise NotWhole(f"a pickle with {name}, which torch.save does not write")


def combine(name, stack, items):
    """Do an operation that takes `items` off the stack."""
    if name in ("APPEND", "APPENDS"):
        stack[-1].extend(items)
    elif name in ("SETITEM", "SETITEMS"):
        check_keys(items[::2])
        if isinstance(stack[-1], dict):
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
    elif name in ("REDUCE", "NEWOBJ"):
        stack.append(call(*items))
    elif name == "BUILD":
        check_state(*items)
        stack.append(items[0])
    elif name == "BINPERSID":
        stack.append(Made("storage", items[0]))
    else:
        stack.append(tuple(items))


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
