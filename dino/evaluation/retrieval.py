# SPDX-License-Identifier: Apache-2.0
"""Image retrieval on revisited Oxford and Paris (Sec. 4.2, Radenovic et al. 2018).

n database images, m queries, B images of a batch, D width of the features. A ranking is an (n, m)
array of indices into the database, nearest first. Places in it count from 0.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from dino.backbones import first_of
from dino.data.retrieval_set import load_image, read_ground_truth
from dino.errors import UserError
from dino.evaluation.features import describe_images, patch_size_of, whole_patches
from dino.printable import printable

__all__ = [
    "DIFFICULTIES",
    "SCALES",
    "average_precision",
    "compute_ap",
    "compute_map",
    "features",
    "load_image",
    "mean_average_precision",
    "multi_scale",
    "multi_scale_features",
    "protocol",
    "rank",
    "read_ground_truth",
    "score",
    "set_features",
]

SCALES = (1, 2**-0.5, 0.5)  # of the image, for the multi-scale features

# Which images are positive and which are left out of the ranking. The official script reports
# medium and hard; the benchmark has all three.
DIFFICULTIES = {
    "easy": {"ok": ["easy"], "junk": ["junk", "hard"]},
    "medium": {"ok": ["easy", "hard"], "junk": ["junk"]},
    "hard": {"ok": ["hard"], "junk": ["junk", "easy"]},
}


# ---- features ----


def set_features(pretrained, images, imsize, multiscale, *, device, **options):
    """Features of the database (n, D) and the queries (m, D) of a RetrievalSet.

    `options` are those of describe_images. UserError for an image that the network does not take.
    """
    check_sizes(pretrained, images, imsize, min(SCALES) if multiscale else 1)
    rows = describe_images(
        partial(multi_scale_features if multiscale else features, pretrained.backbone.to(device)),
        images.paths,
        partial(load_image, imsize=imsize, mean=pretrained.mean, std=pretrained.std),
        sizes=images.sizes,
        device=device,
        **options,
    )
    return rows.split([len(images.database), len(images.queries)])


@torch.no_grad()
def check_sizes(pretrained, images, imsize, smallest_scale):
    """Raise UserError for an image that holds no patch at the smallest scale.

    And for a network, such as many of timm's, that takes images of one size only: it refuses one of
    two shapes.
    """
    patch_size, shapes = patch_size_of(pretrained.backbone), {}
    for path, (width, height) in zip(images.paths, images.sizes, strict=True):
        scale = min(1, imsize / max(width, height))  # to which it is shrunk, not below a pixel
        sides = (max(1, side * scale) for side in (height, width))
        shape = tuple(int(side * smallest_scale + 1e-6) for side in sides)
        if min(shape) < patch_size:
            raise UserError(
                f"{printable(path)}: its {width} x {height} pixels do not hold a patch of"
                f" {patch_size} x {patch_size} at --imsize {imsize} and the scale {smallest_scale}."
                " Raise --imsize if that makes it larger, or take the image out of the set."
            )
        shapes[shape] = None
    for shape in list(shapes)[:2]:
        try:
            features(pretrained.backbone, torch.zeros(1, 3, *shape))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise UserError(
                f"{pretrained.arch} does not take images of {shape[0]} x {shape[1]} pixels: {error}"
            ) from None


def features(model, images):
    """The output of `model`, for a ViT [CLS]: (B, 3, H, W) -> (B, D), not normalised.

    Sides need not be multiples of the patch size: see whole_patches.
    """
    return first_of(model(whole_patches(model, images))).float()


def multi_scale_features(model, images):
    """Mean of the features at three scales, each row of length 1: (B, 3, H, W) -> (B, D).

    The official code divides a whole batch by one norm, which is right for one image at a time.
    """
    total = sum(features(model, resize(images, scale)) for scale in SCALES)
    return F.normalize(total / len(SCALES), dim=1)


def resize(images, scale):
    """Bilinear, not antialiased, sampled by the scale itself and not by the rounded sizes."""
    if scale == 1:
        return images
    return F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)


def rank(database, queries):
    """The ranking (n, m) by cosine of features (n, D) and (m, D); ties in the order of indices."""
    similarities = F.normalize(database, dim=1) @ F.normalize(queries, dim=1).T
    return similarities.argsort(dim=0, descending=True, stable=True).cpu().numpy()


# ---- scores ----


def score(ranks, gnd, ks):
    """{difficulty: mean_average_precision} of a ranking (n, m), by the lists of `gnd`."""
    return {
        difficulty: mean_average_precision(ranks, protocol(gnd, difficulty), ks)
        for difficulty in DIFFICULTIES
    }


def protocol(gnd, difficulty):
    """[{"ok", "junk"}], the indices that count as right and those left out, for each query.

    `gnd` has lists `easy`, `hard` and `junk` for each query; `difficulty` is a key of DIFFICULTIES.
    """
    return [
        {
            role: np.array([i for label in labels for i in entry.get(label, [])], dtype=int)
            for role, labels in DIFFICULTIES[difficulty].items()
        }
        for entry in gnd
    ]


def average_precision(ranks, num_positives):
    """Area under the precision-recall curve by trapezoids, of one query.

    `ranks` are the places of the positives that were found, ascending; `num_positives` counts those
    that were not as well. A single positive at the second place gives (0 + 1/2) / 2 = 0.25.
    """
    ranks = np.asarray(ranks, dtype=float)
    found = np.arange(len(ranks))  # positives before each
    before = np.divide(found, ranks, out=np.ones(len(ranks)), where=ranks > 0)
    after = (found + 1) / (ranks + 1)
    return float(((before + after) / 2).sum() / num_positives)


def mean_average_precision(ranks, ground_truth, ks=()):
    """(mAP, AP (m,), mean P@k (len(ks),), P@k (m, len(ks))) of a ranking (n, m).

    `ground_truth`: {"ok", "junk"} for each query. Junk, which may be absent, is removed from the
    ranking before places are counted. A query without positives has nan and is left out of the
    means, which are nan if no query has any. P@k looks no further than the last positive found, as
    in the benchmark: positives at the first and third place give P@5 = 2/3.
    """
    aps = np.full(len(ground_truth), np.nan)
    precisions = np.full((len(ground_truth), len(ks)), np.nan)
    for query, wanted in enumerate(ground_truth):
        if len(wanted["ok"]) == 0:
            continue
        places = np.flatnonzero(np.isin(ranks[:, query], wanted["ok"]))
        junk = np.flatnonzero(np.isin(ranks[:, query], wanted.get("junk", [])))
        places = places - np.searchsorted(junk, places)
        aps[query] = average_precision(places, len(wanted["ok"]))
        for column, k in enumerate(ks):
            last = min(places[-1] + 1, k) if len(places) else k
            precisions[query, column] = (places < last).sum() / last
    counted = ~np.isnan(aps)
    if not counted.any():
        return np.nan, aps, np.full(len(ks), np.nan), precisions
    return aps[counted].mean(), aps, precisions[counted].mean(axis=0), precisions


# ---- the official names, importable from utils ----


def compute_ap(ranks, nres):
    """Official interface: see average_precision."""
    return average_precision(ranks, nres)


def compute_map(ranks, gnd, kappas=()):
    """Official interface: see mean_average_precision."""
    return mean_average_precision(ranks, gnd, kappas)


def multi_scale(samples, model):
    """Official interface: see multi_scale_features, which equals it for one image."""
    return multi_scale_features(model, samples)
