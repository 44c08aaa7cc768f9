# SPDX-License-Identifier: Apache-2.0
"""Weights in other libraries' layouts: timm's and transformers' names and folders of a ViT,
safetensors files.

timm's names of a plain ViT are ours. transformers has names of its own, and keeps queries, keys and
values apart.
"""

import math
import os
import re
from pathlib import Path

import torch

from dino.data.channels import RGB
from dino.errors import UserError
from dino.json_files import is_number, parse
from dino.printable import brief
from dino.weights.files import DamagedFile, check_name_is_text, is_named, read, without_prefix
from vision_transformer import ARCHITECTURES

# The name in a safetensors file's metadata of what ours say of the backbone, as JSON.
DESCRIPTION = "backbone"
CONFIG, PREPROCESSOR, SAFETENSORS = "config.json", "preprocessor_config.json", "model.safetensors"

# Arguments of a timm network that change nothing in evaluation, or show in the shapes and names of
# the weights; of the heads the number is compared.
TIMM_ARGUMENTS = {
    *("num_heads", "num_classes", "in_chans", "global_pool", "img_size", "patch_size"),
    *("embed_dim", "depth", "mlp_ratio", "qkv_bias", "init_values", "reg_tokens", "no_embed_class"),
    *("dynamic_img_size", "dynamic_img_pad", "strict_img_size", "weight_init", "fix_init"),
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
    *("drop_path_rate", "pretrained_strict"),
}
POOLS = ("", "token", "avg", "map")  # timm's defaults: neither do others show in the weights

# {our name: transformers' names in its files}, of parts that our weight has one after the other.
OUTSIDE_BLOCKS = {
    "cls_token": ["embeddings.cls_token"],
    "pos_embed": ["embeddings.position_embeddings"],
    "patch_embed.proj.weight": ["embeddings.patch_embeddings.projection.weight"],
    "patch_embed.proj.bias": ["embeddings.patch_embeddings.projection.bias"],
    "norm.weight": ["layernorm.weight"],
    "norm.bias": ["layernorm.bias"],
}
IN_BLOCK = {
    "norm1": ["layernorm_before"],
    "attn.proj": ["attention.output.dense"],
    "norm2": ["layernorm_after"],
    "mlp.fc1": ["intermediate.dense"],
    "mlp.fc2": ["output.dense"],
    "attn.qkv": [f"attention.attention.{name}" for name in ("query", "key", "value")],
}
# Since version 5 transformers has other names in memory: theirs there, and in files.
IN_MEMORY = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


# ---- files and folders ----


def read_weights(path, flag="--pretrained_weights"):
    """`read` for a checkpoint in any container: .pth, .safetensors, a folder with a config.json.

    The latter two give {"teacher": weights by name} and what the file says of its backbone. Raises
    what `read` raises.
    """
    if os.path.isfile(os.path.join(path, CONFIG)):  # not pathlib's, which raises for long names
        return read_folder(Path(path), flag)
    if Path(path).suffix == ".safetensors" and os.path.isfile(path):
        return read_safetensors(Path(path), flag)
    return read(path, flag)


def read_safetensors(path, flag):
    """The weights in a .safetensors file, and what its metadata says of the backbone.

    The format holds no code. The library checks that header and tensors fill the file exactly.
    """
    from safetensors import safe_open  # timm brings it along

    check_name_is_text(path, f"{flag} {path}")
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            described = (file.metadata() or {}).get(DESCRIPTION, "{}")
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever a parser may raise on somebody's bytes
        reason = str(error).partition(".")[0]
        raise DamagedFile(
            f"{flag} {path}: damaged, or not a safetensors file ({reason})."
        ) from None
    described = parse(described)
    if not isinstance(described, dict):
        raise DamagedFile(f"{flag} {path}: its description of the backbone is damaged.")
    return {**described, "teacher": weights}


