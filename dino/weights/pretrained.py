# SPDX-License-Identifier: Apache-2.0
"""A backbone with weights: from a file of any layout, or those that the authors published."""

import math
import re
from dataclasses import dataclass, fields

import torch
from torch import nn

from dino.backbone_checks import check_takes_sizes
from dino.backbones import build_backbone, canonical_name, check_arch, is_timm
from dino.command_line import tell_idle
from dino.data.augmentations import IMAGENET_MEAN, IMAGENET_STD, MEANS, STDS, eval_transform
from dino.data.channels import MOST_CHANNELS, RGB
from dino.data.levels import HIGHEST_WHITE, set_white
from dino.distributed import print0
from dino.errors import UserError
from dino.json_files import is_number
from dino.printable import brief, printable
from dino.small_resnet import STEMS
from dino.weights.files import flags_in, is_named, without_prefix
from dino.weights.layouts import in_our_names, read_weights
from dino.weights.loading import check_fits, list_names, load_exactly
from dino.weights.published import PUBLISHED_BACKBONES, download, published_entry
from vision_transformer import ARCHITECTURES

HEADS = ("head.", "fc.", "classifier.")  # how names of a classifier or of DINO's head begin


@dataclass
class Pretrained:
    """A backbone with its weights, in evaluation mode, and how to feed it."""

    backbone: nn.Module
    embed_dim: int
    arch: str
    patch_size: int
    image_size: int = 224
    mean: tuple = IMAGENET_MEAN
    std: tuple = IMAGENET_STD
    stem: str = "auto"  # of a ResNet
    shrink_images: int = 0  # pixels of the shorter side, before anything else; 0: as they are
    white: float = 0.0  # what stands for white in images of more than 8 bits: see levels.set_white

    @property
    def in_chans(self):
        """Channels of its images: as many as have a mean."""
        return len(self.mean)

    @property
    def description(self):
        """How to build and feed the backbone: what stands beside the weights, as plain values."""
        return {name: getattr(self, name) for name in FIELDS}

    def require_rgb(self, source):
        """Raise UserError, which begins with `source`, unless its images are RGB photographs."""
        if self.in_chans != RGB:
            raise UserError(
                f"{source}: takes images of {self.in_chans} channels, and this is for RGB"
                " photographs. eval_knn.py, eval_linear.py, finetune.py, extract_features.py and"
                " visualize_attention.py take others."
            )

    @property
    def transform(self):
        """PIL image, or array of other channels -> normalised central crop (C, size, size)."""
        return eval_transform(self.image_size, self.mean, self.std, self.shrink_images)


# of Pretrained, that a file may state
FIELDS = tuple(f.name for f in fields(Pretrained) if f.name not in ("backbone", "embed_dim"))


def open_backbone(args, image_size=None, published=PUBLISHED_BACKBONES):
    """The Pretrained that the flags of `add_weights_arguments` ask for.

    A checkpoint that says what it holds decides; a flag given on the command line (`args.given`)
    that contradicts it is an error. Without --pretrained_weights: the weights in the table
    `published`. `image_size` overrides the checkpoint's. From here on this process reads images
    of more than 8 bits as the backbone's training did. UserError unless the backbone takes images
    of that size.
    """
    described = {"arch": canonical_name(args.arch), "patch_size": args.patch_size}
    if args.pretrained_weights:
        source = f"--pretrained_weights {args.pretrained_weights}"
        checkpoint = read_weights(args.pretrained_weights)
        weights = backbone_weights(checkpoint, args.checkpoint_key, args.pretrained_weights)
        stated = describe_backbone(checkpoint, weights, source)
        check_given_flags(getattr(args, "given", {}), stated, args.pretrained_weights)
        described |= stated
    else:
        tell_idle(args, ("checkpoint_key",), "No --pretrained_weights")
        source = f"the published weights of {described['arch']}"
        weights = published_weights(described["arch"], described["patch_size"], published)
    arch, patch_size = described["arch"], described["patch_size"]
    stem, in_chans = described.get("stem", "auto"), len(described.get("mean", IMAGENET_MEAN))
    backbone, embed_dim = build_with(weights, arch, patch_size, source, stem, in_chans)
    print_loaded(backbone, arch, source)
    size = image_size or described.get("image_size") or trained_img_size(weights, arch, patch_size)
    pretrained = Pretrained(backbone.eval(), embed_dim, **{**described, "image_size": size})
    origin = "--image_size" if image_size else f"{source}: image_size"
    check_takes_sizes(backbone, arch, [size], in_chans, f"{origin} {size}: {arch}")
    set_white(pretrained.white)
    return pretrained


