# SPDX-License-Identifier: Apache-2.0
"""export.py: each library loads its file, and gives our features on real photographs."""

import importlib.util
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from conftest import PHOTOGRAPHS, photograph, run_script
from helpers import save_random_backbone
from safetensors.torch import load_file

import eval_knn
import export
from dino.backbones import build_backbone
from dino.data.augmentations import IMAGENET_MEAN
from dino.errors import UserError
from dino.weights import exports, graphs
from dino.weights.pretrained import Pretrained, open_backbone
from vision_transformer import ARCHITECTURES, build_vit, vit_nano, vit_small

NAMES = ("astronaut.png", "chelsea.png", "coffee.png")
PATHS = {
    "timm": "out",
    "transformers": "out",
    "safetensors": "out.safetensors",
    "torch_export": "out.pt2",
    "onnx": "out.onnx",
}


def run_export(weights, name, folder, *flags):
    """The path of an export, and what export.py returns."""
    if name == "onnx":
        pytest.importorskip("onnxscript")
    if name in ("onnx", "transformers"):
        pytest.importorskip("onnxruntime" if name == "onnx" else name)
    path = folder / PATHS[name]
    flags = ("--pretrained_weights", weights, "--format", name, "--output", path, *flags)
    difference = export.export(export.get_args_parser().parse_args([*map(str, flags)]))
    return path, difference


def opened(weights, size=None):
    flags = ["--pretrained_weights", str(weights)]
    return open_backbone(eval_knn.get_args_parser().parse_args(flags), size)


@torch.no_grad()
def ours(weights, size=None):
    """(pixels, features) of photographs in this project."""
    pretrained = opened(weights, size)
    pixels = torch.stack([pretrained.transform(photograph(name)) for name in NAMES])
    return pixels, pretrained.backbone(pixels)


@torch.no_grad()
def theirs(name, path, pixels, **timm_options):
    """Features from the library alone, loaded as its own users do."""
    if name == "timm":
        config = json.loads((path / "config.json").read_text())
        options = {**config["model_args"], **timm_options}
        model = timm.create_model(config["architecture"], **options)
        model.load_state_dict(load_file(path / "model.safetensors"), strict=True)
        return model.eval()(pixels)
    if name == "transformers":
        from transformers import ViTModel

        model = ViTModel.from_pretrained(path, add_pooling_layer=False).eval()
        return model(pixels).last_hidden_state[:, 0]
    if name == "safetensors":
        backbone = build_vit("two_blocks", 8, img_size=32)
        backbone.load_state_dict(load_file(path))
        return backbone.eval()(pixels)
    if name == "torch_export":
        return torch.export.load(path).module()(pixels)
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(["features"], {"images": pixels.numpy()})[0])


