# SPDX-License-Identifier: Apache-2.0
"""report.html: all that runs have logged and drawn, in one file that any browser opens offline.

Texts come from files that others may have written: Jinja escapes them, and the page forbids itself
scripts and the network.
"""

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dino.atomic import replacing
from dino.backbones import canonical_name
from dino.data.images import UnreadableImage, read_image
from dino.distributed import is_main_process
from dino.errors import UserError
from dino.figures import plt
from dino.json_files import dumps, is_number, read_object
from dino.printable import printable
from dino.spread import spread_to_end
from dino.training.backbone_pictures import (
    ATTENTION,
    ATTENTION_EPOCHS,
    NEAREST,
    PATCHES,
    draw_backbone,
)
from dino.training.comparison import COLUMNS, describe_run
from dino.training.flags import get_args_parser
from dino.training.logged_run import open_run
from dino.training.plots import PANELS, draw_panel, whatever_happens
from dino.training.settings import REASONS
from vision_transformer import ARCHITECTURES

TEMPLATE = "report.html.jinja"  # beside this file
MOST_ROWS = 12  # of a table of measurements
LONGEST = 300  # characters of a value
NOT_COMPARED = {"output_dir", "local_rank", "dist_url"}  # they say where a run is, not what it is
MEASURES = (
    ("k-NN, teacher (%)", "knn_teacher", 1),
    ("k-NN, student (%)", "knn_student", 1),
    ("RankMe", "rank_me", 1),
    ("alignment", "alignment", 3),
    ("uniformity", "uniformity", 2),
)
# Of a run's folder: file, title, what it shows.
PICTURES = (
    (
        "augmentations.png",
        "What the network saw",
        "Views of some images as they enter the networks: a row for each image.",
    ),
    (
        ATTENTION,
        "Where the class token looks",
        "Attention of [CLS] to the patches in the last block of the trained backbone. Columns: the"
        " image, the mean of the heads, the first heads.",
    ),
    (
        ATTENTION_EPOCHS,
        "Attention over the epochs",
        "Attention of [CLS] to the patches in the last block of the teacher, before training (epoch"
        " 0) and after some epochs: the mean of the heads, each map from its lowest value to its"
        " highest.",
    ),
    (
        PATCHES,
        "Patch features as colours",
        "The first three principal components of the last block's patch tokens, as red, green and"
        " blue; common to all images, so that equal colours are alike features.",
    ),
    (
        NEAREST,
        "Nearest neighbours",
        "Some training images and those that are most alike to the trained backbone.",
    ),
)


@dataclass
class Picture:
    source: str  # a data URI
    title: str
    width: int  # pixels


@dataclass
class ReportedRun:
    """A run's folder as text and pictures."""

    name: str
    flags: dict
    reasons: dict  # of the flags that a preset decided
    versions: dict
    verdicts: list  # (epoch, name, text)
    bad_images: list  # texts
    measurements: list  # rows of texts, one for each of MEASURES after the epoch
    measured: int  # how often
    undrawn: str  # why there are no attention maps, or ""
    pictures: dict = field(default_factory=dict)  # {file: Picture}


def report_run(folder, backbone, images, augmentation):
    """report.html in the folder of a run that has ended, and pictures of its backbone.

    Prints a warning where that fails.
    """
    if not is_main_process():
        return
    path = Path(folder) / "report.html"
    with whatever_happens("the pictures of the backbone"):
        draw_backbone(folder, backbone, images, augmentation)
    with whatever_happens(path):
        write_report(path, [open_run(folder)])


def write_report(path, logged):
    """One HTML file, written atomically, of each LoggedRun in `logged`; all have steps."""
    runs = [read_run(run) for run in logged]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(TEMPLATE).render(
        columns=COLUMNS,
        table=[describe_run(run) for run in logged],
        runs=runs,
        differing=differing_flags(runs),
        flags=table_of([run.flags for run in runs]),
        versions=table_of([run.versions for run in runs]),
        curves=draw_curves_apart(logged),
        measures=[title for title, _, _ in MEASURES],
        sections=[
            (title, about, [(run.name, run.pictures[file]) for run in runs if file in run.pictures])
            for file, title, about in PICTURES
        ],
    )
    with replacing(path) as temporary:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")


