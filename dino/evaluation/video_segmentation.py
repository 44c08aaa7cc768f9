# SPDX-License-Identifier: Apache-2.0
"""Video object segmentation by label propagation (Tab. 5), after Jabri et al. (arXiv 2006.14613).

The mask of the first frame is carried from frame to frame by the nearest neighbours of patch
features; nothing is trained. The scores are in video_scores.

Shapes: T frames of H x W pixels, P patch size, h = H/P rows and w = W/P columns of patches, D
dimensions, C classes (the background and the objects), n source frames.
"""

from collections import deque
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from dino.data.augmentations import IMAGENET_MEAN
from dino.data.davis import BACKGROUND, read_labels, save_mask
from dino.data.images import read_image
from dino.evaluation.video_scores import boundary_f, jaccard, score_video, statistics

__all__ = [
    "RawPixels",
    "boundary_f",
    "frame_size",
    "jaccard",
    "load_frame",
    "load_mask",
    "neighborhood_mask",
    "propagate_labels",
    "save_mask",
    "score_video",
    "segment_frames",
    "segment_video",
    "statistics",
    "to_label_map",
]

SHORT_SIDE = 480  # of a frame as the network sees it
LONG_SIDE_STEP = 64  # its other side is a multiple of this
# As in the official code, which has 0.228 here and 0.229 everywhere else.
FRAME_STD = (0.228, 0.224, 0.225)
TEMPERATURE = 0.1
BELOW_ANY_COSINE = -2
TILE = 12  # patches per side of a block of targets: the best of 8, 12, 16, 24 and 32 on a CPU


# ---- frames and masks ----


def frame_size(height, width, short_side=SHORT_SIDE):
    """(height, width) of a frame as the network sees it, as in the official code.

    The shorter side becomes `short_side`, smaller videos being enlarged; the longer one is then
    squeezed, not cropped, to a multiple of 64: 480 x 854 becomes 480 x 832, and a square 480 x 448.
    """
    long_side = short_side * max(height, width) // min(height, width)
    long_side -= long_side % LONG_SIDE_STEP
    return (long_side, short_side) if height > width else (short_side, long_side)


def load_frame(path, short_side=SHORT_SIDE, mean=IMAGENET_MEAN, std=FRAME_STD):
    """(normalised frame (3, H, W), height and width in the file).

    Bilinear without antialiasing, in whole grey levels, as OpenCV resizes in the official code.
    """
    image = read_image(path)
    size = frame_size(image.height, image.width, short_side)
    pixels = TF.pil_to_tensor(image)
    pixels = TF.resize(pixels, size, InterpolationMode.BILINEAR, antialias=False)
    return TF.normalize(pixels / 255, mean, std), image.height, image.width


