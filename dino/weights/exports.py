# SPDX-License-Identifier: Apache-2.0
"""A backbone in the formats of other libraries: how each is written, and loaded by its library.

B images, C channels, S image size, D width of the features. What `load` returns maps (B, C, S, S)
to (B, D) with the weights of the file, and of no other.
"""

import copy
import importlib.util
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from dino.backbones import build_backbone, is_timm, is_vit, timm_name
from dino.data.augmentations import resized_side
from dino.data.channels import RGB
from dino.errors import UserError
from dino.weights import graphs
from dino.weights.layouts import CONFIG, DESCRIPTION, SAFETENSORS, to_transformers
from vision_transformer import ARCHITECTURES


@dataclass(frozen=True)
class Format:
    """A row of FORMATS. `write(pretrained, path)` makes a file that ends in `suffix`, or a folder.

    `load(pretrained, path)` gives the library's network; `any_size` tells whether that takes images
    of other sizes too. `load_at_any_size`, where the library interpolates position embeddings in
    its own way, gives the network that does so. `load_transform(path)` gives the library's own
    preprocessing, PIL image -> (C, S, S). `usage(pretrained)` says how to load what is at PATH.
    """

    write: Callable
    load: Callable
    usage: Callable
    suffix: str = ""
    libraries: tuple = ()
    any_size: bool = False
    load_at_any_size: Callable | None = None
    load_transform: Callable | None = None


def check_libraries(name):
    """Raise UserError unless what --format `name` needs is installed."""
    missing = [name for name in FORMATS[name].libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format {name} needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )


def at_image_size(pretrained):
    """`pretrained` with the position embeddings that its backbone makes for its `image_size`.

    timm and transformers interpolate without the shift of 0.1 that the official code adds, and
    timm with antialiasing: they are exact only at the size that the embeddings are for.
    """
    backbone, size = pretrained.backbone, pretrained.image_size
    side = size // pretrained.patch_size
    if not is_vit(backbone) or backbone.patch_embed.grid_size == (side, side):
        return pretrained
    options = dict(img_size=size, in_chans=pretrained.in_chans)
    resized, _ = build_backbone(pretrained.arch, pretrained.patch_size, **options)
    with torch.no_grad():
        positions = backbone.interpolate_pos_encoding(torch.zeros(1, 1 + side**2, 1), size, size)
    resized.load_state_dict({**backbone.state_dict(), "pos_embed": positions})
    return replace(pretrained, backbone=resized.eval())


# ---- safetensors: our names, and a description that the scripts read ----


def write_safetensors(pretrained, path):
    save_weights(pretrained.backbone.state_dict(), path, pretrained)


def save_weights(weights, path, pretrained):
    from safetensors.torch import save  # save_file's files can be read by their owner alone

    description = json.dumps(pretrained.description)
    path.write_bytes(save(dict(weights), metadata={"format": "pt", DESCRIPTION: description}))


def load_safetensors(pretrained, path):
    from safetensors.torch import load_file

    backbone = copy.deepcopy(pretrained.backbone)
    backbone.load_state_dict(load_file(path))  # strict: none of its own weights stays
    return graphs.Features(backbone)


# ---- timm: a folder as timm's save_for_hf writes it ----


def write_timm(pretrained, folder):
    pretrained = at_image_size(pretrained)
    name, options = timm_arguments(pretrained)
    size = pretrained.image_size
    crop_pct = size / resized_side(size)
    if math.floor(size / crop_pct) != resized_side(size):  # as timm computes it, in floating point
        crop_pct = size / (resized_side(size) + 0.5)
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": pretrained.embed_dim,
        "model_args": {"num_classes": 0, **options},
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [pretrained.in_chans, size, size],
            "fixed_input_size": is_vit(pretrained.backbone),
            "interpolation": "bicubic",
            "crop_pct": crop_pct,
            "crop_mode": "center",
            "mean": list(pretrained.mean),
            "std": list(pretrained.std),
            "num_classes": 0,
        },
    }
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    save_weights(pretrained.backbone.state_dict(), folder / SAFETENSORS, pretrained)


def timm_arguments(pretrained):
    """(name, arguments) with which timm.create_model builds this network, without a classifier.

    UserError where timm has no such network.
    """
    import timm

    arch, backbone = pretrained.arch, pretrained.backbone
    options = {"in_chans": pretrained.in_chans} if pretrained.in_chans != RGB else {}
    if is_vit(backbone):
        name = f"{arch}_patch{pretrained.patch_size}_224"
        if not timm.is_model(name):  # any of timm's ViTs will do, with these sizes
            name = "vit_small_patch16_224"
            options |= {"patch_size": pretrained.patch_size, **ARCHITECTURES[arch]}
        if pretrained.image_size != 224:
            options["img_size"] = pretrained.image_size
        return name, options
    if is_timm(arch):
        if hasattr(backbone, "dynamic_img_size"):
            options["dynamic_img_size"] = backbone.dynamic_img_size
        return timm_name(arch), options
    same = timm.is_model(arch) and shapes_of(backbone) == shapes_of(
        timm.create_model(arch, num_classes=0, **options)
    )
    if not same:
        raise UserError(
            f"--format timm: timm has no network with the weights of this {arch}. Formats"
            " for every network: safetensors, torch_export, onnx."
        )
    return arch, options


def shapes_of(network):
    return {name: value.shape for name, value in network.state_dict().items()}


def load_timm(pretrained, folder, **options):
    import timm
    from safetensors.torch import load_file

    name, arguments = timm_arguments(pretrained)
    model = timm.create_model(name, num_classes=0, **arguments, **options)
    model.load_state_dict(load_file(folder / SAFETENSORS))
    return model.eval()


