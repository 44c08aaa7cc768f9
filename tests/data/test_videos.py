# SPDX-License-Identifier: Apache-2.0
"""Video files: what is written is read again, and what is not a video is refused."""

import resource
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino.data.images import limit_pixels
from dino.data.videos import frames_per_second, import_av, is_own_video, read_frames, writing
from dino.errors import UserError

pytest.importorskip("av")


def write(path, count=6, fps=12, width=64, height=32):
    """A red square moves over blue."""
    with writing(path, fps, width, height) as append:
        for i in range(count):
            pixels = np.zeros((height, width, 3), np.uint8)
            pixels[...] = 0, 0, 200
            pixels[8:24, 8 * i : 8 * i + 16] = 200, 0, 0
            append(pixels)
    return path


@pytest.mark.parametrize("suffix", ["mp4", "avi"])
def test_frames_come_back_in_order_and_at_their_rate(suffix, tmp_path):
    path = write(tmp_path / f"video.{suffix}", fps=29.97, width=65, height=33)
    assert frames_per_second(path) == pytest.approx(29.97)
    assert is_own_video(path)
    frames = list(read_frames(path))
    assert {frame.size for frame in frames} == {(64, 32)}  # an odd side loses a pixel
    for i, frame in enumerate(frames):
        pixels = np.asarray(frame).astype(int)
        np.testing.assert_allclose(pixels[16, 8 * i + 8], [200, 0, 0], atol=12)
        np.testing.assert_allclose(pixels[4, 8 * i + 8], [0, 0, 200], atol=12)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_colon_in_a_name_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("take:2")
    folder.mkdir()
    assert len(list(read_frames(write(folder / "a:b.mp4")))) == 6


def test_a_video_that_is_not_finished_is_not_there(tmp_path):
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "video.mp4", 12, 64, 32) as append:
        append(np.zeros((32, 64, 3), np.uint8))
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["mp4", "avi"])
def test_no_space_for_a_video_is_told_with_its_name_and_leaves_nothing(suffix, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"File too large: '.*/video\.{suffix}'"):
            write(tmp_path / f"video.{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_frames_are_turned_as_the_camera_was_held(tmp_path):
    """By the matrix in the track header of an MP4, as telephones write it."""
    path = write(tmp_path / "video.mp4", count=1)
    content, quarter = bytearray(path.read_bytes()), 1 << 16
    matrix = content.index(b"tkhd") + 44
    struct.pack_into(">9i", content, matrix, 0, quarter, 0, -quarter, 0, 0, 0, 0, 1 << 30)
    (upright,) = read_frames(path)
    path.write_bytes(content)
    (turned,) = read_frames(path)
    expected = upright.transpose(Image.Transpose.ROTATE_270)  # clockwise by 90 degrees
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(expected))


def test_a_video_that_is_cut_short_gives_its_first_frames(tmp_path):
    path = write(tmp_path / "video.avi", count=40)
    content = path.read_bytes()
    frames = content.index(b"movi")
    path.write_bytes(content[: frames + (len(content) - frames) // 2])
    assert 5 < len(list(read_frames(path))) < 35


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no video" * 100,
        b"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:3,\nvideo.mp4\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile 'video.mp4'\n",
    ],
    ids=["empty", "text", "playlist", "list of files"],
)
def test_a_file_that_is_not_a_video_or_names_other_files_is_refused(content, tmp_path):
    write(tmp_path / "video.mp4")
    (tmp_path / "input.mp4").write_bytes(content)
    with pytest.raises(UserError, match=r"input\.mp4: cannot be read as a video .*Give a video"):
        frames_per_second(tmp_path / "input.mp4")


def test_frames_of_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = write(tmp_path / "video.mp4")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    limit_pixels(1000)
    with pytest.raises(UserError, match="64 x 32 pixels, more than --max_image_pixels 1000"):
        next(read_frames(path))


def test_without_pyav_the_message_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(UserError, match="pip install av"):
        import_av()
