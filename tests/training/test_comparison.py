# SPDX-License-Identifier: Apache-2.0
"""compare_runs.py: how the measures without labels follow k-NN."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest

from dino.run_log import KINDS
from dino.training.comparison import follow_knn
from dino.training.logged_run import LoggedRun, open_run
from dino.training.plots import draw_gradient_norm
from dino.training.study_report import measure


def spearman(a, b):
    """1 - 6 sum d^2 / (n (n^2 - 1)), for numbers that all differ."""
    ranks = [[sorted(values).index(value) for value in values] for values in (a, b)]
    n, squares = len(a), sum((i - j) ** 2 for i, j in zip(*ranks, strict=True))
    return 1 - 6 * squares / (n * (n**2 - 1))


@pytest.mark.parametrize("count", [3, 5])
def test_measures_without_labels_are_set_beside_knn_if_there_are_four(count, tmp_path):
    knn, ranks = [40.0, 50.0, 45.0, 60.0, 61.0], [10.0, 12.0, 15.0, 14.0, 11.0]
    alignments = [0.5, 0.3, 0.4, 0.2, 0.1]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for epoch in range(count):
            line = {"iteration": 10 * epoch, "epoch": epoch, "knn_student": 0.0, "uniformity": -1.0}
            line |= {"knn_teacher": knn[epoch], "rank_me": ranks[epoch]}
            file.write(json.dumps(line | {"alignment": alignments[epoch]}) + "\n")
        file.write(json.dumps(line | {"knn_teacher": 1.0, "alignment": "hostile"}) + "\n")
    found = follow_knn(LoggedRun(tmp_path))
    if count == 3:
        assert found is None
    else:
        rho = spearman(knn, ranks)
        assert found == (tmp_path.name, "5", f"{rho:.2f}", "-1.00", "-")  # "-": of a constant


def write_steps(folder, *epochs):
    (folder / "args.json").write_text(json.dumps({"out_dim": 64}))
    steps = [dict.fromkeys(KINDS["loss"][0], 1.0) | {"epoch": epoch} for epoch in epochs]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


def test_lines_of_a_log_that_no_run_writes_are_told(tmp_path, capsys):
    """Of logs joined or reversed by hand, the end of the run was another, without a word."""
    write_steps(tmp_path, 1, 2, 3)
    open_run(tmp_path)
    assert capsys.readouterr().out == ""
    write_steps(tmp_path, 1, 2, 3, 1, 2, None, "5")
    open_run(tmp_path)
    said = capsys.readouterr().out
    assert f"{tmp_path / 'metrics.jsonl'}: 2 damaged lines are left out" in said
    assert "1 steps do not come after the one before" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [("images_per_s", 0), ("teacher_entropy_share", 35.6), ("epoch", -1), ("data_wait", -5)],
)
def test_a_step_with_a_figure_that_no_run_has_is_left_out(tmp_path, name, value):
    write_steps(tmp_path, 1, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        step = dict.fromkeys(KINDS["loss"][0], 1.0) | {"epoch": 3, name: value}
        file.write(json.dumps(step) + "\n")
    run = open_run(tmp_path)
    assert [step["epoch"] for step in run.steps] == [1, 2]
    assert run.odd_lines == 1


@pytest.mark.parametrize("memory", [None, "x", [1]])
def test_a_logged_memory_that_is_no_number_is_none(tmp_path, memory):
    write_steps(tmp_path, 1, 2)
    run = open_run(tmp_path)
    run.flags["batch_size_per_gpu"] = 4
    run.steps[0]["peak_memory_mb"] = memory
    assert measure(run, 1)["peak_memory_mb"] == 0
    run.steps[1]["peak_memory_mb"] = 5.0
    assert measure(run, 1)["peak_memory_mb"] == 5


def test_a_logged_norm_that_is_no_number_is_a_gap_in_its_curve(tmp_path):
    norms = [1.0, {"a": 1}, "hostile", True, 2.0]
    (tmp_path / "args.json").write_text(json.dumps({"out_dim": 64}))
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for number, norm in enumerate(norms):
            line = dict.fromkeys(KINDS["loss"][0], 1.0) | {"epoch": number + 1}
            file.write(json.dumps(line | {"grad_norm": norm}) + "\n")
    figure, axis = plt.subplots()
    draw_gradient_norm(axis, LoggedRun(tmp_path), "black", "")
    np.testing.assert_equal(axis.lines[0].get_ydata(), [1.0, np.nan, np.nan, np.nan, 2.0])
    plt.close(figure)
