# SPDX-License-Identifier: Apache-2.0
"""Copy detection: descriptors, whitening, search and scores by their definitions, typed out."""

import numpy as np
import pytest
import torch

import utils
from dino.data.copydays import Copydays
from dino.evaluation.copy_detection import (
    PCA,
    descriptor,
    gem,
    mean_average_precision,
    micro_average_precision,
    score_blocks,
    search,
    whiten,
)
from vision_transformer import vit_nano

RNG = np.random.default_rng(0)


def random_rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- descriptors ----


def test_gem_is_the_fourth_root_of_the_mean_fourth_power_of_positive_values():
    tokens = random_rows(2, 5, 3)
    for row, image in zip(gem(tokens), tokens.tolist(), strict=True):
        for d in range(3):
            powers = [max(token[d], 1e-6) ** 4 for token in image]
            assert row[d].item() == pytest.approx((sum(powers) / 5) ** 0.25, rel=1e-5)


def test_a_descriptor_is_the_class_token_beside_the_pooled_patches():
    torch.manual_seed(0)
    vit = vit_nano(8, img_size=32).eval().requires_grad_(False)
    images = torch.randn(2, 3, 37, 50)  # cut to 32 x 48: 24 patches
    found = descriptor(vit, images)
    assert found.shape == (2, 192)
    torch.testing.assert_close(found[:, :96], vit(images[..., :32, :48]))
    patches = vit.get_intermediate_layers(images[..., :32, :48], 1)[0][:, 1:]
    assert patches.shape == (2, 24, 96)
    torch.testing.assert_close(found[:, 96:], gem(patches))


# ---- whitening ----


def test_similarities_of_whitened_descriptors_are_those_of_the_inverse_second_moments():
    learned_on = random_rows(200, 6) @ random_rows(6, 6, seed=1) + 2
    database, queries = random_rows(9, 6, seed=2), random_rows(4, 6, seed=3)
    before = [rows.clone() for rows in (database, queries, learned_on)]
    whitened = whiten(database, queries, learned_on)
    moments = (learned_on.T @ learned_on / 200).double().numpy()  # around zero, not the mean
    mean = learned_on.mean(dim=0).numpy()
    expected = (database.numpy() - mean) @ np.linalg.inv(moments) @ (queries.numpy() - mean).T
    np.testing.assert_allclose(whitened[0] @ whitened[1].T, expected, atol=1e-4)
    for rows, kept in zip((database, queries, learned_on), before, strict=True):
        assert torch.equal(rows, kept)


@pytest.mark.parametrize(("images", "said"), [(7, True), (8, False)])
def test_a_whitening_of_fewer_images_than_dimensions_is_told(images, said, capsys):
    whiten(random_rows(2, 8), random_rows(2, 8), random_rows(images, 8))
    warning = "--whitening_path holds 7 images, fewer than a descriptor's 8 dimensions"
    assert (warning in capsys.readouterr().out) == said


def test_fewer_images_than_dimensions_have_their_small_eigenvalues_raised():
    learned_on = random_rows(3, 8)
    _, axes = np.linalg.eigh(learned_on.T.numpy() @ learned_on.numpy())
    unseen = torch.from_numpy(axes[:, :1].T)  # a direction that no image has
    largest = np.linalg.norm(learned_on, 2) ** 2 / 3
    whitened, _ = whiten(unseen + learned_on.mean(dim=0), unseen, learned_on)
    np.testing.assert_allclose(whitened.norm(), (1e-5 * largest) ** -0.5, rtol=1e-4)


def test_the_official_pca_keeps_the_largest_eigenvalues(capsys):
    pca = utils.PCA(dim=2, whit=0.5)
    assert isinstance(pca, PCA)
    pca.train_pca(np.diag([1.0, 9.0, 4.0, 2.0]))
    assert "81.25 % of the energy" in capsys.readouterr().out
    found = pca.apply(np.array([[5.0, 6.0, 7.0, 8.0]]))
    np.testing.assert_allclose(np.abs(found), [[6 / 3, 7 / 2]])
    pca.mean = np.array([5.0, 6.0, 7.0, 8.0])
    assert not pca.apply(torch.tensor([[5.0, 6.0, 7.0, 8.0]])).any()


# ---- search ----


def test_search_finds_the_most_similar_by_cosine():
    queries, database = random_rows(7, 5), random_rows(60, 5, seed=1)
    similarities, indices = search(queries, database)
    cosines = np.array(
        [[q @ d / np.linalg.norm(q) / np.linalg.norm(d) for d in database] for q in queries]
    )
    expected = np.argsort(-cosines, axis=1)[:, :20]
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_allclose(similarities, np.take_along_axis(cosines, expected, 1), atol=1e-6)


