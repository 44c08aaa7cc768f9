# SPDX-License-Identifier: Apache-2.0
"""A user's own Python by its name on the command line: `my_module:build`."""

import contextlib
import importlib
import inspect
import os
import sys

from dino.errors import UserError
from dino.printable import brief


def call_by_path(path, flag):
    """What the function or class at `path`, MODULE:NAME, returns when called without arguments.

    UserError if it needs some, if there is none, or if it ends the process. What it raises itself
    is not caught.
    """
    function = import_by_path(path, flag)
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise UserError(
            f"{flag} {path}: it is called without arguments: {error}. Give a function that"
            " needs none."
        ) from None
    except ValueError:
        pass  # some built-in ones do not say what they take
    with exit_refused(path, flag):
        return function()


@contextlib.contextmanager
def exit_refused(path, flag):
    """UserError for sys.exit, which would end a run as if it were done, without a word."""
    try:
        yield
    except SystemExit as error:
        raise UserError(
            f"{flag} {path}: this code calls sys.exit({brief(error.code)}). Leave that out, or put"
            " it below if __name__ == '__main__':."
        ) from None


def import_by_path(path, flag):
    """The object that `path`, MODULE:NAME, says; modules of the current folder are found too.

    UserError if there is no such module or name, or if the module ends the process. What it raises
    itself is not caught.
    """
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name) or module_name.startswith("."):
        raise UserError(f"{flag} {path}: give MODULE:NAME, such as my_module:build.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        with exit_refused(path, flag):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a module that theirs imports is missing
        raise UserError(
            f"{flag} {path}: no module {module_name!r} in the current folder or the environment."
        ) from None
    if not callable(getattr(module, name, None)):
        raise UserError(f"{flag} {path}: {module_name} has no function or class {name!r}.")
    return getattr(module, name)