def read_folder(folder, flag):
    """The weights in a folder as transformers' or timm's `save_pretrained` writes it."""
    source = f"{flag} {folder}"
    config = read_json(folder / CONFIG, flag)
    files = (folder / name for name in (SAFETENSORS, "pytorch_model.bin"))
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(
            f"{source}: neither {SAFETENSORS} nor pytorch_model.bin is in this folder, whose"
            f" {CONFIG} is one of transformers or timm. Give a folder with the weights in one file."
        )
    if "model_type" in config:
        preprocessor = folder / PREPROCESSOR
        described = describe_transformers(config, source)
        if preprocessor.is_file():
            described |= describe_preprocessor(read_json(preprocessor, flag), source)
    else:
        described = describe_timm(config, source)
    weights = read_weights(file, flag)
    if not isinstance(weights, dict) or "teacher" not in weights:
        weights = {"teacher": weights}
    return {**described, **weights}


def read_json(path, flag):
    """The JSON object in a file; DamagedFile for anything else."""
    content = parse(path.read_text(encoding="utf-8", errors="replace"))
    if not isinstance(content, dict):
        raise DamagedFile(f"{flag} {path}: damaged, or not a JSON object.")
    return content


def describe_transformers(config, source):
    """What transformers' config.json says of a backbone; UserError unless it is one of our ViTs.

    Names and shapes of weights do not show everything: the number of heads and the activation are
    compared here.
    """
    sizes = {
        "embed_dim": config.get("hidden_size"),
        "depth": config.get("num_hidden_layers"),
        "num_heads": config.get("num_attention_heads"),
    }
    arch = next((name for name, other in ARCHITECTURES.items() if other == sizes), None)
    wanted = {"model_type": "vit", "hidden_act": "gelu"}
    different = [name for name, value in wanted.items() if config.get(name, value) != value]
    if arch is None or different:
        name = different[0] if different else "num_attention_heads"
        raise UserError(
            f"{source} is not a ViT of this project: its {name} is {brief(config.get(name))}, its"
            f" sizes {brief(sizes)}. transformers' ViTs of the sizes of {', '.join(ARCHITECTURES)}"
            " can be read."
        )
    epsilon = config.get("layer_norm_eps", 1e-12)  # transformers' default; ours adds 1e-6
    if not isinstance(epsilon, float) or not 0 <= epsilon <= 1e-5:
        raise UserError(f"{source}: layer_norm_eps is {brief(epsilon)}; ours is 1e-6.")
    return {
        "arch": arch,
        "patch_size": config.get("patch_size", 16),
        "image_size": config.get("image_size", 224),
    }


def describe_preprocessor(preprocessor, source):
    """The mean and std in transformers' preprocessor_config.json; 0 and 1 where it does not
    normalise. UserError where white does not become 1 before that, or where it has neither:
    transformers' own depend on the class that reads the file.
    """
    factor = preprocessor.get("rescale_factor", 1 / 255)
    scaled = is_number(factor) and math.isclose(factor, 1 / 255, rel_tol=1e-3)
    if not preprocessor.get("do_rescale", True) or not scaled:
        raise UserError(
            f"{source}: {PREPROCESSOR} does not rescale images by 1/255 (do_rescale"
            f" {brief(preprocessor.get('do_rescale', True))}, rescale_factor {brief(factor)}), as"
            " is done here. Put the factor into its image_mean and image_std."
        )
    if not preprocessor.get("do_normalize", True):
        return {"mean": [0.0] * RGB, "std": [1.0] * RGB}
    names = {"mean": "image_mean", "std": "image_std"}
    found = {ours: preprocessor[name] for ours, name in names.items() if name in preprocessor}
    if not found:
        raise UserError(
            f"{source}: {PREPROCESSOR} has no image_mean and no image_std. Add them: those of"
            " transformers' ViTImageProcessor are [0.5, 0.5, 0.5]."
        )
    return found


