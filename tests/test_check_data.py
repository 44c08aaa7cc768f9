# SPDX-License-Identifier: Apache-2.0
"""python check_data.py PATH: what it finds in a data set, and that no file in it can end it."""

import contextlib
import fcntl
import multiprocessing
import os
import re
import shutil
import signal
import struct
import threading
import time
import zlib

import numpy as np
import pytest
import tifffile
from conftest import Started, photograph
from PIL import Image

import check_data
from check_data import find_flaws, get_args_parser
from dino.data import inspection
from dino.data.inspection import look_at_file
from dino.errors import UserError


def check(path, *flags):
    return check_data.check_data(get_args_parser().parse_args([str(path), *map(str, flags)]))


def bomb(path):
    """A PNG of a few bytes that says it has 60,000 x 60,000 pixels."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + (kind + content)
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def cut(path):
    photograph().save(path, "PNG")
    path.write_bytes(path.read_bytes()[:5000])


def test_the_settings_that_fit_are_printed_with_mean_deviation_and_views(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i, image in enumerate(crops(9, 24)):
        image.save(tmp_path / "images" / f"{i}.png")
    assert check(tmp_path / "images", "--stats", "--views", tmp_path / "views.png") == 0
    output = capsys.readouterr().out
    assert "--blur_radius" in output
    assert "in proportion" in output
    pixels = np.concatenate([np.asarray(image).reshape(-1, 3) for image in crops(9, 24)]) / 255
    printed = output.split("--mean ")[2].split()
    np.testing.assert_allclose([float(n) for n in printed[:3]], pixels.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose([float(n) for n in printed[4:7]], pixels.std(axis=0), atol=1e-4)
    assert Image.open(tmp_path / "views.png").format == "PNG"


def test_a_folder_of_many_channels_is_looked_at_with_all_of_them(tmp_path, capsys):
    tifffile.imwrite(tmp_path / "a.tif", np.full((20, 30, 5), 7, np.uint16))
    tifffile.imwrite(tmp_path / "b.tif", np.full((20, 30, 5), 9, np.uint16))
    assert check(tmp_path) == 0
    output = capsys.readouterr().out
    assert "mode: 5 channels (2)" in output
    assert "width: 30 to 30" in output
    assert "--in_chans" in output


def test_arrays_of_three_channels_are_readable_as_they_are_to_training(tmp_path, capsys):
    for i, image in enumerate(crops(3, 24)):
        np.save(tmp_path / f"{i}.npy", np.asarray(image))
    assert check(tmp_path) == 0
    said = capsys.readouterr().out.splitlines()
    assert {"unreadable: 0", "format: NPY (3)", "mode: 3 channels (3)"} <= set(said)


def test_12_bits_in_files_of_16_are_called_dark_and_not_blank(tmp_path, capsys):
    for i, image in enumerate(crops(6, 48)):
        levels = np.asarray(image).astype(np.uint16)
        four = np.concatenate([levels, levels[..., :1]], axis=2)
        tifffile.imwrite(tmp_path / f"{i}.tif", four * 16, photometric="rgb")
    assert check(tmp_path) == 0
    said = capsys.readouterr().out
    assert re.search(r"Warning: no value of the images is above 1\d of 255", said)
    assert "blank" not in said
    assert re.search(r"--white +4095 +the files use 12 of their 16 bits", said)


UNREADABLE = {
    "empty.jpg": lambda path: path.write_bytes(b""),
    "text.jpg": lambda path: path.write_text("not an image"),
    "cut.png": cut,
    "bomb.png": bomb,
    "loop.jpg": lambda path: path.symlink_to(path),
}


def test_pages_that_may_be_frames_are_refused_by_name_until_in_chans_is_given(tmp_path, capsys):
    pages = np.stack([np.asarray(photograph().crop((0, 0, 48, 48)).convert("L"))] * 4)
    tifffile.imwrite(tmp_path / "a.tif", pages, photometric="minisblack")
    with pytest.raises(UserError, match=r"a\.tif: .* several pages .*--in_chans 4 .*--in_chans 3"):
        check(tmp_path)
    for channels, said in ((4, "4 channels"), (3, "mode: L")):
        assert check(tmp_path, "--in_chans", channels) == 0
        assert said in capsys.readouterr().out


def crops(count, size=64):
    image = photograph()
    return [image.crop((4 * i, 0, 4 * i + size, size)) for i in range(count)]


def test_counts_sizes_and_formats_of_a_sound_folder_and_exit_code_0(tmp_path, capsys):
    for folder, count in (("cat", 5), ("dog/small", 3)):
        (tmp_path / folder).mkdir(parents=True)
        for i, image in enumerate(crops(count)):
            image.rotate(90 * len(folder)).save(tmp_path / folder / f"{i}.png")
    photograph("coffee.png").save(tmp_path / "cat" / "large.jpg")
    (tmp_path / "cat" / "photo.HEIC").write_bytes(b"")
    assert check(tmp_path, "--global_crop_size", 64, "--batch_size_per_gpu", 4) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == ["9 images in 2 folders, 3 to 6 in one", "  cat: 6", "  dog/small: 3"]
    assert "ignored, not an image extension: .heic (1)" in said
    assert "width: 64 to 600 pixels, median 64" in said
    assert "height: 64 to 400 pixels, median 64" in said
    assert "format: PNG (8), JPEG (1)" in said
    assert "mode: RGB (9)" in said
    assert "unreadable: 0" in said
    assert not [line for line in said if line.startswith("Warning")]


def test_every_unreadable_file_is_named_with_the_reason_and_exit_code_1(tmp_path, capsys):
    crops(1)[0].save(tmp_path / "good.png")
    for name, make in UNREADABLE.items():
        make(tmp_path / name)
    assert check(tmp_path) == 1
    said = capsys.readouterr().out
    assert f"unreadable: {len(UNREADABLE)}" in said
    for name in UNREADABLE:
        assert f"  {tmp_path / name}: cannot be read as an image (" in said
    assert "Repair" not in said
    assert "good.png:" not in said


def test_a_name_forges_no_line_of_the_report_and_reaches_no_terminal_raw(tmp_path, capsys):
    folder = tmp_path / "cat\nunreadable: 0\x1b[2J"
    folder.mkdir()
    (folder / "\u202egnp.png\r\nunreadable: 0").with_suffix(".png").write_bytes(b"")
    assert check(tmp_path) == 1
    said = capsys.readouterr().out
    assert "cat\\nunreadable: 0\\x1b[2J" in said
    assert [line for line in said.splitlines() if line.startswith("unreadable")] == [
        "unreadable: 1"
    ]
    assert not set(said) & {"\x1b", "\r", "\u202e"}


def test_a_long_list_of_unreadable_files_is_cut_with_the_count(tmp_path, capsys):
    for i in range(25):
        (tmp_path / f"{i:02}.png").write_bytes(b"")
    assert check(tmp_path) == 1
    said = capsys.readouterr().out
    assert "unreadable: 25" in said
    assert said.count("cannot be read") == 20
    assert "  ... and 5 more" in said


def test_files_that_are_equal_to_the_byte_are_named_together(tmp_path, capsys):
    for i, image in enumerate(crops(4)):
        image.save(tmp_path / f"{i}.png")
    shutil.copy(tmp_path / "1.png", tmp_path / "again.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "1.png")
    assert check(tmp_path) == 0
    said = capsys.readouterr().out
    assert "duplicates: 2 files are byte-for-byte copies of another" in said
    assert "  1.png = again.png = link.png" in said
    assert "Warning: 2 of 6 images (33.3 %) are duplicates" in said


def test_a_list_of_paths_is_checked_too(tmp_path, capsys):
    crops(1)[0].save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("a.png\n")
    assert check(tmp_path / "list.txt") == 0
    assert "1 images in 1 folder" in capsys.readouterr().out


def facts(image, path, **options):
    image.save(path, **options)
    return look_at_file(path)


def test_a_look_tells_grey_blank_and_turned_images(tmp_path):
    image, path = photograph("coffee.png"), tmp_path / "image.jpg"
    sideways = Image.Exif()
    sideways[0x0112] = 6
    plain, turned = facts(image, path), facts(image, path, exif=sideways)
    assert (plain.width, plain.height, plain.format, plain.mode) == (600, 400, "JPEG", "RGB")
    assert (plain.is_rotated, turned.is_rotated) == (False, True)
    tiff = facts(image, tmp_path / "image.tif", exif=sideways)
    assert (tiff.is_rotated, tiff.width) == (False, 400), "Pillow turns a TIFF while it decodes it"
    assert (turned.width, turned.height) == (600, 400), "as it is stored, and trained on"
    assert plain.chroma > 20
    assert facts(image.convert("L"), path).chroma < 1
    assert plain.contrast > 20
    assert facts(Image.new("RGB", (64, 64), (250, 20, 30)), path).contrast < 1
    pixels = np.asarray(image.resize((32, 32), Image.Resampling.BOX), float)
    assert plain.contrast == pytest.approx(pixels.mean(2).std(), rel=0.02)


def flaws(images, surplus=(), crop_size=64, batch_size=1):
    return list(find_flaws(images, list(surplus), crop_size, batch_size))


def test_what_dino_finds_hard_is_warned_of_with_what_to_do(tmp_path):
    path = tmp_path / "image.png"
    sound = facts(photograph().resize((200, 200)), path)
    small = facts(photograph().resize((100, 200)), path)
    grey = facts(photograph().convert("L").resize((200, 200)), path)
    blank = facts(Image.new("RGB", (200, 200), "red"), path)
    long = facts(photograph().resize((600, 200)), path)
    turned = Image.Exif()
    turned[0x0112] = 8
    rotated = facts(photograph().resize((200, 200)), path, exif=turned)
    assert flaws([sound] * 200, batch_size=200) == []
    for bad, message in (
        ([small], r"1 of 50 images (2 %) have a side below --global_crop_size 128"),
        ([grey] * 30, "30 of 79 images (38 %)"),
        ([grey] * 60, "60 of 109 images (55 %) are grey"),
        ([blank], "1 of 50 images (2 %) are blank"),
        ([long], "1 of 50 images (2 %) are more than 2.7 times as long as wide"),
        ([rotated], "1 of 50 images (2 %) are stored on their side"),
    ):
        found = flaws([sound] * 49 + bad, crop_size=128)
        if bad == [grey] * 30:  # half of the images may be grey
            assert found == []
        else:
            assert len(found) == 1
            assert found[0].startswith(message)
    assert "collapse more easily" in flaws([grey] * 3)[0]
    assert "of --preset auto, fit them" in flaws([small] * 3, crop_size=128)[0]
    assert flaws([sound] * 3, batch_size=4) == [
        "3 images are fewer than a batch of 4 (--batch_size_per_gpu)."
    ]
    assert flaws([sound] * 200, surplus=["a", "b", "c"])[0].startswith("3 of 200 images (1.5 %)")
    assert flaws([sound] * 500, surplus=["a"]) == [], "one in a hundred is no matter"


# ---- images that hang or kill ----


@contextlib.contextmanager
def file_that_hangs(path):
    """A file as of a network that does not answer: whoever opens it waits (fcntl(2), leases)."""
    path.write_bytes(b"")
    ignored = signal.signal(signal.SIGIO, signal.SIG_IGN)  # the kernel asks for the lease back
    with open(path, "r+b") as file:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
    signal.signal(signal.SIGIO, ignored)


def test_an_image_that_hangs_is_given_up_and_the_others_are_looked_at(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(inspection, "SECONDS", 0.5)
    for i, image in enumerate(crops(6)):
        image.save(tmp_path / f"{i}.png")
    with file_that_hangs(tmp_path / "0hangs.jpg"):
        assert check(tmp_path, "--num_workers", 1) == 1
    said = capsys.readouterr().out
    assert "unreadable: 1" in said
    assert f"{tmp_path}/0hangs.jpg: not decoded within 0.5 seconds" in said
    assert "format: PNG (6)" in said


def test_an_image_whose_process_dies_is_named_and_the_others_are_looked_at(tmp_path, capsys):
    for i, image in enumerate(crops(6)):
        image.save(tmp_path / f"{i}.png")
    before = set(multiprocessing.active_children())  # of other tests

    def begun():
        return list(set(multiprocessing.active_children()) - before)

    def kill():
        while not begun():
            time.sleep(0.01)
        time.sleep(0.5)
        os.kill(begun()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    with file_that_hangs(tmp_path / "0hangs.jpg"):  # whose process waits: it can be caught at it
        killer.start()
        assert check(tmp_path, "--num_workers", 1) == 1
        killer.join()
    said = capsys.readouterr().out
    assert f"{tmp_path}/0hangs.jpg: the process that decoded it died (-9)" in said
    assert "format: PNG (6)" in said
    assert not begun()


def test_no_process_outlives_a_check_that_is_killed(tmp_path):
    for i, image in enumerate(crops(2)):
        image.save(tmp_path / f"{i}.png")
    with file_that_hangs(tmp_path / "hangs.jpg"):
        process = Started("check_data.py", tmp_path, "--num_workers", 2)
        children = []
        while len(children) < 2:
            assert process.poll() is None
            time.sleep(0.05)
            with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
                children = file.read().split()
        time.sleep(0.5)
        process.kill()
        process.wait()
    end = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{child}") for child in children):
        assert time.monotonic() < end, "they wait for a parent that is gone"
        time.sleep(0.05)


def test_the_picture_of_the_views_is_not_put_among_the_images(tmp_path):
    for i, image in enumerate(crops(3)):
        image.save(tmp_path / f"{i}.png")
    with pytest.raises(UserError, match="would be one of the images"):
        check(tmp_path, "--views", tmp_path / "views.png")
