# SPDX-License-Identifier: Apache-2.0
"""A backbone as a graph that runs without this project: torch.export, and from it ONNX.

TorchScript is not among them: PyTorch deprecates it in favour of torch.export.
"""

import contextlib
import copy
import functools
import json
import logging
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from dino.backbones import first_of, is_vit
from dino.errors import UserError
from dino.printable import printable

IMAGES, FEATURES = "images", "features"  # names of the graph's input and output
OPSET = 18  # of ONNX, from 2022: the oldest that torch's exporter writes without conversion
CUBIC = -0.75  # the coefficient of torch's bicubic interpolation


class Features(nn.Module):
    """The features (B, D) of a backbone, whatever else it returns."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images):
        return first_of(self.backbone(images))


def trace(pretrained):
    """torch.export's program of a backbone: images (B, C, H, W) -> features (B, D).

    B, H and W are free as far as the network allows; in our ViTs they are, and the position
    embeddings are interpolated in the graph as `interpolate_pos_encoding` does it.
    """
    backbone = copy.deepcopy(pretrained.backbone).eval().cpu()
    if is_vit(backbone):
        backbone.interpolate_pos_encoding = functools.partial(interpolate_positions, backbone)
    size = pretrained.image_size
    # Two images, since a dimension of 1 in the example would be taken for a constant.
    example = torch.zeros(2, pretrained.in_chans, size, size)
    free = {0: Dim("batch"), 2: Dim.AUTO, 3: Dim.AUTO}
    with torch.no_grad(), explain_failure(pretrained.arch):
        return torch.export.export(Features(backbone), (example,), dynamic_shapes=(free,))


@contextlib.contextmanager
def explain_failure(arch):
    """Silence the exporter's warnings; UserError for whatever it raises about a network."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        reason = printable(f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}")
        raise UserError(
            f"--format: torch {torch.__version__} cannot make a graph of {arch} ({reason}). Take"
            " --format safetensors, which holds any network."
        ) from None


def interpolate_positions(backbone, tokens, height, width):
    """`backbone.interpolate_pos_encoding(tokens, height, width)` where the sizes may be free.

    Bicubic interpolation of a grid is a product with one matrix from the left and one from the
    right. torch's own, with the shift of 0.1 that the official code adds, is traced for one size
    only. The two agree to rounding.
    """
    grid_rows, grid_columns = backbone.patch_embed.grid_size
    patch_size = backbone.patch_embed.patch_size
    rows, columns = height // patch_size, width // patch_size
    trained = torch.full((), rows * columns) == grid_rows * grid_columns
    trained &= torch.full((), rows * grid_columns) == columns * grid_rows
    shift = torch.where(trained, 0.0, 0.1)  # without it both matrices are the identity
    grid = backbone.pos_embed[:, 1:].unflatten(1, (grid_rows, grid_columns))
    grid = torch.einsum("rg,bgcd->brcd", bicubic(grid_rows, rows, shift), grid)
    grid = torch.einsum("cg,brgd->brcd", bicubic(grid_columns, columns, shift), grid)
    return torch.cat([backbone.pos_embed[:, :1], grid.flatten(1, 2)], dim=1)


def bicubic(old, new, shift):
    """The matrix (new, old) that resamples `old` values at `new` + `shift` per their extent.

    Each row has the four weights of a cubic convolution; beyond a border counts the value on it.
    """
    at = (torch.arange(new) + 0.5) * (old / (new + shift)) - 0.5
    first = at.floor()
    t = at - first
    weights = torch.stack([outer(t + 1), inner(t), inner(1 - t), outer(2 - t)], dim=1)  # (new, 4)
    columns = (first.long()[:, None] + torch.arange(-1, 3)).clamp(0, old - 1)
    return (weights[:, :, None] * F.one_hot(columns, old)).sum(dim=1)


def inner(x):
    """The cubic kernel at a distance of at most 1 (Keys 1981)."""
    return ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1


def outer(x):
    """The cubic kernel at a distance from 1 to 2."""
    return ((CUBIC * x - 5 * CUBIC) * x + 8 * CUBIC) * x - 4 * CUBIC


def to_onnx(program, path, description):
    """Write a traced program as one ONNX file, with `description` as its metadata."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with explain_failure(description["arch"]):
        onnx = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[IMAGES],
            output_names=[FEATURES],
            verbose=False,
        )
    names = ("batch", None, "height", "width")
    for value in (*onnx.model.graph.inputs, *onnx.model.graph.outputs):
        for i, name in enumerate(names[: len(value.shape)]):
            if name and not isinstance(value.shape[i], int):
                value.shape[i] = name
    onnx.model.metadata_props["description"] = json.dumps(description)
    onnx.save(path, external_data=False)
