# SPDX-License-Identifier: Apache-2.0
"""How runs compare: a row of figures for each."""

import math
import statistics

from dino.json_files import is_number

# How the measures that need no labels follow the one that does.
FOLLOWERS = ("rank_me", "alignment", "uniformity")
FOLLOWER_COLUMNS = ("run", "measurements", *FOLLOWERS)
FEWEST = 4  # measurements to correlate

COLUMNS = ("run", "epochs", "loss", "h % ln K", "KL % ln K", "best k-NN %", "images/s")


def describe_run(run):
    """One row of the table, a text for each of COLUMNS, of a LoggedRun with steps."""
    last = run.steps[-1]
    best = f"{max(line['knn_teacher'] for line in run.knn):.1f}" if run.knn else "-"
    rate = statistics.median(step["images_per_s"] for step in run.steps)
    return (
        run.name,
        f"{last['epoch']:.1f}",
        f"{last['loss']:.3f}",
        f"{100 * last['teacher_entropy_share']:.1f}",
        f"{100 * last['kl_share']:.1f}",
        best,
        f"{rate:.0f}",
    )


def follow_knn(run):
    """A text for each of FOLLOWER_COLUMNS; None for a LoggedRun with fewer than FEWEST k-NN
    accuracies.

    Spearman's rank correlation of each measure with the teacher's k-NN accuracy over the run, the
    measurement before training included. A good measure without labels has 1 (RankMe) or -1
    (alignment, uniformity).
    """
    from scipy.stats import spearmanr  # takes a second, which training does not wait for

    measured = [line for line in run.knn if all(is_number(line.get(f)) for f in FOLLOWERS)]
    if len(measured) < FEWEST:
        return None
    knn = [line["knn_teacher"] for line in measured]
    found = []
    for name in FOLLOWERS:
        values = [line[name] for line in measured]
        constant = len(set(values)) == 1 or len(set(knn)) == 1
        found.append(math.nan if constant else spearmanr(knn, values).statistic)
    return run.name, str(len(measured)), *("-" if math.isnan(v) else f"{v:.2f}" for v in found)
