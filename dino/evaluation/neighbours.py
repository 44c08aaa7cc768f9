# SPDX-License-Identifier: Apache-2.0
"""Exact nearest neighbours by dot product, at the speed of half precision where there is one.

m queries, n keys, D their width, k neighbours, c > k candidates. Nothing of size m x n exists.
"""

import contextlib
import math

import torch

from dino.precision import has_fast_bfloat16

# Of dot products, or of candidates, at a time. What stays in a processor's cache is read for free;
# a GPU wants long kernels.
CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**30}
KEYS_AT_A_TIME = 2**17  # long rows keep a matrix product busy
ROUNDED_AT_A_TIME = 2**12  # their float32 intermediates fit into a cache
# Take a half-precision first pass only with at least this many keys per candidate: with fewer,
# gathering candidates (0.6 ms a query for 332 of 384 dimensions, on a core) costs more than the
# pass saves (9 ns a key).
WORTHWHILE = 200


@torch.no_grad()
def nearest(queries, keys, k, dtype=None):
    """The k keys with the largest dot product for each query: (products, indices), each (m, k).

    Products are float32, the largest first. `dtype` is that of a first look, by default the fastest
    of the device: it finds c candidates, whose products are then taken in float32. A query for
    which the rounding of the first look can have hidden a neighbour (there is a bound for it) is
    looked up in float32 wholly. So the result is that of float32, up to the order of keys whose
    products are equal in float32.
    """
    dtype = dtype or fast_dtype(keys.device)
    count = k + k // 2 + 32
    if dtype == torch.float32 or len(keys) < WORTHWHILE * count:
        return search(queries, keys, k, torch.float32)
    scale, rounded_keys, keys_error = round_keys(keys, dtype)
    found = []
    for chunk in queries.split(rows_at_a_time(4 * count * keys.shape[1], keys.device)):
        norm, rounded, error = round_off(chunk, chunk.float().norm(dim=1), dtype)
        with float32_sums():
            first_look, candidates = search(rounded, rounded_keys, count, dtype)
        products, indices = rank(chunk, keys, candidates, k)
        error = error + (1 + error) * keys_error + keys.shape[1] * torch.finfo(torch.float32).eps
        hidden = upper_bound(first_look[:, -1], error) * norm * scale
        unsure = products[:, -1] < hidden
        if unsure.any():
            found_again = search(chunk[unsure], keys, k, torch.float32)
            products[unsure], indices[unsure] = found_again
        found.append((products, indices))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def fast_dtype(device):
    """The type of the fastest matrix product: float16, bfloat16 or float32.

    On a GPU float16, whose rounding is an eighth of bfloat16's. Processors with instructions for
    bfloat16 take a fifth of float32's time (350 GFLOP/s to 70, measured on a core of an AMD EPYC
    9005); without them it is slower than float32, and so is float16 on any of them.
    """
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if has_fast_bfloat16() else torch.float32


def rows_at_a_time(bytes_per_row, device):
    return max(1, CHUNK_BYTES[device.type] // bytes_per_row)


def round_keys(keys, dtype):
    """(their largest norm, the keys divided by it in `dtype`, the largest error of one of them)."""
    scale = keys.float().norm(dim=1).max()
    rounded, errors = torch.empty_like(keys, dtype=dtype), []
    for start in range(0, len(keys), ROUNDED_AT_A_TIME):
        part = slice(start, start + ROUNDED_AT_A_TIME)
        _, rounded[part], error = round_off(keys[part], scale.expand(len(keys[part])), dtype)
        errors.append(error.max())
    return scale, rounded, torch.stack(errors).max()


def round_off(rows, norms, dtype):
    """(norms, rows / norms in `dtype`, the norm of the rounding error of each of these)."""
    norms = norms.clamp_min(torch.finfo(torch.float32).tiny)
    unit = rows.float() / norms[:, None]
    rounded = unit.to(dtype)
    return norms, rounded, (unit - rounded.float()).norm(dim=1)


def upper_bound(product, error):
    """Upper bound on an exact dot product whose half-precision value is at most `product`.

    a b - a' b' = (a - a') b + a' (b - b'), which by Cauchy-Schwarz is at most the `error` of the
    rounded inputs and of the float32 sum; and then the result is rounded.
    """
    half_a_step = torch.finfo(product.dtype).eps / 2
    product = product.float()
    return product + half_a_step * product.abs() + error


@contextlib.contextmanager
def float32_sums():
    """cuBLAS adds up the products of float16 numbers in float32 only, as `upper_bound` assumes."""
    settings, name = torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"
    before = getattr(settings, name)
    setattr(settings, name, False)
    try:
        yield
    finally:
        setattr(settings, name, before)


def search(queries, keys, k, dtype):
    """The k largest dot products, in `dtype`, largest first: (products, indices), each (m, k)."""
    rows = rows_at_a_time(dtype.itemsize * min(len(keys), KEYS_AT_A_TIME), keys.device)
    found = []
    for chunk in queries.to(dtype).split(rows):
        parts = [
            top(chunk @ part.to(dtype).T, min(k, len(part))) for part in keys.split(KEYS_AT_A_TIME)
        ]
        products = torch.cat([values for values, _ in parts], dim=1)
        indices = torch.cat(
            [columns + i * KEYS_AT_A_TIME for i, (_, columns) in enumerate(parts)], dim=1
        )
        products, order = products.topk(k, dim=1)
        found.append((products, indices.gather(1, order)))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def top(products, k):
    """topk of each row, in any order: the k columns with the largest values, (values, columns).

    They are in the k groups of columns with the largest maxima: a column of another group has k
    maxima above it. Two short selections take the place of a long one, which on a CPU costs as
    much as the matrix product.
    """
    columns = products.shape[1]
    size = math.isqrt(columns // k)  # which makes both selections equally long
    if size < 4:
        return products.topk(k, dim=1, sorted=False)
    groups = columns // size
    grouped = products[:, : size * groups].unflatten(1, (size, groups))  # strided, for the maximum
    best = grouped.amax(dim=1).topk(k, dim=1, sorted=False).indices
    members = best[:, None] + groups * torch.arange(size, device=best.device)[:, None]
    rest = torch.arange(size * groups, columns, device=best.device).expand(len(best), -1)
    candidates = torch.cat([members.flatten(1), rest], dim=1)
    values, order = products.gather(1, candidates).topk(k, dim=1, sorted=False)
    return values, candidates.gather(1, order)


def rank(queries, keys, candidates, k):
    """The k best of each query's candidates (m, c), in float32: (products, indices)."""
    products = torch.bmm(keys[candidates].float(), queries.float()[:, :, None])[:, :, 0]
    products, order = products.topk(k, dim=1)
    return products, candidates.gather(1, order)
