# SPDX-License-Identifier: Apache-2.0
"""Jaccard similarity of attention masks by hand, and eval_attention.py as a user runs it."""

import json

import numpy as np
import pytest
import torch
from conftest import photograph, run_script
from helpers import parse, save_random_backbone
from PIL import Image
from torch import nn

import eval_attention
from dino.data.masks import SegmentedImages
from dino.errors import UserError
from dino.evaluation.attention import (
    class_attention,
    fit_to_patches,
    keep_mass,
    open_for_attention,
    upsample,
)
from dino.weights.pretrained import Pretrained
from eval_attention import jaccard, patch_of_pixels


def test_jaccard_of_itself_is_one_of_the_complement_zero_and_of_an_overlap_its_share():
    masks = torch.zeros(2, 6, 10, dtype=torch.bool)
    masks[0, :4, :5] = True  # 20 pixels
    masks[1, 2:, 3:9] = True  # 24 pixels, 2 x 2 of them in the first
    first, second = masks.flatten(1)
    found = jaccard(torch.stack([first, ~first]), torch.stack([first, second]))
    np.testing.assert_allclose(found, [[1, 4 / 40], [0, 20 / 44]])


@pytest.mark.parametrize(("pixels", "size", "patch"), [(375, 480, 16), (500, 640, 16), (61, 45, 8)])
def test_pixels_of_a_mask_take_the_patch_under_their_centre(pixels, size, patch):
    """Pillow's nearest neighbour, from the resized image to the mask, is the judge."""
    resized = np.arange(size, dtype=np.int32) // patch
    expected = np.asarray(Image.fromarray(resized[None]).resize((pixels, 1), Image.NEAREST))[0]
    expected = expected[expected < size // patch]
    found = patch_of_pixels(pixels, size, patch).numpy()
    assert found.shape == expected.shape
    # Of a centre between two patches, Pillow's rounding decides at whim: ours is in the second.
    between = (2 * np.arange(len(found)) + 1) * size % (2 * pixels * patch) == 0
    np.testing.assert_array_equal(found[~between], expected[~between])
    np.testing.assert_array_equal(np.diff(found)[between[1:]], 1)


def with_palette(labels):
    mask = Image.fromarray(np.asarray(labels, np.uint8))
    mask.putpalette([*range(256)] * 3)
    return mask


def write_voc(root, labels, folder="SegmentationObject", size=(32, 32)):
    """A VOC2012 folder of images of `size` (width, height), with these {name: labels}."""
    for name in ("JPEGImages", folder, "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name, values in labels.items():
        photograph().resize(size).save(root / "JPEGImages" / f"{name}.jpg")
        with_palette(values).save(root / folder / f"{name}.png")
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("\n".join(labels) + "\n")
    return root


# 32 x 32 pixels, 4 x 4 patches of 8.
TWO_OBJECTS = np.zeros((32, 32))
TWO_OBJECTS[:, :16] = 1  # the left half
TWO_OBJECTS[24:, 24:] = 2  # the last patch
OBJECT_AND_VOID = np.zeros((32, 32))
OBJECT_AND_VOID[:16, :16], OBJECT_AND_VOID[16:, :16] = 1, 255
ONLY_VOID = np.full((32, 32), 255)


@pytest.fixture
def two_known_heads(monkeypatch):
    """Head 0 sees the left half, head 1 the lower right quarter, whatever the image."""
    maps = torch.full((2, 4, 4), 1e-9)
    maps[0, :, :2] = 1 / 8
    maps[1, 2:, 2:] = 1 / 4
    monkeypatch.setattr(eval_attention, "class_attention", lambda pretrained, image: maps)
    pretrained = Pretrained(nn.Identity(), 96, "vit_nano", 8)
    monkeypatch.setattr(eval_attention, "open_for_attention", lambda args: pretrained)


def test_voc_scores_each_object_with_the_head_that_fits_it_best(two_known_heads, tmp_path, capsys):
    labels = {"a": TWO_OBJECTS, "b": OBJECT_AND_VOID, "c": ONLY_VOID}
    flags = ("--data_path", write_voc(tmp_path, labels), "--image_size", 0, "--threshold", 0.95)
    output = tmp_path / "figures" / "all.json"
    summary = eval_attention.eval_attention(parse(eval_attention, *flags, "--output", output))[0.95]
    # a: (1 + 64/256) / 2; b: 256/512, as void counts for background; c has no object
    assert summary["best_head"] == pytest.approx(100 * (0.625 + 0.5) / 2)
    # head 0: (1 + 0) / 2 and 1/2; head 1: (0 + 64/256) / 2 and 0
    assert summary["heads"] == pytest.approx([50, 100 * 0.125 / 2])
    assert summary["best_single_head"] == {"head": 0, "jaccard": pytest.approx(50)}
    # mean: all 12 patches, 768 pixels. (512/768 + 64/768) / 2, and 256/768
    assert summary["mean_of_heads"] == pytest.approx(100 * (0.375 + 1 / 3) / 2)
    shown = capsys.readouterr().out
    assert "2 images with 3 true masks (objects); 1 without any are left out" in shown
    assert "DINO 45.9" in shown
    written = json.loads(output.read_text())
    assert written["thresholds"]["0.95"] == summary
    assert written["images"]["a"]["0.95"]["best_head"] == pytest.approx(62.5)
    assert written["ground_truth"] == "objects"


def test_as_foreground_all_objects_are_one_and_void_is_left_out(two_known_heads, tmp_path):
    labels = {"a": TWO_OBJECTS, "b": OBJECT_AND_VOID, "c": ONLY_VOID}
    root = write_voc(tmp_path, labels, "SegmentationClass")
    flags = ("--data_path", root, "--image_size", 0, "--threshold", 0.95)
    with pytest.raises(UserError, match="SegmentationObject, which --ground_truth objects needs"):
        eval_attention.eval_attention(parse(eval_attention, *flags))
    args = parse(eval_attention, *flags, "--ground_truth", "foreground")
    summary = eval_attention.eval_attention(args)[0.95]
    assert summary["best_head"] == pytest.approx(100 * (512 / 576 + 1) / 2)


@pytest.mark.parametrize("scale", [1, 2])
def test_what_lies_beyond_the_last_whole_patch_does_not_count(two_known_heads, tmp_path, scale):
    """At any resolution of the mask."""
    labels = np.zeros((32, 36))
    labels[:16, 32:] = 1  # out of sight
    labels[16:, 16:] = 2  # all that head 1 sees, and beyond
    root = write_voc(tmp_path, {"a": np.kron(labels, np.ones((scale, scale)))}, size=(36, 32))
    flags = ("--data_path", root, "--image_size", 0, "--threshold", 0.95)
    assert eval_attention.eval_attention(parse(eval_attention, *flags))[0.95]["heads"] == [0, 100]


def test_white_is_foreground_in_a_grey_mask_and_void_in_one_with_a_palette(tmp_path):
    for name in ("images", "masks/sub"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "images" / "sub").mkdir()
    photograph().resize((32, 32)).save(tmp_path / "images" / "sub" / "a.jpg")
    mask = tmp_path / "masks" / "sub" / "a.png"
    grey = Image.fromarray(OBJECT_AND_VOID.astype(np.uint8))
    transparent = Image.merge("LA", [grey, Image.new("L", grey.size, 255)])
    for kind in (grey, grey.convert("RGB"), transparent, grey.point(lambda v: v > 0, "1")):
        kind.save(mask)
        ((name, _, objects, counted),) = SegmentedImages(tmp_path)
        assert name == "sub/a"
        np.testing.assert_array_equal(objects[0], OBJECT_AND_VOID > 0)
        assert counted.all()
    with_palette(OBJECT_AND_VOID).save(mask)
    ((_, _, objects, counted),) = SegmentedImages(tmp_path)
    np.testing.assert_array_equal(objects[0], OBJECT_AND_VOID == 1)
    np.testing.assert_array_equal(counted, OBJECT_AND_VOID != 255)


def test_wrong_data_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"JPEGImages.*images/ and masks/"):
        SegmentedImages(tmp_path)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="no images to measure"):
        SegmentedImages(tmp_path)
    photograph().resize((32, 32)).save(tmp_path / "images" / "a.png")
    with pytest.raises(UserError, match=r"a\.png has no counterpart in .*masks"):
        SegmentedImages(tmp_path)
    photograph().resize((32, 32)).save(tmp_path / "masks" / "a.jpg")
    with pytest.raises(UserError, match="JPEG blurs"):
        list(SegmentedImages(tmp_path))
    with pytest.raises(UserError, match="does not tell objects apart"):
        SegmentedImages(tmp_path, "objects")
    photograph().resize((32, 32)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(UserError, match="same name but for the suffix"):
        SegmentedImages(tmp_path)
    voc = write_voc(tmp_path / "voc", {"a": TWO_OBJECTS})
    photograph().resize((32, 32)).save(voc / "SegmentationObject" / "a.png")
    with pytest.raises(UserError, match="not labels with a palette"):
        list(SegmentedImages(voc))
    (voc / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(UserError, match=r"lists .*a\.jpg, which is not a file"):
        SegmentedImages(voc)


@pytest.mark.parametrize(
    ("ending", "mode", "options", "message"),
    [
        ("tif", "CMYK", {}, "CMYK, of which black is not 0"),
        ("tif", "YCbCr", {}, "YCbCr, of which black is not 0"),
        ("tif", "RGB", {"compression": "jpeg"}, "jpeg in TIFF blurs"),
        ("webp", "RGB", {"quality": 50}, "WEBP blurs"),
        ("png", "white first", {}, "black is number 1 of its palette, and 0, .* is another colour"),
    ],
)
def test_masks_that_do_not_hold_their_pixels_as_they_are_are_refused(
    ending, mode, options, message, tmp_path
):
    with pytest.raises(UserError, match=message):
        list(SegmentedImages(write_pair(tmp_path, f"a.{ending}", mode, **options)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.webp", {"lossless": True}),
        ("a.webp", {"lossless": True, "exif": b"Exif\0\0odd"}),  # with a chunk before the pixels
        ("a.tif", {"compression": "tiff_lzw"}),
    ],
)
def test_masks_in_which_nothing_is_lost_are_read(name, options, tmp_path):
    ((_, _, objects, _),) = SegmentedImages(write_pair(tmp_path, name, "RGB", **options))
    assert np.array_equal(objects[0].numpy(), OBJECT_AND_VOID != 0)


def write_pair(root, mask_name, mode, **options):
    for name in ("images", "masks"):
        (root / name).mkdir()
    photograph().resize((32, 32)).save(root / "images" / "a.png")
    grey = Image.fromarray(OBJECT_AND_VOID.astype(np.uint8)).convert("RGB")
    mask = grey.quantize(2) if mode == "white first" else grey.convert(mode)
    mask.save(root / "masks" / mask_name, **options)
    return root


@pytest.mark.parametrize(
    ("names", "message"),
    [("a\n".encode("utf-16"), r"val\.txt: this file is not text"), (b"a\na\n", "lists a twice")],
)
def test_a_list_of_voc_is_text_and_names_an_image_once(names, message, tmp_path):
    voc = write_voc(tmp_path, {"a": TWO_OBJECTS})
    (voc / "ImageSets" / "Segmentation" / "val.txt").write_bytes(names)
    with pytest.raises(UserError, match=message):
        SegmentedImages(voc)


def test_a_mask_of_another_shape_than_its_image_is_refused(two_known_heads, tmp_path):
    root = write_voc(tmp_path, {"a": np.ones((32, 40))})
    with pytest.raises(UserError, match="32 x 32 pixels, its mask 40 x 32"):
        eval_attention.eval_attention(parse(eval_attention, "--data_path", root))


def test_the_script_measures_a_checkpoint(tmp_path):
    """Of one head's mask as an object, that head is the best, with 100 %."""
    checkpoint = save_random_backbone(tmp_path / "backbone.pth", "vit_nano")
    pretrained = open_for_attention(parse(eval_attention, "--pretrained_weights", checkpoint))
    root = write_voc(tmp_path / "voc", {"a": TWO_OBJECTS})
    image, _ = fit_to_patches(Image.open(root / "JPEGImages" / "a.jpg"), [64], 8, "")
    mask = upsample(keep_mass(class_attention(pretrained, image), 0.6)[1], 4)  # 32 x 32
    with_palette(mask).save(root / "SegmentationObject" / "a.png")
    result = run_script(
        *("eval_attention.py", "--pretrained_weights", checkpoint, "--data_path", root),
        *("--image_size", 64, "--device", "cpu"),
    )
    assert result.returncode == 0, result.stderr
    values = {line[:42].strip(): line[42:].split() for line in result.stdout.splitlines()}
    assert values["Jaccard similarity (%) of masks that hold"] == ["60", "%", "80", "%"]
    assert values["best head for each true mask"][0] == "100.0"
    assert values["best single head"][:3] == ["100.0", "(head", "1)"]


def test_help_is_shown(capsys):
    with pytest.raises(SystemExit) as stopped:
        eval_attention.get_args_parser().parse_args(["--help"])
    assert stopped.value.code == 0
    assert "--ground_truth" in capsys.readouterr().out


def test_the_script_refuses_a_wrong_data_path_without_a_traceback(tmp_path):
    result = run_script("eval_attention.py", "--data_path", tmp_path)
    assert result.returncode == 2
    assert f"--data_path {tmp_path}: neither VOC2012's folder" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_data_path_that_was_not_given_is_called_missing():
    with pytest.raises(UserError, match="--data_path is missing"):
        eval_attention.eval_attention(parse(eval_attention))
