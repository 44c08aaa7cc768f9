# SPDX-License-Identifier: Apache-2.0
"""Images of other numbers than 8 bits, bombs, and files that are not data."""

import os
import struct
import zlib
from contextlib import nullcontext

import numpy as np
import pytest
import tifffile
from conftest import ROOT, SMALL_RUN, photograph, run_script
from PIL import Image

from dino.command_line import MAX_PIXELS
from dino.data.channels import read_any
from dino.data.images import (
    UnreadableImage,
    find_images,
    limit_pixels,
    list_labelled_images,
    list_training_images,
    read_image,
)
from dino.errors import UserError

GREY = np.asarray(photograph().convert("L").resize((48, 32)))
GREY = np.rint((GREY - GREY.min()) * (255 / np.ptp(GREY))).astype(np.uint8)  # all of 0 to 255


@pytest.fixture(autouse=True)
def default_limit():
    limit_pixels(MAX_PIXELS)
    yield
    limit_pixels(MAX_PIXELS)


def write_tiff(path, values, **tags):
    """A TIFF of one strip, grey, of any type of numbers: Pillow cannot write all of them."""
    values = np.ascontiguousarray(values)
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    entries = {
        256: tags.get("width", values.shape[1]),
        257: values.shape[0],
        258: tags.get("bits", 8 * values.itemsize),
        259: 1,
        262: tags.get("photometric", 1),
        273: 8,
        278: values.shape[0],
        279: values.nbytes,
        339: kind,
    }
    data = values.tobytes()
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    header = b"II*\0" + struct.pack("<I", 8 + len(data))
    path.write_bytes(header + data + struct.pack("<H", len(entries)) + table + bytes(4))


SCALED = {  # type: (of what a level of 0 to 255 becomes in it)
    "float32 to 1": lambda grey: (grey / 255).astype(np.float32),
    "float32 to 255": lambda grey: grey.astype(np.float32),
    "float32 to 65535": lambda grey: (grey * 257.0).astype(np.float32),
    "uint16": lambda grey: grey.astype(np.uint16) * 257,
    "int16": lambda grey: np.rint(grey * (32767 / 255)).astype(np.int16),
    "int32 to 255": lambda grey: grey.astype(np.int32),
    "uint32 to 65535": lambda grey: grey.astype(np.uint32) * 257,
}


@pytest.mark.parametrize("kind", SCALED)
def test_numbers_of_any_type_become_the_levels_that_they_stand_for(tmp_path, kind):
    write_tiff(tmp_path / "a.tif", SCALED[kind](GREY))
    levels = np.asarray(read_image(tmp_path / "a.tif"))
    assert levels.shape == (32, 48, 3)
    assert (levels == GREY[..., None]).all()


def test_twelve_bits_become_the_levels_that_they_stand_for(tmp_path):
    values = np.rint(GREY * (4095 / 255)).astype(int).reshape(-1, 2)
    high, low = values.T  # two numbers in three bytes
    packed = np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], axis=1).astype(np.uint8)
    write_tiff(tmp_path / "a.tif", packed.reshape(32, 72), bits=12, width=48)
    assert (np.asarray(read_image(tmp_path / "a.tif")) == GREY[..., None]).all()


@pytest.mark.parametrize("kind", ["float32 to 1", "uint16"])
def test_a_sequence_of_such_images_in_memory_comes_out_alike(tmp_path, kind):
    """As train_dino(images=...) takes them: Pillow's convert alone would cut them off at 255."""
    from dino.data.items import image_of

    levels = np.asarray(image_of((Image.fromarray(SCALED[kind](GREY)), 0), 0))
    assert (levels == GREY[..., None]).all()


