# SPDX-License-Identifier: Apache-2.0
"""extract_features.py: the features are the backbone's, and a killed extraction resumes to them."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, photograph, run_processes, run_script, save_backbone
from helpers import parse, save_random_backbone
from PIL import Image
from safetensors.numpy import load_file
from torch import nn
from torchvision.datasets import ImageFolder

import eval_knn
import extract_features
from dino.data.images import read_image
from dino.errors import UserError
from dino.evaluation.feature_files import read_features
from dino.evaluation.unfinished import Unfinished
from dino.networks import MultiCropWrapper
from dino.weights.pretrained import open_backbone
from vision_transformer import vit_nano


def extract(checkpoint, data_path, output, *flags, images=None):
    """The FeatureFile that extract_features.py writes."""
    flags = ("--pretrained_weights", checkpoint, "--output", output, "--num_workers", 0, *flags)
    if images is None:
        flags = (*flags, "--data_path", data_path)
    extract_features.extract_features(parse(extract_features, *flags), images)
    return read_features(output)


def opened(checkpoint):
    return open_backbone(parse(eval_knn, "--pretrained_weights", checkpoint))


@torch.no_grad()
def defined(checkpoint, paths):
    """{--tokens: features} of images, from the blocks of the network one after the other."""
    pretrained = opened(checkpoint)
    vit = pretrained.backbone
    tokens = vit.prepare_tokens(torch.stack([pretrained.transform(read_image(p)) for p in paths]))
    blocks = []
    for block in vit.blocks:
        tokens = block(tokens)
        blocks.append(vit.norm(tokens))
    return {
        "cls": blocks[-1][:, 0],
        "patch": blocks[-1][:, 1:],
        "mean": blocks[-1][:, 1:].sum(dim=1) / 16,
        "last4": torch.cat([block[:, 0] for block in blocks[2:]], dim=1),
    }


# ---- what is in the file ----


@pytest.mark.parametrize("tokens", ["cls", "patch", "mean", "last4"])
def test_features_are_the_tokens_of_the_backbone(checkpoint, class_folders, tmp_path, tokens):
    file = extract(checkpoint, class_folders / "train", tmp_path / "f.npz", "--tokens", tokens)
    theirs = ImageFolder(class_folders / "train")
    assert file.paths == [path for path, _ in theirs.samples]
    assert file.labels.tolist() == theirs.targets
    assert file.settings["classes"] == theirs.classes
    expected = defined(checkpoint, file.paths)[tokens]
    assert file.features.dtype == np.float32
    assert np.allclose(file.features, expected, atol=1e-5)


def test_both_formats_hold_the_same_and_are_read_by_their_libraries(
    checkpoint, class_folders, tmp_path
):
    flags = ("--tokens", "patch", "--dtype", "float16", "--batch_size_per_gpu", 5)
    npz = extract(checkpoint, class_folders, tmp_path / "f.npz", *flags)
    safetensors = extract(checkpoint, class_folders, tmp_path / "f.safetensors", *flags)
    assert isinstance(npz.features, np.memmap)
    assert isinstance(safetensors.features, np.memmap)
    with np.load(tmp_path / "f.npz", allow_pickle=False) as by_numpy:
        assert np.array_equal(by_numpy["features"], npz.features)
        assert by_numpy["features"].dtype == np.float16
        assert by_numpy["features"].shape == (36, 16, 96)
        assert by_numpy["paths"].tolist() == npz.paths == safetensors.paths
        assert json.loads(by_numpy["settings"].item()) == npz.settings == safetensors.settings
        by_library = load_file(tmp_path / "f.safetensors")
        for name in ("features", "labels"):
            assert np.array_equal(by_library[name], by_numpy[name])
    names = by_library["paths"].tobytes().decode().split("\0")[:-1]
    assert names == npz.paths
    assert set(npz.settings) >= {"arch", "tokens", "image_size", "mean", "weights_sha256"}


def test_a_name_that_is_not_text_stays_what_it_is(checkpoint, tmp_path):
    (tmp_path / "photos").mkdir()
    photograph().save(tmp_path / "photos" / b"\xff \n.png".decode("utf-8", "surrogateescape"))
    for suffix in (".npz", ".safetensors"):
        file = extract(checkpoint, tmp_path / "photos", tmp_path / f"f{suffix}")
        assert Image.open(file.paths[0]).size == (512, 512)


def test_images_of_ones_own_need_no_files(checkpoint, class_folders, tmp_path):
    images = ImageFolder(class_folders / "train")  # PIL images with labels
    own = extract(checkpoint, None, tmp_path / "own.npz", images=images)
    files = extract(checkpoint, class_folders / "train", tmp_path / "files.npz")
    assert np.array_equal(own.features, files.features)
    assert np.array_equal(own.labels, files.labels)
    assert own.paths[:2] == ["0", "1"]


def test_images_of_ones_own_that_are_none_are_skipped_as_files_are(checkpoint, tmp_path):
    images = [photograph(), "a text", photograph()]
    with pytest.raises(UserError, match=r"images\[1\]"):
        extract(checkpoint, None, tmp_path / "f.npz", images=images)
    file = extract(checkpoint, None, tmp_path / "f.npz", "--on_bad_image", "skip", images=images)
    assert np.isfinite(file.features).all(axis=1).tolist() == [True, False, True]


def test_precisions_differ_by_their_rounding(checkpoint, class_folders, tmp_path):
    data = class_folders / "val"
    exact = extract(checkpoint, data, tmp_path / "32.npz").features
    half = extract(checkpoint, data, tmp_path / "16.npz", "--amp_dtype", "bfloat16").features
    assert 1e-5 < np.abs(half - exact).max() < 0.1


def test_other_networks_give_their_output(class_folders, tmp_path):
    weights = save_random_backbone(tmp_path / "backbone.pth", "timm:resnet10t")
    file = extract(weights, class_folders / "val", tmp_path / "f.npz")
    pretrained = opened(weights)
    pixels = torch.stack([pretrained.transform(read_image(path)) for path in file.paths])
    with torch.no_grad():
        assert np.allclose(file.features, pretrained.backbone(pixels), atol=1e-5)


# ---- interrupted ----

# A run with images of its own that is killed when it reads number 60.
KILLED = """
import os, signal, sys
import extract_features
from dino.data.images import ImageFiles, list_training_images