def test_a_database_of_fewer_than_twenty_images_is_searched_wholly():
    similarities, indices = search(random_rows(3, 5), random_rows(4, 5, seed=1))
    assert similarities.shape == (3, 4)
    assert indices.sort().values.tolist() == [[0, 1, 2, 3]] * 3


# ---- scores ----


def test_an_original_that_was_not_found_counts_in_the_denominator():
    retrieved = np.array([[0, 1, 2], [5, 6, 7], [9, 3, 4]])
    wanted = [[0], [8], [9, 50]]
    assert mean_average_precision(retrieved, wanted) == pytest.approx((1 + 0 + 1 / 2) / 3)


def micro_ap_by_definition(similarities, retrieved, positives):
    results = [
        (similarities[query][place], index in positives[query])
        for query, row in enumerate(retrieved)
        for place, index in enumerate(row)
    ]
    right, total = 0, 0.0
    for count, (_, is_right) in enumerate(sorted(results, key=lambda result: -result[0]), 1):
        right += is_right
        total += is_right * right / count
    return total / sum(map(len, positives))


def test_micro_ap_ranks_the_results_of_all_queries_together():
    similarities = -np.sort(-RNG.random((6, 20)))
    retrieved = np.stack([RNG.permutation(30)[:20] for _ in range(6)])
    positives = [RNG.permutation(30)[: RNG.integers(1, 4)].tolist() for _ in range(6)]
    found = micro_average_precision(similarities, retrieved, positives)
    assert found == pytest.approx(micro_ap_by_definition(similarities, retrieved, positives))
    # perfect by themselves, but no threshold fits both
    retrieved, positives = np.array([[0, 1], [2, 3]]), [[0], [2]]
    similarities = np.array([[0.9, 0.8], [0.5, 0.4]])
    assert mean_average_precision(retrieved, positives) == 1
    assert micro_average_precision(similarities, retrieved, positives) == pytest.approx(
        (1 + 2 / 3) / 2
    )


VECTORS = {
    **{f"original {i}": random_rows(8, seed=i) for i in range(3)},
    **{f"distractor {i}": random_rows(8, seed=10 + i) for i in range(4)},
    **{f"strong {i}": random_rows(8, seed=i) + random_rows(8, seed=20 + i) for i in range(3)},
    **{f"crop {i}": random_rows(8, seed=i) + 0.01 * random_rows(8, seed=30) for i in range(3)},
    **{f"learned on {i}": random_rows(8, seed=40 + i) for i in range(30)},
}


@pytest.mark.parametrize("whitening", [False, True])
def test_blocks_are_scored_against_originals_and_distractors_each_image_described_once(whitening):
    described = []

    def describe(paths, title=None):
        described.extend(paths)
        return torch.stack([VECTORS[path] for path in paths])

    def named(name):
        return [path for path in VECTORS if path.startswith(name)]

    blocks = {"original": named("original"), "strong": named("strong"), "crops/10": named("crop")}
    wanted = {block: [[0], [1], [2]] for block in blocks}
    learned_on = named("learned on") if whitening else []
    scores = score_blocks(Copydays(blocks, wanted), named("distractor"), learned_on, describe)
    assert sorted(described) == sorted(
        set(VECTORS) - (set() if learned_on else set(named("learned")))
    )
    assert list(scores) == ["original", "strong", "crops/10", "copies"]
    assert [scores[block]["images"] for block in scores] == [3, 3, 3, 6]
    database, strong, crops = (
        torch.stack([VECTORS[path] for path in paths])
        for paths in (named("original") + named("distractor"), blocks["strong"], blocks["crops/10"])
    )
    if whitening:
        rows = torch.stack([VECTORS[path] for path in learned_on])
        database, queries = whiten(database, torch.cat([strong, crops]), rows)
        strong, crops = queries.split(3)
    for block, rows in (
        ("strong", strong),
        ("crops/10", crops),
        ("copies", torch.cat([strong, crops])),
    ):
        found = search(rows, database)
        originals = [[0], [1], [2]] * (len(rows) // 3)
        assert scores[block]["mAP"] == mean_average_precision(found[1], originals)
        expected = micro_ap_by_definition(*(part.tolist() for part in found), originals)
        assert scores[block]["micro-AP"] == pytest.approx(expected)
    assert scores["original"]["mAP"] == 1
    assert scores["strong"]["mAP"] < scores["crops/10"]["mAP"]