REFUSED = {
    "not finite": np.where(GREY > 250, np.nan, GREY / 255).astype(np.float32),
    "that are not finite": np.where(GREY > 250, np.inf, GREY / 255).astype(np.float32),
    "values below 0": (GREY / 127.5 - 1).astype(np.float32),
    "values up to 1.5, from which it cannot be told": (GREY / 170).astype(np.float32),
    "values up to 1000, from which it cannot be told": (GREY / 0.255).astype(np.float32),
    "values up to 1e\\+06": (GREY / 255 * 1e6).astype(np.float32),
    "below 0": GREY.astype(np.int16) - 128,
    "values below": GREY.astype(np.uint32) << 24,  # which Pillow takes for signed
    "8-bit integers with a sign": (GREY // 2).astype(np.int8),
    "of a kind that Pillow reads": GREY.astype(np.float64),
}


@pytest.mark.parametrize("said", REFUSED)
def test_numbers_that_tell_no_brightness_are_refused_by_name(tmp_path, said):
    write_tiff(tmp_path / "a.tif", REFUSED[said])
    with pytest.raises(UnreadableImage, match=f"a.tif: cannot be read as an image .*{said}"):
        read_image(tmp_path / "a.tif")


def test_a_negative_is_read_as_a_positive_or_refused(tmp_path):
    write_tiff(tmp_path / "8.tif", 255 - GREY, photometric=0)
    assert (np.asarray(read_image(tmp_path / "8.tif")) == GREY[..., None]).all()
    write_tiff(tmp_path / "16.tif", (255 - GREY).astype(np.uint16) * 257, photometric=0)
    with pytest.raises(UnreadableImage, match="0 is white"):
        read_image(tmp_path / "16.tif")


RGB16 = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1).astype(np.uint16) * 257


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_planes_of_16_bits_are_read_as_stored_or_refused(tmp_path, compression):
    """Pillow takes each byte of planes that are not compressed for a pixel."""
    options = dict(photometric="rgb", planarconfig="separate", compression=compression)
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(RGB16, -1, 0), **options)
    refused = pytest.raises(UnreadableImage, match="planes of more than 8 bits")
    with nullcontext() if compression else refused:
        levels = np.asarray(read_image(tmp_path / "a.tif")).astype(int)
        assert abs(levels - RGB16 // 257).max() <= 1


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_big_endian_numbers_with_a_sign_are_read_as_stored_or_refused(tmp_path, compression):
    """Pillow swaps the bytes of compressed ones twice: 100 becomes 25600."""
    values = np.rint(GREY[:, :24] / 255 * 100).astype(np.int16)
    tifffile.imwrite(tmp_path / "a.tif", values, byteorder=">", compression=compression)
    refused = pytest.raises(UnreadableImage, match="save it little-endian")
    with refused if compression else nullcontext():
        levels = np.asarray(read_image(tmp_path / "a.tif"))[..., 0]
        assert (levels == np.floor(values * (255 / 32767) + 0.5)).all()


@pytest.mark.parametrize("left", [0, 5, 16])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_numbers_without_a_colour_in_the_palette_are_refused(tmp_path, left, in_chans):
    """Pillow makes them black: a PNG whose palette is missing is black all over."""
    picture = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).quantize(16)
    picture.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    start = content.index(b"PLTE")
    palette = content[start : start + 4 + 3 * left]
    chunk = struct.pack(">I", 3 * left) + palette + struct.pack(">I", zlib.crc32(palette))
    rest = content[start + 4 + 3 * 16 + 4 :]
    (tmp_path / "a.png").write_bytes(content[: start - 4] + chunk * bool(left) + rest)
    said = f"number 15 of a palette of {left} colours"
    with nullcontext() if left == 16 else pytest.raises(UnreadableImage, match=said):
        levels = np.asarray(read_any(tmp_path / "a.png", in_chans))
        assert len(np.unique(levels)) == 16


# ---- bombs ----


def tiny_gif(side):
    screen = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(6)
    return screen + b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x02\x44\x01\x00;"


