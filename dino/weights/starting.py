# SPDX-License-Identifier: Apache-2.0
"""Weights that a run starts from: fitted to its networks, with what they say of themselves."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dino.command_line import spaced
from dino.data.augmentations import IMAGENET_MEAN, IMAGENET_STD
from dino.distributed import print0
from dino.networks import unwrap
from dino.printable import printable
from dino.weights.files import is_named, without_prefix
from dino.weights.loading import FLOATS, load_exactly, same_kind
from dino.weights.pretrained import (
    backbone_weights,
    describe,
    describe_backbone,
    trained_img_size,
    without_classifier,
)


def initialise_from(checkpoint, path, student, teacher, dino_loss):
    """Start a new run from weights, ours or official: the content of the file `path`, --init_from.

    A training checkpoint gives student, teacher, both with their heads, and center, as far as they
    fit; a backbone alone goes into both networks. Prints what was taken. The backbone must fit.
    """
    taken = []
    for name, network in (("student", unwrap(student)), ("teacher", unwrap(teacher))):
        key = name if isinstance(checkpoint, dict) and name in checkpoint else "teacher"
        weights = backbone_weights(checkpoint, key, path, flag="--init_from")
        load_resized(network.backbone, weights, f"--init_from {path}: {key}")
        taken.append(f"backbone of the {name}")
        head = head_weights(checkpoint.get(name))
        if fits(network.head, head):
            load_exactly(network.head, head, f"--init_from {path}: head of the {name}")
            taken.append(f"head of the {name}")
    center = checkpoint.get("dino_loss")
    if fits(dino_loss, center):
        load_exactly(dino_loss, center, f"--init_from {path}: center")
        taken.append("center")
    everything = 5
    rest = "" if len(taken) == everything else "; the rest starts afresh"
    print0(printable(f"From {path}: {', '.join(taken)}{rest}."))


def warn_of_other_images(checkpoint, path, **flags):
    """Print a warning unless the run's `flags` make of images what those that the file states do.

    The network would see brighter, darker, sharper or softer images than it learned from.
    """
    described = describe(checkpoint)
    stated = {
        name: described[name]
        for name, value in flags.items()
        if same_kind(described.get(name), value)
        and not np.allclose(described[name], value, atol=1e-3)
    }
    if stated:
        theirs, ours = (
            " ".join(f"--{name} {spaced(of[name])}" for name in stated) for of in (stated, flags)
        )
        print0(
            printable(
                f"Warning: the weights of {path} are of images with {theirs}, and this run has"
                f" {ours}, which changes what its features say. --preset continue takes over what a"
                " file states."
            )
        )


def describe_weights(checkpoint, path):
    """What the content of the file --init_from says of its backbone: fields of Pretrained, checked.

    Where it does not state size or normalisation, they are the released backbones'.
    """
    weights = backbone_weights(checkpoint, "teacher", path, "--init_from")
    described = describe_backbone(checkpoint, weights, f"--init_from {path}")
    size = trained_img_size(weights, described.get("arch"), described.get("patch_size"))
    return {"image_size": size, "mean": IMAGENET_MEAN, "std": IMAGENET_STD} | described


def head_widths(checkpoint):
    """The flags of the head of the teacher in a checkpoint, from its shapes; {} without a head."""
    head = head_weights(checkpoint.get("teacher"))
    last, first = head.get("last_layer.weight_v"), head.get("mlp.0.weight")
    if not all(isinstance(value, torch.Tensor) and value.ndim == 2 for value in (last, first)):
        return {}
    return {
        "out_dim": last.shape[0],
        "head_bottleneck_dim": last.shape[1],
        "head_hidden_dim": first.shape[0],
        "use_bn_in_head": "mlp.1.running_mean" in head,
    }


def head_weights(state_dict):
    """The entries of DINO's head, without prefixes; {} if this is not a state dict."""
    state_dict = without_prefix(state_dict, "module.") if is_named(state_dict) else {}
    head = {name: value for name, value in state_dict.items() if name.startswith("head.")}
    return without_prefix(head, "head.")


def fits(module, state_dict):
    """Whether names and shapes are those of `module`."""
    entries = state_dict if is_named(state_dict) else {}
    shapes = {name: getattr(value, "shape", None) for name, value in entries.items()}
    return shapes == {name: value.shape for name, value in module.state_dict().items()}


def load_resized(backbone, weights, what):
    """load_exactly, after fitting position embeddings and the first layer to `backbone`. A
    classifier is ignored.
    """
    weights = fit_channels(backbone, weights, what)
    own = backbone.state_dict().get("pos_embed")
    positions = weights.get("pos_embed")
    if own is not None and is_position_grid(positions) and own.shape != positions.shape:
        weights = {**weights, "pos_embed": resize_positions(positions, own.shape[1] - 1)}
        print0(
            printable(f"{what}: position embeddings resized from {positions.shape[1] - 1} patches.")
        )
    load_exactly(backbone, without_classifier(weights, backbone), what)


def is_position_grid(positions):
    """Whether this is (1, 1 + n, D) of numbers with n a square; load_exactly refuses the others."""
    if not isinstance(positions, torch.Tensor) or positions.ndim != 3:
        return False
    patches = positions.shape[1] - 1
    square = patches > 0 and math.isqrt(patches) ** 2 == patches
    return square and len(positions) == 1 and positions.dtype in FLOATS


def fit_channels(backbone, weights, what):
    """`weights` with a first layer for as many channels as `backbone` takes.

    Every new channel gets the mean of the old ones' weights times old / new number of channels, so
    that an image whose channels are all equal gives what it gave before. Weights that are not of a
    convolution are left for load_exactly to refuse.
    """
    name = first_convolution(backbone)
    own, first = backbone.state_dict().get(name), weights.get(name)
    takes = isinstance(first, torch.Tensor) and first.ndim == 4 and first.dtype in FLOATS
    if own is not None and takes and first.shape[1] != own.shape[1]:
        before, now = first.shape[1], own.shape[1]
        print0(printable(f"{what}: {name} adapted from {before} channels to {now}."))
        first = first.mean(dim=1, keepdim=True).expand(-1, now, -1, -1) * before / now
        weights = {**weights, name: first}
    return weights


def first_convolution(backbone):
    """The name of the weights that see the channels of an image, or None without a convolution."""
    convolutions = (
        name for name, module in backbone.named_modules() if isinstance(module, nn.Conv2d)
    )
    return next((f"{name}.weight" for name in convolutions), None)


def resize_positions(positions, patches):
    """(1, 1 + n, D) -> (1, 1 + patches, D), both grids square, by bicubic interpolation."""
    size, new_size = round((positions.shape[1] - 1) ** 0.5), round(patches**0.5)
    grid = positions[:, 1:].float().unflatten(1, (size, size)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new_size, new_size), mode="bicubic")
    return torch.cat([positions[:, :1].float(), grid.flatten(2).transpose(1, 2)], dim=1)
