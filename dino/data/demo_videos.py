# SPDX-License-Identifier: Apache-2.0
"""Videos with known masks, in DAVIS's layout: objects cut from photographs move over others.

The photographs come with scikit-image. Objects move, grow or shrink and turn; the background pans,
and the light changes. An object that is drawn later covers those before it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dino.data.davis import RESOLUTION, save_mask
from dino.data.demo import open_photograph

FRAMES, HEIGHT = 20, 240  # of a video; pixels
ASPECT_RATIO = 16 / 9


@dataclass(frozen=True)
class Object:
    """A part of a photograph, and its pose in the first and in the last frame.

    `outline`: corners of a polygon in the photograph, or (left, top), (right, bottom) of an
    ellipse. A pose is the centre's x and y, and the height, in heights of the frame; and an angle
    in degrees.
    """

    photograph: str
    outline: tuple
    first: tuple
    last: tuple


@dataclass(frozen=True)
class Scene:
    background: str
    objects: tuple
    light: float  # brightness of the last frame, in that of the first


CAT = "chelsea.png", ((90, 15), (390, 265))
CUP = "coffee.png", ((80, 19), (478, 389))
COIN = "coins.png", ((307, 14), (363, 74))
ASTRONAUT = (
    "astronaut.png",
    ((154, 68), (182, 23), (228, 14), (279, 28), (302, 91), (285, 131), (256, 171), (304, 211))
    + ((304, 273), (341, 285), (361, 347), (296, 376), (279, 455), (285, 510), (23, 510))
    + ((34, 421), (46, 285), (119, 216), (137, 159), (176, 142)),
)
SCENES = {
    "cat": Scene("coffee.png", (Object(*CAT, (0.5, 0.45, 0.5, 0), (1.2, 0.6, 0.7, 20)),), 0.8),
    "cup": Scene(
        "motorcycle_left.png", (Object(*CUP, (1.3, 0.5, 0.7, 0), (0.6, 0.4, 0.4, -45)),), 1.2
    ),
    "astronaut": Scene(
        "chelsea.png", (Object(*ASTRONAUT, (0.5, 0.6, 0.75, 0), (1.2, 0.6, 0.6, 8)),), 0.7
    ),
    "coin-and-cat": Scene(
        "grass.png",
        (
            Object(*CAT, (0.5, 0.6, 0.5, 0), (0.8, 0.5, 0.5, -15)),
            Object(*COIN, (1.4, 0.4, 0.4, 0), (0.6, 0.5, 0.4, 90)),
        ),
        1.0,
    ),
}


def write_demo_videos(folder, frames=FRAMES, height=HEIGHT):
    """Write the videos of SCENES, always the same, as a data set for eval_video_segmentation."""
    folder = Path(folder)
    for name, scene in SCENES.items():
        pictures, masks = (
            folder / part / RESOLUTION / name for part in ("JPEGImages", "Annotations")
        )
        for path in (pictures, masks):
            path.mkdir(parents=True, exist_ok=True)
        for number in range(frames):
            picture, labels = draw_frame(scene, number / max(1, frames - 1), height)
            picture.save(pictures / f"{number:05}.jpg", quality=92)
            save_mask(masks / f"{number:05}.png", labels)
    names = folder / "ImageSets" / "2017" / "val.txt"
    names.parent.mkdir(parents=True, exist_ok=True)
    names.write_text("".join(f"{name}\n" for name in SCENES))


def draw_frame(scene, time, height):
    """(PIL image, label map (height, width) uint8) at a `time` from 0 to 1."""
    width = round(height * ASPECT_RATIO)
    picture = pan(open_photograph(scene.background), time, width, height)
    labels = np.zeros((height, width), np.uint8)
    for number, item in enumerate(scene.objects, start=1):
        cut_out = cut(item.photograph, item.outline)
        pose = [(1 - time) * a + time * b for a, b in zip(item.first, item.last, strict=True)]
        opacity = paste(picture, cut_out, pose, height)
        labels[opacity >= 128] = number
    light = 1 + time * (scene.light - 1)
    return picture.point(lambda value: min(255, round(value * light))), labels


def pan(photograph, time, width, height):
    """A window of the background, a little smaller than it fits, which moves to the right."""
    scale = 1.15 * max(width / photograph.width, height / photograph.height)
    size = round(scale * photograph.width), round(scale * photograph.height)
    resized = photograph.resize(size, Image.Resampling.LANCZOS)
    left, top = round(time * (size[0] - width)), (size[1] - height) // 2
    return resized.crop((left, top, left + width, top + height))


def cut(name, outline):
    """The part of a photograph inside the outline: RGBA."""
    photograph = open_photograph(name)
    opacity = Image.new("L", photograph.size)
    pen = ImageDraw.Draw(opacity)
    (pen.ellipse if len(outline) == 2 else pen.polygon)(outline, fill=255)
    photograph.putalpha(opacity)
    return photograph.crop(opacity.getbbox())


def paste(picture, cut_out, pose, height):
    """Draw an object onto `picture` at a pose; its opacity there, (H, W) uint8."""
    x, y, size, angle = pose
    scale = size * height / cut_out.height
    cut_out = cut_out.resize(
        (max(1, round(scale * cut_out.width)), max(1, round(scale * cut_out.height))),
        Image.Resampling.LANCZOS,
    ).rotate(angle, Image.Resampling.BICUBIC, expand=True)
    corner = round(x * height - cut_out.width / 2), round(y * height - cut_out.height / 2)
    opacity = Image.new("L", picture.size)
    opacity.paste(cut_out.getchannel("A"), corner)
    picture.paste(cut_out.convert("RGB"), corner, cut_out.getchannel("A"))
    return np.asarray(opacity)
