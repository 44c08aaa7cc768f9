# SPDX-License-Identifier: Apache-2.0
"""J and F by their definitions, and the tables of davis2017-evaluation."""

import csv
import math

import numpy as np
import pytest
from scipy import ndimage

from dino.evaluation.video_scores import (
    boundary_f,
    jaccard,
    score_video,
    statistics,
    summarise,
    table,
    write_tables,
)


def boundary_by_definition(mask):
    height, width = mask.shape
    edge = np.zeros(mask.shape, bool)
    for y in range(height):
        for x in range(width):
            for dy, dx in ((0, 1), (1, 0), (1, 1)):
                if y + dy < height and x + dx < width and mask[y, x] != mask[y + dy, x + dx]:
                    edge[y, x] = True
    return edge


def f_by_definition(annotation, segmentation):
    radius = math.ceil(0.008 * math.hypot(*annotation.shape))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disc = x**2 + y**2 <= radius**2
    truth, found = map(boundary_by_definition, (annotation, segmentation))
    precision = (found & ndimage.binary_dilation(truth, disc)).sum() / found.sum()
    recall = (truth & ndimage.binary_dilation(found, disc)).sum() / truth.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0


@pytest.mark.parametrize("size", [(60, 80), (140, 180)])
@pytest.mark.parametrize("seed", [0, 1])
def test_f_is_that_of_its_definition(size, seed):
    noise = np.random.default_rng(seed).normal(size=(2, *size))
    a, b = (ndimage.gaussian_filter(channel, 6) > 0.01 for channel in noise)
    moved = np.roll(a, 2, axis=1)
    for pair in ((a, b), (a, moved), (moved, b)):
        assert boundary_f(*pair) == pytest.approx(f_by_definition(*pair), abs=1e-12)


def test_j_and_f_of_masks_that_are_empty_or_fill_the_frame():
    empty, some = np.zeros((2, 40, 50), bool)
    some[10:20, 10:20] = True
    assert (jaccard(empty, empty), boundary_f(empty, empty)) == (1, 1)
    assert (jaccard(some, empty), boundary_f(some, empty)) == (0, 0)
    assert (jaccard(~empty, empty), boundary_f(~empty, empty)) == (0, 1)  # no boundary in either
    assert jaccard(some, np.roll(some, 5, axis=0)) == pytest.approx(50 / 150)


def test_recall_is_strict_and_decay_compares_the_first_quarter_with_the_last():
    mean, recall, decay = statistics([0.9, 0.5, 0.6, 0.4, 0.2])  # quarters: 1-2, 2-3, 3-4, 4-5
    assert (mean, recall) == (pytest.approx(0.52), 0.4)
    assert decay == pytest.approx((0.9 + 0.5) / 2 - (0.4 + 0.2) / 2)
    many = np.linspace(1, 0, 1001)  # more than the 256 frames that 8 bits count
    assert statistics(many)[2] == pytest.approx(0.75)


def test_first_and_last_frame_and_late_objects_are_not_scored():
    truth = np.zeros((5, 30, 30), np.uint8)
    truth[:, 5:15, 5:15] = 1
    truth[2:, 20:25, 20:25] = 2  # appears later
    found = truth.copy()
    found[[0, 4]] = 0
    j, f = score_video(truth, found)
    assert j.tolist() == f.tolist() == [[1, 1, 1]]


def test_means_are_over_objects_and_files_have_the_names_and_columns_of_the_official_ones(tmp_path):
    scores = {
        "dogs": (np.full((3, 4), 0.6), np.full((3, 4), 0.8)),
        "kite": (np.full((1, 4), 0.2), np.full((1, 4), 0.4)),
    }
    total, objects = summarise(scores)
    assert total["J-Mean"] == pytest.approx((3 * 0.6 + 0.2) / 4)
    assert total["J&F-Mean"] == pytest.approx((0.5 + 0.7) / 2)
    write_tables(tmp_path, "val", total, objects)
    with open(tmp_path / "global_results-val.csv", newline="") as file:
        header, values = csv.reader(file)
    assert ",".join(header) == "J&F-Mean,J-Mean,J-Recall,J-Decay,F-Mean,F-Recall,F-Decay"
    assert ",".join(values) == "0.600,0.500,0.750,0.000,0.700,0.750,0.000"
    with open(tmp_path / "per-sequence_results-val.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["Sequence", "J-Mean", "F-Mean"]
    assert rows[1:] == [[f"dogs_{k}", "0.600", "0.800"] for k in (1, 2, 3)] + [
        ["kite_1", "0.200", "0.400"]
    ]
    *_, last = table(total, objects)
    assert last.split() == ["all", "objects", "60.0", "50.0", "75.0", "0.0", "70.0", "75.0", "0.0"]