def load_mask(path, patch_size, short_side=SHORT_SIDE):
    """(one-hot labels of the patches (1, C, h, w), labels of the pixels in the file).

    The patches are those of `load_frame`; in the official code those of a square mask are
    transposed.
    """
    labels = read_labels(path)
    height, width = frame_size(*labels.shape, short_side)
    return one_hot_patches(labels, height // patch_size, width // patch_size), labels


def one_hot_patches(labels, rows, columns):
    """(1, C, rows, columns): the class of each patch, that of the pixel nearest to its centre.

    C counts the objects of `labels`, as numbered there. An object that no patch would get has the
    free patch that holds most of its pixels; in the official code it is lost.
    """
    image = Image.fromarray(labels)
    patches = np.array(image.resize((columns, rows), Image.Resampling.NEAREST))
    for lost in np.setdiff1d(labels, patches):
        if lost != BACKGROUND:
            give_a_patch(patches, labels, lost)
    classes = int(labels.max()) + 1
    return F.one_hot(torch.from_numpy(patches).long(), classes).permute(2, 0, 1)[None].float()


def give_a_patch(patches, labels, lost):
    """Give the class `lost` a patch, unless each is the only one of another class. In place."""
    y, x = np.nonzero(labels == lost)
    cells = y * len(patches) // len(labels), x * patches.shape[1] // labels.shape[1]
    pixels = np.zeros(patches.shape, int)
    np.add.at(pixels, cells, 1)
    sizes = np.bincount(patches.ravel())
    pixels[sizes[patches] == 1] = 0
    if pixels.any():
        patches[np.unravel_index(pixels.argmax(), pixels.shape)] = lost


# ---- propagation ----


def neighborhood_mask(height, width, radius):
    """(hw, hw) of 0 and 1: source (p, q) counts for target (i, j) iff |p-i|, |q-j| <= radius.

    All ones for radius 0. For looking at: propagate_labels never builds it.
    """
    near = within(range(height), range(width), range(height), range(width), radius)
    return near.float()


def within(rows, columns, source_rows, source_columns, radius):
    """Which sources of a rectangle are near which targets of another: bool (targets, sources)."""
    near = [
        (torch.tensor(targets)[:, None] - torch.tensor(sources)).abs() <= (radius or torch.inf)
        for targets, sources in ((rows, source_rows), (columns, source_columns))
    ]
    return (near[0][:, None, :, None] & near[1][None, :, None, :]).flatten(2).flatten(0, 1)


def propagate_labels(target_features, source_features, source_labels, radius=12, topk=5):
    """Labels (C, h, w) of a frame: (hw, D), (n, hw, D), (n, C, h, w) -> weighted means of labels.

    A target weighs the sources of all n frames together by exp(cosine / 0.1), and only those in its
    neighbourhood (see neighborhood_mask) that reach its `topk`-th largest weight: ties stay, and a
    neighbourhood of fewer counts whole. Targets are taken in blocks, each with the candidates
    around it alone. The official code weighs all pairs and cuts then: with patches of 8 pixels,
    1.25 GB for each of several copies.
    """
    count, classes, height, width = source_labels.shape
    targets = F.normalize(target_features, dim=-1).view(height, width, -1)
    sources = F.normalize(source_features, dim=-1).view(count, height, width, -1)
    labels = source_labels.permute(0, 2, 3, 1)  # (n, h, w, C)
    propagated = labels.new_empty(height, width, classes)
    for rows in tiles(height):
        for columns in tiles(width):
            near_rows = around(rows, radius, height)
            near_columns = around(columns, radius, width)
            candidates = (slice(None), near_rows, near_columns)
            near = within(*map(as_range, (rows, columns, near_rows, near_columns)), radius)
            propagated[rows, columns] = weighted_labels(
                targets[rows, columns].flatten(0, 1),
                sources[candidates].flatten(1, 2),
                labels[candidates].flatten(1, 2),
                near.to(targets.device),
                topk,
            ).view(len(as_range(rows)), len(as_range(columns)), classes)
    return propagated.permute(2, 0, 1)


def weighted_labels(targets, sources, labels, near, topk):
    """(t, D), (n, s, D), (n, s, C), near (t, s) -> (t, C)."""
    cosines = targets @ sources.flatten(0, 1).T  # (t, n s)
    # Infinite where a source is not near; multiplying the weights is faster than exp(-inf).
    distant = torch.zeros(near.shape, device=near.device).masked_fill_(~near, -torch.inf)
    candidates = (cosines.view(len(targets), *sources.shape[:2]) + distant[:, None]).flatten(1)
    smallest = candidates.topk(min(topk, candidates.shape[1])).values[:, -1:]
    kept = candidates >= smallest.clamp_(min=BELOW_ANY_COSINE)
    weights = cosines.div_(TEMPERATURE).exp_() * kept
    return weights @ labels.flatten(0, 1) / weights.sum(dim=1, keepdim=True)


def tiles(length):
    return [slice(start, min(start + TILE, length)) for start in range(0, length, TILE)]


def around(tile, radius, length):
    """The tile and all that is within `radius` of it; everything for radius 0."""
    if radius == 0:
        return slice(0, length)
    return slice(max(0, tile.start - radius), min(length, tile.stop + radius))


def as_range(part):
    return range(part.start, part.stop)


def to_label_map(scores, patch_size, height, width):
    """Class of every pixel, (height, width) uint8, of soft labels (C, h, w).

    Bilinear to the pixels of the frame that the network saw; each class shifted and scaled to [0,
    1] over the frame, so that a class that is weak everywhere wins where it is strongest; argmax;
    nearest to the original size. A class with one positive score everywhere wins everywhere: in the
    official code it becomes 0/0, which argmax takes for the largest.
    """
    scores = F.interpolate(scores[None], scale_factor=patch_size, mode="bilinear")[0]
    lowest, highest = scores.amin(dim=(1, 2), keepdim=True), scores.amax(dim=(1, 2), keepdim=True)
    scaled = (scores - lowest) / (highest - lowest)
    scaled = torch.where(highest > lowest, scaled, torch.inf)
    labels = torch.where(highest > 0, scaled, scores).argmax(dim=0).to(torch.uint8).cpu().numpy()
    resized = Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(resized)


# ---- videos ----


class RawPixels(nn.Module):
    """The baseline without a network: the features of a patch are its pixels."""

    def __init__(self, patch_size):
        super().__init__()
        self.patch_embed = SimpleNamespace(patch_size=patch_size)

    def get_intermediate_layers(self, x, n=1):
        """(1, 3, H, W) -> [(1, 1 + hw, D)], as of a ViT: the first token stands for [CLS]."""
        patches = F.unfold(x, self.patch_embed.patch_size, stride=self.patch_embed.patch_size)
        return [F.pad(patches, (1, 0)).transpose(1, 2)]


def segment_video(model, frames, first_mask, n_last_frames=7, radius=12, topk=5):
    """Label maps (T, H0, W0) uint8, `first_mask` (H0, W0) included; see segment_frames."""
    return np.stack(list(segment_frames(model, frames, first_mask, n_last_frames, radius, topk)))


@torch.no_grad()
def segment_frames(model, frames, first_mask, n_last_frames=7, radius=12, topk=5):
    """Yield the label map (H0, W0) uint8 of each frame, beginning with `first_mask` itself.

    `model` is a ViT of vision_transformer; `frames` an iterable of normalised (3, H, W) on its
    device, of which one is held at a time. The sources of a frame are the first frame with its
    mask, and the last `n_last_frames` before it with their soft labels; each frame is encoded once.
    """
    patch_size = model.patch_embed.patch_size
    context = deque(maxlen=n_last_frames)
    first = None
    for frame in frames:
        features = model.get_intermediate_layers(frame[None], n=1)[0][0, 1:]  # (hw, D): no [CLS]
        if first is None:
            rows, columns = (side // patch_size for side in frame.shape[-2:])
            labels = one_hot_patches(np.asarray(first_mask), rows, columns)[0]
            first = features, labels.to(features.device)
            yield np.array(first_mask, np.uint8)
            continue
        source_features, source_labels = map(torch.stack, zip(first, *context, strict=True))
        labels = propagate_labels(features, source_features, source_labels, radius, topk)
        context.append((features, labels))
        yield to_label_map(labels, patch_size, *np.shape(first_mask))
