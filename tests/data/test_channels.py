# SPDX-License-Identifier: Apache-2.0
"""Images of other channels than three: read, cropped, trained on, evaluated, adapted to."""

import contextlib
import os
import tracemalloc

import numpy as np
import pytest
import tifffile
import torch
from conftest import photograph, run_script, save_backbone
from PIL import Image
from torch import nn

import eval_attention
import eval_knn
from dino.data.augmentations import LinearProbeAugmentation, MultiCrop, View, eval_transform
from dino.data.augmentations_on_device import BothStages, CropStage, DeviceStage
from dino.data.channels import count_channels, read_any, read_channels
from dino.data.images import UnreadableImage
from dino.data.items import collate_readable, image_of
from dino.data.levels import to_levels
from dino.errors import UserError
from dino.evaluation.attention import open_for_attention
from dino.networks import MultiCropWrapper
from dino.training.data import build_augmentation
from dino.training.flags import parse_args
from dino.weights.starting import fit_channels
from main_dino import train_dino
from vision_transformer import vit_nano


def bands(count, size=40, seed=0):
    """uint8 (size, size, count): a photograph's channels, and mixtures of them."""
    pixels = np.asarray(photograph().resize((size, size)), float)
    weights = np.random.default_rng(seed).dirichlet([1, 1, 1], max(count, 3))
    weights[:3] = np.eye(3)
    return (pixels @ weights[:count].T).astype(np.uint8)


@pytest.mark.parametrize("count", [2, 4, 5])
@pytest.mark.parametrize("planar", [False, True])
def test_tiff_and_npy_of_any_number_of_channels_are_read_with_all_of_them(tmp_path, count, planar):
    pixels = bands(count)
    stored = np.moveaxis(pixels, -1, 0) if planar else pixels
    layout = "separate" if planar else "contig"
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack", planarconfig=layout)
    np.save(tmp_path / "a.npy", stored)
    for name in ("a.tif", "a.npy"):
        np.testing.assert_array_equal(read_any(tmp_path / name, count), pixels)
        assert count_channels([tmp_path / name]) == count


def test_sixteen_bits_and_shares_are_scaled_to_levels(tmp_path):
    pixels = bands(4)
    tifffile.imwrite(tmp_path / "16.tif", pixels.astype(np.uint16) * 257)
    np.save(tmp_path / "share.npy", pixels.astype(np.float32) / 255)
    np.save(tmp_path / "signed.npy", np.rint(pixels * (32767 / 255)).astype(np.int16))
    for name in ("16.tif", "share.npy", "signed.npy"):
        np.testing.assert_array_equal(read_any(tmp_path / name, 4), pixels)


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_the_order_of_bytes_changes_no_level(tmp_path, kind):
    """Dark values, whose range would tell another white: 255."""
    values = bands(4).astype(kind)
    for order in "<>":
        np.save(tmp_path / f"{order}.npy", values.astype(values.dtype.newbyteorder(order)))
    little, big = (read_any(tmp_path / f"{order}.npy", 4) for order in "<>")
    np.testing.assert_array_equal(big, little)
    assert little.max() == (1 if kind == np.uint16 else values.max())


def test_true_is_white_and_false_is_black(tmp_path):
    truth = bands(5) > 100
    np.save(tmp_path / "a.npy", truth)
    layout = dict(photometric="minisblack", planarconfig="separate")
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(truth, -1, 0), **layout)  # a bit per value
    for name in ("a.npy", "a.tif"):
        np.testing.assert_array_equal(read_any(tmp_path / name, 5), truth * np.uint8(255))


@pytest.mark.parametrize(("kind", "bits"), [(np.uint8, 4), (np.uint16, 10), (np.uint16, 12)])
def test_fewer_bits_than_the_type_has_room_for_reach_white_too(kind, bits):
    """Values as tifffile gives them: it unpacks them only where imagecodecs is installed."""
    grey = np.arange(2**bits, dtype=kind).reshape(4, -1, 1)
    expected = np.floor(grey * (255 / (2**bits - 1)) + 0.5)
    np.testing.assert_array_equal(to_levels(grey, bits), expected)


