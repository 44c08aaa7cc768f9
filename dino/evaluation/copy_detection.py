# SPDX-License-Identifier: Apache-2.0
"""Copy detection on Copydays (Sec. 4.2, Douze et al. 2009).

m queries, n database images (the originals first, then distractors), B images of a batch, N patch
tokens, D width of a token.
"""

import numpy as np
import torch
import torch.nn.functional as F

from dino.data.copydays import load_image, positives
from dino.distributed import print0
from dino.evaluation.features import whole_patches
from dino.evaluation.neighbours import nearest
from dino.evaluation.retrieval import average_precision

__all__ = [
    "PCA",
    "TOP",
    "descriptor",
    "gem",
    "load_image",
    "mean_average_precision",
    "micro_average_precision",
    "positives",
    "score_blocks",
    "search",
    "whiten",
]

TOP = 20  # results of a query that count
GEM_POWER, GEM_FLOOR = 4, 1e-6
SMALLEST_EIGENVALUE = 1e-5  # share of the largest, to which smaller ones are raised


# ---- descriptors ----


def descriptor(model, images):
    """[CLS] of a ViT's last block beside the pooled patch tokens: (B, 3, H, W) -> (B, 2D)."""
    tokens = model.get_intermediate_layers(whole_patches(model, images), 1)[0].float()
    return torch.cat([tokens[:, 0], gem(tokens[:, 1:])], dim=1)


def gem(tokens):
    """Generalised mean over the tokens, (B, N, D) -> (B, D). Negative values count as zero."""
    return tokens.clamp(min=GEM_FLOOR).pow(GEM_POWER).mean(dim=1).pow(1 / GEM_POWER)


class PCA:
    """Projection on the eigenvectors of a covariance matrix, scaled by eigenvalue ** -whit.

    The official interface: `train_pca(cov)`, then `apply(x)`; `mean`, if it is set, is subtracted
    first. All arithmetic is in float64.
    """

    def __init__(self, dim=256, whit=0.5):
        self.dim, self.whit, self.mean = dim, whit, None

    def train_pca(self, cov):
        """Take the `dim` largest eigenvalues of `cov` (D, D), and print their share of the sum."""
        eigenvalues, vectors = np.linalg.eigh(np.asarray(cov, dtype=np.float64))
        eigenvalues = eigenvalues.clip(min=SMALLEST_EIGENVALUE * eigenvalues.max())
        largest = np.argsort(eigenvalues)[::-1][: self.dim]
        energy = eigenvalues[largest].sum() / eigenvalues.sum()
        print0(f"keeping {100 * energy:.2f} % of the energy")
        self.dvt = vectors[:, largest].T / eigenvalues[largest, None] ** self.whit  # (dim, D)

    def apply(self, x):
        """(n, D) -> (n, dim), of the kind of `x`: a numpy array, or a tensor on its device."""
        if isinstance(x, torch.Tensor):
            return torch.from_numpy(self.apply(x.double().cpu().numpy())).to(x)
        x = np.asarray(x, dtype=np.float64)
        return (x if self.mean is None else x - self.mean) @ self.dvt.T


def whiten(database, queries, learned_on):
    """The descriptors (n, 2D) and (m, 2D), whitened as in the official code, not normalised.

    The mean of `learned_on` is subtracted from both, but the matrix whose eigenvectors serve is
    that of its second moments around zero, not around the mean: a slip of the official code that
    the published numbers were made with. All 2D dimensions are kept. Warns of fewer images than
    dimensions.
    """
    images, dimensions = learned_on.shape
    if images < dimensions:
        print0(
            f"Warning: --whitening_path holds {images} images, fewer than a descriptor's"
            f" {dimensions} dimensions, so the scores depend on which these are. The authors took"
            " 20,000."
        )
    learned_on = learned_on.double()
    pca = PCA(dim=learned_on.shape[1], whit=0.5)
    pca.train_pca((learned_on.T @ learned_on / len(learned_on)).cpu().numpy())
    pca.mean = learned_on.mean(dim=0).cpu().numpy()
    return pca.apply(database), pca.apply(queries)


def search(queries, database, k=TOP):
    """(cosines, indices), each (m, k): the k nearest database images of each query.

    All n of a smaller database, where the official code fails.
    """
    queries, database = F.normalize(queries, dim=1), F.normalize(database, dim=1)
    return nearest(queries, database, min(k, len(database)))


# ---- scores ----


def score_blocks(copydays, distractors, learned_on, describe):
    """{block: `scores_of` it} of a Copydays; under "copies" all blocks but `original` together.

    `describe(paths, title=...)` gives descriptors (n, 2D); each image is described once.
    `distractors` are paths to search beside the originals, `learned_on` paths to learn a whitening
    on; either may be empty.
    """
    queries = describe([path for paths in copydays.blocks.values() for path in paths])
    originals = len(copydays.blocks["original"])  # the first block
    database = queries[:originals]
    if distractors:
        database = torch.cat([database, describe(distractors, title="distractors")])
    if learned_on:
        learned_on = describe(learned_on, title="whitening set")
        database, queries = whiten(database, queries, learned_on)
    similarities, retrieved = search(queries, database)
    wanted = [row for rows in copydays.positives.values() for row in rows]
    scores, end = {}, 0
    for block, paths in copydays.blocks.items():
        start, end = end, end + len(paths)
        part = slice(start, end)
        scores[block] = scores_of(similarities[part], retrieved[part], wanted[part])
    part = slice(originals, None)
    scores["copies"] = scores_of(similarities[part], retrieved[part], wanted[part])
    return scores


def scores_of(similarities, retrieved, positives):
    """{"images", "mAP", "micro-AP"} of queries; the scores are from 0 to 1."""
    return {
        "images": len(positives),
        "mAP": mean_average_precision(retrieved, positives),
        "micro-AP": micro_average_precision(similarities, retrieved, positives),
    }


def mean_average_precision(retrieved, positives):
    """Mean over the queries of the average precision of what was `retrieved`, (m, k) indices.

    `positives`: the indices of each query's originals, at least one. An original beyond the k
    results adds nothing.
    """
    aps = [
        average_precision(np.flatnonzero(np.isin(row, wanted)), len(wanted))
        for row, wanted in zip(np.asarray(retrieved), positives, strict=True)
    ]
    return float(np.mean(aps))


def micro_average_precision(similarities, retrieved, positives):
    """Average precision of the results of all queries in one ranking by similarity, each (m, k).

    Unlike mAP it needs one threshold for all queries: it falls where a wrong result of one query
    is more similar than a right result of another. The official code lacks it; the definition is
    that of the Image Similarity Challenge 2021: the sum of the precision at each right result,
    divided by the number of originals to be found.
    """
    right = np.array(
        [np.isin(row, wanted) for row, wanted in zip(np.asarray(retrieved), positives, strict=True)]
    )
    order = np.argsort(-np.asarray(similarities), axis=None, kind="stable")
    right = right.reshape(-1)[order]
    precision = right.cumsum() / np.arange(1, len(right) + 1)
    return float(precision[right].sum() / sum(map(len, positives)))
