# SPDX-License-Identifier: Apache-2.0
"""Compare finished or running runs: a table, and a picture of their curves.

python compare_runs.py runs/a runs/b
"""

import statistics
from pathlib import Path

from dino.command_line import Parser, check_output_file
from dino.errors import UserError, exit_on_user_error
from dino.printable import printable
from dino.run_log import RunLog
from dino.training.plots import LoggedRun, draw_curves

COLUMNS = ("run", "epochs", "loss", "h % ln K", "KL % ln K", "best k-NN %", "images/s")


def get_args_parser():
    parser = Parser(prog="compare_runs.py", description="Compare runs: a table, and a picture.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="an --output_dir of main_dino.py")
    parser.add_argument("--output", default="comparison.png", help="where to draw their curves")
    return parser


def compare_runs(args):
    """Print the table, draw the picture."""
    check_output_file(args.output)
    table = [COLUMNS, *map(describe_run, args.runs)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
    draw_curves(args.output, [LoggedRun(folder) for folder in args.runs])
    print(printable(f"Curves: {args.output}"))


def describe_run(folder):
    """One row of the table, a text for each of COLUMNS."""
    log = RunLog(folder)
    steps, knn = log.read("loss"), log.read("knn_teacher")
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


def main():
    with exit_on_user_error("compare_runs.py"):
        compare_runs(get_args_parser().parse_args())


if __name__ == "__main__":
    main()
