# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: what the network sees, and its curves. Drawn without a screen."""

import contextlib
import math
from pathlib import Path

import torch

from dino.atomic import replacing
from dino.data.channels import as_rgb
from dino.distributed import is_main_process, print0
from dino.errors import UserError
from dino.figures import LogFormatter, plt
from dino.printable import printable
from dino.run_log import best_effort, is_figure
from dino.spread import spread
from dino.training.logged_run import LoggedRun


def draw_augmentations(path, views, names, mean, std):
    """Contact sheet: a row for each image, a column for each view, as the network receives them.

    `views`: for each image the list of its V views (3, S, S), S the view's own size, normalised by
    `mean` and `std`.
    """
    rows, columns = len(views), len(names)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(1.5 * columns, 1.5 * rows + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for row, image_views in zip(axes, views, strict=True):
        for axis, view in zip(row, image_views, strict=True):
            axis.imshow(displayable(view, mean, std), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, name, view in zip(axes[0], names, views[0], strict=True):
        axis.set_title(f"{name}\n{view.shape[-1]} x {view.shape[-2]}", fontsize=8)
    save(figure, path)


def displayable(view, mean, std):
    """Undo the normalisation: (C, S, S) -> (S, S, 3) in [0, 1], of the first three channels.

    See `as_rgb`.
    """
    mean, std = torch.tensor(mean), torch.tensor(std)
    return as_rgb((view.permute(1, 2, 0) * std + mean).clamp(0, 1).numpy())


def save(figure, path, dpi=90):
    """Write `figure` atomically, since somebody may be viewing the file, and close it."""
    try:
        with replacing(path) as temporary:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(temporary, format="png", dpi=dpi)
    finally:
        plt.close(figure)


@contextlib.contextmanager
def whatever_happens(what):
    """Print a warning and continue: no picture is worth the end of a run."""
    try:
        yield
    except Exception as error:  # a full disk, an unreadable image, a font
        print0(printable(f"Warning: {what} could not be written ({error}); continuing."))


def draw_first_views(path, loader, augmentation, images=4):
    """`draw_augmentations` of a few images from all over the data set, as epoch 0 will see them."""
    if not is_main_process():
        return
    indices = spread(len(loader.dataset), images)
    views = [[view[0].cpu() for view in loader.batch_of([(0, index)])] for index in indices]
    with best_effort(path):
        draw_augmentations(path, views, view_names(views[0]), augmentation.mean, augmentation.std)


def view_names(views):
    """Titles of the columns of a contact sheet: the first two views are the global ones."""
    return ["global 1", "global 2", *(f"local {i + 1}" for i in range(len(views) - 2))]


def draw_run(folder):
    """curves.png in a run's folder."""
    path = Path(folder) / "curves.png"
    if not is_main_process():
        return
    with best_effort(path):
        try:
            run = LoggedRun(folder)
        except UserError as error:  # args.json, which nobody needs to train on
            print0(f"Warning: {error} There is no curves.png.")
            return
        if run.steps:  # none where the disk was full
            draw_curves(path, [run])


class PlainNumbers(LogFormatter):
    """Numbers of a logarithmic scale without formulas, which text here is not; 0.6, not 6e-01."""

    def __call__(self, x, pos=None):
        return f"{x:g}" if super().__call__(x, pos) else ""


def draw_curves(path, runs):
    """Everything that a run has logged in one picture, or several runs over each other."""
    figure, axes = plt.subplots(2, 5, figsize=(20, 7.5))
    # constrained layout takes as long as the drawing itself
    margins = dict(left=0.025, right=0.995, top=0.955, bottom=0.06)
    figure.subplots_adjust(**margins, wspace=0.15, hspace=0.24)
    for axis, panel in zip(axes.flat, PANELS, strict=True):
        draw_panel(axis, panel, runs)
    save(figure, path)


def draw_panel(axis, panel, runs):
    """One of PANELS, of each run in a colour of its own."""
    title, draw = panel
    for number, run in enumerate(runs):
        draw(axis, run, f"C{number}", f"{run.name}: " if len(runs) > 1 else "")
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("epochs", fontsize=8)
    axis.tick_params(which="both", labelsize=7)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[1]:
        legend = axis.legend(fontsize=7, loc="upper right")
        make_room(axis, len(legend.get_texts()))


def make_room(axis, labels):
    """Raise the upper limit, so that a legend of so many `labels` covers no line."""
    share = min(0.5, 0.03 + 0.06 * labels)  # of the height
    scale = axis.yaxis.get_transform()  # may be logarithmic
    bottom, top = scale.transform(axis.get_ylim())
    axis.set_ylim(top=scale.inverted().transform(bottom + (top - bottom) / (1 - share)))


def line(axis, run, name, scale=1.0, **style):
    """One figure of the logged iterations, times `scale`; a gap where it is no number."""
    found = [step.get(name) for step in run.steps]
    values = [scale * value if is_figure(value) else math.nan for value in found]
    axis.plot([step["epoch"] for step in run.steps], values, **style)


def draw_loss(axis, run, color, prefix):
    line(axis, run, "loss", color=color, label=f"{prefix}loss")
    axis.axhline(
        run.ln_k, color=color, ls=":", label=f"{prefix}ln K = {run.ln_k:.2f}: nothing learned"
    )
    for verdict in run.verdicts:
        axis.axvline(verdict["epoch"], color="red", lw=0.8)
        axis.annotate(
            verdict["verdict"],
            (verdict["epoch"], 0.02),
            xycoords=("data", "axes fraction"),
            color="red",
            fontsize=7,
            rotation=90,
            ha="right",
        )


def draw_entropy(axis, run, color, prefix):
    line(axis, run, "teacher_entropy_share", 100, color=color, label=f"{prefix}teacher's entropy")
    line(axis, run, "kl_share", 100, color=color, ls="--", label=f"{prefix}KL(teacher, student)")
    axis.set_ylim(-3, 103)


def draw_knn(axis, run, color, prefix):
    for network, style in (("teacher", "o-"), ("student", "x--")):
        points = [(line["epoch"], line[f"knn_{network}"]) for line in run.knn]
        if points:
            axis.plot(*zip(*points, strict=True), style, color=color, label=f"{prefix}{network}")
    if not run.knn:
        axis.plot([], [], color=color, label=f"{prefix}not measured: --knn_data_path")


def logarithmic(axis):
    """A logarithmic scale."""
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(PlainNumbers())
    axis.yaxis.set_minor_formatter(PlainNumbers(labelOnlyBase=False))


def draw_rank(axis, run, color, prefix):
    draw_measure(axis, run, "rank_me", "o-", color=color, label=prefix.removesuffix(": "))


def draw_alignment(axis, run, color, prefix):
    for name, style in (("alignment", "o-"), ("uniformity", "x--")):
        draw_measure(axis, run, name, style, color=color, label=prefix + name)


def draw_measure(axis, run, name, style, **options):
    """One of the measures of the teacher's features between epochs."""
    epochs, values = ([line[key] for line in run.measures] for key in ("epoch", name))
    axis.plot(epochs, values, style, **options)


def draw_agreement(axis, run, color, prefix):
    line(axis, run, "agreement", 100, color=color, label=prefix.removesuffix(": "))
    axis.set_ylim(-3, 103)


def draw_outputs_used(axis, run, color, prefix):
    line(axis, run, "outputs_used", color=color, label=prefix.removesuffix(": "))
    logarithmic(axis)


def draw_gradient_norm(axis, run, color, prefix):
    line(axis, run, "grad_norm", color=color, label=prefix.removesuffix(": "))
    logarithmic(axis)


def draw_schedules(axis, run, color, prefix):
    """Each as a share of its own maximum, which the legend gives."""
    styles = {"lr": "-", "weight_decay": "--", "1 - momentum": "-.", "teacher_temp": ":"}
    for name, style in styles.items():
        highest = max(step[name] for step in run.steps) or 1.0
        label = f"{prefix}{name}, at most {highest:.3g}"
        line(axis, run, name, 100 / highest, color=color, ls=style, label=label)


def draw_throughput(axis, run, color, prefix):
    """Images/s, and the part of them lost to waiting for data.

    Leaves out the first step of an epoch, if others were logged: it waits for the loader to start.
    """
    steps = [step for step in run.steps if not is_first_of_epoch(step)] or run.steps
    epochs = [step["epoch"] for step in steps]
    rates = [step["images_per_s"] for step in steps]
    working = [step["images_per_s"] * (1 - step["data_wait"]) for step in steps]
    axis.plot(epochs, rates, color=color, label=f"{prefix}images/s")
    axis.fill_between(
        epochs, working, rates, color=color, alpha=0.3, label=f"{prefix}lost to waiting for data"
    )
    axis.set_ylim(bottom=0)


def is_first_of_epoch(step):
    iterations_per_epoch = max(1, round((step["iteration"] + 1) / step["epoch"]))
    return step["iteration"] % iterations_per_epoch == 0


PANELS = [
    ("loss (nats)", draw_loss),
    ("teacher's entropy and KL (% of ln K)", draw_entropy),
    ("k-NN accuracy (%)", draw_knn),
    ("RankMe of the teacher's features", draw_rank),
    ("alignment and uniformity", draw_alignment),
    ("student's first choice is the teacher's (%)", draw_agreement),
    ("outputs in use, exp of entropy", draw_outputs_used),
    ("gradient norm before clipping", draw_gradient_norm),
    ("schedules (% of their maximum)", draw_schedules),
    ("throughput (images/s)", draw_throughput),
]
