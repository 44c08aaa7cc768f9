# SPDX-License-Identifier: Apache-2.0
"""A user's own Python by its name on the command line: `my_module:build`."""

import importlib
import os
import sys

from dino.errors import UserError


def import_by_path(path, flag):
    """The object that `path`, MODULE:NAME, says; modules of the current folder are found too.

    UserError if there is no such module or name. What the module itself raises is not caught.
    """
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
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
