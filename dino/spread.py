# SPDX-License-Identifier: Apache-2.0
"""A few of many, evenly spread: neighbours in a list of images often show the same thing."""


def spread(total, count):
    """At most `count` numbers below `total`, evenly spread, in order."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def spread_to_end(last, count):
    """At most `count` numbers from 0 to `last`, both of them included, evenly spread, in order."""
    return sorted({round(i * last / (count - 1)) for i in range(count)})
