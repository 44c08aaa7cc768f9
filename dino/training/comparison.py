# SPDX-License-Identifier: Apache-2.0
"""How runs compare: a row of figures for each."""

import statistics
from pathlib import Path

from dino.errors import UserError
from dino.printable import printable
from dino.run_log import RunLog

COLUMNS = ("run", "epochs", "loss", "h % ln K", "KL % ln K", "best k-NN %", "images/s")


def describe_run(folder):
    """One row of the table, a text for each of COLUMNS."""
    lines = RunLog(folder).read_all()
    steps, knn = lines["loss"], lines["knn_teacher"]
    if not steps:
        found = "no metrics.jsonl with steps in it" if Path(folder).is_dir() else "no such folder"
        raise UserError(f"RUN {folder}: {found}. Give the --output_dir of a run.")
    last = steps[-1]
    best = f"{max(line['knn_teacher'] for line in knn):.1f}" if knn else "-"
    rate = statistics.median(step["images_per_s"] for step in steps)
    return (
        printable(Path(folder).resolve().name),
        f"{last['epoch']:.1f}",
        f"{last['loss']:.3f}",
        f"{100 * last['teacher_entropy_share']:.1f}",
        f"{100 * last['kl_share']:.1f}",
        best,
        f"{rate:.0f}",
    )
