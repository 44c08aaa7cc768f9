# SPDX-License-Identifier: Apache-2.0
"""Retrieval: scores by their definitions, features at any size, and the same on every rank."""

import numpy as np
import pytest
import torch
from conftest import run_processes
from torch import nn

import utils
from dino.backbones import build_backbone
from dino.data.retrieval_set import RetrievalSet
from dino.errors import UserError
from dino.evaluation.features import describe_images
from dino.evaluation.retrieval import (
    average_precision,
    check_sizes,
    features,
    mean_average_precision,
    multi_scale_features,
    protocol,
    rank,
    resize,
    score,
)
from dino.weights.pretrained import Pretrained
from vision_transformer import vit_nano


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return vit_nano(8, img_size=32).eval().requires_grad_(False)


# ---- scores ----


@pytest.mark.parametrize(
    ("ranks", "positives"),
    [([0], 1), ([1], 1), ([0, 2], 2), ([3, 4, 9], 5), ([], 3), ([0, 1, 2, 3], 4)],
)
def test_average_precision_is_the_area_under_the_curve_of_precision_over_recall(ranks, positives):
    """The curve has a point before and one after each positive that was found."""
    recalls, precisions = [], []
    for found, place in enumerate(ranks):
        recalls += [found / positives, (found + 1) / positives]
        precisions += [found / place if place else 1, (found + 1) / (place + 1)]
    expected = np.trapezoid(precisions, recalls)
    np.testing.assert_allclose(average_precision(ranks, positives), expected)
    assert utils.compute_ap(np.array(ranks), positives) == average_precision(ranks, positives)


def test_one_positive_in_the_second_place_has_the_official_value():
    assert average_precision([1], 1) == 0.25


def random_rankings(seed, database=50, queries=8):
    """(a ranking, ground truth): query 2 has no positives, query 4 no junk, and 5 no key for it."""
    rng = np.random.default_rng(seed)
    ranks = np.stack([rng.permutation(database) for _ in range(queries)], axis=1)
    gnd = []
    for query in range(queries):
        labelled = rng.permutation(database)
        ok, junk = rng.integers(1, 9), rng.integers(1, 12)
        ok, junk = 0 if query == 2 else ok, 0 if query == 4 else junk
        gnd.append({"ok": labelled[:ok], "junk": labelled[ok : ok + junk]})
    del gnd[5]["junk"]
    return ranks, gnd


def test_mean_average_precision_drops_junk_and_queries_without_positives():
    ranks, gnd = random_rankings(0)
    mean, aps, precisions, precisions_by_query = mean_average_precision(ranks, gnd, [1, 5, 10])
    expected, expected_precisions = [], []
    for query, wanted in enumerate(gnd):
        kept = [i for i in ranks[:, query] if i not in wanted.get("junk", [])]
        right = [i in wanted["ok"] for i in kept]
        if not any(right):
            assert np.isnan(aps[query])
            assert np.isnan(precisions_by_query[query]).all()
            continue
        places = [place for place, is_right in enumerate(right) if is_right]
        expected.append(average_precision(places, len(places)))
        last = max(places) + 1
        expected_precisions.append([np.mean(right[: min(k, last)]) for k in (1, 5, 10)])
    assert len(expected) == 7
    np.testing.assert_allclose(aps[~np.isnan(aps)], expected)
    np.testing.assert_allclose(mean, np.mean(expected))
    np.testing.assert_allclose(precisions, np.mean(expected_precisions, axis=0))
    for ours, official in zip(
        utils.compute_map(ranks, gnd, [1, 5, 10])[1:], (aps, precisions), strict=False
    ):
        np.testing.assert_array_equal(ours, official)


def test_precision_at_k_looks_no_further_than_the_last_positive():
    ranks = np.arange(20)[:, None]
    _, _, precisions, _ = mean_average_precision(ranks, [{"ok": [0, 2]}], [1, 2, 5])
    np.testing.assert_allclose(precisions, [1, 1 / 2, 2 / 3])


def test_a_ranking_that_was_cut_short_counts_the_positives_that_it_misses():
    ranks = np.arange(3)[:, None]
    mean, _, precisions, _ = mean_average_precision(ranks, [{"ok": [0, 7]}], [5])
    assert (mean, precisions[0]) == (0.5, 1)
    mean, _, precisions, _ = mean_average_precision(ranks, [{"ok": [7]}], [5])
    assert (mean, precisions[0]) == (0, 0)


def test_without_any_positive_the_scores_are_nan():
    mean, _, precisions, _ = mean_average_precision(np.zeros((3, 1)), [{"ok": []}], [1])
    assert np.isnan(mean)
    assert np.isnan(precisions).all()


def test_easy_medium_and_hard_choose_positives_and_junk_as_the_benchmark_does():
    gnd = [{"easy": [1, 2], "hard": [3], "junk": [4]}, {"easy": [], "hard": [0]}]
    chosen = {
        difficulty: [{role: sorted(of_role) for role, of_role in entry.items()} for entry in found]
        for difficulty in ("easy", "medium", "hard")
        for found in [protocol(gnd, difficulty)]
    }
    assert chosen == {
        "easy": [{"ok": [1, 2], "junk": [3, 4]}, {"ok": [], "junk": [0]}],
        "medium": [{"ok": [1, 2, 3], "junk": [4]}, {"ok": [0], "junk": []}],
        "hard": [{"ok": [3], "junk": [1, 2, 4]}, {"ok": [0], "junk": []}],
    }


