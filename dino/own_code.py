# SPDX-License-Identifier: Apache-2.0
"""A user's own Python by its name on the command line: `my_module:build`."""

import importlib
import inspect
import os
import sys

from dino.errors import UserError


def call_by_path(path, flag):
    """What the function or class at `path`, MODULE:NAME, returns when called without arguments.

    UserError if it needs some, or if there is none. What it raises itself is not caught.
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
    return function()


def import_by_path(path, flag):
    """The object that `path`, MODULE:NAME, says; modules of the current folder are found too.

    UserError if there is no such module or name. What the module itself raises is not caught.
    """
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name) or module_name.startswith("."):
        raise UserError(f"{flag} {path}: give MODULE:NAME, such as my_module:build.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
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
