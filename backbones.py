# SPDX-License-Identifier: Apache-2.0
"""`--arch` -> (backbone, embed_dim): the only place that knows what a name means."""

import difflib

import torch
from torch import nn

import vision_transformer as vits
from errors import UserError

# Architectures of torchvision that cannot serve, and what can.
REFUSED = {
    "vit_": "torchvision's ViT takes one image size only, so not crops of two; take --arch"
    " vit_tiny, vit_small,"
    " vit_base or vit_large with --patch_size",
    "maxvit": "it takes one image size only, so not crops of two",
    "squeezenet": "it classifies by a convolution and has no feature vector; take --arch"
    " shufflenet_v2_x1_0",
}


def build_backbone(arch, patch_size=16, *, img_size=224, in_chans=3, drop_path_rate=0.0):
    """(backbone, embed_dim): a randomly initialised module (B, C, H, W) -> (B, embed_dim), and
    that width.

    `arch` is one of vision_transformer's, `deit_*` for these by their old name, a classifier of
    torchvision, the official `xcit_*`, or `timm:NAME`. `patch_size` and `img_size` matter to our
    ViTs only, `in_chans` to these and timm's. Raises UserError for any other name, with those that
    are close.
    """
    arch = canonical_name(arch)
    if arch in vits.ARCHITECTURES:
        backbone = vits.build_vit(
            arch, patch_size, img_size=img_size, in_chans=in_chans, drop_path_rate=drop_path_rate
        )
        return backbone, backbone.embed_dim
    if arch.startswith(("timm:", "xcit_")):
        return build_timm(arch, in_chans, drop_path_rate)
    if arch in torchvision_classifiers():
        return build_torchvision(arch, drop_path_rate)
    raise UserError(unknown_arch(arch))


def canonical_name(arch):
    """The ViT that the official code means by `deit_small`; other names as they are."""
    return arch.replace("deit_", "vit_") if arch.startswith("deit_") else arch


def is_vit(backbone):
    """True for our ViT, which has patches, attention maps and intermediate layers."""
    return isinstance(backbone, vits.VisionTransformer)


def torchvision_classifiers():
    import torchvision.models

    return torchvision.models.list_models(module=torchvision.models)


def unknown_arch(arch):
    names = [*vits.ARCHITECTURES, *XCIT_NAMES, *torchvision_classifiers()]
    close = difflib.get_close_matches(arch, names, n=4, cutoff=0.5)
    hint = (
        f"Close to it: {', '.join(close)}."
        if close
        else f"Our ViTs are {', '.join(vits.ARCHITECTURES)}."
    )
    return f"--arch {arch}: unknown. {hint} Any model of timm is --arch timm:NAME."


# The official names, which are those of torch.hub facebookresearch/xcit.
XCIT_NAMES = [
    f"xcit_{size}_p{patch}"
    for size in ("nano_12", "tiny_12", "tiny_24", "small_12", "small_24", "medium_24", "large_24")
    for patch in (16, 8)
]


def build_timm(arch, in_chans, drop_path_rate):
    import timm  # a second or two: only for those who ask

    name = arch.removeprefix("timm:")
    if name in XCIT_NAMES:
        name += "_224"  # timm's name for the same network; it takes any size
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.5)
        raise UserError(
            f"--arch {arch}: timm has no model {name!r}. Close to it: {', '.join(close) or 'none'}."
        )
    options = dict(
        pretrained=False, num_classes=0, in_chans=in_chans, drop_path_rate=drop_path_rate
    )
    try:
        backbone = timm.create_model(name, dynamic_img_size=True, **options)  # crops of two sizes
    except TypeError:
        backbone = timm.create_model(name, **options)
    return (
        backbone,
        backbone.head_hidden_size,
    )  # num_features is the width before a last hidden layer


def build_torchvision(arch, drop_path_rate):
    import torchvision.models

    for prefix, reason in REFUSED.items():
        if arch.startswith(prefix):
            raise UserError(f"--arch {arch}: {reason}.")
    options = (
        {"aux_logits": False, "init_weights": True} if arch in ("googlenet", "inception_v3") else {}
    )
    backbone = torchvision.models.get_model(arch, weights=None, **options)
    # The classifier is the last linear layer, whatever its name; what pools or normalises before
    # it stays.
    name, classifier = [
        item for item in backbone.named_modules() if isinstance(item[1], nn.Linear)
    ][-1]
    backbone.set_submodule(name, nn.Identity())
    set_dropout_rates(backbone, drop_path_rate)
    return backbone, classifier.in_features


def set_dropout_rates(backbone, drop_path_rate):
    """Stochastic depth that rises to `drop_path_rate`, and no dropout: the teacher, in train mode
    too, has neither.
    """
    from torchvision.ops import StochasticDepth

    branches = [module for module in backbone.modules() if isinstance(module, StochasticDepth)]
    highest = max((branch.p for branch in branches), default=0.0)
    for branch in branches:
        branch.p = drop_path_rate * branch.p / highest if highest else 0.0
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def has_batchnorms(model):
    """True if there is a batch norm, synchronised or not, anywhere in `model`."""
    batchnorms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return any(isinstance(module, batchnorms) for module in model.modules())


@torch.no_grad()
def check_takes_sizes(backbone, arch, sizes, in_chans=3):
    """Raise UserError unless `backbone` gives one feature vector for square images of each of
    `sizes`.
    """
    training = backbone.training
    backbone.eval()
    for size in sizes:
        try:
            features = backbone(torch.zeros(1, in_chans, size, size))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise UserError(
                f"--arch {arch} does not take crops of {size} pixels: {error}."
            ) from None
        features = features[0] if isinstance(features, tuple) else features
        if features.ndim != 2:
            shape = tuple(features.shape)
            raise UserError(
                f"--arch {arch} gives features of shape {shape}, not one vector per image."
            )
    backbone.train(training)
