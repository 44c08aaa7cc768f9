# SPDX-License-Identifier: Apache-2.0
"""`--arch` -> (backbone, embed_dim). A backbone of your own is one more row of FAMILIES, below."""

import contextlib
import difflib
from collections.abc import Callable
from dataclasses import dataclass

import torchvision.models
from torch import nn
from torchvision.ops import StochasticDepth

import vision_transformer as vits
from dino.errors import UserError
from dino.small_resnet import CELLS, ResNetNano, use_small_stem

# The official names, which are those of torch.hub facebookresearch/xcit; timm has the networks.
XCIT_NAMES = [
    f"xcit_{size}_p{patch}"
    for size in ("nano_12", "tiny_12", "tiny_24", "small_12", "small_24", "medium_24", "large_24")
    for patch in (16, 8)
]

# Classifiers of torchvision that cannot serve, by how their names begin, and why.
REFUSED = {
    "vit_": "torchvision's ViT takes one image size only, so not crops of two; ours are vit_tiny,"
    " vit_small, vit_base and vit_large, with --patch_size",
    "maxvit": "it takes one image size only, so not crops of two",
    "squeezenet": "it classifies by a convolution and has no feature vector; shufflenet_v2_x1_0 is"
    " as small and has one",
}


@dataclass(frozen=True)
class Family:
    """A row of FAMILIES: which names belong to it, which of them it refuses, how it builds one.

    `has(arch)` -> bool; `check(arch)` raises UserError; `build(arch, *, patch_size, img_size,
    in_chans, drop_path_rate, stem)` -> (backbone, embed_dim). Options that mean nothing to it are
    ignored. `has_stem(arch)` -> bool: whether `stem` means something to it.
    """

    has: Callable
    build: Callable
    check: Callable = lambda arch: None
    has_stem: Callable = lambda arch: False


def build_backbone(
    arch, patch_size=16, *, img_size=224, in_chans=3, drop_path_rate=0.0, stem="auto"
):
    """(backbone, embed_dim): a module (B, C, H, W) -> (B, embed_dim) with random weights.

    `arch` is one of vision_transformer's, `deit_*` for these by their old name, resnet_nano,
    resnet_nano_2x2, a classifier of torchvision, an official `xcit_*`, or `timm:NAME`. `patch_size`
    and `img_size` matter to our ViTs only. `stem`, of ResNets, is imagenet, small, or auto for the
    network's own. Raises UserError for any other name.
    """
    check_arch(arch, stem)
    arch = canonical_name(arch)
    return family_of(arch).build(
        arch,
        patch_size=patch_size,
        img_size=img_size,
        in_chans=in_chans,
        drop_path_rate=drop_path_rate,
        stem=stem,
    )


def check_arch(arch, stem="auto"):
    """Raise UserError, with the closest known names, for what `build_backbone` refuses."""
    arch = canonical_name(arch)
    family = family_of(arch)
    family.check(arch)
    if stem != "auto" and not family.has_stem(arch):
        raise UserError(f"--stem {stem}: only ResNets have such a stem, not --arch {arch}.")


def canonical_name(arch):
    """The ViT that the official code means by `deit_small`; other names unchanged."""
    return f"vit_{arch.removeprefix('deit_')}" if arch.startswith("deit_") else arch


def family_of(arch):
    """The row of FAMILIES that `arch` belongs to; UserError if there is none."""
    for family in FAMILIES:
        if family.has(arch):
            return family
    close = close_names(arch, [*vits.ARCHITECTURES, *CELLS, *XCIT_NAMES, *torchvision_names()])
    raise UserError(f"--arch {arch}: unknown. {close} Any model of timm is --arch timm:NAME.")


def close_names(name, names):
    close = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    return (
        f"Close to it: {', '.join(close)}." if close else f"Ours: {', '.join(vits.ARCHITECTURES)}."
    )


def is_vit(backbone):
    """True for our ViT, which has patches, attention maps and intermediate layers."""
    return isinstance(backbone, vits.VisionTransformer)


# ---- our ViTs ----


def build_vit(arch, *, patch_size, stem, **options):
    backbone = vits.build_vit(arch, patch_size, **options)
    return backbone, backbone.embed_dim


# ---- our ResNet ----


def build_nano(arch, *, in_chans, stem, **_):
    backbone = ResNetNano(in_chans, stem, CELLS[arch])
    return backbone, backbone.embed_dim