def check_given_flags(given, stated, path):
    """Raise UserError for a flag on the command line that contradicts what the file states."""
    for flag in ("arch", "patch_size"):
        wanted = canonical_name(str(given.get(flag)))
        if flag in given and flag in stated and wanted != str(stated[flag]):
            raise UserError(
                f"--{flag} {given[flag]}: {path} holds a backbone with {flag} {stated[flag]}."
                " Leave the flag out."
            )


def build_with(weights, arch, patch_size, source, stem="auto", in_chans=3):
    """(backbone, embed_dim) that holds the `weights`; UserError where they do not fit."""
    img_size = trained_img_size(weights, arch, patch_size)
    options = dict(img_size=img_size, stem=stem, in_chans=in_chans)
    if is_timm(arch):  # a file of 2 KB may name one of 7 billion weights
        with torch.device("meta"):
            empty, _ = build_backbone(arch, patch_size, **options)
        check_fits(empty, weights_for(empty, weights, arch), f"{source}, as --arch {arch},")
    backbone, embed_dim = build_backbone(arch, patch_size, **options)
    fit_weights(backbone, weights, arch, source)
    return backbone, embed_dim


def print_loaded(backbone, arch, source):
    tensors = len(backbone.state_dict())
    print0(printable(f"Loaded {tensors} of {tensors} tensors of {arch} from {source}."))


def describe_backbone(checkpoint, weights, source):
    """What the shapes of the backbone's weights and the checkpoint's entries say of it, checked."""
    described = vit_in(weights) | describe(checkpoint)
    check_description(described, source)
    return described


def describe(checkpoint):
    """What a checkpoint says of its backbone: a dict with some of the fields of Pretrained.

    `backbone.pth` says it in entries of its own, a training checkpoint, ours or official, in
    `args`.
    """
    described = {name: checkpoint[name] for name in FIELDS if name in checkpoint}
    args = flags_in(checkpoint)
    for name in FIELDS:
        value = args.get("global_crop_size" if name == "image_size" else name)
        if value is not None:  # timm's checkpoints have None for a flag that was not given
            described[name] = value
    if isinstance(described.get("arch"), str):
        described["arch"] = canonical_name(described["arch"])
        if re.fullmatch(r"vit_\w+_patch\d+_\d+", described["arch"]):  # timm's: the shapes say more
            del described["arch"]
    return described


def check_description(described, source):
    """Raise UserError if a field that a file states has an invalid type or range."""

    def is_count(value):
        return type(value) is int and 0 < value <= 2**13

    def is_color(value, lowest, highest):
        numbers = isinstance(value, tuple | list) and 0 < len(value) <= MOST_CHANNELS
        return numbers and all(is_number(v) and lowest <= v <= highest for v in value)

    right = {
        "arch": lambda value: isinstance(value, str),
        "patch_size": is_count,
        "stem": lambda value: isinstance(value, str) and value in STEMS,
        "image_size": is_count,
        "shrink_images": lambda value: type(value) is int and 0 <= value <= 2**13,
        "white": lambda value: is_number(value) and 0 <= value <= HIGHEST_WHITE,
        "mean": lambda value: is_color(value, *MEANS),
        "std": lambda value: is_color(value, *STDS),
    }
    for name, value in described.items():
        if not right[name](value):
            raise UserError(f"{source} has an invalid {name}: {brief(value)}.")
    if len({len(described.get(name, ())) for name in ("mean", "std")}) > 1:
        raise UserError(f"{source} has a mean and a std of different numbers of channels.")
    if "arch" in described:
        try:
            check_arch(described["arch"], described.get("stem", "auto"))
        except UserError as error:
            raise UserError(f"{source} names a network that cannot be built: {error}") from None


def vit_in(weights):
    """{"arch", "patch_size"} of one of our ViTs, from the shapes of its weights, or {}."""
    try:
        width, depth = weights["cls_token"].shape[-1], 1 + max(map(block_number, weights))
        patch_size = weights["patch_embed.proj.weight"].shape[-1]
    except (KeyError, AttributeError, IndexError):
        return {}
    for arch, sizes in ARCHITECTURES.items():
        if (sizes["embed_dim"], sizes["depth"]) == (width, depth):
            return {"arch": arch, "patch_size": patch_size}
    return {}


def block_number(name):
    """N of the weights of `blocks.N`, -1 for other weights."""
    match = re.match(r"blocks\.(\d{1,9})\.", name)
    return int(match[1]) if match else -1


