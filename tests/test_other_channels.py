# SPDX-License-Identifier: Apache-2.0
"""Pictures and fine-tuning of a run on images of four channels."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import tifffile
import torch
from conftest import SMALL_RUN, photograph
from helpers import parse
from PIL import Image

import finetune
import visualize_attention
from dino.backbones import build_backbone
from dino.errors import UserError
from dino.training.backbone_pictures import GAP, TILE
from dino.training.flags import parse_args
from dino.weights.starting import load_resized
from main_dino import train_dino
from vision_transformer import vit_nano

MEAN, STD = (0.5, 0.4, 0.3, 0.6), (0.2, 0.25, 0.3, 0.2)


def four_channels(number):
    """uint8 (32, 32, 4): a part of a photograph in red, and a channel that is not to be seen."""
    red = np.asarray(photograph().convert("L"))[100 + 8 * number :][:32, 200:232]
    return np.stack([red, red // 4, red // 4, 255 - red], axis=-1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(data, folder of a run on its train/) of two classes."""
    root = tmp_path_factory.mktemp("channels")
    data, run = root / "data", root / "run"
    for number in range(12):
        folder = data / ("val" if number % 3 == 0 else "train") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(folder / f"{number}.tif", four_channels(number))
    flags = (*SMALL_RUN, "--epochs", 1, "--in_chans", 4, "--mean", *MEAN, "--std", *STD)
    flags += ("--report", "true", "--data_path", data / "train", "--output_dir", run)
    train_dino(parse_args([str(flag) for flag in flags]))
    return data, run


@pytest.mark.parametrize("name", ["attention_maps", "attention_over_epochs", "patch_features"])
def test_a_run_is_drawn_by_the_first_three_channels_of_its_images(trained, name):
    sheet = np.asarray(Image.open(trained[1] / f"{name}.png").convert("RGB")).astype(float)
    tile = sheet[-GAP - TILE : -GAP, GAP : GAP + TILE]
    red, green, blue = tile.mean(axis=(0, 1))
    assert 20 < green < 70
    assert red == pytest.approx(4 * green, rel=0.1)
    assert green == pytest.approx(blue, abs=1)


def test_neighbours_are_drawn_of_four_channels(trained):
    assert (trained[1] / "neighbours.png").stat().st_size > 10_000


def test_maps_of_four_channels_are_those_of_the_network_on_all_of_them(trained, tmp_path):
    data, run = trained
    weights, image = run / "backbone.pth", data / "val" / "a" / "6.tif"
    flags = ("--pretrained_weights", weights, "--image_path", image, "--image_size", 0)
    flags += ("--output_dir", tmp_path, "--device", "cpu")
    visualize_attention.visualize_attention(parse(visualize_attention, *flags))

    backbone = vit_nano(8, img_size=[32], in_chans=4).eval()
    state = torch.load(weights)["teacher"]
    backbone.load_state_dict({k: v for k, v in state.items() if not k.startswith("head.")})
    pixels = torch.tensor(four_channels(6) / 255, dtype=torch.float32)
    pixels = ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None]
    with torch.no_grad():
        maps = backbone.get_last_selfattention(pixels)[0, :, 0, 1:].reshape(-1, 4, 4)
    expected = np.kron(maps[0].numpy(), np.ones((8, 8)))
    plt.imsave(tmp_path / "expected.png", expected)
    found, right = (
        np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int)
        for name in ("attn-head0.png", "expected.png")
    )
    assert abs(found - right).max() <= 2, "a colour of the map may round to the one beside it"
    assert np.array_equal(np.asarray(Image.open(tmp_path / "img.png")), four_channels(6)[..., :3])


def test_the_photograph_that_comes_along_is_not_for_four_channels(trained, tmp_path):
    flags = ("--pretrained_weights", trained[1] / "backbone.pth", "--output_dir", tmp_path)
    args = parse(visualize_attention, *flags, "--device", "cpu")
    with pytest.raises(UserError, match="--image_path is missing: the backbone takes images of 4"):
        visualize_attention.visualize_attention(args)


def test_four_channels_are_finetuned_without_the_colours_of_randaugment(trained, tmp_path, capsys):
    data, run = trained
    flags = ("--pretrained_weights", run / "backbone.pth", "--data_path", data, "--num_workers", 0)
    flags += ("--output_dir", tmp_path, "--epochs", 2, "--warmup_epochs", 1, "--device", "cpu")
    flags += ("--batch_size_per_gpu", 4, "--preset", "imagenet")
    with pytest.raises(UserError, match="--rand_augment rand-m5: changes the colours of RGB"):
        finetune.finetune(parse(finetune, *flags, "--rand_augment", "rand-m5"))
    best = finetune.finetune(parse(finetune, *flags))
    assert "takes 4 channels, so there is no RandAugment." in capsys.readouterr().out
    network = tmp_path / "best_finetuned.pth"
    flags = ("--evaluate", "--pretrained_weights", network, "--data_path", data)
    again = finetune.finetune(parse(finetune, *flags, "--num_workers", 0, "--device", "cpu"))
    assert again == pytest.approx(best)


@pytest.mark.parametrize("arch", ["vit_nano", "resnet18", "xcit_nano_12_p16", "mobilenet_v3_small"])
def test_rgb_weights_start_a_network_of_five_channels_that_says_the_same_of_grey(arch):
    """Whatever the first layer is called: docs/images.md promises it of every network."""
    grey = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    rgb, five = (build_backbone(arch, in_chans=channels)[0].eval() for channels in (3, 5))
    load_resized(five, rgb.state_dict(), "--init_from rgb.pth")
    with torch.no_grad():
        features = rgb(grey.expand(-1, 3, -1, -1)), five(grey.expand(-1, 5, -1, -1))
    torch.testing.assert_close(*features, rtol=1e-3, atol=1e-4)
