# SPDX-License-Identifier: Apache-2.0
"""Video object segmentation by label propagation (Tab. 5), after Jabri et al. (arXiv 2006.14613).

The mask of the first frame is carried from frame to frame by the nearest neighbours of patch
features; nothing is trained. The scores are in video_scores.

Shapes: T frames of H x W pixels, P patch size, h = H/P rows and w = W/P columns of patches, D
dimensions, C classes (the background and the objects), n source frames.
"""

import itertools
from collections import deque
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from dino.backbones import build_backbone
from dino.data.augmentations import IMAGENET_MEAN, IMAGENET_STD
from dino.data.davis import BACKGROUND, read_labels, save_mask
from dino.data.images import read_image
from dino.errors import UserError
from dino.evaluation.features import require_finite
from dino.evaluation.video_scores import boundary_f, jaccard, score_video, statistics
from dino.meters import progress_bar
from dino.randomness import fix_random_seeds

__all__ = [
    "RawPixels",
    "boundary_f",
    "check_frame_size",
    "frame_size",
    "jaccard",
    "load_frame",
    "load_mask",
    "lost_objects",
    "neighborhood_mask",
    "propagate_labels",
    "save_mask",
    "score_baselines",
    "score_video",
    "segment_files",
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


def check_frame_size(size, short_side, limit, name):
    """Raise UserError for a video, of frames of `size` (width, height), that grows too large."""
    width, height = size
    new_height, new_width = frame_size(height, width, short_side)
    if new_height * new_width > limit:
        raise UserError(
            f"--image_size {short_side}: frames of {name}, {width} x {height} pixels, become"
            f" {new_width} x {new_height}, more than --max_image_pixels. Lower it."
        )


def load_frame(path, short_side=SHORT_SIDE, mean=IMAGENET_MEAN, std=FRAME_STD):
    """(normalised frame (3, H, W), height and width in the file).

    Bilinear without antialiasing, in whole grey levels, as OpenCV resizes in the official code.
    """
    image = read_image(path)
    size = frame_size(image.height, image.width, short_side)
    pixels = TF.pil_to_tensor(image)
    pixels = TF.resize(pixels, size, InterpolationMode.BILINEAR, antialias=False)
    return TF.normalize(pixels / 255, mean, std), image.height, image.width


def load_mask(path, patch_size):
    """(one-hot labels of the patches (1, C, h, w), labels of the pixels in the file).

    The patches are those of `load_frame`; in the official code those of a square mask are
    transposed.
    """
    labels = read_labels(path)
    height, width = frame_size(*labels.shape)
    return one_hot_patches(labels, height // patch_size, width // patch_size), labels


def one_hot_patches(labels, rows, columns):
    """(1, C, rows, columns): the class of each patch, that of the pixel nearest to its centre.

    As in the official code, an object that no patch gets is lost, and C ends with the last one that
    is left; see `lost_objects`.
    """
    image = Image.fromarray(labels).resize((columns, rows), Image.Resampling.NEAREST)
    patches = torch.from_numpy(np.array(image)).long()
    return F.one_hot(patches).permute(2, 0, 1)[None].float()


def lost_objects(labels, patch_size, short_side=SHORT_SIDE):
    """Numbers of the objects of a first mask that are too small for the grid of patches."""
    height, width = frame_size(*labels.shape, short_side)
    one_hot = one_hot_patches(labels, height // patch_size, width // patch_size)[0]
    kept = one_hot.flatten(1).any(dim=1).nonzero().flatten().tolist()
    return sorted({*np.unique(labels).tolist()} - {*kept, BACKGROUND})


# ---- propagation ----


def neighborhood_mask(height, width, radius):
    """(hw, hw) of 0 and 1: source (p, q) counts for target (i, j) iff |p-i|, |q-j| <= radius.

    All ones for radius 0. For looking at: propagate_labels never builds it.
    """
    everywhere = slice(0, height), slice(0, width)
    return within(everywhere, everywhere, radius, device="cpu").float()


def within(targets, sources, radius, device):
    """Which sources are near which targets: two (rows, columns) -> bool (targets, sources)."""
    rows, columns = (
        (
            torch.arange(a.start, a.stop, device=device)[:, None]
            - torch.arange(b.start, b.stop, device=device)
        ).abs()
        <= (radius or torch.inf)
        for a, b in zip(targets, sources, strict=True)
    )
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)


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
    for tile in itertools.product(target_blocks(height), target_blocks(width)):
        candidates = around(tile[0], radius, height), around(tile[1], radius, width)
        near = within(tile, candidates, radius, targets.device)
        block = targets[tile]
        propagated[tile] = weighted_labels(
            block.flatten(0, 1),
            sources[:, *candidates].flatten(1, 2),
            labels[:, *candidates].flatten(1, 2),
            near,
            topk,
        ).view(*block.shape[:2], classes)
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


def target_blocks(length):
    return [slice(start, min(start + TILE, length)) for start in range(0, length, TILE)]


def around(tile, radius, length):
    """The tile and all that is within `radius` of it; everything for radius 0."""
    if radius == 0:
        return slice(0, length)
    return slice(max(0, tile.start - radius), min(length, tile.stop + radius))


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


def baselines(pretrained):
    """Models to compare a Pretrained ViT with, on its device: {name: model}."""
    fix_random_seeds(0)
    arch, patch_size = pretrained.arch, pretrained.patch_size
    untrained, _ = build_backbone(arch, patch_size, img_size=pretrained.image_size)
    untrained.to(pretrained.backbone.cls_token.device)
    return {"raw pixels": RawPixels(patch_size), "untrained backbone": untrained.eval()}


def segment_files(model, pretrained, paths, first_mask, short_side=SHORT_SIDE, **options):
    """segment_frames of image files, each read when its turn comes.

    `pretrained` says how `model`, its backbone or a baseline, is fed. A backbone fed as the
    official ones are gets the official odd FRAME_STD.
    """
    std = FRAME_STD if tuple(pretrained.std) == IMAGENET_STD else pretrained.std
    device = pretrained.backbone.cls_token.device
    frames = (load_frame(path, short_side, pretrained.mean, std)[0].to(device) for path in paths)
    return segment_frames(model, frames, first_mask, **options)


def score_baselines(pretrained, videos, **options):
    """Yield (name, {video's name: (J, F)}) of models to compare a Pretrained ViT with.

    `videos` are of dino.data.davis, all with true masks; `options` are those of segment_files.
    """
    for name, model in baselines(pretrained).items():
        scores = {}
        for video in progress_bar(videos, name):
            truth = video.read_annotations()
            found = segment_files(model, pretrained, video.frames, truth[0], **options)
            scores[video.name] = score_video(truth, list(found))
        yield name, scores


def segment_video(model, frames, first_mask, n_last_frames=7, radius=12, topk=5):
    """Label maps (T, H0, W0) uint8, `first_mask` (H0, W0) included; see segment_frames."""
    return np.stack(list(segment_frames(model, frames, first_mask, n_last_frames, radius, topk)))


@torch.no_grad()
def segment_frames(model, frames, first_mask, n_last_frames=7, radius=12, topk=5):
    """Yield the label map (H0, W0) uint8 of each frame, beginning with `first_mask` itself.

    `model` is a ViT of vision_transformer; `frames` an iterable of normalised (3, H, W) on its
    device, of which one is held at a time. The sources of a frame are the first frame with its
    mask, and the last `n_last_frames` before it with their soft labels; each frame is encoded once.
    UserError for features that are not finite.
    """
    patch_size, first_mask = model.patch_embed.patch_size, np.array(first_mask, np.uint8)
    context = deque(maxlen=n_last_frames)
    first = None
    for frame in frames:
        features = model.get_intermediate_layers(frame[None], n=1)[0][0, 1:]  # (hw, D): no [CLS]
        require_finite(features, "the patch features of this network")
        if first is None:
            rows, columns = (side // patch_size for side in frame.shape[-2:])
            labels = one_hot_patches(first_mask, rows, columns)[0]
            first = features, labels.to(features.device)
            yield first_mask
            continue
        source_features, source_labels = map(torch.stack, zip(first, *context, strict=True))
        labels = propagate_labels(features, source_features, source_labels, radius, topk)
        context.append((features, labels))
        yield to_label_map(labels, patch_size, *first_mask.shape)
