# SPDX-License-Identifier: Apache-2.0
"""The backbone of an evaluation that needs what only a ViT has: patch tokens or attention maps."""

from dino.backbones import canonical_name
from dino.errors import UserError
from dino.weights.pretrained import open_backbone
from dino.weights.published import PUBLISHED_BACKBONES
from vision_transformer import ARCHITECTURES


def open_vit(args, reason, published=PUBLISHED_BACKBONES, rgb_only=True):
    """`open_backbone`; UserError unless that is a ViT, with `rgb_only` one for RGB photographs.

    `reason(arch)`: why no other network will do.
    """
    check_flag_is_vit(args, reason)  # rather than download another network
    pretrained = open_backbone(args, published=published)
    source = f"--pretrained_weights {args.pretrained_weights} ({pretrained.arch})"
    check_is_vit(pretrained.arch, source, reason)
    if rgb_only:
        pretrained.require_rgb(source)
    return pretrained


def check_flag_is_vit(args, reason):
    """Raise UserError if --arch decides and is not a ViT: before anything is opened."""
    if not args.pretrained_weights or "arch" in getattr(args, "given", ()):
        check_is_vit(args.arch, f"--arch {args.arch}", reason)


def check_is_vit(arch, source, reason):
    arch = canonical_name(arch)
    if arch not in ARCHITECTURES:
        raise UserError(
            f"{source}: {reason(arch)}. Take --arch {' or '.join(ARCHITECTURES)}, with"
            " --pretrained_weights of such a network."
        )
