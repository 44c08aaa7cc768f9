# SPDX-License-Identifier: Apache-2.0
"""Attention maps and masks against the rule written out, and visualize_attention.py as used."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import photograph, run_script
from helpers import parse, save_random_backbone
from PIL import Image
from torchvision.transforms import functional as F

import visualize_attention
from dino.data.augmentations import IMAGENET_MEAN, IMAGENET_STD
from dino.errors import UserError
from dino.evaluation.attention import (
    class_attention,
    fit_to_patches,
    keep_mass,
    open_for_attention,
    upsample,
)
from visualize_attention import Picture, color_map, draw_mask, draw_sheet

RANDOM_MAPS = torch.from_numpy(np.random.default_rng(0).gamma(0.3, size=(5, 6, 9)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_random_backbone(tmp_path_factory.mktemp("nano") / "backbone.pth", "vit_nano")


def visualize(checkpoint, output_dir, *flags):
    flags = ("--pretrained_weights", checkpoint, "--output_dir", output_dir, *flags)
    visualize_attention.visualize_attention(parse(visualize_attention, *flags))


# ---- maps and masks ----


@pytest.mark.parametrize("size", [(64, 40), (40, 64), (24, 24)])
def test_maps_equal_the_first_row_of_the_last_blocks_map(checkpoint, size):
    pretrained = open_for_attention(parse(visualize_attention, "--pretrained_weights", checkpoint))
    image = photograph().resize(size)
    maps = class_attention(pretrained, image)
    pixels = F.normalize(F.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)[None]
    whole = pretrained.backbone.get_last_selfattention(pixels)[0]  # (h, N, N)
    assert maps.shape == (3, size[1] // 8, size[0] // 8)
    torch.testing.assert_close(maps.flatten(1), whole[:, 0, 1:])
    assert (maps.sum(dim=(1, 2)) < 1).all(), "[CLS] keeps some for itself"


def kept_by_the_rule(values, threshold):
    """F56 of one map, patch by patch: sorted upwards, kept from where the sum passes."""
    flat = np.asarray(values, np.float64).ravel() / np.asarray(values, np.float64).sum()
    kept, total = np.zeros(flat.size, bool), 0.0
    for patch in np.argsort(flat, kind="stable"):
        total += flat[patch]
        kept[patch] = total > 1 - threshold
    return kept.reshape(np.shape(values))


@pytest.mark.parametrize("threshold", [0.05, 0.6, 0.8, 0.999])
def test_masks_equal_the_rule_head_by_head(threshold):
    masks = keep_mass(RANDOM_MAPS, threshold)
    assert 0 < masks.sum() < masks.numel()
    for mask, values in zip(masks, RANDOM_MAPS, strict=True):
        np.testing.assert_array_equal(mask, kept_by_the_rule(values, threshold))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_mask_holds_the_share_and_would_not_without_its_smallest_patch(share):
    for values, mask in zip(RANDOM_MAPS, keep_mass(RANDOM_MAPS, share), strict=True):
        held = values[mask].sum() / values.sum()
        assert held >= share
        assert held - values[mask].min() / values.sum() < share
        assert values[mask].min() >= values[~mask].max()


def test_upsampled_patches_are_squares_of_equal_pixels():
    values = RANDOM_MAPS[0]
    np.testing.assert_array_equal(upsample(values, 8), np.kron(values, np.ones((8, 8))))


@pytest.mark.parametrize(
    ("image_size", "resized", "whole"),
    [
        ([0], (45, 61), (40, 56)),
        ([45, 30], (45, 30), (40, 24)),
        ([90], (90, 122), (88, 120)),  # the short side
    ],
)
def test_images_keep_their_aspect_ratio_unless_two_numbers_are_given(image_size, resized, whole):
    image, size = fit_to_patches(photograph().resize((61, 45)), image_size, 8, "name")
    assert size == resized
    assert (image.height, image.width) == whole


def test_rows_and_columns_are_cut_at_the_bottom_and_on_the_right():
    image = photograph().resize((61, 45))
    np.testing.assert_array_equal(fit_to_patches(image, [0], 8, "")[0], np.asarray(image)[:40, :56])


def test_an_image_smaller_than_a_patch_is_refused_by_name():
    with pytest.raises(UserError, match=r"a\.png: 7 x 30 pixels do not hold a patch of 8 x 8"):
        fit_to_patches(photograph().resize((30, 7)), [0], 8, "a.png")


# ---- pictures ----


def test_official_flags_have_official_defaults():
    args = vars(visualize_attention.get_args_parser().parse_args([]))
    official = dict(arch="vit_small", patch_size=8, pretrained_weights="", checkpoint_key="teacher")
    official |= dict(image_path=None, image_size=[480, 480], output_dir=".", threshold=None)
    assert args == official | {"device": "auto", "max_image_pixels": 89478485, "given": {}}


def test_help_is_shown(capsys):
    with pytest.raises(SystemExit) as stopped:
        visualize_attention.get_args_parser().parse_args(["--help"])
    assert stopped.value.code == 0
    assert "--threshold" in capsys.readouterr().out


PICTURES = ["attention.png", "attn-mean.png", "img.png", "overlay.png"]
PICTURES += [f"attn-head{j}.png" for j in range(3)]
MASKS = [f"mask_th0.6_{name}.png" for name in ("head0", "head1", "head2", "mean")]


@pytest.mark.parametrize(
    ("size", "flags", "pixels"),
    [
        ((90, 60), ("--image_size", 64), (96, 64)),
        ((60, 90), ("--image_size", 64), (64, 96)),
        ((60, 90), ("--image_size", 64, 40), (40, 64)),  # height, width
        ((19, 9), ("--image_size", 0), (16, 8)),
        ((5, 3), ("--image_size", 16), (24, 16)),
    ],
)
def test_pictures_have_official_names_and_the_size_of_the_whole_patches(
    checkpoint, tmp_path, size, flags, pixels
):
    photograph().resize(size).save(tmp_path / "a.png")
    out = tmp_path / "out"
    visualize(checkpoint, out, "--image_path", tmp_path / "a.png", *flags, "--threshold", 0.6)
    assert sorted(path.name for path in out.iterdir()) == sorted(PICTURES + MASKS)
    for path in out.iterdir():
        if path.name != "attention.png":
            assert Image.open(path).size == pixels, path.name


def test_without_a_file_the_network_of_the_papers_pictures_is_asked_for(tmp_path, asked):
    """As by the official script: ViT-S/8 of 300 epochs, not the one of 800 that is evaluated."""
    with pytest.raises(UserError, match="could not be downloaded"):
        visualize("", tmp_path / "maps")
    file = "dino_deitsmall8_300ep_pretrain"
    assert asked == [f"https://dl.fbaipublicfiles.com/dino/{file}/{file}.pth"]


def test_a_backbone_of_small_images_is_shown_large_with_a_word_about_it(
    checkpoint, tmp_path, capsys
):
    hint = "the backbone was trained on 32: add --image_size 32 to see maps as in training."
    visualize(checkpoint, tmp_path)
    assert hint in capsys.readouterr().out
    visualize(checkpoint, tmp_path, "--image_size", 32)
    assert "trained on" not in capsys.readouterr().out


def test_without_a_threshold_there_are_no_masks(checkpoint, tmp_path):
    visualize(checkpoint, tmp_path, "--image_size", 48)  # of scikit-image's photograph
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(PICTURES)
    expected, _ = fit_to_patches(photograph("chelsea.png"), [48], 8, "")
    np.testing.assert_array_equal(Image.open(tmp_path / "img.png"), expected)


@pytest.mark.parametrize("size", [(8, 2048), (2048, 8)])
def test_a_strip_has_a_sheet_that_can_be_looked_at(size, tmp_path):
    strip = np.zeros((*size[::-1], 3), np.uint8)
    draw_sheet(tmp_path / "a.png", "strip", [[Picture("img.png", "image", strip)]] * 2)
    with Image.open(tmp_path / "a.png") as sheet:
        assert max(sheet.size) < 3000


def test_images_of_a_folder_do_not_overwrite_each_other(checkpoint, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    (photos / "b").mkdir(parents=True)
    names = ["a.png", "b/a.png", "b/c.png"]
    for number, name in enumerate(names):
        photograph().crop((number, 0, number + 40, 24)).save(photos / name)
    visualize(checkpoint, out, "--image_path", photos, "--image_size", 0)
    for name in names:
        picture = out / name.removesuffix(".png") / "img.png"
        np.testing.assert_array_equal(Image.open(picture), Image.open(photos / name))
    photograph().resize((40, 24)).save(photos / "a.jpg")
    visualize(checkpoint, tmp_path / "again", "--image_path", photos, "--image_size", 0)
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"a.png", "a.jpg", "b"}


def test_a_photograph_is_turned_as_its_file_says(checkpoint, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    photograph().crop((0, 0, 80, 40)).save(tmp_path / "a.jpg", exif=exif)
    visualize(checkpoint, tmp_path / "out", "--image_path", tmp_path / "a.jpg", "--image_size", 0)
    assert Image.open(tmp_path / "out" / "img.png").size == (40, 80)


def test_colours_are_those_of_matplotlibs_imsave(tmp_path):
    values = upsample(RANDOM_MAPS[0].float(), 4)
    plt.imsave(tmp_path / "official.png", values.numpy(), format="png")
    expected = np.asarray(Image.open(tmp_path / "official.png").convert("RGB"))
    np.testing.assert_array_equal(color_map(values), expected)
    assert (color_map(torch.ones(2, 2)) == color_map(torch.zeros(2, 2))).all()


def test_a_mask_is_tinted_inside_its_contour_and_nowhere_else():
    pixels = np.full((48, 64, 3), 100, np.uint8)
    mask = np.zeros((48, 64), bool)
    mask[8:24, 16:40] = True
    mask[40:, 56:] = True  # in the corner
    picture = draw_mask(pixels, mask).astype(int)
    changed = (picture != 100).any(axis=-1)
    np.testing.assert_array_equal(changed[10:22, 18:38], True)
    around = np.zeros_like(mask)
    around[7:25, 15:41] = around[39:, 55:] = True  # a contour may reach one pixel outside
    assert not changed[~around].any()
    outline = (picture == visualize_attention.MASK_COLOR).all(axis=-1)
    assert outline[7:9, 20:36].any(axis=0).all(), "the upper edge is drawn"
    assert not outline[12:20, 20:36].any()
    assert outline[46:, 58:62].any(), "contours close along the border of the image"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--image_path", "nowhere.jpg"), "--image_path nowhere.jpg: no such file or folder"),
        (("--image_size", 1, 2, 3), "--image_size 1 2 3: give height and width"),
        (("--image_size", 0, 48), "--image_size 0 48: give height and width"),
        (("--image_path", "{tmp}/empty"), "no image in this folder"),
        (("--image_path", "{tmp}/broken.png"), "broken.png: cannot be read as an image"),
    ],
)
def test_wrong_flags_are_refused(checkpoint, tmp_path, flags, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_text("no image")
    flags = [str(flag).replace("{tmp}", str(tmp_path)) for flag in flags]
    with pytest.raises(UserError, match=message):
        visualize(checkpoint, tmp_path / "out", *flags)


def test_no_photograph_is_overwritten(checkpoint, tmp_path):
    photograph().resize((40, 24)).save(tmp_path / "img.png")
    before = (tmp_path / "img.png").read_bytes()
    with pytest.raises(UserError, match="would be overwritten"):
        visualize(checkpoint, tmp_path, "--image_path", tmp_path / "img.png")
    with pytest.raises(UserError, match="taken for photographs next time"):
        visualize(checkpoint, tmp_path / "out", "--image_path", tmp_path)
    assert (tmp_path / "img.png").read_bytes() == before


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("resnet50", "no class token"),
        ("xcit_small_12_p16", "from channel to channel"),
        ("timm:vit_tiny_patch16_224", "do not return theirs"),
    ],
)
def test_networks_without_a_map_are_refused_before_a_download(arch, reason):
    with pytest.raises(UserError, match=rf"--arch {arch}: .*{reason}.*vit_small"):
        open_for_attention(parse(visualize_attention, "--arch", arch))


def test_a_checkpoint_of_a_resnet_is_refused_by_name(tmp_path):
    path = save_random_backbone(tmp_path / "backbone.pth", "resnet18")
    flags = ("--pretrained_weights", path, "--device", "cpu")
    result = run_script("visualize_attention.py", *flags, "--output_dir", tmp_path / "out")
    assert result.returncode == 2
    assert f"--pretrained_weights {path} (resnet18): " in result.stderr
    assert "--arch vit_nano or vit_tiny" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
