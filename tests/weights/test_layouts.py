# SPDX-License-Identifier: Apache-2.0
"""Files of timm and transformers as --pretrained_weights and --init_from: whole, or refused."""

import argparse
import json
import os
import shutil
import struct

import numpy as np
import pytest
import timm
import torch
from helpers import training_objects
from safetensors.torch import load_file, save_file

import eval_knn
from dino.errors import UserError
from dino.weights.layouts import describe_timm, in_our_names, read_weights, to_transformers
from dino.weights.pretrained import open_backbone
from dino.weights.starting import initialise_from
from vision_transformer import vit_nano, vit_tiny


def opened(path, *flags):
    parser = eval_knn.get_args_parser()
    return open_backbone(parser.parse_args(["--pretrained_weights", str(path), *flags]))


def features(path, pixels, *flags):
    with torch.no_grad():
        return opened(path, *flags).backbone(pixels)


def pixels(size=32):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


# ---- transformers ----


@pytest.fixture(scope="module")
def transformers_vit(tmp_path_factory):
    """(folder, features of `pixels()`): a random ViT as transformers itself makes and saves it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=96,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=384,
        image_size=32,
        patch_size=8,
    )
    model = transformers.ViTModel(config).eval()  # with a pooling layer, its default
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    folder = tmp_path_factory.mktemp("transformers")
    model.save_pretrained(folder)
    mean, std = [0.4, 0.5, 0.6], [0.1, 0.2, 0.3]
    transformers.ViTImageProcessor(image_mean=mean, image_std=std).save_pretrained(folder)
    torch.save(model.state_dict(), folder / "in_memory.pth")
    with torch.no_grad():
        return folder, model(pixels()).last_hidden_state[:, 0]


def test_a_transformers_folder_is_read_with_its_mean_and_size(transformers_vit):
    folder, expected = transformers_vit
    pretrained = opened(folder)
    found = pretrained.backbone(pixels())
    assert torch.allclose(found, expected, atol=1e-4)  # epsilon: 1e-12 there, 1e-6 here
    assert (pretrained.arch, pretrained.patch_size, pretrained.image_size) == ("vit_nano", 8, 32)
    assert (pretrained.mean, pretrained.std) == ([0.4, 0.5, 0.6], [0.1, 0.2, 0.3])


@pytest.mark.parametrize("file", ["model.safetensors", "in_memory.pth"])
def test_the_names_of_transformers_are_read_from_a_file_too(transformers_vit, file):
    folder, expected = transformers_vit
    assert torch.allclose(features(folder / file, pixels()), expected, atol=1e-4)


def test_an_older_folder_with_pytorch_model_bin_and_a_classifier_is_read(
    transformers_vit, tmp_path
):
    folder, expected = transformers_vit
    weights = load_file(folder / "model.safetensors")
    weights = {f"vit.{name}": value for name, value in weights.items()}
    weights["classifier.weight"] = torch.zeros(10, 96)
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert torch.allclose(features(tmp_path, pixels()), expected, atol=1e-4)


def test_names_for_transformers_are_those_of_its_own_file(transformers_vit):
    folder, _ = transformers_vit
    theirs = {name for name in load_file(folder / "model.safetensors") if "pooler" not in name}
    backbone = vit_nano(8, img_size=32)
    named = to_transformers(backbone.state_dict())
    assert set(named) == theirs
    for name, value in in_our_names(named).items():
        assert torch.equal(value, backbone.state_dict()[name]), name


@pytest.mark.parametrize(
    ("path", "advice"),
    [("https://x.org/vits16.pth", " Download it, and give the file."), ("w" * 300, "")],
)
def test_a_path_that_cannot_be_one_is_told_as_it_was_given(path, advice):
    """https:/x.org was said; and of a long one, with another at its end, no flag."""
    with pytest.raises(UserError) as error:
        read_weights(path)
    assert str(error.value) == f"--pretrained_weights {path}: no such file.{advice}"


# ---- timm ----


def test_timm_files_are_read_and_a_classifier_is_ignored(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32).eval()
    torch.nn.init.normal_(model.pos_embed)
    with torch.no_grad():
        expected = model.forward_features(pixels())[:, 0]
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    flags = argparse.Namespace(model="vit_tiny_patch16_224", mean=None, std=None)  # not given
    training = {"state_dict": model.state_dict(), "arch": "vit_tiny_patch16_224", "args": flags}
    torch.save(training, tmp_path / "last.pth.tar")
    timm.models.save_for_hf(model, str(tmp_path / "hub"), safe_serialization=True)
    for file in ("bare.pth", "bare.safetensors", "hub"):
        assert torch.allclose(features(tmp_path / file, pixels()), expected, atol=1e-5), file
    found = features(tmp_path / "last.pth.tar", pixels(), "--checkpoint_key", "state_dict")
    assert torch.allclose(found, expected, atol=1e-5)
    pretrained = opened(tmp_path / "hub")
    assert (pretrained.arch, pretrained.patch_size, pretrained.image_size) == ("vit_tiny", 16, 32)
    assert pretrained.mean == [0.5, 0.5, 0.5]  # timm's for this name, not ImageNet's


def test_timms_older_config_says_mean_and_std_too(tmp_path):
    """Its entries are those of today's pretrained_cfg; ImageNet's mean was taken without a word."""
    shown = dict(input_size=[3, 32, 32], mean=[0.5, 0.5, 0.5], std=[0.4, 0.4, 0.4])
    save_file(vit_nano(8, img_size=32).state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "vit_nano", "num_classes": 0, **shown}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (opened(tmp_path).mean, opened(tmp_path).std) == (shown["mean"], shown["std"])


def test_a_run_starts_from_files_of_both(tmp_path, capsys):
    weights = training_objects(seed=1)["teacher"].backbone.state_dict()
    save_file(to_transformers(weights), tmp_path / "transformers.safetensors")
    save_file({**weights, "head.weight": torch.zeros(2, 96)}, tmp_path / "timm.safetensors")
    for file in ("transformers.safetensors", "timm.safetensors"):
        objects = training_objects(seed=2)
        networks = objects["student"], objects["teacher"], objects["dino_loss"]
        path = tmp_path / file
        initialise_from(read_weights(path, "--init_from"), path, *networks)
        assert "backbone of the student, backbone of the teacher" in capsys.readouterr().out
        for network in networks[:2]:
            for name, value in network.backbone.state_dict().items():
                assert torch.equal(value, weights[name]), (file, name)


# ---- refused ----


def edited(transformers_vit, tmp_path, **changes):
    folder = tmp_path / "edited"
    shutil.copytree(transformers_vit[0], folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_attention_heads": 6},
            "num_attention_heads is 6",
        ),  # the weights have the same shapes
        ({"hidden_act": "gelu_new"}, "hidden_act is gelu_new"),
        ({"model_type": "dinov2"}, "model_type is dinov2"),
        ({"layer_norm_eps": 0.1}, "layer_norm_eps is 0.1"),
        ({"patch_size": -8}, "invalid patch_size: -8"),
        ({"patch_size": 4}, r"patch_embed\.proj\.weight is \(96, 3, 8, 8\)"),
        ({"model_type": "\x1b[2J"}, "model_type is \x1b\\[2J"),
    ],
)
def test_a_transformers_folder_of_another_network_is_refused(
    transformers_vit, tmp_path, changes, message
):
    with pytest.raises(UserError, match=message):
        opened(edited(transformers_vit, tmp_path, **changes))


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        ({"do_rescale": False}, "does not rescale images by 1/255 .do_rescale False"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor 0.0078"),
        ({"image_std": [0.5] * 3}, "a mean and a std of different numbers"),
        ({"size": 32}, r"no image_mean and no image_std\. Add them"),
    ],
)
def test_images_that_transformers_would_show_otherwise_are_refused(
    transformers_vit, tmp_path, shown, message
):
    folder = edited(transformers_vit, tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps(shown))
    with pytest.raises(UserError, match=message):
        opened(folder)


def test_a_transformers_folder_without_normalisation_gets_images_from_0_to_1(
    transformers_vit, tmp_path
):
    folder = edited(transformers_vit, tmp_path)
    shown = {"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(shown))
    pretrained = opened(folder)
    assert (pretrained.mean, pretrained.std) == ([0.0] * 3, [1.0] * 3)


@pytest.mark.parametrize("where", ["model_args", "pretrained_cfg"])
def test_positions_of_4_by_16_patches_are_not_taken_for_those_of_8_by_8(tmp_path, where):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=(64, 256))
    if where == "pretrained_cfg":
        model.pretrained_cfg["input_size"] = (3, 64, 256)
    options = dict(img_size=[64, 256]) if where == "model_args" else {}
    timm.models.save_for_hf(
        model, str(tmp_path / "hub"), model_args=options, safe_serialization=True
    )
    with pytest.raises(UserError, match=r"says images of .*64, 256\]; here they are square"):
        opened(tmp_path / "hub")


def test_other_heads_are_refused_in_timms_folder(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, num_heads=6)
    timm.models.save_for_hf(model, str(tmp_path / "hub"), safe_serialization=True)
    with pytest.raises(UserError, match="is not a ViT of this project"):
        opened(tmp_path / "hub")


@pytest.mark.parametrize("options", [{"act_layer": "relu"}, {"norm_layer": "layernormbf16"}])
def test_an_argument_of_timm_that_no_weight_shows_is_refused_by_name(tmp_path, options):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    shown = dict(num_classes=0, img_size=32, drop_path_rate=0.1)
    for name, model_args in (("shown", shown), ("hidden", shown | options)):
        timm.models.save_for_hf(
            model, str(tmp_path / name), model_args=model_args, safe_serialization=True
        )
    assert opened(tmp_path / "shown").arch == "vit_tiny"
    (name, value), *_ = options.items()
    with pytest.raises(UserError, match=rf"model_args in its config.json has {name} {value}"):
        opened(tmp_path / "hidden")


def test_a_pooling_of_timm_that_no_weight_shows_is_refused():
    """A ResNet of maxima loaded as one of means."""
    for pool in ("avg", "token"):
        describe_timm({"model_args": {"global_pool": pool}}, "--pretrained_weights hub")
    with pytest.raises(UserError, match=r"model_args in its config.json has global_pool max"):
        describe_timm({"model_args": {"global_pool": "max"}}, "--pretrained_weights hub")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update({"encoder.layer.0.lambda": torch.ones(96)}), "lambda is not expected"),
        (lambda w: w.pop("encoder.layer.3.attention.attention.key.bias"), "qkv.bias is missing"),
        (lambda w: w.pop("layernorm.weight"), r"norm\.weight is missing"),
        (lambda w: w["layernorm.weight"].fill_(torch.nan), "not finite"),
    ],
)
def test_every_weight_must_match(tmp_path, change, message):
    weights = to_transformers(vit_nano(8, img_size=32).state_dict())
    change(weights)
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "w.safetensors", "--arch", "vit_nano", "--patch_size", "8")


def test_a_folder_is_refused_without_weights_or_with_a_damaged_config(transformers_vit, tmp_path):
    shutil.copy(transformers_vit[0] / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        opened(tmp_path)
    for content in (b"", b"[]", b"{" * 10**5, b'{"a": 1', b"\xff\xfe"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(UserError, match="damaged, or not a JSON object"):
            opened(tmp_path)
    with pytest.raises(UserError, match="is a folder"):
        (tmp_path / "empty").mkdir()
        opened(tmp_path / "empty")


def damaged(content):
    """Bytes that are not a safetensors file: of another length, or with another header."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    yield from (b"", content[:7], content[:100], content[:-1], content + b"\0")
    for wrong in (2**63, length + 10**6, 2**40):
        yield struct.pack("<Q", wrong) + content[8:]
    name = next(name for name in header if name != "__metadata__")
    start, end = header[name]["data_offsets"]
    for change in (
        {"data_offsets": [0, 2**50]},
        {"data_offsets": [-8, end]},
        {"data_offsets": [start, end + 4]},
        {"shape": [2**62, 2**62]},
        {"dtype": "python"},
    ):
        other = json.dumps({**header, name: header[name] | change}).encode()
        yield struct.pack("<Q", len(other)) + other + content[8 + length :]
    rng = np.random.default_rng(0)
    for _ in range(60):
        changed = bytearray(content)
        for place in rng.integers(8 + length, size=3):
            changed[place] = rng.integers(256)
        yield bytes(changed)


