# SPDX-License-Identifier: Apache-2.0
"""Top-5 of a data set with fewer than 1,000 classes, beside the official rule typed out."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import run_script

from dino.evaluation.knn import knn_accuracies, knn_classifier

OFFICIAL_CLASSES = 1000  # the official function's default, whatever the data set has


def official_rule(train, train_labels, test, test_labels, k, temperature):
    """Votes of 1,000 classes, sorted with those without one last; the first min(5, k) count."""
    hits = [0, 0]
    for feature, label in zip(test, test_labels.tolist(), strict=True):
        cosines = (train @ feature).tolist()
        nearest = sorted(range(len(train)), key=lambda i: -cosines[i])[:k]
        votes = [0.0] * OFFICIAL_CLASSES
        for i in nearest:
            votes[int(train_labels[i])] += math.exp(cosines[i] / temperature)
        # 990 of these are not classes of the data: one without a vote is hardly ever the right one
        ranking = [c for c in sorted(range(OFFICIAL_CLASSES), key=lambda c: -votes[c]) if votes[c]]
        hits[0] += ranking[0] == label
        hits[1] += label in ranking[: min(5, k)]
    return [100 * count / len(test) for count in hits]


def noisy_classes(count, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(classes, 16, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % classes
    noise = torch.randn(count, 16, generator=generator)
    return F.normalize(directions[labels] + 2.5 * noise, dim=1), labels


@pytest.mark.parametrize("k", [3, 5, 10, 20])
def test_top_5_of_ten_classes_is_the_official_one(k):
    train, test = noisy_classes(200, 10, seed=0), noisy_classes(101, 10, seed=1)
    expected = official_rule(*train, *test, k, 0.07)
    found = knn_accuracies(*train, *test, [k], 0.07, 10)[k]
    assert found == pytest.approx(expected)
    assert 20 < expected[0] < expected[1] < 97, "the comparison can fail"


def test_a_class_without_a_vote_is_a_hit_of_the_official_interface_alone():
    """Of ten classes and three neighbours the official sort gives two places to the lowest ones."""
    train, test = noisy_classes(200, 10, seed=0), noisy_classes(101, 10, seed=1)
    with_votes = knn_accuracies(*train, *test, [5], 0.07, 10)[5][1]
    filled_up = knn_classifier(*train, *test, 5, 0.07, num_classes=10)[1]
    assert filled_up > with_votes + 2


def test_the_script_prints_the_official_figures(tmp_path):
    train, test = noisy_classes(200, 10, seed=0), noisy_classes(101, 10, seed=1)
    names = ("trainfeat", "trainlabels", "testfeat", "testlabels")
    for name, tensor in zip(names, (*train, *test), strict=True):
        torch.save(tensor, tmp_path / f"{name}.pth")
    command = ("eval_knn.py", "--load_features", tmp_path, "--device", "cpu")
    said = run_script(*command, "--nb_knn", 3, 5, 10, 20).stdout
    for k in (3, 5, 10, 20):
        top1, top5 = official_rule(*train, *test, k, 0.07)
        assert f"{k}-NN classifier result: Top1: {top1:.2f}, Top5: {top5:.2f}\n" in said
