# SPDX-License-Identifier: Apache-2.0
"""What the operations of a pickle put together, found out without an unpickler.

An unpickler that refuses every class keeps code out, but a few bytes still make it reserve 32 GiB
(a memo slot of number 2^32) or compute for hours (keys of a dict that collide). So the operations
are carried out here, one by one, from the list that `pickletools` makes of them.
"""

import pickletools

VALUES = {  # operations that push their argument
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),  # of Python 2
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict}
LAST_ITEMS = {"APPEND": 1, "SETITEM": 2, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
ITEMS_FROM_MARK = {"APPENDS", "SETITEMS", "LIST", "TUPLE", "DICT"}
PUT = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
GET = {"GET", "BINGET", "LONG_BINGET"}
NOTHING = {"PROTO", "FRAME", "STOP"}
PLAIN = frozenset(
    (*VALUES, *CONSTANTS, *EMPTY, "MARK", *LAST_ITEMS, *ITEMS_FROM_MARK, *PUT, *GET, *NOTHING)
)


class PickleMachine:
    """The stack, the marks and the memo of an unpickler that calls nothing.

    A subclass says which operations are `known`, what becomes of any `other`, which keys a dict may
    have (`check_keys`), and what to raise (`refuse`). On bytes that are not a pickle any exception
    may come.
    """

    known = PLAIN

    def __init__(self):
        self.stack, self.below, self.memo = [], [], {}  # `below`: the stacks under the marks

    def run(self, file, most):
        """Carry out the pickle that begins here, of at most so many operations."""
        for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
            if count == most:
                self.refuse(f"more than {most} operations")
            if operation.name in self.known:
                self.step(operation.name, argument)
            else:
                self.other(operation.name, argument)

    def step(self, name, argument):
        stack = self.stack
        if name in VALUES:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name == "MARK":
            self.below.append(stack)
            self.stack = []
        elif name in LAST_ITEMS:
            self.combine(name, [stack.pop() for _ in range(LAST_ITEMS[name])][::-1])
        elif name in ITEMS_FROM_MARK:
            self.stack = self.below.pop()
            self.combine(name, stack)
        elif name in PUT:
            self.memo[len(self.memo) if argument is None else argument] = stack[-1]
        elif name in GET:
            stack.append(self.memo[argument])

    def combine(self, name, items):
        """Add `items` to the list or dict on top of the stack, or put one made of them there."""
        if name in ("APPEND", "APPENDS"):
            self.stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            self.stack[-1].update(self.pairs(items))
        elif name == "LIST":
            self.stack.append(items)
        elif name == "DICT":
            self.stack.append(dict(self.pairs(items)))
        else:
            self.stack.append(tuple(items))

    def pairs(self, items):
        """[(key, value)] of keys and values in turn."""
        self.check_keys(items[::2])
        return zip(items[::2], items[1::2], strict=True)
