# SPDX-License-Identifier: Apache-2.0
"""Segmented videos to look at: a contact sheet of frames with their masks."""

import numpy as np

from dino.data.davis import palette
from dino.data.images import read_image
from dino.evaluation.video_scores import boundary
from dino.figures import plt
from dino.printable import printable

SHOWN, PER_ROW = 8, 4  # frames of a video
PANEL_WIDTH = 3.5  # inches


def draw_video(video, masks, scores=None):
    """A matplotlib figure: frames from all over the video, with their objects.

    `masks`: label maps (H, W) uint8 of all frames; `scores`: (J, F) of the video.
    """
    height, width = masks[0].shape
    numbers = np.linspace(0, len(masks) - 1, min(SHOWN, len(masks))).round().astype(int)
    rows = -(-len(numbers) // PER_ROW)
    figure, axes = plt.subplots(
        rows,
        PER_ROW,
        figsize=(PANEL_WIDTH * PER_ROW, rows * (PANEL_WIDTH * height / width + 0.3) + 0.4),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, number in zip(axes.flat, numbers, strict=False):
        axis.imshow(overlay(read_image(video.frames[number]), masks[number]))
        axis.set_title(printable(video.frames[number].stem), fontsize=9, parse_math=False)
    title = printable(video.name)
    if scores is not None:
        j, f = (100 * values.mean() for values in scores)
        title += f": J {j:.1f}, F {f:.1f}"
    figure.suptitle(title, fontsize=12, parse_math=False)
    return figure


def overlay(image, labels):
    """The frame (H, W, 3) uint8 with its objects tinted and outlined in white."""
    pixels = np.asarray(image)
    tinted = np.where(labels[..., None] > 0, (pixels / 2 + palette()[labels] / 2), pixels)
    tinted[boundary(labels)] = 255
    return tinted.astype(np.uint8)
