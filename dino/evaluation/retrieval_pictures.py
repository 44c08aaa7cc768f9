# SPDX-License-Identifier: Apache-2.0
"""Queries with their first results as pictures: what was right, wrong and junk."""

from pathlib import Path

from dino.data.retrieval_set import read_even_truncated
from dino.figures import plt
from dino.printable import printable

SHOWN, PER_ROW = 10, 5  # results of a query
SIDE = 256  # pixels of the longer side of an image
COLORS = {"easy": "tab:green", "hard": "tab:green", "junk": "tab:gray", "wrong": "tab:red"}


def draw_query(images, query, ranking):
    """A matplotlib figure of the query of this number, and the first of its `ranking`."""
    labels = {
        index: label
        for label in ("easy", "hard", "junk")
        for index in images.ground_truth[query].get(label, [])
    }
    columns, rows = 1 + PER_ROW, SHOWN // PER_ROW
    figure = plt.figure(figsize=(2 * columns, 2.2 * rows + 0.4), layout="constrained")
    grid = figure.add_gridspec(rows, columns)
    draw_image(figure.add_subplot(grid[:, 0]), images.queries[query], "query", "black")
    for place, index in enumerate(ranking[:SHOWN].tolist()):
        label = labels.get(index, "wrong")
        axis = figure.add_subplot(grid[place // PER_ROW, 1 + place % PER_ROW])
        title = f"{place + 1}: {f'right ({label})' if label in ('easy', 'hard') else label}"
        draw_image(axis, images.database[index], title, COLORS[label])
    name = printable(Path(images.queries[query]).stem)
    figure.suptitle(f"{printable(images.name)}, query {query}: {name}", parse_math=False)
    return figure


def draw_image(axis, path, title, color):
    """The image of a file on `axis`, in a frame of this colour."""
    image = read_even_truncated(path)
    image.thumbnail((SIDE, SIDE))
    axis.imshow(image)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=9)
    axis.spines[:].set(color=color, linewidth=4)
