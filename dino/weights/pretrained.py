# SPDX-License-Identifier: Apache-2.0
"""A frozen backbone: from a checkpoint of any layout, or the weights that the authors published."""

import hashlib
import http.client
import math
import re
import textwrap
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from augmentations import IMAGENET_MEAN, IMAGENET_STD
from backbones import build_backbone, canonical_name, check_arch, check_takes_sizes
from checkpoints import DamagedFile, flags_in, is_named, load_exactly, read, without_prefix
from distributed import print0
from errors import UserError
from linear_heads import load_head
from metrics import progress_bar
from vision_transformer import ARCHITECTURES

PUBLISHED_URL = "https://dl.fbaipublicfiles.com/dino/"
PUBLISHED_BACKBONES = {  # (arch, patch size or None where it is in the name): file
    ("vit_small", 16): "dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    ("vit_small", 8): "dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
    ("vit_base", 16): "dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    ("vit_base", 8): "dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth",
    (
        "xcit_small_12_p16",
        None,
    ): "dino_xcit_small_12_p16_pretrain/dino_xcit_small_12_p16_pretrain.pth",
    ("xcit_small_12_p8", None): "dino_xcit_small_12_p8_pretrain/dino_xcit_small_12_p8_pretrain.pth",
    (
        "xcit_medium_24_p16",
        None,
    ): "dino_xcit_medium_24_p16_pretrain/dino_xcit_medium_24_p16_pretrain.pth",
    (
        "xcit_medium_24_p8",
        None,
    ): "dino_xcit_medium_24_p8_pretrain/dino_xcit_medium_24_p8_pretrain.pth",
    ("resnet50", None): "dino_resnet50_pretrain/dino_resnet50_pretrain.pth",
}
# Linear heads on these: file, and the flags of eval_linear.py with which they were trained.
PUBLISHED_HEADS = {
    ("vit_small", 16): (
        "dino_deitsmall16_pretrain/dino_deitsmall16_linearweights.pth",
        dict(n_last_blocks=4, avgpool_patchtokens=False),
    ),
    ("vit_small", 8): (
        "dino_deitsmall8_pretrain/dino_deitsmall8_linearweights.pth",
        dict(n_last_blocks=4, avgpool_patchtokens=False),
    ),
    ("vit_base", 16): (
        "dino_vitbase16_pretrain/dino_vitbase16_linearweights.pth",
        dict(n_last_blocks=1, avgpool_patchtokens=True),
    ),
    ("vit_base", 8): (
        "dino_vitbase8_pretrain/dino_vitbase8_linearweights.pth",
        dict(n_last_blocks=1, avgpool_patchtokens=True),
    ),
    ("resnet50", None): ("dino_resnet50_pretrain/dino_resnet50_linearweights.pth", {}),
}
# The authors publish no hashes. This one, of the only file for which several others do (343242485
# bytes), is the same wherever it is given.
SHA256 = {
    "dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth": (
        "bf34ad0f424b9029b593e8dc3ed553bf26e88bcba0d32bf3e62a6209cb64c85e"
    ),
}
CHUNK, PATIENCE = 2**20, 60  # bytes of a download at a time; seconds without any


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


def load_backbone(args, given):
    """The Pretrained that the flags of `add_weights_arguments` ask for.

    A checkpoint that says what it holds decides; one of the flags `given` on the command line that
    says otherwise is an error. Without --pretrained_weights: the published weights.
    """
    if args.pretrained_weights:
        source = f"--pretrained_weights {args.pretrained_weights}"
        checkpoint = read(args.pretrained_weights)
        weights = backbone_weights(checkpoint, args.checkpoint_key, args.pretrained_weights)
        described = vit_in(weights) | describe(checkpoint)
        check_description(described, source)
    else:
        described = {}
    for flag in ("arch", "patch_size"):
        stated = str(described.get(flag))
        if flag in given and flag in described and canonical_name(str(given[flag])) != stated:
            raise UserError(
                f"--{flag} {given[flag]}: {args.pretrained_weights} holds a backbone with {flag}"
                f" {described[flag]}. Leave the flag out."
            )
    options = {"arch": canonical_name(args.arch), "patch_size": args.patch_size, **described}
    arch, patch_size = options["arch"], options["patch_size"]
    if not args.pretrained_weights:
        weights, source = published_weights(arch, patch_size), f"the published weights of {arch}"
    backbone, embed_dim = build_with(weights, arch, patch_size, source)
    print_loaded(backbone, arch, source)
    return Pretrained(backbone.eval(), embed_dim, **options)


