# SPDX-License-Identifier: Apache-2.0
"""The pictures of the studies, in the manner of the paper's, with the paper's numbers beside ours.

`summary` is that of study_report.summarise; `runs` are {name: [LoggedRun of each seed]}.
"""

import statistics
import textwrap

from dino.figures import plt
from dino.training.plots import save
from dino.training.study_report import sources

THEIRS = "theirs, ImageNet"


def draw_study(path, study, summary, runs):
    """The picture of one of STUDIES, by name."""
    DRAWERS[study](path, summary, runs)


def draw_teacher(path, summary, runs):
    """Fig. 6: momentum teacher and student; the teachers, while training and at the end."""
    figure, (left, middle, right) = panels(3, summary)
    first = next(iter(runs))
    for network, style in (("teacher", "o-"), ("student", "x--")):
        curves(left, {f"{first}: {network}": runs[first]}, f"knn_{network}", ["C0"], style)
    curves(middle, runs, "knn_teacher", [f"C{i}" for i in range(len(runs))], "o-")
    for axis, title in ((left, "teacher and student"), (middle, "teachers")):
        label(axis, f"ours: {title}", "epochs", "k-NN accuracy (%)")
    draw_bars(right, summary, "knn_teacher", "k-NN")
    save(figure, path)


def draw_collapse(path, summary, runs):
    """Fig. 7: h(P_t) and KL(P_t || P_s) in nats, which the paper draws over 100 epochs."""
    figure, axes = panels(2, summary)
    ln_k = next(run.ln_k for seeds in runs.values() for run in seeds)
    names = (("teacher_entropy", "teacher's entropy h(P_t)"), ("kl", "KL(P_t || P_s)"))
    for axis, (key, title) in zip(axes, names, strict=True):
        for i, (name, seeds) in enumerate(runs.items()):
            for j, run in enumerate(seeds):
                points = [(step["epoch"], step[key]) for step in run.steps if key in step]
                text = name if j == 0 else None
                axis.plot(*zip(*points, strict=True), color=f"C{i}", label=text, alpha=0.9)
        axis.axhline(ln_k, color="black", ls=":", label=f"ln K = {ln_k:.2f}")
        for run in summary["runs"]:
            if end := run["theirs"].get("h" if key == "teacher_entropy" else "KL"):
                end = end if end == "between" else f"ends at {end}"
                axis.plot([], [], " ", label=f"theirs, {run['name']}: {end}")
        axis.set_ylim(-0.03 * ln_k, 1.03 * ln_k)
        label(axis, f"ours: {title}", "epochs", "nats")
    save(figure, path)


def draw_components(path, summary, runs):
    """Table 7 as bars, and the k-NN accuracies while training."""
    figure, (left, right) = panels(2, summary)
    curves(left, runs, "knn_teacher", [f"C{i}" for i in range(len(runs))], "o-")
    label(left, "ours: while training", "epochs", "teacher's k-NN accuracy (%)")
    draw_bars(right, summary, "knn_teacher", "k-NN")
    save(figure, path)


def draw_settings(path, summary, runs):
    """Of our own studies: the k-NN accuracies at the end, a bar for each run."""
    rows = len(summary["runs"])
    figure, axis = plt.subplots(figsize=(7, 1.8 + 0.5 * rows), layout="constrained")
    head(figure, summary, 80)
    draw_bars(axis, summary, "knn_teacher", None)
    save(figure, path)


def draw_multicrop(path, summary, runs):
    """Table 8: accuracy over the time that training took, and over memory; theirs beside ours."""
    figure, axes = panels(4, summary)
    panel = (
        ("minutes", "training time (minutes)", "knn_teacher", "k-NN accuracy (%)", False),
        ("hours", "training time (hours)", "linear", "linear accuracy (%)", True),
        ("peak_memory_mb", "peak memory (MiB)", "knn_teacher", "k-NN accuracy (%)", False),
        ("GB per GPU", "peak memory (GB per GPU)", "linear", "linear accuracy (%)", True),
    )
    for axis, (x, x_label, y, y_label, theirs) in zip(axes, panel, strict=True):
        scatter(axis, summary, x, y, theirs)
        label(axis, THEIRS if theirs else "ours", x_label, y_label, legend=False)
    save(figure, path)


def draw_batch_size(path, summary, runs):
    """Table 9: accuracy over the logarithm of the batch."""
    figure, (left, right) = panels(2, summary)
    for axis, key, theirs in ((left, "knn_teacher", False), (right, "k-NN", True)):
        found = [(int(run["name"]), value(run, key, theirs)) for run in summary["runs"]]
        points = sorted(point for point in found if point[1] is not None)
        axis.set_xscale("log", base=2)
        if points:
            axis.plot(*zip(*points, strict=True), "o-", color="grey" if theirs else "C0")
            for run in () if theirs else summary["runs"]:
                accuracies = of_seeds(run, key)
                axis.plot([int(run["name"])] * len(accuracies), accuracies, "_", color="C0")
            batches = [batch for batch, _ in points]
            axis.set_xticks(batches, batches)
        title = THEIRS if theirs else "ours"
        label(axis, title, "images per step", "k-NN accuracy (%)", legend=False)
    save(figure, path)


