# SPDX-License-Identifier: Apache-2.0
"""J and F of segmented videos, as davis2017-evaluation computes them (semi-supervised task).

J is the similarity of regions, F that of boundaries (Perazzi et al. 2016, Sec. 4). Shapes: T frames
of H x W pixels; the first and the last frame are not scored.
"""

import csv
import math
import warnings

import numpy as np

from dino.atomic import replacing
from dino.printable import printable

BOUNDARY_TOLERANCE = 0.008  # of the frame's diagonal
COLUMNS = ("J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")


def jaccard(annotation, segmentation):
    """J: |A and S| / |A or S| of two bool (H, W); 1 where both are empty."""
    union = np.count_nonzero(annotation | segmentation)
    return np.count_nonzero(annotation & segmentation) / union if union else 1.0


def boundary_f(annotation, segmentation):
    """F: harmonic mean of the shares of each boundary that are near the other; two bool (H, W).

    1 where neither has a boundary, 0 where one has. The frame's edge is not a boundary, so that a
    mask that fills the frame has none.
    """
    boundaries = boundary(annotation), boundary(segmentation)
    some = [edge.any() for edge in boundaries]
    if not all(some):
        return 0.0 if any(some) else 1.0
    radius = math.ceil(BOUNDARY_TOLERANCE * math.hypot(*annotation.shape))
    edge, found = crop_to(boundaries[0] | boundaries[1], boundaries)
    precision = np.mean(near(edge, radius)[found])
    recall = np.mean(near(found, radius)[edge])
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def boundary(mask):
    """Pixels that differ from their right, lower or lower right neighbour: bool (H, W)."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    neighbours = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return np.logical_or.reduce([mask != neighbour for neighbour in neighbours])


def crop_to(mask, images):
    """The images (H, W), cut to the rectangle around `mask`."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return [image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] for image in images]


def near(mask, radius):
    """Dilation by a disc: pixels at most `radius` away from the mask, between centres."""
    from skimage.morphology import isotropic_dilation  # a second, for those who have annotations

    return isotropic_dilation(mask, radius)


def statistics(values):
    """(mean, recall, decay) of the values of an object's frames.

    Recall is the share of frames above 0.5, decay the mean of the first quarter of them minus that
    of the last, both with the frame they end on. Values that are NaN count in the recall alone.
    davis2017-evaluation keeps the ends of the quarters in 8 bits, and so is wrong beyond 256
    frames.
    """
    values = np.asarray(values, float)
    if len(values) == 0:
        return math.nan, math.nan, math.nan
    ends = (np.round(np.linspace(1, len(values), 5) + 1e-10) - 1).astype(int)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of NaN alone
        quarters = [np.nanmean(values[ends[i] : ends[i + 1] + 1]) for i in (0, 3)]
        mean = np.nanmean(values)
    return float(mean), float(np.mean(values > 0.5)), float(quarters[0] - quarters[1])


def score_video(annotations, segmentations):
    """(J, F), each (objects, T - 2), of two label maps (T, H, W).

    The objects are those up to the highest number in the first annotation: one that appears later
    is not scored.
    """
    objects = range(1, 1 + int(annotations[0].max()))
    frames = list(zip(annotations, segmentations, strict=True))[1:-1]
    scores = [
        [[measure(truth == k, found == k) for truth, found in frames] for k in objects]
        for measure in (jaccard, boundary_f)
    ]
    return tuple(np.array(of_objects).reshape(len(objects), len(frames)) for of_objects in scores)


def summarise(scores):
    """({"J&F-Mean": ..., "J-Mean": ...}, {"NAME_K": {"J-Mean": ..., ...}}) of {NAME: (J, F)}.

    Means over all objects of all videos, not over videos; `K` counts the objects of a video from 1.
    """
    objects = {
        f"{name}_{k}": dict(zip(COLUMNS, statistics(j) + statistics(f), strict=True))
        for name, values in scores.items()
        for k, (j, f) in enumerate(zip(*values, strict=True), start=1)
    }
    means = {
        column: float(np.mean([measured[column] for measured in objects.values()]))
        for column in COLUMNS
    }
    return {"J&F-Mean": (means["J-Mean"] + means["F-Mean"]) / 2} | means, objects


def table(total, objects):
    """Lines: a row for each object, and the means over all of them, in percent."""
    rows = {printable(name): row for name, row in objects.items()} | {"all objects": total}
    width = max(map(len, rows))
    header = ("J&F", "J", "recall", "decay", "F", "recall", "decay")
    yield " " * width + "".join(f"{name:>8}" for name in header)
    for name, row in rows.items():
        cells = [(row["J-Mean"] + row["F-Mean"]) / 2, *(row[column] for column in COLUMNS)]
        yield f"{name:{width}}" + "".join(f"{100 * cell:8.1f}" for cell in cells)


def table_files(folder, split):
    """Paths of the two files of davis2017-evaluation: of the means, and of each object."""
    return [folder / f"{kind}_results-{split}.csv" for kind in ("global", "per-sequence")]


def write_tables(folder, split, total, objects):
    """The two files of davis2017-evaluation, by its names and columns."""
    of_means, of_objects = table_files(folder, split)
    write_csv(of_means, list(total), [list(total.values())])
    rows = [[name, row["J-Mean"], row["F-Mean"]] for name, row in objects.items()]
    header = ["Sequence", "J-Mean", "F-Mean"]
    write_csv(of_objects, header, rows)


def write_csv(path, header, rows):
    """Numbers to 3 decimals."""
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            writer.writerow([f"{cell:.3f}" if isinstance(cell, float) else cell for cell in row])
