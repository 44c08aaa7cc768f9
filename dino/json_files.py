# SPDX-License-Identifier: Apache-2.0
"""JSON files: strictly valid when written; reading tolerates damaged and hostile ones."""

import json
import math
from pathlib import Path

from dino.atomic import replacing
from dino.errors import UserError


def dumps(value, **options):
    """JSON text; a number that is not finite, which JSON does not have, becomes null."""
    return json.dumps(finite(value), allow_nan=False, **options)


def write_json(path, value):
    """Write `value` to `path` atomically, in a folder that is made if there is none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(dumps(value, indent=1) + "\n")


def finite(value):
    """`value` with None in the place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_object(path):
    """The JSON object of a file. OSError where there is none, UserError where it is damaged."""
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"{path} is not a file.")
    value = parse(Path(path).read_text(errors="replace"))
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it does not hold a JSON object. Restore or remove it.")
    return value


def read_lines(path):
    """(the JSON objects in a file of lines, how many lines are not one); ([], 0) without a file."""
    if not Path(path).is_file():
        return [], 0
    lines = Path(path).read_text(errors="replace").splitlines()
    records = [record for record in map(parse, lines) if isinstance(record, dict)]
    return records, len(lines) - len(records)


def parse(text):
    """The value, or None of what is not JSON, is nested too deeply or has a huge number."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def is_number(value):
    """Whether it is a finite number that fits a float; NumPy's float64 is a float, True is not."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
