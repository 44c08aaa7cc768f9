# SPDX-License-Identifier: Apache-2.0
"""Attention of [CLS] to the patches in the last block: images cut to patches, maps, and masks.

Shapes: h heads, P patch size, H x W pixels of an image of whole patches, R = H/P rows and C = W/P
columns of patches.
"""

import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from dino.data.augmentations import normalised
from dino.distributed import choose_device
from dino.errors import UserError
from dino.evaluation.features import require_finite
from dino.evaluation.vits import open_vit
from dino.weights.published import PUBLISHED_BACKBONES


def open_for_attention(args, published=PUBLISHED_BACKBONES, rgb_only=True):
    """`open_vit`, on --device."""
    device = choose_device(args.device)
    pretrained = open_vit(args, lacks_class_attention, published, rgb_only)
    pretrained.backbone.to(device)
    return pretrained


def lacks_class_attention(arch):
    """Why a network that is not one of vision_transformer.py has no attention to show."""
    if arch.startswith("xcit_"):
        reason = "XCiT attends from channel to channel, not from patch to patch"
    elif arch.startswith("timm:"):
        reason = "timm's networks do not return theirs"
    else:
        reason = "this network has no class token"
    return (
        f"what is shown here is the attention of a ViT's class token to the patches, and {reason}"
    )


def fit_to_patches(image, image_size, patch_size, name, flag="--image_size"):
    """(image of whole patches, (height, width) before the rest of a patch was cut off).

    `image`: PIL, or a tensor (C, H, W), which the result is then, too. `image_size` is [height,
    width], or [short side], which keeps the aspect ratio, or [0], the image as it is. Rows and
    columns are cut at the bottom and on the right, as in the official code. UserError, with the
    image's `name` and the `flag` of its size, where no patch fits.
    """
    if image_size != [0]:
        image = F.resize(image, image_size, InterpolationMode.BILINEAR)
    _, height, width = F.get_dimensions(image)
    rows, columns = height // patch_size, width // patch_size
    if rows == 0 or columns == 0:
        raise UserError(
            f"{name}: {height} x {width} pixels do not hold a patch of {patch_size} x {patch_size}."
            f" Enlarge it with {flag}."
        )
    return F.crop(image, 0, 0, rows * patch_size, columns * patch_size), (height, width)


def class_attention(pretrained, image):
    """attention_of_pixels of a PIL image, or of levels uint8 (C, H, W): (h, R, C).

    UserError for values that are not finite.
    """
    pixels = normalised(image, pretrained.mean, pretrained.std)
    maps = attention_of_pixels(pretrained.backbone, pixels)
    require_finite(maps, f"the attention maps of {pretrained.arch}")
    return maps


@torch.no_grad()
def attention_of_pixels(backbone, pixels):
    """Each head's attention of [CLS] to the patches of a normalised image (C, H, W): (h, R, C).

    Softmax probabilities; what is missing to a sum of 1 is what [CLS] gives itself. The values are
    those of `get_last_selfattention`, without its N x N numbers per head: for a photograph of 12
    megapixels and P = 16 those would be 8 GiB.
    """
    tokens = backbone.prepare_tokens(pixels[None].to(backbone.cls_token.device))  # (1, N, D)
    for block in backbone.blocks[:-1]:
        tokens = block(tokens)
    last = backbone.blocks[-1]
    queries, keys, _ = last.attn.queries_keys_values(last.norm1(tokens))  # (1, h, N, D/h)
    attention = (queries[0, :, :1] @ keys[0].transpose(-2, -1) * last.attn.scale).softmax(dim=-1)
    rows = pixels.shape[-2] // backbone.patch_embed.patch_size
    return attention[:, 0, 1:].unflatten(1, (rows, -1))


def keep_mass(maps, share):
    """Masks of the patches that hold `share` of each map's sum, the most attended first.

    (..., R, C) -> bool (..., R, C). A patch is dropped while it and all smaller ones hold at most
    1 - `share` (the official rule), so that what is kept holds at least `share`, and would not
    without its smallest patch. Computed in float64, so that no device rounds its own way.
    """
    values, order = maps.double().flatten(-2).sort(dim=-1, stable=True)
    held = (values / values.sum(dim=-1, keepdim=True)).cumsum(dim=-1)  # by a patch and all smaller
    kept = held > 1 - share
    return torch.zeros_like(kept).scatter_(-1, order, kept).view(maps.shape)


def upsample(maps, patch_size):
    """Every patch as P x P equal pixels: (..., R, C) -> (..., H, W)."""
    return maps.repeat_interleave(patch_size, dim=-2).repeat_interleave(patch_size, dim=-1)