# ---- parts of pictures ----


def panels(count, summary):
    figure, axes = plt.subplots(1, count, figsize=(4.6 * count, 4.2), layout="constrained")
    head(figure, summary, 46 * count)
    return figure, axes


def head(figure, summary, width):
    """What was run, above the picture, in lines of `width` letters."""
    text = textwrap.fill(f"{summary['title']}. {sources(summary)}", width)
    figure.suptitle(text, fontsize=9)


def label(axis, title, x, y, legend=True):
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    if legend and axis.get_legend_handles_labels()[1]:
        # below the axes, where it covers no curve, by four letters
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, 0), borderaxespad=4.2, ncols=2)


def curves(axis, runs, key, colors, style):
    """k-NN measurements: the mean over the seeds, and their range."""
    for (name, seeds), color in zip(runs.items(), colors, strict=True):
        by_epoch = {}
        for run in seeds:
            for measured in run.knn:
                by_epoch.setdefault(measured["epoch"], []).append(measured[key])
        if not by_epoch:
            continue
        epochs, values = zip(*sorted(by_epoch.items()), strict=True)
        means = [statistics.fmean(of_seeds) for of_seeds in values]
        axis.plot(epochs, means, style, color=color, label=name, ms=4)
        axis.fill_between(epochs, [*map(min, values)], [*map(max, values)], color=color, alpha=0.15)


def value(run, key, theirs):
    """Of a row of the summary: the paper's number, or our mean over the seeds; None without."""
    if theirs:
        return run["theirs"].get(key)
    values = of_seeds(run, key)
    return statistics.fmean(values) if values else None


def of_seeds(run, key):
    """Our numbers in a row of the summary, one for each seed that has it."""
    return [figures[key] for figures in run["seeds"].values() if key in figures]


def draw_bars(axis, summary, ours, theirs):
    """Accuracies at the end as bars, the paper's below ours; a line for our untrained network.

    Where the paper has none, bars of the untrained networks, which may differ, take its place. A
    dash stands at the end of each seed.
    """
    names = [run["name"] for run in summary["runs"]]
    below = ("ours, untrained", "knn_untrained", False)
    if summary["theirs"]:
        below = (THEIRS, theirs, True)
    series = (("ours", ours, False, "C0", -0.2), (*below, "lightgrey", 0.2))
    for text, key, is_theirs, color, shift in series:
        lengths = [value(run, key, is_theirs) or 0.0 for run in summary["runs"]]
        bars = axis.barh([i + shift for i in range(len(names))], lengths, 0.4, color=color)
        bars.set_label(text)
        for i, run in enumerate(summary["runs"]):
            seeds = of_seeds(run, key) if key == ours else []
            axis.plot(seeds, [i + shift] * len(seeds), "|", color="black", ms=7)
            place = max([lengths[i], *seeds]) + 3, i + shift
            axis.text(*place, f"{lengths[i]:.1f}", fontsize=7, va="center")
    untrained = [value(run, "knn_untrained", False) for run in summary["runs"]]
    untrained = [accuracy for accuracy in untrained if accuracy is not None]
    if untrained and summary["theirs"]:
        text = f"ours, untrained: {untrained[0]:.1f}"
        axis.axvline(untrained[0], color="C0", ls=":", label=text)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    label(axis, "at the end", "teacher's k-NN accuracy (%)", "")
    axis.set_xlim(0, 100)


def scatter(axis, summary, x, y, theirs):
    points = [
        (run["name"], value(run, x, theirs), value(run, y, theirs)) for run in summary["runs"]
    ]
    points = [point for point in points if None not in point]
    if points:
        names, xs, ys = zip(*points, strict=True)
        axis.plot(xs, ys, "o-", color="grey" if theirs else "C0")
        for name, *place in zip(names, xs, ys, strict=True):
            left = place[0] > (min(xs) + max(xs)) / 2  # inside the axes
            options = dict(ha="right" if left else "left", fontsize=7)
            place_of_text = (-6, 4) if left else (4, -10)
            axis.annotate(name, place, textcoords="offset points", xytext=place_of_text, **options)
        axis.margins(0.2)


DRAWERS = {
    "teacher": draw_teacher,
    "collapse": draw_collapse,
    "components": draw_components,
    "multicrop": draw_multicrop,
    "batch-size": draw_batch_size,
    "small-data": draw_settings,
    "auto-rules": draw_settings,
}
