# SPDX-License-Identifier: Apache-2.0
"""Matplotlib, for pictures in files: without a screen, whatever the environment says of one."""

import os

# Before the import, which ends in a traceback where MPLBACKEND has a value that it does not know.
os.environ["MPLBACKEND"] = "agg"

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.ticker import LogFormatter

__all__ = ["LogFormatter", "plt"]

matplotlib.use("agg")  # also where a program that calls us has imported it already
matplotlib.rcParams["text.parse_math"] = False  # names of files may have a $ in them
