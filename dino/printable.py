# SPDX-License-Identifier: Apache-2.0
"""Text that others wrote (names of files and classes, values in checkpoints), safe to print."""

import reprlib
import unicodedata

# Control and format characters (terminal escapes, line breaks, right-to-left overrides), halves of
# surrogate pairs (bytes of a name that is not UTF-8), line and paragraph separators.
ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(text):
    """`text` on one line, with every character that is not plainly visible written as an escape."""
    return "".join(
        ascii(character)[1:-1] if unicodedata.category(character) in ESCAPED else character
        for character in str(text)
    )


def brief(value):
    """A text, or the repr of another value, that somebody's file holds: at most 60 characters."""
    try:
        text = value if isinstance(value, str) and value else SHORT.repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 60
