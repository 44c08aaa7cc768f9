# SPDX-License-Identifier: Apache-2.0
"""--white: sensors of 10, 12 or 14 bits, whose files have 16, keep all 256 levels."""

import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
from conftest import photograph
from PIL import Image

import eval_knn
from dino.data.channels import find_white, read_any
from dino.data.images import UnreadableImage
from dino.data.levels import set_white
from dino.training.flags import parse_args
from dino.weights.pretrained import open_backbone
from main_dino import train_dino

LEVELS = np.asarray(photograph().resize((40, 32)))  # (32, 40, 3)
TWELVE_BITS = np.rint(LEVELS * (4095 / 255)).astype(np.uint16)


pytestmark = pytest.mark.usefixtures("white_is_reset")


def write_png_of_16_bits(path, values):
    """An RGB PNG of uint16 (H, W, 3), which Pillow cannot write."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
        for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            checksum = zlib.crc32(kind + content)
            file.write(struct.pack(">I", len(content)) + kind + content)
            file.write(struct.pack(">I", checksum))


OF_16_BITS = {
    "grey.tif": lambda path: tifffile.imwrite(path, TWELVE_BITS[..., 0]),
    "grey, lzw.tif": lambda path: Image.fromarray(TWELVE_BITS[..., 0]).save(
        path, compression="tiff_lzw"
    ),
    "rgb.tif": lambda path: tifffile.imwrite(path, TWELVE_BITS),
    "rgb, compressed.tif": lambda path: tifffile.imwrite(path, TWELVE_BITS, compression="zlib"),
    "grey.png": lambda path: Image.fromarray(TWELVE_BITS[..., 0]).save(path),
    "rgb.npy": lambda path: np.save(path, TWELVE_BITS),
}
OF_32_BITS = {
    "32 bits.tif": lambda path: tifffile.imwrite(path, TWELVE_BITS[..., 0].astype(np.uint32)),
    "floats.tif": lambda path: tifffile.imwrite(path, TWELVE_BITS[..., 0].astype(np.float32)),
}


@pytest.mark.parametrize("name", OF_16_BITS)
def test_white_is_found_in_each_kind_of_file_of_16_bits(tmp_path, name):
    OF_16_BITS[name](tmp_path / name)
    assert find_white([tmp_path / name]) == 4095


@pytest.mark.parametrize("name", OF_16_BITS | OF_32_BITS)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_twelve_bits_in_files_of_more_have_the_levels_of_eight(tmp_path, name, in_chans):
    if in_chans == 1 and "lzw" in name:
        pytest.importorskip("imagecodecs")  # with which tifffile reads it
    (OF_16_BITS | OF_32_BITS)[name](tmp_path / name)
    set_white(4095.0)
    expected = LEVELS if name.startswith("rgb") else LEVELS[..., :1].repeat(3, axis=2)
    if in_chans == 1:
        expected = np.asarray(Image.fromarray(expected).convert("L"))[..., None]
    np.testing.assert_array_equal(np.asarray(read_any(tmp_path / name, in_chans)), expected)


def test_what_is_above_white_is_white(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[0, 500, 1000, 60000]] * 2, np.uint16))
    set_white(1000.0)
    assert read_any(tmp_path / "a.npy", 1)[0, :, 0].tolist() == [0, 128, 255, 255]


def test_images_of_8_bits_stay_as_they_are(tmp_path):
    for name in ("a.png", "a.tif", "a.ppm"):
        Image.fromarray(LEVELS).save(tmp_path / name)
    np.save(tmp_path / "a.npy", LEVELS)
    set_white(100.0)
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(np.asarray(read_any(path)), LEVELS)


def test_a_bmp_of_16_bits_a_pixel_is_not_of_more_than_8_a_channel(tmp_path):
    header = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0)
    header += struct.pack("<III", 31 << 11, 63 << 5, 31)  # the bits of red, green and blue
    pixels = struct.pack("<HH", 31 << 11, 31)
    (tmp_path / "a.bmp").write_bytes(b"BM" + struct.pack("<IHHI", 70, 0, 0, 66) + header + pixels)
    set_white(4095.0)
    assert np.asarray(read_any(tmp_path / "a.bmp")).tolist() == [[[255, 0, 0], [0, 0, 255]]]


def test_a_png_of_which_only_8_of_16_bits_would_be_read_is_refused(tmp_path):
    write_png_of_16_bits(tmp_path / "a.png", LEVELS.astype(np.uint16) * 257)
    np.testing.assert_array_equal(np.asarray(read_any(tmp_path / "a.png")), LEVELS)
    set_white(4095.0)
    for in_chans in (1, 3):
        with pytest.raises(UnreadableImage, match="PNG of several channels of 16 bits"):
            read_any(tmp_path / "a.png", in_chans)


@pytest.mark.parametrize(("bits", "found"), [(5, 8), (8, 8), (10, 10), (12, 12), (15, 15)])
def test_white_is_the_greatest_number_of_the_bits_that_are_used(tmp_path, bits, found):
    values = np.rint(LEVELS * ((2**bits - 1) / 255)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values)
    Image.fromarray(LEVELS).save(tmp_path / "of 8 bits.png")
    assert find_white(sorted(tmp_path.iterdir())) == 2**found - 1


@pytest.mark.parametrize("values", [LEVELS, LEVELS * np.uint16(257), LEVELS / 255])
def test_files_that_use_their_type_need_no_white(tmp_path, values):
    np.save(tmp_path / "a.npy", values)
    assert find_white([tmp_path / "a.npy"]) == 0


def test_auto_finds_white_and_the_evaluations_read_images_as_the_run_did(tmp_path, capsys):
    for number in range(8):
        tifffile.imwrite(tmp_path / f"{number}.tif", np.roll(TWELVE_BITS, number, axis=0))
    run = ("--epochs", 1, "--output_dir", tmp_path / "run", "--report", "false")
    flags = ("--preset", "auto", "--data_path", tmp_path, "--num_workers", 1, *run)
    train_dino(parse_args([str(flag) for flag in flags]))
    output = capsys.readouterr().out
    assert "the files use 12 of their 16 bits" in output
    assert "Warning: no value of the images is above" not in output
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    expected = LEVELS.mean(axis=(0, 1)) / 255
    np.testing.assert_allclose(checkpoint["args"]["mean"], expected, atol=0.01)
    for name in ("backbone.pth", "checkpoint.pth"):
        set_white(0.0)
        weights = str(tmp_path / "run" / name)
        open_backbone(eval_knn.get_args_parser().parse_args(["--pretrained_weights", weights]))
        np.testing.assert_array_equal(np.asarray(read_any(tmp_path / "0.tif")), LEVELS)
