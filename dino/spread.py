# SPDX-License-Identifier: Apache-2.0
"""A few of many, evenly spread: neighbours in a list of images often show the same thing."""


def spread(total, count):
    """At most `count` numbers below `total`, evenly spread, in order."""
    count = min(count, total)
    return [i * total // count for i in range(count)]