def load_timm_transform(folder):
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return timm.data.create_transform(**timm.data.resolve_model_data_config(model))


def timm_usage(pretrained):
    name, options = timm_arguments(pretrained)
    arguments = "".join(f", {option}={value!r}" for option, value in options.items())
    return (
        f'model = timm.create_model("{name}", num_classes=0{arguments})\n'
        f'model.load_state_dict(safetensors.torch.load_file("PATH/{SAFETENSORS}"))\n'
        'or model = timm.create_model("local-dir:PATH", pretrained=True)'
    )


# ---- transformers: a folder for from_pretrained ----


def write_transformers(pretrained, folder):
    from transformers import BitImageProcessor, ViTConfig

    if not is_vit(pretrained.backbone):
        raise UserError(
            f"--format transformers: its ViTModel is for our ViTs, not for {pretrained.arch}."
            " Formats for every network: safetensors, torch_export, onnx."
        )
    pretrained = at_image_size(pretrained)
    sizes, size = ARCHITECTURES[pretrained.arch], pretrained.image_size
    config = ViTConfig(
        architectures=["ViTModel"],
        hidden_size=sizes["embed_dim"],
        num_hidden_layers=sizes["depth"],
        num_attention_heads=sizes["num_heads"],
        intermediate_size=4 * sizes["embed_dim"],
        image_size=size,
        patch_size=pretrained.patch_size,
        num_channels=pretrained.in_chans,
        layer_norm_eps=pretrained.backbone.norm.eps,
    )
    # Unlike ViTImageProcessor this one resizes the short side, and crops. With backend="pil" it
    # gives our pixels, except that it rounds half a pixel of the crop's margin the other way.
    processor = BitImageProcessor(
        size={"shortest_edge": resized_side(size)},
        crop_size={"height": size, "width": size},
        image_mean=list(pretrained.mean),
        image_std=list(pretrained.std),
    )
    folder.mkdir()
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    weights = to_transformers(pretrained.backbone.state_dict())
    save_weights(weights, folder / SAFETENSORS, pretrained)


def load_transformers(_, folder, **options):
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, found = transformers.ViTModel.from_pretrained(
        folder, add_pooling_layer=False, output_loading_info=True
    )
    unmatched = {kind: keys for kind, keys in found.items() if keys}
    if unmatched:
        raise UserError(f"--format transformers: from_pretrained reports {unmatched}.")
    return lambda images: model.eval()(images, **options).last_hidden_state[:, 0]


def load_transformers_transform(folder):
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return lambda image: processor(image, return_tensors="pt").pixel_values[0]


def transformers_usage(_):
    return (
        'model = ViTModel.from_pretrained("PATH", add_pooling_layer=False).eval()\n'
        'processor = AutoImageProcessor.from_pretrained("PATH", backend="pil")\n'
        'model(**processor(image, return_tensors="pt")).last_hidden_state[:, 0]'
    )


# ---- graphs ----


def write_torch(pretrained, path):
    program = graphs.trace(pretrained)
    description = {"description.json": json.dumps(pretrained.description)}
    content = io.BytesIO()  # where its own writing fails, as on a full disk, torch aborts
    torch.export.save(program, content, extra_files=description)
    path.write_bytes(content.getbuffer())


def load_torch(_, path):
    return torch.export.load(path).module()


def write_onnx(pretrained, path):
    graphs.to_onnx(graphs.trace(pretrained), path, pretrained.description)


def graph_usage(call, pretrained):
    """The `call` of a graph, and what its images are, in words: it has no transform with it."""
    size, shorter = pretrained.image_size, pretrained.shrink_images
    shrunk = f"larger ones first shrunk to a shorter side of {shorter}, " if shorter else ""
    return (
        f"{call}\n"
        f"images: float32, (n, {pretrained.in_chans}, {size}, {size}): {shrunk}the shorter side"
        f" resized to {resized_side(size)} (bicubic), the centre,\n"
        f"values from 0 to 1, minus the mean {tuple(pretrained.mean)}, divided by the std"
        f" {tuple(pretrained.std)}"
    )


def load_onnx(_, path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {graphs.IMAGES: images.numpy()})[0])


FORMATS = {
    "timm": Format(
        write_timm,
        load_timm,
        timm_usage,
        libraries=("timm", "safetensors"),
        load_at_any_size=partial(load_timm, dynamic_img_size=True),
        load_transform=load_timm_transform,
    ),
    "transformers": Format(
        write_transformers,
        load_transformers,
        transformers_usage,
        libraries=("transformers", "safetensors"),
        load_at_any_size=partial(load_transformers, interpolate_pos_encoding=True),
        load_transform=load_transformers_transform,
    ),
    "safetensors": Format(
        write_safetensors,
        load_safetensors,
        lambda _: "--pretrained_weights PATH, in every script",
        suffix=".safetensors",
        libraries=("safetensors",),
    ),
    "torch_export": Format(
        write_torch,
        load_torch,
        partial(graph_usage, 'torch.export.load("PATH").module()(images)'),
        suffix=".pt2",
        any_size=True,
    ),
    "onnx": Format(
        write_onnx,
        load_onnx,
        partial(
            graph_usage,
            'onnxruntime.InferenceSession("PATH").run(None, {"images": images.numpy()})',
        ),
        suffix=".onnx",
        any_size=True,
        libraries=("onnx", "onnxscript", "onnxruntime"),
    ),
}
