# SPDX-License-Identifier: Apache-2.0
"""Pictures of nearest neighbours: a row for each query, its neighbours from left to right.

m queries, n images, D width of their features, k neighbours.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from dino.errors import UserError
from dino.evaluation.neighbours import nearest
from dino.figures import plt
from dino.printable import printable
from dino.spread import spread

ROWS_AT_A_TIME = 2**16  # of the features, in memory
SIDE = 224  # pixels of the longer side of a drawn image
RIGHT, WRONG = "tab:green", "tab:red"


@dataclass
class Panel:
    """An image with the text above it; the color, of frame and text, tells right from wrong."""

    image: object  # PIL
    text: str
    color: str = "black"


def neighbour_panel(image, similarity, class_name, query_class):
    """A neighbour with its similarity and class, coloured where the classes of both are known."""
    known = class_name and query_class
    color = (RIGHT if class_name == query_class else WRONG) if known else "black"
    return Panel(image, f"{similarity:.3f}\n{class_name}".strip(), color)


def spread_rows(features, count):
    """At most `count` rows of `features` (n, D), evenly spread, that are finite."""
    return [row for row in spread(len(features), count) if np.isfinite(features[row]).all()]


def nearest_rows(queries, features, k):
    """The k rows of `features` (n, D) with the largest cosine similarity to each query (m, D).

    (similarities, rows), each (m, k). `features` may be on disk: a part at a time is read. Rows
    that are not finite count as absent, and with fewer than k others k is their number.
    """
    queries, found = F.normalize(queries), []
    for start in range(0, len(features), ROWS_AT_A_TIME):
        part = torch.from_numpy(np.array(features[start : start + ROWS_AT_A_TIME], np.float32))
        rows = part.isfinite().all(dim=1).nonzero()[:, 0]
        if len(rows):
            keys = F.normalize(part[rows])
            products, indices = nearest(queries, keys, min(k, len(rows)))
            found.append((products, rows[indices] + start))
    if not found:
        raise UserError("--neighbours: no image has features that are finite numbers.")
    products, rows = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    products, order = products.topk(min(k, products.shape[1]))
    return products, rows.gather(1, order)


def without_self(products, rows, own):
    """The neighbours (m, k - 1) of queries that are the rows `own` (m,) themselves.

    A copy of a query may come before it; then the query is left out all the same.
    """
    other = rows != own[:, None]
    other[other.all(dim=1), -1] = False  # k copies came first: the last neighbour goes
    kept = (len(own), rows.shape[1] - 1)
    return products[other].view(kept), rows[other].view(kept)


def draw_neighbours(sheet, title):
    """A matplotlib figure of the `sheet`, rows of Panels, the query first in each."""
    columns = max(map(len, sheet))
    width, height = 1.5 * columns + 0.2, 1.9 * len(sheet) + 0.4  # inches
    # Fixed places: matplotlib's automatic layout takes a minute for 200 images.
    places = dict(left=0.1 / width, right=1 - 0.1 / width, bottom=0.1 / height)
    places |= dict(top=1 - 0.7 / height, wspace=0.06, hspace=0.32)
    figure, axes = plt.subplots(
        len(sheet), columns, figsize=(width, height), squeeze=False, gridspec_kw=places
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for row_axes, row in zip(axes, sheet, strict=True):
        for axis, panel in zip(row_axes, row, strict=False):
            draw_result(axis, panel)
    place = dict(y=1 - 0.1 / height, va="top")
    figure.suptitle(printable(title), fontsize=11, parse_math=False, **place)
    return figure


def draw_result(axis, panel):
    image = panel.image.copy()
    image.thumbnail((SIDE, SIDE))
    axis.set_axis_on()
    axis.imshow(image)
    axis.set_xticks([])
    axis.set_yticks([])
    text = "\n".join(map(printable, panel.text.split("\n")))
    axis.set_title(text, fontsize=8, color=panel.color, parse_math=False)
    axis.spines[:].set(color=panel.color, linewidth=2.5)
