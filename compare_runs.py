# SPDX-License-Identifier: Apache-2.0
"""Compare finished or running runs: a table, and a picture of their curves.

    python compare_runs.py runs/a runs/b
    python compare_runs.py runs/a runs/b --html report.html   # and all else that they have logged

The report is one file without scripts, which any browser opens offline.
"""

from dino.command_line import Parser
from dino.errors import exit_on_user_error
from dino.output_checks import check_output_file
from dino.printable import printable
from dino.training.comparison import COLUMNS, FOLLOWER_COLUMNS, describe_run, follow_knn
from dino.training.html_report import write_report
from dino.training.logged_run import open_run
from dino.training.plots import draw_curves


def get_args_parser():
    parser = Parser(prog="compare_runs.py", description="Compare runs: a table, and a picture.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="an --output_dir of main_dino.py")
    parser.add_argument("--output", default="comparison.png", help="where to draw their curves")
    parser.add_argument(
        "--html",
        default=None,
        metavar="FILE",
        help="write a report too: settings that differ, curves, health, k-NN, views, attention",
    )
    return parser


def compare_runs(args):
    """Print the tables, draw the picture."""
    check_output_file(args.output, ending=".png")
    if args.html:
        check_output_file(args.html, "--html", ending=".html")
    runs = [open_run(folder) for folder in args.runs]
    print_table([COLUMNS, *map(describe_run, runs)])
    if followers := list(filter(None, map(follow_knn, runs))):
        print("\nSpearman's correlation with the teacher's k-NN accuracy over a run:")
        print_table([FOLLOWER_COLUMNS, *followers])
    draw_curves(args.output, runs)
    print(printable(f"Curves: {args.output}"))
    if args.html:
        write_report(args.html, runs)
        print(printable(f"Report: {args.html}"))


def print_table(rows):
    """Print rows of texts, the columns aligned on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))


def main():
    with exit_on_user_error("compare_runs.py"):
        compare_runs(get_args_parser().parse_args())


if __name__ == "__main__":
    main()