def read_run(logged):
    """The ReportedRun of a LoggedRun; what is not there, or damaged, is left out."""
    pictures = {file: read_picture(logged.folder / file, title) for file, title, _ in PICTURES}
    flags = {name: value for name, value in logged.flags.items() if name != REASONS}
    reasons = logged.flags.get(REASONS)
    return ReportedRun(
        logged.name,
        shown(flags),
        shown(reasons) if isinstance(reasons, dict) else {},
        shown(read_versions(logged.folder)),
        [
            (f"{line['epoch']:g}", printable(line["verdict"]), printable(line["text"]))
            for line in logged.verdicts
        ],
        [printable(line["text"]) for line in logged.bad_images],
        *describe_measurements(logged),
        why_no_attention(flags.get("arch")),
        {file: picture for file, picture in pictures.items() if picture},
    )


def why_no_attention(arch):
    """A sentence for a network that is not a ViT of vision_transformer.py; "" for one that is."""
    if not isinstance(arch, str) or canonical_name(arch) in ARCHITECTURES:
        return ""
    return f"There are no attention maps and no patch features: {printable(arch)} is not a ViT."


def shown(values):
    """{name: text} of a JSON object, each on one line and not too long."""
    texts = {
        printable(name): printable(value if isinstance(value, str) else dumps(value))
        for name, value in values.items()
    }
    return {
        name: text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
        for name, text in texts.items()
    }


def read_versions(folder):
    """versions.json, which older runs lack."""
    try:
        return read_object(folder / "versions.json")
    except (OSError, UserError):
        return {}


def describe_measurements(run):
    """(rows of texts: the epoch and each of MEASURES, how many measurements there are).

    Rows are spread evenly from the first measurement to the last; the best k-NN is among them.
    """
    by_epoch = {}
    for line in [*run.knn, *run.measures]:
        by_epoch.setdefault(line["epoch"], {"epoch": line["epoch"]}).update(
            {key: line[key] for _, key, _ in MEASURES if is_number(line.get(key))}
        )
    lines = [by_epoch[epoch] for epoch in sorted(by_epoch)]
    last = len(lines) - 1
    shown_rows = set(spread_to_end(last, MOST_ROWS)) if lines else set()
    if run.knn:
        shown_rows.add(max(range(len(lines)), key=lambda i: lines[i].get("knn_teacher", -1)))
    rows = [
        [f"{lines[i]['epoch']:g}"]
        + [f"{lines[i][key]:.{n}f}" if key in lines[i] else "-" for _, key, n in MEASURES]
        for i in sorted(shown_rows)
    ]
    return rows, len(lines)


def table_of(columns):
    """Rows (name, [text in each of the dicts `columns`]), by name."""
    names = sorted({name for column in columns for name in column})
    return [(name, [column.get(name, "-") for column in columns]) for name in names]


def differing_flags(runs):
    """Rows (flag, [value of each run]): those not equal in all runs, or of one run, not default."""
    columns = [run.flags for run in runs]
    if len(runs) == 1:
        columns = [shown(vars(get_args_parser().parse_args([]))), *columns]
    return [
        (flag, values[-len(runs) :])
        for flag, values in table_of(columns)
        if len(set(values)) > 1 and flag not in NOT_COMPARED
    ]


def draw_curves_apart(runs):
    """Each panel of curves.png as a Picture of its own, which a small screen can show."""
    pictures = []
    for panel in PANELS:
        figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
        buffer = io.BytesIO()
        try:
            draw_panel(axis, panel, runs)
            figure.savefig(buffer, format="png", dpi=110)
        finally:
            plt.close(figure)
        pictures.append(Picture(data_uri(buffer), panel[0], 550))
    return pictures


def read_picture(path, title):
    """A file of a run's folder, decoded and encoded again, as a Picture; None if that fails."""
    try:
        image = read_image(path)
    except UnreadableImage:
        return None
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return Picture(data_uri(buffer), title, image.width)


def data_uri(buffer):
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