def equal_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A backbone.pth whose position embeddings are as large as those of a trained network.

    Its architecture is one more row of the table: to trace six blocks takes seconds.
    """
    path = tmp_path_factory.mktemp("weights") / "backbone.pth"
    torch.manual_seed(0)
    backbone = build_vit("two_blocks", 8, img_size=32)
    torch.nn.init.normal_(backbone.pos_embed)
    fields = dict(
        arch="two_blocks", patch_size=8, image_size=32, mean=(0.5, 0.4, 0.3), std=(0.2,) * 3
    )
    torch.save({"teacher": backbone.state_dict(), **fields}, path)
    return path


@pytest.fixture(scope="module", autouse=True)
def two_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "two_blocks", dict(embed_dim=96, depth=2, num_heads=3))
        yield


@pytest.mark.parametrize("name", PATHS)
def test_the_library_gives_our_features_of_photographs(weights, tmp_path, name, capsys):
    path, difference = run_export(weights, name, tmp_path)
    pixels, expected = ours(weights)
    found = theirs(name, path, pixels)
    assert expected.std() > 0.1
    assert torch.allclose(found, expected, atol=1e-4, rtol=0)
    assert difference < 1e-5
    said = capsys.readouterr().out
    assert f"differ by at most {difference:.1e}" in said
    assert str(path) in said
    assert (name == "timm") == ('timm.create_model("vit_small_patch16_224"' in said)
    graph = name in ("onnx", "torch_export")
    mean = re.escape(str(tuple(opened(weights).mean)))
    told = rf"\(n, 3, 32, 32\).* resized to 37 .*\n.*minus the mean {mean}"
    assert graph == bool(re.search(told, said))  # what their user has to do, without our transform
    if graph:  # dynamic batch and size, with the official shift of 0.1
        for shape in ((1, 3, 32, 32), (2, 3, 48, 24), (5, 3, 64, 64)):
            other = torch.rand(shape)
            with torch.no_grad():
                expected = opened(weights).backbone(other)
            assert torch.allclose(theirs(name, path, other), expected, atol=1e-5, rtol=0), shape
    else:
        again = opened(path)
        for field in ("arch", "patch_size", "image_size"):
            assert getattr(again, field) == getattr(opened(weights), field)
        assert tuple(again.mean) == (0.5, 0.4, 0.3)
        assert torch.equal(again.backbone(pixels), opened(weights).backbone(pixels))


@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_a_vit_small_is_what_timm_and_transformers_call_so(tmp_path, name):
    torch.manual_seed(0)
    torch.save(vit_small(16).state_dict(), tmp_path / "vits16.pth")  # as the authors publish theirs
    (tmp_path / "list.txt").write_text(str(PHOTOGRAPHS / "coffee.png"))
    flags = ("--check_images", tmp_path / "list.txt")
    path, difference = run_export(tmp_path / "vits16.pth", name, tmp_path, *flags)
    assert difference < 1e-5
    pixels, expected = ours(tmp_path / "vits16.pth")
    if name == "timm":  # nothing from config.json
        model = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
        model.load_state_dict(load_file(path / "model.safetensors"), strict=True)
        with torch.no_grad():
            found = model(pixels)
        hub = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
        assert equal_weights(hub.state_dict(), model.state_dict())
        assert tuple(timm.data.resolve_model_data_config(hub)["mean"]) == IMAGENET_MEAN
    else:
        found = theirs(name, path, pixels)
    assert torch.allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_at_another_image_size_the_export_has_our_position_embeddings(weights, tmp_path, name):
    """Those with the shift of 0.1; the library's own are others."""
    path, difference = run_export(weights, name, tmp_path, "--image_size", 48)
    pixels, expected = ours(weights, 48)
    assert difference < 1e-5
    assert torch.allclose(theirs(name, path, pixels), expected, atol=1e-4, rtol=0)
    (tmp_path / "small").mkdir()
    path, _ = run_export(weights, name, tmp_path / "small")
    loader = exports.FORMATS[name].load_at_any_size
    with torch.no_grad():
        assert (loader(opened(weights), path)(pixels) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_the_librarys_preprocessing_gives_our_pixels(weights, tmp_path, name):
    path, _ = run_export(weights, name, tmp_path)
    transform = exports.FORMATS[name].load_transform(path)
    pretrained = opened(weights)
    photo = photograph("astronaut.png")  # square: no half pixels in the crop's margins
    assert torch.allclose(transform(photo), pretrained.transform(photo), atol=1e-6)


def test_preprocessing_that_does_not_shrink_images_first_is_said_to_differ(
    weights, tmp_path, capsys
):
    """All 5 photographs were said to have the same: ours were not shrunk either."""
    torch.save(torch.load(weights) | {"shrink_images": 32}, tmp_path / "shrunk.pth")
    run_export(tmp_path / "shrunk.pth", "timm", tmp_path)
    said = capsys.readouterr().out
    assert "0 of 5 photographs have the same features" in said
    assert "make their short side 32 pixels" in said


@pytest.mark.parametrize("name", ["timm", "transformers", "safetensors"])
def test_a_network_for_four_channels_is_exported_as_such(tmp_path, name):
    pytest.importorskip("transformers" if name == "transformers" else "torch")
    torch.manual_seed(0)
    backbone = build_backbone("vit_nano", 8, img_size=32, in_chans=4)[0].eval()
    pretrained = Pretrained(backbone, 96, "vit_nano", 8, 32, (0.5,) * 4, (0.2,) * 4)
    exports.FORMATS[name].write(pretrained, tmp_path / PATHS[name])
    assert export.compare(name, pretrained, tmp_path / PATHS[name], [photograph()]) < 1e-5


def test_a_resnet_for_other_channels_is_one_of_timm_too(tmp_path):
    backbone = build_backbone("resnet18", in_chans=4)[0].eval()
    pretrained = Pretrained(backbone, 512, "resnet18", 16, 32, (0.5,) * 4, (0.2,) * 4)
    exports.FORMATS["timm"].write(pretrained, tmp_path / "timm")
    assert export.compare("timm", pretrained, tmp_path / "timm", [photograph()]) < 1e-5


@pytest.mark.parametrize("arch", ["resnet18", "xcit_nano_12_p8", "timm:resnet10t"])
def test_other_networks_go_where_the_format_can_hold_them(tmp_path, arch):
    weights = save_random_backbone(tmp_path / "backbone.pth", arch)
    for name in ("timm", "safetensors"):
        path, difference = run_export(weights, name, tmp_path)
        assert difference < 1e-5
        assert opened(path).arch == arch
    with pytest.raises(UserError, match=r"ViTModel is for our ViTs, not for"):
        (tmp_path / "no").mkdir()
        run_export(weights, "transformers", tmp_path / "no")
    assert not any((tmp_path / "no").iterdir())


def test_positions_in_a_graph_are_those_of_the_backbone():
    """At the trained size exactly; at others, of the same number of patches too, to rounding."""
    torch.manual_seed(0)
    backbone = vit_nano(8, img_size=64)
    torch.nn.init.normal_(backbone.pos_embed)
    for height, width in ((64, 64), (32, 128), (8, 8), (80, 72), (224, 16)):
        tokens = torch.zeros(1, 1 + height * width // 64, 1)
        expected = backbone.interpolate_pos_encoding(tokens, height, width)
        found = graphs.interpolate_positions(backbone, tokens, height, width)
        assert torch.allclose(found, expected, atol=2e-5), (height, width)
        assert torch.equal(found, expected) == ((height, width) == (64, 64))


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_timm_has_a_name_for_each_of_our_vits(arch):
    with torch.device("meta"):
        backbone, embed_dim = build_backbone(arch, 8, img_size=64)
        pretrained = Pretrained(backbone, embed_dim, arch, 8, 64)
        name, options = exports.timm_arguments(pretrained)
        model = timm.create_model(name, num_classes=0, **options)
    assert exports.shapes_of(model) == exports.shapes_of(backbone)
    assert ("embed_dim" in options) == (arch in ("vit_nano", "vit_tiny", "vit_large"))


# ---- refused ----


def test_a_difference_is_an_error_and_leaves_nothing(weights, tmp_path, monkeypatch, capsys):
    good = exports.FORMATS["safetensors"]

    def write(pretrained, path):
        good.write(pretrained, path)
        tensors = load_file(path)
        tensors["norm.bias"] = tensors["norm.bias"] + 2e-4
        exports.save_weights(tensors, path, pretrained)

    monkeypatch.setitem(exports.FORMATS, "safetensors", replace(good, write=write))
    flags = ["--pretrained_weights", weights, "--format", "safetensors", "--output"]
    monkeypatch.setattr(
        "sys.argv", ["export.py", *map(str, flags), str(tmp_path / "x.safetensors")]
    )
    with pytest.raises(SystemExit, match="2"):
        export.main()
    assert "the features differ by 2.0e-04, more than 0.0001" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_feature_that_is_not_a_number_is_a_difference(weights, tmp_path, monkeypatch):
    """Of one image among several, which the first alone does not show."""
    good = exports.FORMATS["safetensors"]

    def load(pretrained, path):
        network = good.load(pretrained, path)
        return lambda pixels: network(pixels) + torch.tensor([0.0, torch.nan])[: len(pixels), None]

    monkeypatch.setitem(exports.FORMATS, "safetensors", replace(good, load=load))
    monkeypatch.setattr(export, "PHOTOGRAPHS", NAMES[:2])
    with pytest.raises(UserError, match="differ by inf"):
        run_export(weights, "safetensors", tmp_path)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_library_that_is_not_installed_is_named(weights, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    pytest.importorskip("onnx")  # the one of the three that the message leaves out
    absent = ("onnxscript", "onnxruntime")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in absent else found(name, *a)
    )
    with pytest.raises(UserError, match=r"needs .*: pip install onnxscript onnxruntime$"):
        flags = ("--format", "onnx", "--output", tmp_path / "x.onnx")
        export.export(export.get_args_parser().parse_args([*map(str, flags)]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--format onnx --output x.pth", r"--output x\.pth: .*ends in \.onnx"),
        ("--format timm --output there", r"--output there exists"),
        ("--format timm --output there/file/out", "is not a folder that can be written to"),
        ("--format timm --output new --image_size 33", "--image_size 33: two_blocks does not take"),
        ("--format timm --output new --image_size 0", "--image_size: 0 is out of range"),
        ("--format timm --output new --check_images nowhere", "--check_images nowhere: no such"),
        ("--format timm --output new --check_images bad", "cannot be read as an image"),
        ("--format tf --output new", "invalid choice: 'tf'"),
        (os.fsdecode(b"--format timm --output n\xffw"), "in this path is not UTF-8"),
        ("--format timm", "required: --output"),
    ],
)
def test_a_mistake_is_named_and_writes_nothing(
    weights, tmp_path, monkeypatch, capsys, flags, message
):
    if "onnx" in flags:
        pytest.importorskip("onnxscript")  # without it that is the first mistake
        pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no")
    before = sorted(tmp_path.rglob("*"))
    command = ["export.py", "--pretrained_weights", str(weights), *flags.split()]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match="2"):
        export.main()
    assert re.search(message, capsys.readouterr().err)
    assert sorted(tmp_path.rglob("*")) == before


def test_no_space_for_a_graph_is_an_error_that_can_be_told(weights):
    """torch's own writer ends the process: terminate called after throwing an instance of ..."""
    with pytest.raises(OSError, match="No space left"):
        exports.write_torch(opened(weights), Path("/dev/full"))


def test_the_command_as_a_user_runs_it(checkpoint, tmp_path):
    (tmp_path / "photos").mkdir()
    photograph().save(tmp_path / "photos" / "a.png")
    of_a_killed_export = tmp_path / "deep" / ".out.safetensors.tmp" / "out"
    of_a_killed_export.mkdir(parents=True)
    command = ("export.py", "--pretrained_weights", checkpoint, "--format", "safetensors")
    output = tmp_path / "deep" / "out.safetensors"
    done = run_script(*command, "--output", output, "--check_images", tmp_path / "photos")
    assert done.returncode == 0, done.stderr
    assert "Features of 1 photographs from safetensors" in done.stdout
    assert f"--pretrained_weights {output}, in every script" in done.stdout
    assert list((tmp_path / "deep").iterdir()) == [output]
