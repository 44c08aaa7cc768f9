# SPDX-License-Identifier: Apache-2.0
"""Neighbours in a file of features are those of all its rows at once."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dino.errors import UserError
from dino.evaluation import neighbour_pictures
from dino.evaluation.neighbour_pictures import (
    Panel,
    draw_neighbours,
    nearest_rows,
    neighbour_panel,
    spread_rows,
    without_self,
)
from dino.printable import printable


def test_neighbours_by_parts_are_those_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(neighbour_pictures, "ROWS_AT_A_TIME", 64)
    generator = torch.Generator().manual_seed(0)
    features = 10 * torch.randn(300, 8, generator=generator)
    features[70] = torch.nan
    features[128:192] = torch.inf
    np.save(tmp_path / "features.npy", features.numpy())
    queries = torch.randn(5, 8, generator=generator)
    found, rows = nearest_rows(queries, np.load(tmp_path / "features.npy", mmap_mode="r"), 7)
    cosines = F.cosine_similarity(queries[:, None], features[None], dim=2).nan_to_num(-2.0)
    expected, expected_rows = cosines.topk(7)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.equal(rows, expected_rows)
    assert nearest_rows(queries, features.numpy()[60:70], 20)[0].shape == (5, 10)
    with pytest.raises(UserError, match="no image has features"):
        nearest_rows(queries, features.numpy()[130:140], 3)


def test_a_query_is_not_its_own_neighbour():
    rows = torch.tensor([[3, 1, 2], [0, 4, 5], [8, 9, 7]])
    products = torch.tensor([[1.0, 0.9, 0.8], [1.0, 1.0, 0.5], [1.0, 1.0, 1.0]])
    found = without_self(products, rows, torch.tensor([3, 4, 6]))  # 6 has three copies before it
    assert found[1].tolist() == [[1, 2], [0, 5], [8, 9]]
    assert torch.equal(found[0], torch.tensor([[0.9, 0.8], [1.0, 0.5], [1.0, 1.0]]))


def test_spread_rows_pass_over_those_without_features():
    features = np.zeros((10, 2), np.float32)
    features[5] = np.nan
    assert spread_rows(features, 4) == [0, 2, 7]
    assert spread_rows(features[:3], 8) == [0, 1, 2]


@pytest.mark.parametrize(
    "name", [b"\xff\xfe".decode("utf-8", "surrogateescape"), "v$x^$", "\x1b[2J"]
)
def test_class_names_of_any_characters_are_drawn_as_they_are_printed(name):
    image = Image.new("RGB", (8, 8))
    sheet = [[Panel(image, name), neighbour_panel(image, 0.5, name, name)]]
    figure = draw_neighbours(sheet, f"{name}.npz")
    figure.canvas.draw()
    assert figure.axes[0].get_title() == printable(name)
    assert figure.axes[1].get_title() == f"0.500\n{printable(name)}"
    plt.close(figure)
