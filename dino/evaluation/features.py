# SPDX-License-Identifier: Apache-2.0
"""Features of a frozen backbone: of all images over all ranks, or of a batch for a linear head.

D width of the features, B images of a batch, P patch size.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from dino.backbones import evaluating, first_of, is_vit
from dino.data.loaders import equal_size_loader, evaluation_loader
from dino.distributed import gather_interleaved
from dino.errors import UserError
from dino.meters import progress_bar
from dino.precision import autocast

CPU = torch.device("cpu")


def image_features(
    pretrained,
    paths,
    labels,
    *,
    device=CPU,
    batch_size=128,
    num_workers=0,
    amp_dtype=torch.float32,
    keep_on_device=True,
):
    """`extract_features` of image files: each rank reads a share of them, with a progress bar."""
    loader = evaluation_loader(
        paths,
        labels,
        pretrained.transform,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )
    features, labels = extract_features(
        pretrained.backbone.to(device),
        progress_bar(loader, "features"),
        len(paths),
        device,
        amp_dtype=amp_dtype,
        keep_on_device=keep_on_device,
    )
    require_finite(features, f"the features of {pretrained.arch}")
    return [features, labels]


def require_finite(values, what):
    """Raise UserError, which says `what` they are, unless all `values` are finite numbers."""
    if not values.isfinite().all():
        raise UserError(
            f"{what} are not finite numbers: the weights are damaged, or too large for this"
            " precision. Take another file, or --amp_dtype float32 where there is that flag."
        )


def extract_features(model, loader, total, device, *, amp_dtype=torch.float32, keep_on_device=True):
    """L2-normalised features (total, D) float32 and labels (total,), of all ranks, on every rank.

    `loader` gives this rank's share of the `total` images: see loaders.evaluation_loader. `model`
    is in evaluation mode meanwhile. The result is on the device, or else on the CPU.
    """
    keep_on = device if keep_on_device else CPU
    share = extract_share([model], loader, device, amp_dtype=amp_dtype, keep_on=keep_on)
    return [gather_interleaved(rows, total) for rows in share]


@torch.no_grad()
def extract_share(models, loader, device, *, amp_dtype=torch.float32, keep_on):
    """[L2-normalised features (n, D) float32 of each model, labels (n,)] of this rank's n images.

    They are on the device `keep_on`; None each where `loader`, which is read once, gives no image.
    """
    features, labels = [[] for _ in models], []
    with contextlib.ExitStack() as modes:
        for model in models:
            modes.enter_context(evaluating(model))
        for images, targets in loader:
            images = images.to(device, non_blocking=True)
            for model, rows in zip(models, features, strict=True):
                with autocast(device, amp_dtype):
                    output = first_of(model(images))
                rows.append(F.normalize(output.float(), dim=1).to(keep_on))
            labels.append(targets.to(keep_on, non_blocking=True))
    return [torch.cat(rows) if rows else None for rows in (*features, labels)]


@torch.no_grad()
def describe_images(
    describe,
    paths,
    load,
    *,
    sizes=None,
    device=CPU,
    batch_size=16,
    num_workers=0,
    amp_dtype=torch.float32,
    title="features",
):
    """What `describe` makes of each image, in the order of `paths`, on every rank: (n, D) float32.

    `load(path)` gives an image (3, H, W), `describe` turns images (B, 3, H, W) on `device` into
    (B, D). Each rank reads a share, with a progress bar. Where images differ in shape, `sizes` has
    an entry for each, and only those with equal ones share a batch. The result is on the CPU.
    UserError for features that are not finite.
    """
    loader = equal_size_loader(
        paths,
        load,
        sizes or [None] * len(paths),
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )
    rows, numbers = [], []
    for images, batch in progress_bar(loader, title):
        with autocast(device, amp_dtype):
            output = describe(images.to(device, non_blocking=True))
        rows.append(output.float().cpu())
        numbers.append(batch)
    in_order = torch.cat(rows)[torch.cat(numbers).argsort()] if rows else None
    features = gather_interleaved(in_order, len(paths))
    require_finite(features, "the features of this network")
    return features


def whole_patches(model, images):
    """The images without the rows and columns, at the bottom and right, that fill no patch.

    The convolution of the official ViT drops them, ours refuses. Networks that do not embed
    patches side by side get their images as they are: (B, 3, H, W) -> (B, 3, H - H % P, W - W % P).
    """
    patch_size = patch_size_of(model)
    height, width = images.shape[-2:]
    return images[..., : height - height % patch_size, : width - width % patch_size]


def patch_size_of(model):
    """P of a ViT, ours or timm's; 1 for a network that takes images of any size."""
    projection = getattr(getattr(model, "patch_embed", None), "proj", None)
    if isinstance(projection, nn.Conv2d) and projection.stride == projection.kernel_size:
        return projection.kernel_size[0]
    return 1


class FrozenFeatures:
    """Images (B, 3, H, W) on any device -> what a linear head sees of them, (B, dim) float32.

    Of our ViTs [CLS] of the last `n_last_blocks` blocks, each after the final norm, side by side;
    with `avgpool_patchtokens`, which goes with one block only, [CLS] of the last interleaved with
    its mean patch token: cls_0, mean_0, cls_1, mean_1, ... Of other networks their output.
    UserError for more blocks than there are.
    """

    def __init__(
        self,
        backbone,
        embed_dim,
        device,
        *,
        n_last_blocks=4,
        avgpool_patchtokens=False,
        amp_dtype=torch.float32,
    ):
        self.backbone, self.device, self.amp_dtype = backbone.to(device), device, amp_dtype
        self.n_last_blocks, self.avgpool_patchtokens = n_last_blocks, avgpool_patchtokens
        self.dim = embed_dim
        if is_vit(backbone):
            self.check_blocks()
            self.dim *= n_last_blocks + avgpool_patchtokens

    def check_blocks(self):
        depth = len(self.backbone.blocks)
        if self.n_last_blocks > depth:
            raise UserError(
                f"--n_last_blocks {self.n_last_blocks}: this backbone has {depth} blocks."
            )
        if self.avgpool_patchtokens and self.n_last_blocks != 1:
            raise UserError(
                f"--avgpool_patchtokens true and --n_last_blocks {self.n_last_blocks} exclude each"
                " other: the mean patch token goes with the [CLS] of the last block alone,"
                " --n_last_blocks 1."
            )

    @torch.no_grad()
    def __call__(self, images):
        images = images.to(self.device, non_blocking=True)
        with autocast(self.device, self.amp_dtype):
            return self.extract(images).float()

    def extract(self, images):
        if not is_vit(self.backbone):
            return first_of(self.backbone(images))
        blocks = self.backbone.get_intermediate_layers(
            images, self.n_last_blocks, only_cls=not self.avgpool_patchtokens
        )
        features = torch.cat([tokens[:, 0] for tokens in blocks], dim=-1)
        if self.avgpool_patchtokens:
            mean_patch = blocks[-1][:, 1:].mean(dim=1)
            # [cls_0, mean_0, cls_1, mean_1, ...]: the order that the released heads were trained in
            features = torch.stack([features, mean_patch], dim=-1).flatten(1)
        return features