@pytest.mark.parametrize("mode", ["P", "YCbCr", "CMYK", "LAB", "1", "negative"])
def test_a_tiff_of_no_levels_is_grey_by_its_colours_and_has_no_other_channels(tmp_path, mode):
    """Indices of a palette, inks and differences of colours are no brightness."""
    photo = photograph().resize((40, 40))
    if mode == "negative":
        photo = photo.convert("L")
        negative = 255 - np.asarray(photo)
        tifffile.imwrite(tmp_path / "a.tif", negative, photometric="miniswhite")
    elif mode == "LAB":
        tifffile.imwrite(tmp_path / "a.tif", np.asarray(photo), photometric="cielab")
        photo = Image.open(tmp_path / "a.tif")
    else:
        photo = photo.quantize(16) if mode == "P" else photo.convert(mode)
        photo.save(tmp_path / "a.tif")
    expected = np.asarray(photo.convert("RGB").convert("L"))
    np.testing.assert_array_equal(read_any(tmp_path / "a.tif", 1)[..., 0], expected)
    assert count_channels([tmp_path / "a.tif"]) == 3
    with pytest.raises(UnreadableImage, match="channels, and the network takes 4"):
        read_any(tmp_path / "a.tif", 4)


KINDS_IN_MEMORY = {
    "uint16": lambda pixels: pixels.astype(np.uint16) * 257,
    "float32 to 1": lambda pixels: (pixels / 255).astype(np.float32),
    "int64": lambda pixels: pixels.astype(np.int64),
}


@pytest.mark.parametrize("kind", KINDS_IN_MEMORY)
def test_arrays_and_images_of_ones_own_become_levels_by_their_type(kind):
    pixels = bands(5)
    of_kind = KINDS_IN_MEMORY[kind](pixels)
    np.testing.assert_array_equal(image_of(of_kind, 0, 5), pixels)
    if kind != "int64":  # which Pillow lacks
        grey = image_of(Image.fromarray(of_kind[..., 0]), 0, 1)
        np.testing.assert_array_equal(grey[..., 0], pixels[..., 0])


def test_the_palette_of_an_image_of_ones_own_is_no_brightness():
    photo = photograph().quantize(16)
    grey = image_of((photo, 7), 0, 1)[..., 0]
    np.testing.assert_array_equal(grey, np.asarray(photo.convert("RGB").convert("L")))


@pytest.mark.parametrize("size", [(9, 1), (9, 2), (1, 1), (1, 9)])
def test_rows_of_a_small_photograph_are_not_taken_for_its_channels(tmp_path, size):
    photo = photograph().resize(size)
    photo.save(tmp_path / "a.png")
    grey = read_any(tmp_path / "a.png", 1)
    np.testing.assert_array_equal(grey[..., 0], np.asarray(photo.convert("L")))


def test_formats_of_pillow_give_their_channels_too(tmp_path):
    photograph().resize((30, 20)).save(tmp_path / "rgb.png")
    photograph().convert("RGBA").save(tmp_path / "rgba.png")
    photograph().convert("L").save(tmp_path / "grey.png")
    assert read_channels(tmp_path / "rgba.png").shape[-1] == 4
    grey = read_any(tmp_path / "rgb.png", 1)
    expected = np.asarray(Image.open(tmp_path / "rgb.png").convert("L"))
    np.testing.assert_array_equal(grey[..., 0], expected)
    for name in ("rgb.png", "rgba.png", "grey.png"):
        assert count_channels([tmp_path / name]) == 3, "transparency is not a channel"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (np.zeros((4, 4, 3), np.uint8), "3 channels, and the network takes 5"),
        (np.zeros((4, 4, 4, 5), np.uint8), "4 dimensions"),
        (np.full((8, 8, 5), np.nan), "not finite"),
        (np.array([{}, {}], dtype=object), "Python objects"),
        (np.full((8, 8, 5), -1.0), "values below 0"),
        (np.full((8, 8, 5), 1, np.int8), "8-bit integers with a sign"),
        (np.zeros((8, 0, 5), np.uint8), "0 x 8 pixels"),
    ],
)
def test_what_is_not_an_image_of_these_channels_says_why(tmp_path, content, why):
    path = tmp_path / "a.npy"
    np.save(path, content, allow_pickle=True)
    with pytest.raises(UnreadableImage, match=why):
        read_any(path, 5)


def test_more_pixels_than_the_limit_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", bands(4))
    np.save(tmp_path / "a.npy", bands(4))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name in ("a.tif", "a.npy"):
        with pytest.raises(UnreadableImage, match="--max_image_pixels 1000"):
            read_any(tmp_path / name, 4)


OME = """<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"
UUID="urn:uuid:1"><Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8"
SizeX="40" SizeY="40" SizeC="5" SizeZ="1" SizeT="1"><Channel ID="Channel:0" SamplesPerPixel="1"/>
<TiffData IFD="0" FirstC="0" PlaneCount="1"><UUID FileName="a.tif">urn:uuid:1</UUID></TiffData>
<TiffData IFD="0" FirstC="1" PlaneCount="4"><UUID FileName="{}">urn:uuid:2</UUID></TiffData>
</Pixels></Image></OME>"""


