# SPDX-License-Identifier: Apache-2.0
"""Measures of features without labels, against their definitions and on networks known."""

import math

import numpy as np
import pytest
import torch
from conftest import photograph, run_processes
from torch import nn

from dino.data.augmentations import DataAugmentationDINO
from dino.evaluation import without_labels
from dino.evaluation.without_labels import SampleProbe, alignment, rank_me, uniformity


def unit_rows(n, width, seed=0):
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(rows, dim=1)


def test_rank_me_is_the_exponential_of_the_entropy_of_the_singular_values():
    features = unit_rows(60, 12) * torch.linspace(0.1, 3, 12)
    values = np.sqrt(np.linalg.eigvalsh(features.double().numpy().T @ features.double().numpy()))
    shares = values / values.sum()
    expected = math.exp(-(shares * np.log(shares)).sum())
    assert rank_me(features) == pytest.approx(expected, rel=1e-9)
    assert rank_me(torch.eye(7)) == pytest.approx(7), "all directions alike"
    assert rank_me(torch.ones(7, 5)) == pytest.approx(1, abs=1e-6), "one direction"
    assert rank_me(torch.zeros(7, 5)) == 1, "none at all"
    assert math.isnan(rank_me(torch.full((7, 5), math.inf)))


def test_alignment_and_uniformity_are_those_of_wang_and_isola():
    first, second = unit_rows(40, 8, seed=1), unit_rows(40, 8, seed=2)
    distances = [np.linalg.norm(a - b) ** 2 for a, b in zip(first, second, strict=True)]
    assert alignment(first, second) == pytest.approx(np.mean(distances), rel=1e-6)
    rows = first.double().numpy()
    pairs = [math.exp(-2 * np.sum((rows[i] - rows[j]) ** 2)) for i in range(40) for j in range(i)]
    assert uniformity(first) == pytest.approx(math.log(np.mean(pairs)), rel=1e-6)
    assert uniformity(torch.ones(5, 3)) == 0


PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "cat.png")


def some_images():
    return [photograph(name).resize((64, 48)) for name in PHOTOGRAPHS[:4]] * 3


def probe_of(images):
    augmentation = DataAugmentationDINO((0.4, 1), (0.05, 0.4), 2, 32, 16)
    return SampleProbe(
        *(images, augmentation, torch.device("cpu")),
        **dict(seed=0, skip_bad=False, batch_size=2, num_workers=0),
    )


def random_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 16))


def measures():
    network = random_network().train()
    return probe_of(some_images()).measure(network), network.training


def test_a_sample_gives_the_same_measures_again_and_leaves_the_network_as_it_was():
    state = torch.get_rng_state()
    (first, training), (second, _) = measures(), measures()
    assert first == second
    assert training
    assert 1 < first["rank_me"] <= 12
    assert 0 < first["alignment"] < 4 and first["uniformity"] < 0
    torch.set_rng_state(state)


class Counted(list):
    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


@pytest.mark.parametrize(("kept", "reads"), [(without_labels.KEPT, 12), (0, 24)])
def test_a_sample_of_small_views_is_read_once(monkeypatch, kept, reads):
    monkeypatch.setattr(without_labels, "KEPT", kept)
    images = Counted(some_images())
    probe, network = probe_of(images), random_network()
    assert probe.measure(network) == probe.measure(network)
    assert images.reads == reads


def measured():
    return measures()[0]


def test_two_processes_measure_what_one_measures(tmp_path):
    for found in run_processes(measured, 2, tmp_path):
        assert found == pytest.approx(measured(), rel=1e-5)