def trained_img_size(weights, arch, patch_size):
    """Side in pixels of the images for whose patches a ViT has position embeddings; else 224."""
    positions = weights.get("pos_embed")  # (1, 1 + patches, D), or it is found not to fit
    known = isinstance(positions, torch.Tensor) and positions.ndim == 3 and positions.shape[1] > 1
    if arch not in ARCHITECTURES or not known:
        return 224
    return math.isqrt(positions.shape[1] - 1) * patch_size


def backbone_weights(checkpoint, key, path, flag="--pretrained_weights"):
    """The backbone's state dict in any layout: ours, the official full one, or a bare backbone,
    which may have transformers' names.

    The prefixes of wrappers and the weights of DINO's head are taken off.
    """
    if not isinstance(checkpoint, dict):
        kind = type(checkpoint).__name__
        raise UserError(f"{flag} {path} holds a {kind}, not the weights of a network by name.")
    if isinstance(checkpoint.get(key), dict):
        state_dict = checkpoint[key]
    elif checkpoint and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        state_dict = checkpoint
    else:
        raise UserError(f"{flag} {path} {no_weights(checkpoint, key, flag)}")
    if not is_named(state_dict):
        raise UserError(f"{flag} {path} holds weights whose names are not text.")
    check_one_network(state_dict, f"{flag} {path}")
    state_dict = without_prefix(state_dict, "module.")
    if any(name.startswith("backbone.") for name in state_dict):
        state_dict = {
            name: value for name, value in state_dict.items() if name.startswith("backbone.")
        }
    return in_our_names(without_prefix(state_dict, "backbone."))


def no_weights(checkpoint, key, flag):
    """Why a dict has no weights under `key`, and what to do, for a sentence about its file."""
    found = f"holds {brief(checkpoint[key])} as" if key in checkpoint else "has no"
    reason = f"{found} entry {key!r}; it has {list_names(checkpoint)}."
    if flag != "--init_from":
        return f"{reason} Choose one with --checkpoint_key."
    return f"{reason} Save its weights in a file of their own."


def check_one_network(state_dict, source):
    """Raise UserError if two weights have one name without prefixes, but for those of heads."""
    found = {}
    for name in state_dict:
        bare = name.removeprefix("module.").removeprefix("backbone.")
        other = found.setdefault(bare, name)
        if other != name and not bare.startswith(HEADS):
            raise UserError(
                f"{source} holds two networks: {brief(other)} and {brief(name)}. Save the weights"
                " of one of them in a file of their own."
            )


def published_weights(arch, patch_size, published=PUBLISHED_BACKBONES):
    """State dict of a released backbone of a table, downloaded once into torch.hub's folder."""
    check_arch(arch)
    name = published_entry(published, arch, patch_size)
    if name is None:
        raise UserError(
            f"there are no published weights for --arch {arch} --patch_size {patch_size}: give"
            " --pretrained_weights."
        )
    file = f"{name}/{name}.pth"

    def check(content):
        weights = backbone_weights(content, "teacher", file, flag="the published file")
        build_with(weights, arch, patch_size, f"the published file {file}")

    return download(file, "without --pretrained_weights the published ones are used", check)


def fit_weights(backbone, weights, arch, source):
    """Load every tensor of `backbone`, or raise; a classifier that it lacks is ignored."""
    load_exactly(backbone, weights_for(backbone, weights, arch), f"{source}, as --arch {arch},")


def weights_for(backbone, weights, arch):
    """`weights` in the names of `backbone`, without a classifier that it lacks."""
    if arch.startswith("xcit_"):
        from timm.models.xcit import checkpoint_filter_fn  # the official keys, in timm's names

        weights = checkpoint_filter_fn(dict(weights), backbone)
    return without_classifier(weights, backbone)


def without_classifier(weights, backbone):
    """`weights` without those of a classifier that `backbone` lacks."""
    own = backbone.state_dict()
    return {
        name: value for name, value in weights.items() if name in own or not name.startswith(HEADS)
    }


def load_pretrained_weights(model, pretrained_weights, checkpoint_key, model_name, patch_size):
    """Official interface: load a file or, if it is '', the published weights into `model`.

    Unlike the official function it raises UserError for a file that does not exist or does not fit.
    """
    if pretrained_weights:
        checkpoint = read_weights(pretrained_weights)
        weights = backbone_weights(checkpoint, checkpoint_key, pretrained_weights)
    else:
        weights = published_weights(model_name, patch_size)
    source = pretrained_weights or "the published weights"
    fit_weights(model, weights, model_name, source)
    print_loaded(model, model_name, source)
