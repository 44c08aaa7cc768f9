# SPDX-License-Identifier: Apache-2.0
"""What is measured of a loop: seconds, and the share of them spent waiting for data."""

import time

from dino.meters import MetricLogger


def test_a_clock_that_is_set_back_changes_no_measured_time(monkeypatch):
    moments = iter(range(10**6, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: next(moments))
    logger = MetricLogger()
    for _ in logger.log_every(range(3), print_freq=10):
        pass
    seconds, waited, iterations = logger.lap()
    assert iterations == 3
    assert 0 <= waited <= seconds < 3600