# ---- timm, which has the official XCiT too ----


def is_timm(arch):
    return arch.startswith(("timm:", "xcit_"))


def timm_name(arch):
    """timm's name of `arch`; its XCiT called 224 takes any size."""
    return f"{arch}_224" if arch in XCIT_NAMES else arch.removeprefix("timm:")


def check_timm(arch):
    import timm  # a second or two: only for those who ask

    if not timm.is_model(timm_name(arch)):
        close = close_names(timm_name(arch), timm.list_models())
        raise UserError(f"--arch {arch}: unknown to timm. {close}")


def build_timm(arch, *, in_chans, drop_path_rate, **_):
    import timm

    options = dict(num_classes=0, in_chans=in_chans, drop_path_rate=drop_path_rate)
    try:  # crops of two sizes
        backbone = timm.create_model(timm_name(arch), dynamic_img_size=True, **options)
    except TypeError:
        try:
            backbone = timm.create_model(timm_name(arch), **options)
        except TypeError as error:
            raise UserError(f"--arch {arch}: timm cannot build it for DINO: {error}.") from None
    # not num_features, the width before a last hidden layer
    return backbone, backbone.head_hidden_size


# ---- torchvision ----


def torchvision_names():
    return torchvision.models.list_models(module=torchvision.models)


def check_torchvision(arch):
    for prefix, reason in REFUSED.items():
        if arch.startswith(prefix):
            raise UserError(f"--arch {arch}: {reason}.")


def is_torchvision_resnet(arch):
    return arch.startswith(("resnet", "resnext", "wide_resnet"))


def build_torchvision(arch, *, in_chans, drop_path_rate, stem, **_):
    auxiliary = arch in ("googlenet", "inception_v3")  # which have classifiers inside too
    options = dict(aux_logits=False, init_weights=True) if auxiliary else {}
    backbone = torchvision.models.get_model(arch, weights=None, **options)
    linear = [item for item in backbone.named_modules() if isinstance(item[1], nn.Linear)]
    # the classifier is the last of them, by whatever name; what pools or normalises before it stays
    name, classifier = linear[-1]
    backbone.set_submodule(name, nn.Identity())
    set_dropout_rates(backbone, drop_path_rate)
    if in_chans != 3:
        take_channels(backbone, in_chans)
    if stem == "small":
        use_small_stem(backbone)
    return backbone, classifier.in_features


def take_channels(backbone, in_chans):
    """Give the first convolution `in_chans` input channels, with new weights from its own range."""
    name, first = next(item for item in backbone.named_modules() if isinstance(item[1], nn.Conv2d))
    options = ("out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")
    conv = nn.Conv2d(
        in_chans,
        **{option: getattr(first, option) for option in options},
        bias=first.bias is not None,
    )
    nn.init.normal_(conv.weight, std=first.weight.std().item())
    backbone.set_submodule(name, conv)
    if hasattr(backbone, "transform_input"):
        backbone.transform_input = False  # googlenet's and inception's, of three channels


def set_dropout_rates(backbone, drop_path_rate):
    """Stochastic depth that rises to `drop_path_rate`, and no dropout.

    The teacher, which is in train mode too, has neither: its targets must not be noisy.
    """
    branches = [module for module in backbone.modules() if isinstance(module, StochasticDepth)]
    highest = max((branch.p for branch in branches), default=0.0)
    for branch in branches:
        branch.p = drop_path_rate * branch.p / highest if highest else 0.0
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


FAMILIES = [  # the first that has a name builds it
    Family(vits.ARCHITECTURES.__contains__, build_vit),
    Family(CELLS.__contains__, build_nano, has_stem=CELLS.__contains__),
    Family(is_timm, build_timm, check_timm),
    Family(
        lambda arch: arch in torchvision_names(),
        build_torchvision,
        check_torchvision,
        is_torchvision_resnet,
    ),
]


# ---- any backbone ----


def first_of(output):
    """The feature vectors (B, D) of a backbone; the official XCiT returns a tuple, [CLS] first."""
    return output[0] if isinstance(output, tuple) else output


def has_batchnorms(model):
    """True if there is a batch norm, synchronised or not, anywhere in `model`."""
    batchnorms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return any(isinstance(module, batchnorms) for module in model.modules())


@contextlib.contextmanager
def evaluating(model):
    """`model` in evaluation mode meanwhile, and then as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