def test_a_perfect_ranking_scores_one_at_every_difficulty():
    gnd = [{"easy": [1, 2], "hard": [3], "junk": [0]}]
    scores = score(np.array([0, 1, 2, 3, 4])[:, None], gnd, [1, 5])
    assert [mean for mean, *_ in scores.values()] == [1, 1, 1]


def test_a_ranking_is_by_cosine_and_equal_images_keep_their_order():
    database = torch.tensor([[0.0, 3.0], [5.0, 0.1], [1.0, 1.0], [0.0, 1.0], [-1.0, 0.0]])
    assert rank(database, torch.tensor([[0.0, 2.0], [9.0, 0.0]])).T.tolist() == [
        [0, 3, 2, 1, 4],
        [1, 2, 0, 3, 4],
    ]


# ---- features ----


def test_scales_have_the_official_sizes_and_sample_by_the_scale_itself():
    ramp = torch.arange(512.0).expand(1, 3, 341, 512)
    small, smaller = resize(ramp, 2**-0.5), resize(ramp, 0.5)
    assert small.shape[2:] == (241, 362)
    assert smaller.shape[2:] == (170, 256)
    centres = (torch.arange(362.0) + 0.5) * 2**0.5 - 0.5  # of the pixels of `small`, in `ramp`
    torch.testing.assert_close(small[0, 0, 0], centres.clamp(0, 511), atol=1e-3, rtol=0)


def test_multi_scale_features_are_the_mean_of_three_scales_normalised_row_by_row(vit):
    images = torch.randn(2, 3, 64, 56, generator=torch.Generator().manual_seed(0))
    rows = multi_scale_features(vit, images)
    for image, row in zip(images, rows, strict=True):
        # 64 x 56, 45 x 39 cut to 40 x 32, 32 x 28 cut to 32 x 24
        scales = [image[None], resize(image[None], 2**-0.5)[..., :40, :32]]
        scales.append(resize(image[None], 0.5)[..., :32, :24])
        mean = sum(vit(scale)[0] for scale in scales) / 3
        torch.testing.assert_close(row, mean / mean.norm())
        torch.testing.assert_close(utils.multi_scale(image[None], vit)[0], row)


def test_what_fills_no_patch_is_cut_at_the_bottom_and_on_the_right(vit):
    images = torch.randn(1, 3, 45, 39)
    torch.testing.assert_close(features(vit, images), vit(images[..., :40, :32]))


def test_a_resnet_50_has_2048_features_of_images_of_any_size():
    backbone, _ = build_backbone("resnet50", None)
    with torch.no_grad():
        found = features(backbone.eval(), torch.randn(1, 3, 45, 39))
    assert found.shape == (1, 2048)
    assert found.std() > 0


@pytest.mark.parametrize("sizes", [[(64, 64), (64, 48)], [(64, 48), (64, 64)]])
def test_a_network_of_one_image_size_is_refused(sizes):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8))
    images = RetrievalSet("own", ["a.jpg"], ["b.jpg"], sizes, [])
    with pytest.raises(UserError, match="linear does not take images of 24 x 32 pixels"):
        check_sizes(Pretrained(network, 8, "linear", 1), images, 64, smallest_scale=0.5)


def describe_sums(numbers, sizes):
    """Sums of "images" of these sizes that are filled with these numbers, and batches' shapes."""
    batches = []

    def describe(images):
        batches.append(tuple(images.shape))
        return images.sum(dim=(1, 2, 3))[:, None]

    def load(number):
        return torch.full((3, *sizes[number]), float(number))

    rows = describe_images(describe, numbers, load, sizes=sizes, batch_size=2)
    return rows, batches


SIZES = [(2, 3), (4, 4), (2, 3), (2, 3), (4, 4), (1, 1), (2, 3)]
SUMS = [[3.0 * height * width * number] for number, (height, width) in enumerate(SIZES)]


def test_only_images_of_equal_size_share_a_batch_and_rows_keep_their_order():
    rows, batches = describe_sums(range(7), SIZES)
    assert rows.tolist() == SUMS
    assert sorted(batches) == [(1, 3, 1, 1), (2, 3, 2, 3), (2, 3, 2, 3), (2, 3, 4, 4)]


def test_every_rank_gets_all_rows_in_order_also_of_fewer_images_than_ranks(tmp_path):
    second = tmp_path / "second"
    second.mkdir()
    for rank_rows, _ in run_processes(describe_sums, 2, tmp_path, range(7), SIZES):
        assert rank_rows.tolist() == SUMS
    for rank_rows, _ in run_processes(describe_sums, 2, second, range(1), SIZES[:1]):
        assert rank_rows.tolist() == SUMS[:1]