def describe_timm(config, source):
    """What timm's config.json says of a backbone: image size, mean and std.

    The shapes of the weights say the rest, save the number of heads and some arguments: UserError
    if those are not ours.
    """
    options, shown = (
        entry if is_named(entry) else {}
        # older versions of timm wrote all of pretrained_cfg beside architecture
        for entry in (config.get("model_args"), config.get("pretrained_cfg", config))
    )
    heads, width = options.get("num_heads"), config.get("num_features")
    ours = [(sizes["num_heads"], sizes["embed_dim"]) for sizes in ARCHITECTURES.values()]
    if heads is not None and (heads, width) not in ours:
        raise UserError(
            f"{source} is not a ViT of this project: {brief(heads)} heads share a width of"
            f" {brief(width)}."
        )
    for name, value in options.items():
        if name not in TIMM_ARGUMENTS or (name == "global_pool" and value not in POOLS):
            raise UserError(
                f"{source} is not a network of this project: model_args in its {CONFIG} has"
                f" {brief(name)} {brief(value)}. Remove the entry if it is timm's default."
            )
    described = {name: shown[name] for name in ("mean", "std") if name in shown}
    if isinstance(shown.get("input_size"), list) and shown["input_size"]:
        described["image_size"] = shown["input_size"][-1]  # [channels, height, width]
    check_square(options.get("img_size"), source)
    check_square(shown.get("input_size"), source)
    return described


def check_square(size, source):
    """Raise UserError for a size [..., height, width] that is not square: position embeddings of
    4 x 16 patches look like those of 8 x 8.
    """
    if isinstance(size, list) and len(size) > 1 and size[-2] != size[-1]:
        raise UserError(
            f"{source}: its {CONFIG} says images of {brief(size)}; here they are square."
        )


# ---- names ----


def in_our_names(weights):
    """The state dict of a ViT in our names. What is named otherwise keeps its name."""
    if "vit.embeddings.cls_token" in weights:  # inside a classifier
        weights = without_prefix(weights, "vit.")
    return from_transformers(weights) if "embeddings.cls_token" in weights else weights


def from_transformers(weights):
    """Our names for transformers' weights of a ViT: queries, keys and values become one matrix.

    The pooling layer is left out: transformers adds it, DINO has none. What has no counterpart
    keeps its name, so that it is found not to fit.
    """
    left = {name_in_files(name): value for name, value in weights.items()}
    ours = {}
    for name, theirs in transformers_names(left, r"encoder\.layer\.(\d+)\.").items():
        values = [left.get(part) for part in theirs]
        shapes = {getattr(value, "shape", None) for value in values}
        if len(shapes) == 1 and shapes.isdisjoint({None, torch.Size()}):
            ours[name] = torch.cat(values)
            left = {part: value for part, value in left.items() if part not in theirs}
    left = {name: value for name, value in left.items() if not name.startswith("pooler.")}
    return {**ours, **left}


def to_transformers(weights):
    """transformers' names, those in its files, for the state dict of one of our ViTs."""
    return {
        part: value.clone()
        for name, theirs in transformers_names(weights, r"blocks\.(\d+)\.").items()
        for part, value in zip(theirs, weights[name].chunk(len(theirs)), strict=True)
    }


def transformers_names(weights, block):
    """{our name: [transformers' names]} of a ViT with the blocks that `weights` has.

    `block` matches the beginning of the name of a block's weight, and in it the block's number.
    """
    found = (re.match(block, name) for name in weights)
    numbers = dict.fromkeys(match[1] for match in found if match)
    return OUTSIDE_BLOCKS | {
        f"blocks.{number}.{part}.{kind}": [
            f"encoder.layer.{number}.{name}.{kind}" for name in theirs
        ]
        for number in numbers
        for part, theirs in IN_BLOCK.items()
        for kind in ("weight", "bias")
    }


def name_in_files(name):
    """What transformers calls in its files a weight that it calls `name` in memory, or in files."""
    block = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if not block:
        return name
    number, part, kind = block.groups()
    return f"encoder.layer.{number}.{IN_MEMORY.get(part, part)}.{kind}"
