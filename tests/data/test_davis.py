# SPDX-License-Identifier: Apache-2.0
"""DAVIS's layout, as it is and as it should not be; masks as files; the demo's videos."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import photograph
from PIL import Image
from scipy import ndimage

from dino.data.davis import check_video, find_videos, palette, read_labels, save_mask
from dino.data.demo_videos import SCENES, draw_frame, write_demo_videos
from dino.data.frames import list_frames
from dino.errors import UserError


@pytest.fixture
def davis(tmp_path):
    """One video of three frames, the first called 00001, in a folder that is called jpgs."""
    return write_davis(tmp_path / "jpgs", {"dog": 3})


def write_davis(root, videos, size=(32, 24), first=1):
    for name, count in videos.items():
        frames, masks = (root / part / "480p" / name for part in ("JPEGImages", "Annotations"))
        for path in (frames, masks):
            path.mkdir(parents=True)
        for i in range(first, first + count):
            photograph().resize(size).save(frames / f"{i:05}.jpg")
            labels = np.zeros(size[::-1], np.uint8)
            labels[4:12, i : i + 8] = 1
            save_mask(masks / f"{i:05}.png", labels)
    names = root / "ImageSets" / "2017" / "val.txt"
    names.parent.mkdir(parents=True)
    names.write_text("".join(f"{name}\n" for name in videos))
    return root


def frames_of(root, name="dog"):
    return root / "JPEGImages" / "480p" / name


def masks_of(root, name="dog"):
    return root / "Annotations" / "480p" / name


def test_a_video_begins_with_its_own_first_frame_in_a_folder_of_any_name(davis):
    """Blank lines in the list mean nothing. The official code ends at each of these."""
    (davis / "ImageSets" / "2017" / "val.txt").write_text("\ndog\n\n")
    (frames_of(davis) / "._00001.jpg").write_bytes(b"left by a Mac")
    (video,) = find_videos(davis)
    assert [path.name for path in video.frames] == ["00001.jpg", "00002.jpg", "00003.jpg"]
    assert video.annotations[0] == masks_of(davis) / "00001.png"
    assert video.has_ground_truth
    assert check_video(video) == (32, 24)
    (masks_of(davis) / "00002.png").unlink()
    assert not find_videos(davis)[0].has_ground_truth


def test_frames_come_in_the_order_of_their_numbers(tmp_path):
    names = [f"frame-{i:04}.jpg" for i in (0, 2, 9999, 10000, 10001)] + ["x1.PNG", "x02.jpeg"]
    for name in [*names, "notes.txt"]:
        (tmp_path / name).touch()
    assert [path.name for path in list_frames(tmp_path)] == names
    assert [path.name for path in list_frames(tmp_path, "x.*")] == names[-2:]


def break_list(root, text):
    (root / "ImageSets" / "2017" / "val.txt").write_bytes(text)


def save_colors(path):
    photograph().resize((32, 24)).save(path)


BROKEN = {
    "no list": (lambda root: shutil.rmtree(root / "ImageSets"), r"there is no .*val\.txt"),
    "empty list": (lambda root: break_list(root, b"\n\n"), "lists no video"),
    "binary list": (lambda root: break_list(root, b"\xff\xfe\x00"), "is not text"),
    "name that leads out": (lambda root: break_list(root, b"../dog\n"), "not the name of a folder"),
    "name twice": (lambda root: break_list(root, b"dog\ndog\n"), "lists dog twice"),
    "no such video": (lambda root: break_list(root, b"cat\n"), r"no folder .*480p/cat"),
    "no frames": (
        lambda root: [path.unlink() for path in frames_of(root).iterdir()],
        r"no frame \(\.jpg or \.png\)",
    ),
    "unreadable frame": (
        lambda root: (frames_of(root) / "00002.jpg").write_bytes(b"no picture"),
        r"00002\.jpg: cannot be read as an image",
    ),
    "frame of another size": (
        lambda root: photograph().resize((40, 24)).save(frames_of(root) / "00003.jpg"),
        "40 x 24 pixels, and the first frame has 32 x 24",
    ),
    "no first mask": (
        lambda root: (masks_of(root) / "00001.png").unlink(),
        r"00001\.png is missing, the mask of the first frame",
    ),
    "mask in colours": (
        lambda root: save_colors(masks_of(root) / "00001.png"),
        "its pixels are colours",
    ),
    "mask of another size": (
        lambda root: save_mask(masks_of(root) / "00002.png", np.zeros((10, 10))),
        "10 x 10 pixels, and its frame has 32 x 24",
    ),
    "mask without objects": (
        lambda root: save_mask(masks_of(root) / "00001.png", np.full((24, 32), 255)),
        "no object in this first mask",
    ),
    "object without a mask": (  # which would score 100 %
        lambda root: [save_mask(path, np.full((24, 32), 7)) for path in masks_of(root).iterdir()],
        "an object 7, and no mask of this video has an object 1",
    ),
    "two frames for a mask": (
        lambda root: shutil.copy(frames_of(root) / "00001.jpg", frames_of(root) / "00001.png"),
        "same name but for the suffix",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_data_that_is_not_as_it_should_be_is_refused_by_name(kind, davis):
    break_it, message = BROKEN[kind]
    break_it(davis)
    with pytest.raises(UserError, match=message):
        for video in find_videos(davis):
            check_video(video)


def test_an_object_that_appears_later_is_named_as_it_is_not_scored(davis, capsys):
    save_mask(masks_of(davis) / "00003.png", np.full((24, 32), 2))
    check_video(*find_videos(davis))
    assert "dog: object 2 is not in the first mask" in capsys.readouterr().out


def test_a_split_is_a_name_and_leads_to_no_other_folder(davis):
    """The names of the tables contain it."""
    with pytest.raises(UserError, match=r"--split \.\./2017/val: give the name of a list"):
        find_videos(davis, "../2017/val")


def test_masks_survive_their_file_and_void_becomes_background(tmp_path):
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    save_mask(tmp_path / "mask.png", labels)
    assert Image.open(tmp_path / "mask.png").mode == "P"
    np.testing.assert_array_equal(
        read_labels(tmp_path / "mask.png"), np.where(labels < 255, labels, 0)
    )


def test_the_palette_has_voc_colours_with_191_for_192():
    expected = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)]
    assert palette()[:5].tolist() == [list(color) for color in expected]
    assert palette()[[9, 19]].tolist() == [[191, 0, 0], [128, 191, 0]]
    assert palette()[22:].tolist() == [[i, i, i] for i in range(22, 256)]


def test_the_demo_makes_the_same_videos_each_time(tmp_path):
    for folder in ("a", "b"):
        write_demo_videos(tmp_path / folder, frames=3, height=60)
    videos = find_videos(tmp_path / "a")
    assert [video.name for video in videos] == list(SCENES)
    for video, again in zip(videos, find_videos(tmp_path / "b"), strict=True):
        check_video(video)
        for path, other in zip(video.frames, again.frames, strict=True):
            assert path.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("name", SCENES)
def test_a_mask_of_the_demo_is_where_the_frame_differs_from_its_background(name):
    """But for the soft edge of an object, and for pixels that happen to be alike."""
    scene, time = SCENES[name], 0.5
    picture, labels = draw_frame(scene, time, 120)
    background, nothing = draw_frame(replace(scene, objects=()), time, 120)
    difference = np.asarray(picture).astype(int) - np.asarray(background)
    differs = (abs(difference) > 8).any(axis=-1)
    inside, outside = (
        ndimage.binary_erosion(labels > 0, iterations=2),
        ~ndimage.binary_dilation(labels > 0, iterations=3),
    )
    assert not nothing.any()
    assert not differs[outside].any()
    assert differs[inside].mean() > 0.9
    assert set(np.unique(labels)) == set(range(len(scene.objects) + 1))
