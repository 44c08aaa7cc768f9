# SPDX-License-Identifier: Apache-2.0
"""The table of a study: what its runs logged, a row for each, beside the paper's numbers."""

import math
import statistics
from collections import Counter
from pathlib import Path

from dino.atomic import replacing
from dino.errors import UserError
from dino.json_files import write_json
from dino.output_checks import check_output_file
from dino.run_log import before_training, is_figure
from dino.training.plots import is_first_of_epoch

# Our columns: title, key of `measure`, digits after the point.
COLUMNS = (
    ("epochs", "epochs", 0),
    ("k-NN %", "knn_teacher", 1),
    ("student's k-NN %", "knn_student", 1),
    ("untrained k-NN %", "knn_untrained", 1),
    ("h, % of ln K", "entropy", 1),
    ("KL, % of ln K", "kl", 1),
    ("ms per step", "step_ms", 0),
    ("images/s", "images_per_s", 0),
    ("minutes", "minutes", 1),
    ("peak MiB", "peak_memory_mb", 0),
)

HARMLESS = ("unfreezing", "waiting for data")  # verdicts that do not say how the run ended


def measure(run, processes):
    """{key: number} of a LoggedRun: how it ended, and what it cost. It has logged a step.

    h and KL are means over the logged steps of its last epoch. Times are those of the median logged
    step, without the first of each epoch, which waits for the loader to start; `minutes` is that
    of all steps, without k-NN and checkpoints.
    """
    global_batch = processes * run.whole_number("batch_size_per_gpu", 1)
    last = run.steps[-1]
    end = [step for step in run.steps if step["epoch"] > math.ceil(last["epoch"]) - 1]
    settled = [step for step in run.steps if not is_first_of_epoch(step)] or run.steps
    rate = statistics.median(step["images_per_s"] for step in settled)
    memory = [step.get("peak_memory_mb") for step in run.steps]
    figures = {
        "epochs": last["epoch"],
        "entropy": 100 * statistics.fmean(step["teacher_entropy_share"] for step in end),
        "kl": 100 * statistics.fmean(step["kl_share"] for step in end),
        "step_ms": 1000 * global_batch / rate,
        "images_per_s": rate,
        "minutes": (last["iteration"] + 1) * global_batch / rate / 60,
        "peak_memory_mb": max(filter(is_figure, memory), default=0),
        "verdicts": [v["verdict"] for v in run.verdicts if v["verdict"] not in HARMLESS],
    }
    if run.knn:
        if first := before_training(run.knn):
            figures |= {"knn_untrained": first["knn_teacher"]}
        figures |= {name: run.knn[-1][name] for name in ("knn_teacher", "knn_student")}
    return figures


def summarise(title, source, rows, how):
    """The study as a dict for JSON. `rows`: [(name, theirs, {seed: figures})]; `how`: the setup.

    `source` says where the paper has it; None: nowhere.
    """
    return {
        "title": title,
        "theirs": source,
        "ours": how,
        "runs": [
            {"name": name, "theirs": theirs, "seeds": {str(s): f for s, f in seeds.items()}}
            for name, theirs, seeds in rows
        ],
    }


def markdown(summary):
    """The table: means over the seeds, with their range; the verdicts; the paper's numbers."""
    runs = summary["runs"]
    theirs = list(dict.fromkeys(key for run in runs for key in run["theirs"]))
    measured = {key for run in runs for figures in run["seeds"].values() for key in figures}
    columns = [column for column in COLUMNS if column[1] in measured]
    titles = ["run", *(column[0] for column in columns), "the monitor's verdict"]
    titles += [f"theirs: {key}" for key in theirs]
    lines = [titles, ["---"] * len(titles)]
    for run in runs:
        figures = list(run["seeds"].values())
        cells = [mean_and_range(figures, key, digits) for _, key, digits in columns]
        names = Counter(name for figure in figures for name in figure["verdicts"])
        verdicts = ", ".join(
            name if count == len(figures) else f"{name} ({count} of {len(figures)} seeds)"
            for name, count in names.items()
        )
        paper = [str(run["theirs"].get(key, "")) for key in theirs]
        lines.append([run["name"], *cells, verdicts, *paper])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"# {summary['title']}\n\n{sources(summary)}\n\n{table}\n"


def sources(summary):
    """What was run, and where the paper's numbers are, in a line."""
    theirs = f" Theirs: {summary['theirs']}." if summary["theirs"] else ""
    return f"Ours: {summary['ours']}.{theirs}"


def mean_and_range(figures, key, digits):
    """`61.2` of one seed, `61.2 (60.8 to 61.6)` of several, empty without any."""
    values = [figure[key] for figure in figures if key in figure]
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def check_tables(folder, study, title):
    """Raise UserError for a file in the place of a table or picture that no `study` wrote."""
    path = Path(folder) / study
    for ending in (".png", ".json"):
        check_output_file(f"{path}{ending}", "--output_dir:", ending)
    table = path.with_suffix(".md")
    if table.exists() and not table.read_text(errors="replace").startswith(f"# {title}\n"):
        raise UserError(
            f"--output_dir: {table} exists and was not written by this study. Give another folder,"
            " or move the file away."
        )


def write_tables(folder, study, summary):
    """`study`.md and `study`.json in `folder`; the text of the first is returned."""
    text = markdown(summary)
    with replacing(Path(folder) / f"{study}.md") as temporary:
        temporary.write_text(text)
    write_json(Path(folder) / f"{study}.json", summary)
    return text
