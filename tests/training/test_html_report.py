# SPDX-License-Identifier: Apache-2.0
"""report.html of real runs, read by a parser that knows nothing of how it was written."""

import base64
import html.parser
import io
import json
import shutil

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import SMALL_RUN, run_script
from PIL import Image

from dino.training import plots
from dino.training.backbone_pictures import (
    ATTENTION,
    ATTENTION_EPOCHS,
    NEAREST,
    PATCHES,
    TITLE,
    principal_colors,
)
from dino.training.html_report import write_report
from dino.training.logged_run import LoggedRun, open_run
from dino.training.plots import PANELS, draw_panel, logarithmic

VOID = {"meta", "img", "br", "link"}  # elements without an end


class Page(html.parser.HTMLParser):
    """The texts, pictures and tables of a page whose elements are all closed in order."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.texts, self.attributes, self.images = [], [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "img":
            kind, data = dict(attributes)["src"].split(",")
            assert kind == "data:image/png;base64"
            self.images.append(Image.open(io.BytesIO(base64.b64decode(data))))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def train(data, folder, *flags):
    command = ("main_dino.py", *SMALL_RUN, "--data_path", data, "--output_dir", folder)
    command += ("--report", "true")
    result = run_script(*command, *flags)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def run(class_folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    train(class_folders / "train", folder, "--knn_data_path", class_folders, "--knn_freq", 1)
    return folder


def test_a_run_ends_with_a_report_of_all_it_has_logged(run):
    page = Page(run / "report.html")
    for flag, value in json.loads((run / "args.json").read_text()).items():
        assert flag in page.texts
        assert (value if isinstance(value, str) else json.dumps(value)) in page.texts
    for name, version in json.loads((run / "versions.json").read_text()).items():
        assert {name, version} <= set(page.texts)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "rank_me" in line]
    assert len(measured) == 3  # before training and after each of two epochs
    for line in measured:
        assert {f"{line['knn_teacher']:.1f}", f"{line['rank_me']:.1f}"} <= set(page.texts)
    for line in lines:
        assert line.get("text", "") in page.text


def test_the_report_shows_the_views_of_the_run(run):
    views = Image.open(run / "augmentations.png").convert("RGB").tobytes()
    assert views in [image.convert("RGB").tobytes() for image in Page(run / "report.html").images]


def test_the_report_shows_what_the_backbone_makes_of_the_images(run):
    page = Page(run / "report.html")
    shown = [image.convert("RGB").tobytes() for image in page.images]
    for name in (ATTENTION, ATTENTION_EPOCHS, PATCHES, NEAREST):
        assert Image.open(run / name).convert("RGB").tobytes() in shown
    columns = 2 + 3  # image, mean, and the 3 heads of a vit_nano
    assert Image.open(run / ATTENTION).size == (columns * 132 + 4, 8 * 132 + 4 + TITLE)


def test_patches_of_two_kinds_get_two_colours():
    """Tokens around two points differ along one axis: its component tells them apart."""
    torch.manual_seed(0)
    second = torch.rand(3, 50) > 0.5
    tokens = 0.01 * torch.randn(3, 50, 6)
    tokens[second] += torch.tensor([1.0, 0, 0, 2, 0, 0])
    colors = principal_colors(tokens)
    assert colors.shape == (3, 50, 3)
    red = colors[..., 0]
    assert red[second].min() > 0.9
    assert red[~second].max() < 0.1


def test_colours_of_few_features_are_finite():
    assert principal_colors(torch.ones(1, 4, 6)).isfinite().all()
    assert principal_colors(torch.randn(1, 1, 2)).shape == (1, 1, 3)


def test_a_network_without_patches_has_neighbours_alone(class_folders, tmp_path):
    train(class_folders / "train", tmp_path, "--epochs", 1, "--arch", "resnet_nano")
    page = Page(tmp_path / "report.html")
    assert "Nearest neighbours" in page.texts
    assert not {"Where the class token looks", "Attention over the epochs"} & set(page.texts)
    assert "no attention maps and no patch features: resnet_nano is not a ViT." in page.text
    assert not (tmp_path / "attention_history").exists()


def test_the_reasons_of_a_preset_are_a_table_and_no_setting(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    flags = json.loads((run / "args.json").read_text())
    flags |= {"preset": "auto", "auto": {"lr": "short runs need a high one"}}
    (tmp_path / "run" / "args.json").write_text(json.dumps(flags))
    write_report(tmp_path / "page.html", [open_run(tmp_path / "run")])
    page = Page(tmp_path / "page.html")
    assert "Why --preset auto took these values" in page.text
    assert "lr 0.0005 short runs need a high one" in page.text
    assert "{" not in page.text[page.text.index("Settings") :]


def test_pictures_and_reports_make_the_folder_that_is_named(tmp_path):
    figure, _ = plots.plt.subplots()
    plots.save(figure, tmp_path / "pictures" / "curves.png")
    write_report(tmp_path / "reports" / "page.html", [])
    assert (tmp_path / "pictures" / "curves.png").stat().st_size
    assert (tmp_path / "reports" / "page.html").stat().st_size


def test_the_report_needs_no_network_and_no_script(run):
    page = Page(run / "report.html")
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not [value for _, value in page.attributes if value and "://" in value[:100]]
    text = (run / "report.html").read_text()
    assert "@import" not in text
    assert "url(" not in text


def test_text_of_others_stays_text(run, tmp_path):
    name = "<script>alert(1)<\x1b[31m&amp;"
    folder = tmp_path / name.replace("/", "")
    shutil.copytree(run, folder)
    flags = json.loads((folder / "args.json").read_text())
    evil = '"><img src=http://example.com/x.png onerror=alert(1)>'
    (folder / "args.json").write_text(json.dumps(flags | {evil: evil, "arch": evil}))
    (folder / "versions.json").write_text(json.dumps({evil: evil}))
    (folder / "augmentations.png").write_text(evil)
    with (folder / "metrics.jsonl").open("a") as file:
        line = {"iteration": 1, "epoch": 1, "text": evil}
        file.write(json.dumps(line | {"verdict": evil}) + "\n")
        file.write(json.dumps(line | {"bad_image": evil}) + "\n")
        measures = dict.fromkeys(("rank_me", "alignment", "uniformity"), 1.0)
        file.write(json.dumps(line | measures | {"knn_teacher": evil}) + "\n")
    path = tmp_path / "report.html"
    result = run_script(
        "compare_runs.py", folder, "--html", path, "--output", tmp_path / "curves.png"
    )
    assert result.returncode == 0, result.stderr
    page = Page(path)
    assert page.texts.count("<script>alert(1)<\\x1b[31m&amp;") > 1
    assert page.text.count(evil) >= 6
    assert "script" not in page.tags
    assert not [attribute for attribute, _ in page.attributes if attribute.startswith("on")]
    assert len(page.images) == len(Page(run / "report.html").images) - 1  # no views


def test_several_runs_stand_side_by_side_with_the_flags_that_differ(run, class_folders, tmp_path):
    second = tmp_path / "second"
    train(class_folders / "train", second, "--lr", 0.007, "--epochs", 1)
    path = tmp_path / "report.html"
    both = ("compare_runs.py", run, second, "--output", tmp_path / "curves.png", "--html", path)
    result = run_script(*both)
    assert result.returncode == 0, result.stderr
    assert f"Report: {path}" in result.stdout
    page = Page(path)
    differing = page.text.partition("Settings that differ")[2].partition("All ")[0].split()
    assert {"lr", "0.007", "epochs", "knn_data_path"} <= set(differing)
    assert not {"arch", "vit_nano", "output_dir"} & set(differing)
    assert page.texts.count("first") == page.texts.count("second") > 2


def test_a_run_outlives_a_report_that_cannot_be_written(class_folders, tmp_path):
    (tmp_path / "report.html").mkdir()
    result = train(class_folders / "train", tmp_path, "--epochs", 1)
    assert "Warning" in result.stdout
    assert "report.html could not be written" in result.stdout


def test_a_report_where_a_folder_stands_is_refused(run, tmp_path):
    result = run_script("compare_runs.py", run, "--html", tmp_path)
    assert result.returncode == 2
    assert f"--html {tmp_path} is a folder" in result.stderr


@pytest.mark.parametrize("panel", PANELS, ids=[title for title, _ in PANELS])
def test_no_legend_covers_a_line(run, panel):
    figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
    draw_panel(axis, panel, [LoggedRun(run)] * 2)
    figure.canvas.draw()
    legend = axis.get_legend()
    within = legend.get_window_extent() if legend else None
    for curve in axis.lines if legend else []:
        pixels = curve.get_transform().transform(curve.get_xydata())
        assert within.count_contains(pixels) == 0, curve.get_label()
    plt.close(figure)


def test_small_numbers_of_a_logarithmic_scale_are_written_plainly():
    figure, axis = plt.subplots()
    logarithmic(axis)
    axis.plot([0.3, 0.9])
    figure.canvas.draw()
    labels = [label.get_text() for label in axis.yaxis.get_ticklabels("both")]
    plt.close(figure)
    assert "0.6" in labels
    assert not any("e" in label for label in labels)
