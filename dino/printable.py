# SPDX-License-Identifier: Apache-2.0
"""Text that others wrote (names of files and classes, values in checkpoints), safe to print."""

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