def test_a_tiff_whose_metadata_name_another_file_is_read_without_opening_it(tmp_path):
    """A pipe here, which nobody writes to: opening it would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    name = OME.format(tmp_path / "pipe")
    tifffile.imwrite(tmp_path / "a.tif", bands(1)[..., 0], description=name, metadata=None)
    code = "import sys; from dino.data.channels import *;"
    code += "print(count_channels(sys.argv[1:]), read_any(sys.argv[1], 1).shape)"
    run = run_script("-c", code, tmp_path / "a.tif", timeout=60)
    assert run.stdout.split() == ["3", "(40,", "40,", "1)"], run.stderr


@pytest.mark.parametrize("metadata", [None, "ImageJ=1.11a\nchannels=2\n"])
def test_pages_are_counted_in_the_headers_and_not_decoded(tmp_path, metadata):
    pages = np.zeros((40, 1000, 1000), np.uint8)
    written = dict(compression="zlib", photometric="minisblack", metadata=None)
    tifffile.imwrite(tmp_path / "a.tif", pages, description=metadata, **written)
    tracemalloc.start()
    with pytest.raises(UnreadableImage, match="40"):
        read_any(tmp_path / "a.tif", 2)
    with contextlib.suppress(UserError):
        count_channels([tmp_path / "a.tif"])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6


def test_no_file_has_more_channels_than_the_flag_takes(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((1100, 2, 1101), np.uint8))
    with pytest.raises(ValueError, match="1100 channels, more than 1024"):
        read_channels(tmp_path / "a.npy")
    assert count_channels([tmp_path / "a.npy"]) == 3


PAGES = {"by tifffile": dict(metadata={"axes": "CYX"}), "by ImageJ": dict(imagej=True)}


@pytest.mark.parametrize("kind", PAGES)
def test_pages_that_the_metadata_call_channels_are_channels(tmp_path, kind):
    pixels = bands(5)
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(pixels, -1, 0), **PAGES[kind])
    assert count_channels([tmp_path / "a.tif"]) == 5
    np.testing.assert_array_equal(read_any(tmp_path / "a.tif", 5), pixels)


def test_pages_that_are_the_rows_of_an_image_are_told_from_a_long_stack(tmp_path):
    tifffile.imwrite(tmp_path / "rows.tif", bands(5), photometric="minisblack")
    assert count_channels([tmp_path / "rows.tif"]) == 5
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((50, 24, 24), np.uint8))
    with pytest.raises(UserError, match=r"stack\.tif: .*several pages"):
        count_channels([tmp_path / "stack.tif"])


def test_three_pages_that_may_be_frames_are_no_colours_of_a_grey_image(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(bands(3), -1, 0), photometric="minisblack")
    with pytest.raises(UnreadableImage, match="3 pages that may be frames"):
        read_any(tmp_path / "a.tif", 1)


@pytest.mark.parametrize("metadata", [{"axes": "TYX"}, {}, None])
def test_other_pages_are_channels_only_if_the_user_says_so(tmp_path, metadata):
    pixels = bands(5)
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(pixels, -1, 0), metadata=metadata)
    with pytest.raises(UserError, match=r"a\.tif: .*several pages .*--in_chans 5"):
        count_channels([tmp_path / "a.tif"])
    np.testing.assert_array_equal(read_any(tmp_path / "a.tif", 5), pixels)
    first = np.asarray(read_any(tmp_path / "a.tif"))
    np.testing.assert_array_equal(first, pixels[..., :1].repeat(3, axis=-1))


def test_views_of_five_channels_are_the_same_on_workers_and_device_and_for_each_channel():
    """Brightness, blur and solarisation treat a channel as they treat the red of a photograph."""
    view = View(32, (0.3, 1), jitter=(0.4, 0, 0, 0), jitter_p=1, grayscale_p=0, blur_p=0.5)
    image = bands(5)
    five = MultiCrop([view] * 3, mean=(0.1, 0.2, 0.3, 0.4, 0.5), std=(0.2,) * 5)
    three = MultiCrop([view] * 3, mean=five.mean[:3], std=(0.2,) * 3)
    on_worker = BothStages(five)(image, key=3)
    batch = collate_readable([CropStage(five)(image, key=3)])
    on_device = DeviceStage(five, torch.device("cpu"))(batch)
    for ours, staged, rgb in zip(
        on_worker, on_device, three(Image.fromarray(image[..., :3]), key=3), strict=True
    ):
        assert ours.shape == (5, 32, 32)
        assert torch.equal(ours, staged[0])
        assert ((ours[:3] - rgb) * 0.2 * 255).abs().mean() < 1


def test_a_grey_view_of_five_channels_has_their_mean_in_each():
    flags = ["--in_chans", "5", "--mean", *"00000", "--std", *"11111", "--augment", "device"]
    flags += ["--jitter", "0", "0", "0", "0", "--solarize_p", "0", "--local_crops_number", "0"]
    flags += ["--global_crop_size", "32", "--blur_radius", "0", "0"]
    coloured, grey = (
        BothStages(build_augmentation(parse_args([*flags, "--grayscale_p", p])))(bands(5), key=3)[0]
        for p in "01"
    )
    mean = coloured.mean(dim=0)
    assert not torch.allclose(coloured[0], mean, atol=0.1)
    for channel in grey:
        torch.testing.assert_close(channel, mean, rtol=0, atol=0.51 / 255)  # whole levels


def test_evaluation_sees_the_same_crop_of_an_array_as_of_a_photograph():
    image = photograph().resize((60, 48))
    ours = eval_transform(32, (0.5,) * 4, (0.25,) * 4)(np.asarray(image.convert("RGBA")))
    theirs = eval_transform(32, (0.5,) * 3, (0.25,) * 3)(image)
    assert ours.shape == (4, 32, 32)
    apart = ((ours[:3] - theirs) * 0.25 * 255).abs()
    assert apart.mean() < 0.2
    assert apart.max() < 12.1  # the order of the two passes of resizing moves single pixels


def test_the_linear_probe_crops_an_array_as_a_photograph():
    image = photograph().resize((60, 48))
    four = LinearProbeAugmentation(32, (0.5,) * 4, (0.25,) * 4)
    three = LinearProbeAugmentation(32, (0.5,) * 3, (0.25,) * 3)
    for key in range(6):
        ours, theirs = four(np.asarray(image.convert("RGBA")), key), three(image, key)
        assert ours.shape == (4, 32, 32)
        assert ((ours[:3] - theirs) * 0.25 * 255).abs().mean() < 1


def test_masks_of_photographs_are_not_for_a_network_of_other_channels(tmp_path):
    backbone = MultiCropWrapper(vit_nano(8, img_size=32, in_chans=4), nn.Identity())
    options = dict(arch="vit_nano", patch_size=8, image_size=32, mean=(0.5,) * 4, std=(0.2,) * 4)
    save_backbone(tmp_path / "backbone.pth", backbone, **options)
    flags = ["--pretrained_weights", str(tmp_path / "backbone.pth"), "--device", "cpu"]
    with pytest.raises(UserError, match="images of 4 channels"):
        open_for_attention(eval_attention.get_args_parser().parse_args(flags))


def test_published_weights_adapted_to_more_channels_see_grey_images_as_before():
    three, five = vit_nano(8, img_size=32), vit_nano(8, img_size=32, in_chans=5)
    weights = fit_channels(five, three.state_dict(), "a test")
    five.load_state_dict(weights)
    grey = torch.randn(2, 1, 32, 32)
    expected, found = three(grey.expand(-1, 3, -1, -1)), five(grey.expand(-1, 5, -1, -1))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_folder_of_four_channel_tiffs_trains_and_evaluates_unattended(tmp_path, capsys):
    for split in ("train", "val"):
        for label in ("a", "b"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for i in range(6):
                name = folder / f"{i}.tif"
                tifffile.imwrite(name, bands(4, 24, seed=i).astype(np.uint16) * 257)
    data, run = tmp_path / "data", tmp_path / "run"
    flags = ["--preset", "auto", "--data_path", data / "train", "--epochs", 1, "--output_dir", run]
    flags += ["--knn_data_path", data, "--num_workers", 0]
    train_dino(parse_args([str(flag) for flag in flags]))
    output = capsys.readouterr().out
    assert "--in_chans" in output
    assert (run / "augmentations.png").exists()
    assert torch.load(run / "backbone.pth")["teacher"]["conv1.weight"].shape[1] == 4
    flags = ["--pretrained_weights", run / "backbone.pth", "--data_path", data, "--nb_knn", 3]
    flags += ["--num_workers", 0, "--device", "cpu"]
    args = eval_knn.get_args_parser().parse_args([str(flag) for flag in flags])
    assert 0 <= eval_knn.eval_knn(args)[3][0] <= 100


def test_strips_that_share_their_bytes_are_refused_as_each_would_be_decompressed(tmp_path):
    path = tmp_path / "a.tif"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 5), np.uint8)
    tifffile.imwrite(path, noise, photometric="minisblack", compression="zlib", rowsperstrip=1)
    assert np.array_equal(read_channels(path), noise)
    with tifffile.TiffFile(path, mode="r+") as file:
        tags = file.pages[0].tags
        strips, first = len(tags["StripOffsets"].value), tags["StripOffsets"].value[0]
        tags["StripOffsets"].overwrite([first] * strips)
        tags["StripByteCounts"].overwrite([path.stat().st_size - first] * strips)
    with pytest.raises(ValueError, match="strips of more bytes than the file has"):
        read_channels(path)