def build_with(weights, arch, patch_size, source):
    """(backbone, embed_dim) that holds the `weights`; UserError where they do not fit."""
    img_size = trained_img_size(weights, patch_size) if arch in ARCHITECTURES else 224
    backbone, embed_dim = build_backbone(arch, patch_size, img_size=img_size)
    fit_weights(backbone, weights, arch, source)
    return backbone, embed_dim


def print_loaded(backbone, arch, source):
    tensors = len(backbone.state_dict())
    print0(f"Loaded {tensors} of {tensors} tensors of {arch} from {source}.")


def check_image_size(pretrained):
    """Raise UserError unless the backbone takes images of its `image_size`."""
    arch, size = pretrained.arch, pretrained.image_size
    check_takes_sizes(pretrained.backbone, arch, [size], source=f"--image_size {size}: {arch}")


def describe(checkpoint):
    """What a checkpoint says of its backbone: a dict with some of the fields of Pretrained.

    `backbone.pth` says it in entries of its own, a training checkpoint, ours or official, in
    `args`.
    """
    args = flags_in(checkpoint)
    names = {name: name for name in ("arch", "patch_size", "image_size", "mean", "std")}
    described = {field: checkpoint[name] for field, name in names.items() if name in checkpoint}
    names = {"arch": "arch", "patch_size": "patch_size", "image_size": "global_crop_size"}
    described |= {field: args[name] for field, name in names.items() if name in args}
    if isinstance(described.get("arch"), str):
        described["arch"] = canonical_name(described["arch"])
    return described


def check_description(described, source):
    """Raise UserError unless the fields that a file states can be what their names say."""

    def is_count(value):
        return type(value) is int and 0 < value <= 2**13

    def is_color(value, lowest=-math.inf):
        numbers = isinstance(value, tuple | list) and len(value) == 3
        return numbers and all(isinstance(v, int | float) and lowest < v < math.inf for v in value)

    right = {
        "arch": lambda value: isinstance(value, str),
        "patch_size": is_count,
        "image_size": is_count,
        "mean": is_color,
        "std": lambda value: is_color(value, lowest=0.0),
    }
    for name, value in described.items():
        if not right[name](value):
            shown = textwrap.shorten(repr(value), 60)
            raise UserError(f"{source} says that {name} is {shown}, which cannot be.")


def vit_in(weights):
    """{"arch", "patch_size"} of one of our ViTs, which its shapes tell, or {}."""
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
    match = re.match(r"blocks\.(\d+)\.", name)
    return int(match[1]) if match else -1


def trained_img_size(weights, patch_size):
    """Side in pixels of the images whose patches the position embeddings of a ViT are for."""
    positions = weights.get("pos_embed")  # (1, 1 + patches, D), or else it is found not to fit
    known = isinstance(positions, torch.Tensor) and positions.ndim == 3 and positions.shape[1] > 1
    return math.isqrt(positions.shape[1] - 1) * patch_size if known else 224


def backbone_weights(checkpoint, key, path, flag="--pretrained_weights"):
    """The backbone's state dict in any layout: ours, the official full one, or a bare backbone.

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
        raise UserError(
            f"{flag} {path} has no entry {key!r}; it has"
            f" {', '.join(map(str, checkpoint))}. Choose one with --checkpoint_key."
        )
    if not is_named(state_dict):
        raise UserError(f"{flag} {path} holds weights by names that are no text.")
    state_dict = without_prefix(state_dict, "module.")
    if any(name.startswith("backbone.") for name in state_dict):
        state_dict = {
            name: value for name, value in state_dict.items() if name.startswith("backbone.")
        }
    return without_prefix(state_dict, "backbone.")


def published_weights(arch, patch_size):
    """State dict of the released backbone, downloaded once into torch.hub's folder."""
    check_arch(arch)
    file = PUBLISHED_BACKBONES.get((arch, patch_size)) or PUBLISHED_BACKBONES.get((arch, None))
    if file is None:
        raise UserError(
            f"there are no published weights for --arch {arch} --patch_size {patch_size}: give"
            " --pretrained_weights."
        )

    def check(content):
        weights = backbone_weights(content, "teacher", file, flag="the published file")
        build_with(weights, arch, patch_size, f"the published file {file}")

    return download(file, "without --pretrained_weights the published ones are used", check)