def test_a_damaged_safetensors_file_is_refused_or_loads_and_nothing_else(tmp_path):
    good, wrong = tmp_path / "good.safetensors", tmp_path / "wrong.safetensors"
    backbone = vit_nano(8, img_size=32)
    description = json.dumps({"arch": "vit_nano", "patch_size": 8, "mean": [0.5] * 3})
    save_file(backbone.state_dict(), good, metadata={"backbone": description})
    refused = 0
    for content in damaged(good.read_bytes()):
        wrong.write_bytes(content)
        try:
            opened(wrong)
        except UserError:
            refused += 1
    assert refused > 40


@pytest.mark.parametrize(
    "description",
    ["", "[]", "{", "[" * 10**5, '{"mean": "x"}', '{"arch": 3}', '{"patch_size": 8.5}'],
)
def test_a_wrong_description_in_a_safetensors_file_is_no_traceback(tmp_path, description):
    path = tmp_path / "w.safetensors"
    save_file(vit_nano(8, img_size=32).state_dict(), path, metadata={"backbone": description})
    with pytest.raises(UserError, match=r"damaged|has an invalid"):
        opened(path)


def test_weights_of_half_precision_are_read_as_float32(tmp_path):
    backbone = vit_tiny(16, img_size=32)
    half = {name: value.bfloat16() for name, value in backbone.state_dict().items()}
    save_file(half, tmp_path / "half.safetensors")
    found = opened(tmp_path / "half.safetensors").backbone.state_dict()
    assert all(torch.equal(value, half[name].float()) for name, value in found.items())


def test_safetensors_whose_path_is_not_utf_8_are_not_called_damaged(tmp_path):
    path = tmp_path / os.fsdecode(b"w\xff.safetensors")
    path.touch()
    with pytest.raises(UserError, match="a name in this path is not UTF-8"):
        read_weights(path)
