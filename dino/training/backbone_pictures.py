# SPDX-License-Identifier: Apache-2.0
"""What a backbone makes of a run's own images: attention, patch features, nearest neighbours.

n images, h heads, N = R x C patches, D width of a token, S side of an image in pixels.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.utils import make_grid

from dino.backbones import evaluating, first_of, is_vit
from dino.data.augmentations import transform_of
from dino.data.channels import as_picture
from dino.data.items import image_of
from dino.distributed import is_main_process
from dino.evaluation.attention import attention_of_pixels
from dino.evaluation.neighbour_pictures import (
    Panel,
    draw_neighbours,
    nearest_rows,
    neighbour_panel,
    spread_rows,
    without_self,
)
from dino.figures import plt
from dino.spread import spread
from dino.training import plots

SHOWN = 8  # images
MOST_HEADS = 6  # drawn
TILE = 128  # pixels of the side of a drawn image
GALLERY = 256  # images among which neighbours are sought: more would take minutes on a CPU
QUERIES, NEIGHBOURS = 4, 5
BATCH = 32
GAP = 4  # pixels between drawn images
DPI, TITLE = 100, 24  # pixels per inch, and of the line above the columns
ATTENTION, ATTENTION_EPOCHS = "attention_maps.png", "attention_over_epochs.png"
PATCHES, NEAREST = "patch_features.png", "neighbours.png"


@torch.no_grad()
def draw_backbone(folder, backbone, images, augmentation):
    """Write the pictures to a run's folder: neighbours, and of a ViT attention and patches.

    `images`: a sequence of images, or of tuples that begin with one, cropped as for the k-NN.
    """
    if not is_main_process():
        return
    transform = transform_of(augmentation)
    numbers = spread(len(images), GALLERY)
    gallery = [image_of(images[number], number, transform.in_chans) for number in numbers]
    device = next(backbone.parameters()).device
    eager = torch.compiler.set_stance("force_eager")  # other shapes would be compiled anew
    with eager, evaluating(backbone):
        pixels = torch.stack([transform(image) for image in gallery])  # (n, C, S, S)
        if is_vit(backbone):
            shown = pixels[spread(len(pixels), SHOWN)]
            photographs = photographs_of(shown, augmentation)
            maps = [attention_of_pixels(backbone, view).cpu() for view in shown]
            columns = torch.stack([tiles(color_maps(heads_and_mean(heads))) for heads in maps], 1)
            titles = ["mean", *(f"head {number}" for number in range(len(columns) - 1))]
            maps_by_title = dict(zip(titles, columns, strict=True))
            save_columns(Path(folder) / ATTENTION, {"image": photographs} | maps_by_title)
            tokens = backbone.get_intermediate_layers(shown.to(device), 1)[-1][:, 1:].cpu()
            colors = principal_colors(tokens).unflatten(1, maps[0].shape[1:])
            patches = tiles(colors.permute(0, 3, 1, 2))
            save_columns(Path(folder) / PATCHES, {"image": photographs, "patches": patches})
        features = [first_of(backbone(part.to(device))).cpu() for part in pixels.split(BATCH)]
    save_neighbours(Path(folder) / NEAREST, torch.cat(features).float(), gallery)


def shown_pixels(images, augmentation):
    """The SHOWN images of which `draw_backbone` draws maps: normalised (n, C, S, S)."""
    gallery, transform = spread(len(images), GALLERY), transform_of(augmentation)
    numbers = [gallery[i] for i in spread(len(gallery), SHOWN)]
    shown = [image_of(images[number], number, transform.in_chans) for number in numbers]
    return torch.stack([transform(image) for image in shown])


def photographs_of(pixels, augmentation):
    """Normalised (n, C, S, S) as they are drawn: (n, 3, TILE, TILE)."""
    mean, std = augmentation.mean, augmentation.std
    shown = [torch.tensor(plots.displayable(view, mean, std)) for view in pixels]
    return tiles(torch.stack(shown).permute(0, 3, 1, 2))


def heads_and_mean(maps):
    """(h, R, C) -> the mean over the heads, then the first heads: (1 + at most 6, R, C)."""
    return torch.cat([maps.mean(dim=0, keepdim=True), maps[:MOST_HEADS]])


def color_maps(maps):
    """matplotlib's default colours, each map from its lowest to its highest: -> (m, 3, R, C)."""
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    scaled = (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)
    return torch.tensor(plt.colormaps["viridis"](scaled.numpy())[..., :3]).permute(0, 3, 1, 2)


def principal_colors(tokens):
    """Patch tokens (n, N, D) -> red, green and blue in [0, 1]: their first principal components.

    Common to all images, so that equal colours are equal features (as Oquab et al. 2023, DINOv2,
    Fig. 1, show them). Each component reaches from its 2nd to its 98th percentile.
    """
    flat = tokens.flatten(0, 1).double()
    flat = flat - flat.mean(dim=0)
    axes = torch.linalg.svd(flat, full_matrices=False).Vh[:3]  # (3, D)
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    values = flat @ (axes * largest.sign()).T  # an axis has no sign of its own
    ends = torch.tensor([0.02, 0.98], dtype=values.dtype)
    low, high = torch.quantile(values, ends, dim=0)
    colors = (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)
    return F.pad(colors.clamp(0, 1), (0, 3 - colors.shape[1])).unflatten(0, tokens.shape[:2])


def tiles(pictures):
    """(m, 3, R, C) -> (m, 3, TILE, TILE); pixels stay visible where there are few."""
    mode = "nearest-exact" if pictures.shape[-1] < TILE else "area"
    return F.interpolate(pictures.float(), (TILE, TILE), mode=mode)


def save_columns(path, columns):
    """Write {title: pictures (n, 3, TILE, TILE)} as a PNG of n rows, a column for each title."""
    rows = torch.stack(list(columns.values()), dim=1).flatten(0, 1)
    grid = make_grid(rows, nrow=len(columns), padding=GAP, pad_value=1.0)
    height, width = grid.shape[1] + TITLE, grid.shape[2]
    figure = plt.figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.figimage(grid.permute(1, 2, 0).numpy(), 0, 0, origin="upper")
    for number, title in enumerate(columns):
        middle = GAP + number * (TILE + GAP) + TILE / 2
        position = middle / width, 1 - TITLE / 2 / height
        figure.text(*position, title, ha="center", va="center", fontsize=9)
    plots.save(figure, path, dpi=DPI)


def save_neighbours(path, features, gallery):
    """A row for each query, its neighbours in the `gallery` by the cosine of their features."""
    own = spread_rows(features.numpy(), QUERIES)
    if len(own) == 0 or len(gallery) < 2:
        return
    found = nearest_rows(features[own], features.numpy(), NEIGHBOURS + 1)
    products, rows = without_self(*found, torch.tensor(own))
    gallery = [as_picture(image) for image in gallery]
    sheet = [
        [Panel(gallery[query], "query")]
        + [
            neighbour_panel(gallery[row], similarity, "", "")
            for similarity, row in zip(similarities.tolist(), neighbours.tolist(), strict=True)
        ]
        for query, similarities, neighbours in zip(own, products, rows, strict=True)
    ]
    title = f"nearest of {len(gallery)} training images, by cosine similarity"
    plots.save(draw_neighbours(sheet, title), path)