def published_head(arch, patch_size):
    """Entries of the released linear head's file, downloaded likewise, and the flags it is for."""
    key = (arch, patch_size) if (arch, patch_size) in PUBLISHED_HEADS else (arch, None)
    if key not in PUBLISHED_HEADS:
        raise UserError(
            f"there is no published linear head for --arch {arch} --patch_size {patch_size}: give"
            " --classifier, or train one without --evaluate."
        )
    file, flags = PUBLISHED_HEADS[key]

    def check(content):
        load_head(content, f"the published file {file}")

    why = "--evaluate without --classifier takes the published head"
    return {**download(file, why, check), **flags}


def download(file, why, check):
    """The content of a file that the authors published, which torch.hub's folder keeps.

    `why` it is needed goes into errors; `check` raises UserError for content that does not fit. A
    download gets its name only when all of that is known to be right.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(file).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # of this process alone
        try:
            fetch(PUBLISHED_URL + file, temporary, why, SHA256.get(file), check)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    try:
        return read(path, f"{why}:")
    except DamagedFile as error:
        raise UserError(f"{error} Delete it, and it is downloaded again.") from None


def fetch(url, path, why, sha256, check):
    """Write what `url` holds to `path`. UserError unless that is whole and what it should be."""
    request = urllib.request.Request(url, headers={"User-Agent": "torch.hub"})
    digest, size = hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as sent, path.open("wb") as file:
            length = int(sent.headers.get("Content-Length", 0))
            chunks = iter(lambda: sent.read(CHUNK), b"")
            for chunk in progress_bar(chunks, path.name, -(-length // CHUNK) or None):
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{why}, but {url} could not be downloaded ({error}).") from None
    if length and size != length:
        raise UserError(f"{why}, but of {url} only {size} of {length} bytes came. Try again.")
    if sha256 and digest.hexdigest() != sha256:
        raise UserError(f"{why}, but {url} has the SHA-256 {digest.hexdigest()}, not {sha256}.")
    try:
        content = read(path, f"what {url} sent, in")
    except DamagedFile:
        raise UserError(
            f"{why}, but {url} sent no checkpoint: it begins with {path.read_bytes()[:20]}. Is"
            " there a proxy with a page of its own? Download it by other means, and give the file"
            " with --pretrained_weights or --classifier."
        ) from None
    check(content)
    print0(f"Downloaded {url}: {size} bytes, SHA-256 {digest.hexdigest()}.")


def fit_weights(backbone, weights, arch, source):
    """Load every tensor of `backbone`, or raise; a classifier that it lacks is ignored."""
    if arch.startswith("xcit_"):
        from timm.models.xcit import checkpoint_filter_fn  # the official keys, in timm's names

        weights = checkpoint_filter_fn(dict(weights), backbone)
    own = backbone.state_dict()
    weights = {
        name: value
        for name, value in weights.items()
        if name in own or not name.startswith(("head.", "fc."))
    }
    load_exactly(backbone, weights, f"{source}, as --arch {arch},")


def load_pretrained_weights(model, pretrained_weights, checkpoint_key, model_name, patch_size):
    """Official interface: load a file or, if it is '', the published weights into `model`.

    Unlike the official function it raises UserError for a file that does not exist or does not fit.
    """
    if pretrained_weights:
        checkpoint = read(pretrained_weights)
        weights = backbone_weights(checkpoint, checkpoint_key, pretrained_weights)
    else:
        weights = published_weights(model_name, patch_size)
    source = pretrained_weights or "the published weights"
    fit_weights(model, weights, model_name, source)
    print_loaded(model, model_name, source)