def test_a_tiny_file_of_a_huge_image_is_refused_before_it_is_decoded(tmp_path):
    """Of 144 and of 400 million pixels, in a process whose memory is looked at."""
    for side in (12_000, 20_000):
        (tmp_path / f"{side}.gif").write_bytes(tiny_gif(side))
        assert (tmp_path / f"{side}.gif").stat().st_size < 50
    code = """
import sys, resource
from dino.command_line import MAX_PIXELS
from dino.data.images import UnreadableImage, limit_pixels, read_image
limit_pixels(MAX_PIXELS)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        read_image(path)
    except UnreadableImage as error:
        print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    *reasons, kilobytes = run_script("-c", code, *tmp_path.glob("*.gif")).stdout.splitlines()
    assert len(reasons) == 2
    assert all(f"--max_image_pixels {MAX_PIXELS}" in reason for reason in reasons)
    assert int(kilobytes) < 100_000


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_of_very_many_empty_scans_is_refused(tmp_path, progressive):
    def segment(marker, content):
        return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content

    def scan(component, last):
        return segment(0xDA, bytes([1, component, 0, 0, last, 0])) + bytes(4)

    components = bytes([3, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0])
    head = b"\xff\xd8" + segment(0xDB, bytes([0] + [1] * 64))
    head += segment(0xC2 if progressive else 0xC0, struct.pack(">BHH", 8, 64, 64) + components)
    for table in (0x00, 0x10):
        head += segment(0xC4, bytes([table, 1, 1] + [0] * 14 + [0, 1]))
    last = 0 if progressive else 63
    head += b"".join(scan(component, last) for component in (1, 2, 3))
    for more, refused in ((497, False), (498, True)):
        (tmp_path / "a.jpg").write_bytes(head + more * scan(1, last) + b"\xff\xd9")
        with pytest.raises(UnreadableImage, match="500 scans") if refused else nullcontext():
            assert read_image(tmp_path / "a.jpg").size == (64, 64)


@pytest.mark.parametrize("progressive", [False, True])
def test_photographs_are_read_with_ten_scans_or_a_megabyte_behind_them(tmp_path, progressive):
    photograph().save(tmp_path / "a.jpg", progressive=progressive)
    expected = np.asarray(Image.open(tmp_path / "a.jpg"))
    with open(tmp_path / "a.jpg", "ab") as file:
        file.write(np.random.default_rng(0).bytes(10**6))  # as of a video that a phone appends
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.jpg")), expected)


def test_the_limit_is_a_flag_which_the_loader_processes_know_too(class_folders, tmp_path):
    command = (*SMALL_RUN, "--data_path", class_folders / "train", "--output_dir", tmp_path)
    command += ("--num_workers", 1, "--max_image_pixels", 48 * 48 - 1)
    run = run_script("main_dino.py", *command)
    assert run.returncode == 2
    assert "48 x 48 pixels, more than --max_image_pixels 2303" in run.stderr


# ---- what is not data ----


def test_a_pipe_a_device_and_a_folder_are_not_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for path in (tmp_path / "pipe.jpg", tmp_path / "folder.jpg", "/dev/zero"):
        with pytest.raises(UnreadableImage, match="a folder, a pipe or a device, not a file"):
            read_image(path)


def test_hidden_folders_and_files_are_neither_classes_nor_images(tmp_path):
    for name in ("train/cat/a.png", "train/.ipynb_checkpoints/a.png", "train/cat/._a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        photograph().crop((0, 0, 8, 8)).save(tmp_path / name)
    assert find_images(tmp_path) == [f"{tmp_path}/train/cat/a.png"]
    assert list_labelled_images(tmp_path, "train")[2] == ["cat"]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    photograph().crop((0, 0, 8, 8)).save("a.png")
    (tmp_path / "locked").mkdir(mode=0)
    user = os.geteuid()
    if user == 0:  # who may list every folder
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match="locked: this folder cannot be listed"):
            find_images(".")
    finally:
        os.seteuid(user)


def test_a_resumed_run_in_its_own_data_folder_does_not_train_on_its_pictures(
    class_folders, tmp_path
):
    """--data_path . with the default --output_dir ."""
    for i, path in enumerate(find_images(class_folders / "train")[:8]):
        (tmp_path / f"{i}.png").symlink_to(path)
    for epochs in (1, 2):
        command = ("main_dino.py", *SMALL_RUN, "--report", "true", "--epochs", epochs)
        command += ("--data_path", ".")
        run = run_script(ROOT / command[0], *command[1:], "--output_dir", ".", cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        assert "8 images, 2 iterations of 4" in run.stdout
    assert (tmp_path / "augmentations.png").exists()
    assert (tmp_path / "curves.png").exists()
    assert (tmp_path / "neighbours.png").exists()
    assert (tmp_path / "attention_over_epochs.png").exists()
    assert list((tmp_path / "attention_history").iterdir())
    assert len(find_images(tmp_path, (".png", ".npy"))) == 8


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_list_of_images_that_is_a_pipe_or_a_device_is_refused(tmp_path, make):
    make(tmp_path / "list.txt")
    with pytest.raises(UserError, match=r"list\.txt: this is a pipe or a device"):
        list_training_images(tmp_path / "list.txt")
