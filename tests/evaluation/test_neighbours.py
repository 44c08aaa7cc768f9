# SPDX-License-Identifier: Apache-2.0
"""Nearest neighbours by way of half precision, in chunks and in groups, against all products."""

import pytest
import torch
import torch.nn.functional as F

from dino.evaluation import neighbours
from dino.evaluation.neighbours import nearest, search, top

FEW = (7, 900, 24)  # queries, keys, width
MANY = (40, 13000, 48)  # enough for a first look at k = 20


def unit_vectors(queries, keys, width, spread=1.0, seed=0):
    """Vectors around one direction: the wider the spread, the more their products differ."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(queries + keys, width, generator=draw)
    rows = torch.randn(width, generator=draw) + spread * rows
    return F.normalize(rows, dim=1).split([queries, keys])


def in_float64(queries, keys, k):
    return (queries.double() @ keys.double().T).topk(k, dim=1)


def assert_equals_float64(found, queries, keys, k):
    """Of D products in float32 the sum is off by 1e-6 at most, and so keys that are closer to each
    other than that may change places.
    """
    products, indices = found
    expected, _ = in_float64(queries, keys, k)
    scale = float(expected.abs().max())
    torch.testing.assert_close(products.double(), expected, rtol=0, atol=1e-6 * scale)
    own = (queries.double()[:, None] * keys.double()[indices]).sum(dim=2)
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-6 * scale)
    assert all(len(row.unique()) == k for row in indices), "a key counts once"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_first_look_of_any_precision_finds_the_neighbours_of_float32(dtype):
    queries, keys = unit_vectors(*MANY)
    assert_equals_float64(nearest(queries, keys, 20, dtype), queries, keys, 20)


def test_half_precision_alone_would_find_others():
    queries, keys = unit_vectors(*MANY)
    _, expected = in_float64(queries, keys, 20)
    for dtype in (torch.bfloat16, torch.float16):
        _, rounded = search(queries, keys, 20, dtype)
        assert (rounded.sort().values != expected.sort().values).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_neighbours_that_half_precision_cannot_tell_apart_are_found(dtype):
    queries, keys = unit_vectors(*MANY, spread=0.003)
    assert (queries @ keys.T).min() > 0.999
    assert_equals_float64(nearest(queries, keys, 20, dtype), queries, keys, 20)


@pytest.mark.cuda
@pytest.mark.parametrize("spread", [1.0, 0.003])
def test_a_gpu_finds_the_neighbours_of_float32_by_way_of_float16(spread):
    queries, keys = unit_vectors(*MANY, spread=spread)
    found = nearest(queries.cuda(), keys.cuda(), 20)
    assert_equals_float64([part.cpu() for part in found], queries, keys, 20)


def test_vectors_too_long_or_too_short_for_float16():
    for length in (1e6, 1e-6):
        queries, keys = (length * rows for rows in unit_vectors(*MANY))
        lengths = torch.linspace(0.5, 1, len(keys))[:, None]
        keys = keys * lengths
        assert_equals_float64(nearest(queries, keys, 20, torch.float16), queries, keys, 20)


def test_vectors_stored_in_half_precision_are_taken_as_they_are():
    queries, keys = (rows.half() for rows in unit_vectors(*MANY))
    assert_equals_float64(nearest(queries, keys, 20), queries, keys, 20)


def test_chunks_change_nothing(monkeypatch):
    queries, keys = unit_vectors(*MANY)
    whole = nearest(queries, keys, 20, torch.bfloat16)
    monkeypatch.setitem(neighbours.CHUNK_BYTES, "cpu", 4 * 7 * 62 * 48)  # seven queries at a time
    monkeypatch.setattr(neighbours, "KEYS_AT_A_TIME", 333)  # the last part has 13
    for dtype in (torch.bfloat16, torch.float32):
        assert_equals_float64(nearest(queries, keys, 20, dtype), queries, keys, 20)
        torch.testing.assert_close(nearest(queries, keys, 20, dtype)[1], whole[1])


def test_as_many_neighbours_as_keys_and_no_queries():
    queries, keys = unit_vectors(*FEW)
    assert_equals_float64(nearest(queries, keys, 900), queries, keys, 900)
    assert [found.shape for found in nearest(queries[:0], keys, 5)] == [(0, 5), (0, 5)]


@pytest.mark.parametrize("columns", [1000, 1001, 1023])
def test_groups_hold_the_largest_values(columns):
    products = torch.randn(30, columns, generator=torch.Generator().manual_seed(0))
    products[::2] = products[::2].round(decimals=1)  # with many that are equal
    values, indices = top(products, 10)
    torch.testing.assert_close(values, products.gather(1, indices), rtol=0, atol=0)
    expected = products.topk(10, dim=1).values
    torch.testing.assert_close(values.sort(descending=True).values, expected, rtol=0, atol=0)
    assert all(len(row.unique()) == 10 for row in indices)