class Deadly(ImageFiles):
    def __getitem__(self, number):
        if number == 60:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(number)

extract_features.ImageFiles = Deadly
extract_features.main()
"""


def extract_on_a_rank(flags):
    extract_features.shut_down = lambda: None  # run_processes leaves the group
    args = extract_features.get_args_parser().parse_args(flags)
    extract_features.extract_features(args)


def test_a_killed_extraction_resumes_to_the_same_bytes(checkpoint, class_folders, tmp_path):
    """With two processes after one; the batches are those of the beginning."""
    (tmp_path / "killed.py").write_text(KILLED)
    copies = [path for path in sorted(class_folders.rglob("*.png")) for _ in range(2)]
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in copies))
    flags = (
        *("--pretrained_weights", checkpoint, "--data_path", tmp_path / "list.txt"),
        *("--batch_size_per_gpu", 3, "--device", "cpu", "--num_workers", 0),
    )
    output, unfinished = tmp_path / "f.npz", tmp_path / "f.npz.unfinished"
    killed = run_script(tmp_path / "killed.py", *flags, "--output", output, PYTHONPATH=str(ROOT))
    assert killed.returncode == -9, killed.stderr
    assert not output.exists()
    assert (unfinished / "done").read_bytes() == b"\1" * 16 + b"\0" * 8  # saved at every 16th
    features = np.load(unfinished / "features.npy", mmap_mode="r+")
    features[48:] = np.nan  # what was not safe yet may be anything
    features.flush()

    run_processes(extract_on_a_rank, 2, tmp_path, [*map(str, flags), "--output", str(output)])
    assert not unfinished.exists()
    whole = run_script("extract_features.py", *flags, "--output", tmp_path / "whole.npz")
    assert whole.returncode == 0, whole.stderr
    assert output.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    again = run_script("extract_features.py", *flags, "--output", output)
    assert "is complete." in again.stdout


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("done", b""),  # as after a crash of the machine
        ("done", b"\1"),
        ("done", b"\1\1\1\0"),
        ("features.npy", np.zeros((6, 4), np.float32)),
        ("features.npy", np.zeros((5, 4), np.float16)),
        ("features.npy", np.zeros((5, 4), np.float32, "F")),
        ("labels.npy", np.zeros((5, 1), np.int64)),
    ],
)
def test_an_extraction_of_damaged_parts_does_not_resume(name, content, tmp_path):
    settings = {"images": 5, "batch_size": 2}
    begun = Unfinished(tmp_path, settings, (4,), "float32")
    begun.write(0, np.ones((2, 4)), np.ones(2))
    begun.close()
    assert Unfinished(tmp_path, settings, (4,), "float32").missing() == [1, 2]
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content)
    with pytest.raises(UserError, match=r"is damaged\. Remove it to start again"):
        Unfinished(tmp_path, settings, (4,), "float32")


def test_an_extraction_resumes_with_the_same_settings_only(
    checkpoint, class_folders, tmp_path, capsys
):
    output, data = tmp_path / "f.npz", class_folders / "val"
    (tmp_path / "bad").mkdir()
    shutil.copy(class_folders / "val" / "chelsea" / "0.png", tmp_path / "bad" / "a.png")
    (tmp_path / "bad" / "b.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"b\.png: cannot be read as an image"):
        extract(checkpoint, tmp_path / "bad", output, "--batch_size_per_gpu", 1)
    assert (tmp_path / "f.npz.unfinished" / "done").read_bytes() == b"\1\0"
    shutil.copytree(tmp_path / "f.npz.unfinished", tmp_path / "g.npz.unfinished")
    (tmp_path / "g.npz.unfinished" / "labels.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"is damaged\. Remove it"):
        extract(checkpoint, tmp_path / "bad", tmp_path / "g.npz", "--batch_size_per_gpu", 1)
    for flags, name in (
        (("--batch_size_per_gpu", 2), "batch_size is 1, now 2"),
        (("--batch_size_per_gpu", 1, "--tokens", "mean"), "tokens is cls, now mean"),
    ):
        with pytest.raises(UserError, match=name):
            extract(checkpoint, tmp_path / "bad", output, *flags)
    photograph("coffee.png").save(tmp_path / "bad" / "b.png")  # repaired
    flags = ("--batch_size_per_gpu", 1, "--on_bad_image", "skip")  # this one may change
    extract(checkpoint, tmp_path / "bad", output, *flags)
    assert not (tmp_path / "f.npz.unfinished").exists()
    assert "Resuming: 1 of 2 batches are left." in capsys.readouterr().out
    with pytest.raises(UserError, match="images is 2, now 12"):
        extract(checkpoint, data, output, "--batch_size_per_gpu", 1)


def test_an_extraction_that_did_nothing_is_begun_anew_without_the_bad_image(
    checkpoint, class_folders, tmp_path
):
    shutil.copytree(class_folders / "val", tmp_path / "val")
    bad = tmp_path / "val" / "astronaut" / "0.png"
    bad.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"0\.png: cannot be read as an image .* remove it"):
        extract(checkpoint, tmp_path / "val", tmp_path / "f.npz")
    bad.unlink()
    assert len(extract(checkpoint, tmp_path / "val", tmp_path / "f.npz").features) == 11


def test_a_skipped_image_has_no_features_and_changes_no_other(
    checkpoint, class_folders, tmp_path, capsys
):
    shutil.copytree(class_folders / "val", tmp_path / "val")
    (tmp_path / "val" / "chelsea" / "1.png").write_bytes(b"no image")
    flags = ("--on_bad_image", "skip", "--neighbours", 2)
    file = extract(checkpoint, tmp_path / "val", tmp_path / "f.npz", *flags)
    expected = extract(checkpoint, class_folders / "val", tmp_path / "whole.npz").features
    assert "chelsea/1.png cannot be read; its features are nan" in capsys.readouterr().out
    assert np.isnan(file.features[5]).all()
    others = [i for i in range(12) if i != 5]
    assert np.array_equal(file.features[others], expected[others])


# ---- pictures ----


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_images_of_other_channels_are_extracted_and_drawn_with_their_first_three(
    channels, tmp_path
):
    torch.manual_seed(0)
    backbone = MultiCropWrapper(vit_nano(8, img_size=32, in_chans=channels), nn.Identity())
    color = dict(mean=(0.5,) * channels, std=(0.25,) * channels)
    description = dict(arch="vit_nano", patch_size=8, image_size=32, **color)
    save_backbone(tmp_path / "backbone.pth", backbone, **description)
    (tmp_path / "images").mkdir()
    pixels = [np.full((40, 36, channels), 60, np.uint8) for _ in range(3)]
    for number, image in enumerate(pixels):
        image[5 * number :, :, -1] = 200
        np.save(tmp_path / "images" / f"{number}.npy", image)
    weights, output = tmp_path / "backbone.pth", tmp_path / "f.npz"
    file = extract(weights, tmp_path / "images", output, "--neighbours", 1)
    pretrained = opened(weights)
    with torch.no_grad():
        expected = pretrained.backbone(torch.stack([pretrained.transform(i) for i in pixels]))
    np.testing.assert_allclose(file.features, expected, atol=1e-5)
    assert (tmp_path / "f_neighbours.png").exists()
    # the first image is bright in its last channel
    color = {1: (200, 200, 200), 2: (60, 200, 0), 5: (60, 60, 60)}[channels]
    drawn = np.asarray(extract_features.picture_of(pixels[0], 0, channels))
    assert (drawn == color).all() and drawn.shape == (40, 36, 3)


def test_pictures_of_neighbours_are_drawn_for_every_query(checkpoint, class_folders, tmp_path):
    flags = ("--neighbours", 4)
    extract(checkpoint, class_folders / "train", tmp_path / "f.npz", *flags)
    pixels = np.asarray(Image.open(tmp_path / "f_neighbours.png").convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 1000  # photographs
    for color in ((44, 160, 44), (214, 39, 40)):  # right and wrong ones
        assert (pixels == color).all(axis=1).any()
    flags = ("--neighbours", 2, "--queries", class_folders / "val")  # 12 queries: two sheets
    extract(checkpoint, class_folders / "train", tmp_path / "f.npz", *flags)
    sizes = [Image.open(tmp_path / f"f_neighbours_{page}.png").size for page in (1, 2)]
    assert sizes[0][0] == sizes[1][0]
    assert sizes[0][1] > 1.5 * sizes[1][1]


# ---- refused ----


def test_a_damaged_file_of_features_is_refused(checkpoint, class_folders, tmp_path):
    for suffix in (".npz", ".safetensors"):
        path = tmp_path / f"f{suffix}"
        extract(checkpoint, class_folders / "val", path)
        content = path.read_bytes()
        for damaged in (b"", content[:40], content[: len(content) // 2], b"\xff" * 100):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match="damaged, or not a file of extract_features"):
                read_features(path)


def test_a_file_with_features_of_another_shape_is_not_taken_for_complete(
    checkpoint, class_folders, tmp_path
):
    path = tmp_path / "f.npz"
    extract(checkpoint, class_folders / "val", path)
    with np.load(path) as content:
        parts = dict(content)
    flags, count = ("--neighbours", 2), len(parts["features"])
    for features in (parts["features"][:, :5], parts["features"][:, None]):
        np.savez(path, **{**parts, "features": features})
        shape = " x ".join(map(str, features.shape))
        with pytest.raises(UserError, match=f"of shape {shape}, and .* gives {count} x 96"):
            extract(checkpoint, class_folders / "val", path, *flags)


def test_a_file_of_features_cannot_hold_objects(tmp_path):
    good = dict(features=np.zeros((2, 3), np.float32), labels=np.zeros(2, int), paths=["a", "b"])
    objects = np.array([print, print], dtype=object)
    np.savez(tmp_path / "f.npz", **good, settings="{}")
    assert read_features(tmp_path / "f.npz").paths == ["a", "b"]
    for name in good:
        np.savez(tmp_path / "f.npz", **{**good, name: objects}, settings="{}")
        with pytest.raises(UserError, match="damaged, or not a file of extract_features"):
            read_features(tmp_path / "f.npz")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--output f.pth", r"must end in \.npz or \.safetensors"),
        ("--output file/f.npz", "is not a folder that can be written to"),
        ("--output folder.npz", "is a folder"),
        ("--output f.npz --data_path ''", "--data_path '' is empty"),
        ("--output f.npz --data_path nowhere", "--data_path nowhere: no such folder"),
        ("--output f.npz --tokens all", "invalid choice"),
        ("--output f.npz --neighbours 8 --tokens patch", "exclude each other"),
        ("--output images/f.npz --neighbours 8", "is in --data_path"),
        ("--output f.npz --queries images", "is for --neighbours"),
        ("--output f.npz --neighbours 8 --queries nowhere", "--queries nowhere: no such"),
        (
            "--output f.npz --neighbours 8 --queries file",
            r"f\.npz: f_neighbours_2\.png exists and was not written by these scripts",
        ),
        ("--output f.npz --neighbours 21", "--neighbours: 21 is out of range"),
        ("--output f.npz --batch_size_per_gpu 0", "--batch_size_per_gpu: 0 is out of range"),
        ("--output f.npz --image_size 0", "--image_size: 0 is out of range"),
        ("--output f.npz --image_size 33", "--image_size 33: vit_nano does not take"),
        ("--output f.npz --max_image_pixels 200000", "more than --max_image_pixels 200000"),
        ("--output f.npz --pretrained_weights resnet.pth --tokens mean", "is not one of our ViTs"),
        ("", "required: --output"),
    ],
)
def test_a_mistake_is_named_and_writes_nothing(
    checkpoint, tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    for folder in ("images", "folder.npz"):
        (tmp_path / folder).mkdir()
    photograph().save("images/a.png")
    photograph().save("f_neighbours_2.png")
    (tmp_path / "file").write_text("images/a.png\n" * 20)
    save_random_backbone(tmp_path / "resnet.pth", "timm:resnet10t")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # which it is again after this test
    before = sorted(tmp_path.rglob("*"))
    command = f"--pretrained_weights {checkpoint} --data_path images --num_workers 0 {flags}"
    words = [word.replace("''", "") for word in command.split()]
    monkeypatch.setattr(sys, "argv", ["extract_features.py", *words])
    with pytest.raises(SystemExit, match="2"):
        extract_features.main()
    said = capsys.readouterr().err
    assert re.search(message, said), said
    left = [path for path in sorted(tmp_path.rglob("*")) if "unfinished" not in str(path)]
    assert left == before


def test_a_disk_that_is_too_small_is_refused_before_the_work(
    checkpoint, class_folders, tmp_path, monkeypatch
):
    usage = shutil._ntuple_diskusage(10**6, 10**6 - 5000, 5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"of 24 images need 0\.0"):
        extract(checkpoint, class_folders / "train", tmp_path / "f.npz")
    assert not list(tmp_path.iterdir())
