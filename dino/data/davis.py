# SPDX-License-Identifier: Apache-2.0
"""DAVIS 2017's folder: frames of videos, their indexed masks, and the checks of both.

data_path/ImageSets/2017/val.txt            a video's name per line
data_path/JPEGImages/480p/NAME/00000.jpg    its frames, in the order of their numbers
data_path/Annotations/480p/NAME/00000.png   their masks: 0 is the background, 1, 2, ... are objects
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dino.atomic import replacing
from dino.data.frames import check_frames, check_size, list_frames
from dino.data.images import given_path
from dino.data.masks import BACKGROUND, VOID, open_mask
from dino.data.name_lists import read_names
from dino.distributed import print0
from dino.errors import UserError
from dino.printable import printable

RESOLUTION = "480p"
VOC_COLORS = 22  # entries of the palette that are colours; the others are greys


@dataclass(frozen=True)
class Video:
    """A video of the data set; every frame has a mask of its name, or only the first one has."""

    name: str
    frames: list
    annotations: list  # of paths: of every frame, or of the first one alone

    @property
    def has_ground_truth(self):
        """Whether its segmentation can be scored."""
        return len(self.annotations) == len(self.frames)

    def read_annotations(self):
        """The label maps of the annotations."""
        return [read_labels(path) for path in self.annotations]


def find_videos(data_path, split="val"):
    """The Videos that ImageSets/2017/`split`.txt lists. UserError where a file is missing."""
    root = given_path(data_path)
    return [find_video(root, name) for name in list_videos(root, split)]


def list_videos(root, split):
    """Names of the videos of a split. Blank lines are skipped: UserError for anything else."""
    if Path(split).name != split:  # it is a part of the names of tables, too
        raise UserError(f"--split {split}: give the name of a list in ImageSets/2017/, as val.")
    path = root / "ImageSets" / "2017" / f"{split}.txt"
    if not path.is_file():
        raise UserError(
            f"--data_path {root}: there is no {path} for --split {split}. Give DAVIS 2017's folder,"
            " which holds ImageSets/2017/val.txt, JPEGImages/480p/ and Annotations/480p/; or demo://."
        )
    names = read_names(path)
    if not names:
        raise UserError(f"{path} lists no video. It must list a name per line.")
    for name in names:
        if name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise UserError(f"{path}: {name!r} is not the name of a folder of frames.")
    return names


def find_video(root, name):
    frame_folder = root / "JPEGImages" / RESOLUTION / name
    mask_folder = root / "Annotations" / RESOLUTION / name
    if not frame_folder.is_dir():
        raise UserError(f"--data_path {root}: no folder {frame_folder}.")
    frames = list_frames(frame_folder)
    if not frames:
        raise UserError(f"--data_path {root}: no frame (.jpg or .png) in {frame_folder}.")
    masks = [mask_folder / f"{frame.stem}.png" for frame in frames]
    if len(set(masks)) < len(masks):
        raise UserError(f"{frame_folder}: two frames have the same name but for the suffix.")
    if not masks[0].is_file():
        raise UserError(
            f"--data_path {root}: {masks[0]} is missing, the mask of the first frame,"
            " which is carried on to the others."
        )
    every = all(mask.is_file() for mask in masks)
    return Video(name, frames, masks if every else masks[:1])


def check_video(video):
    """(width, height) of the frames. UserError for a file that cannot be read or does not fit.

    Objects that are not in the first mask are named.
    """
    size, present = check_frames(video.frames), []
    for path in video.annotations:
        labels = read_labels(path)
        check_size(path, labels.shape[::-1], size, "its frame")
        present.append(set(np.unique(labels).tolist()))
    first = video.annotations[0]
    highest = max(present[0])
    if highest == BACKGROUND:
        raise UserError(
            f"{first}: there is no object in this first mask (255 is void, not an"
            " object), so there is nothing to carry on. Take the original file."
        )
    absent = sorted({*range(1, highest)}.difference(*present))
    if absent and video.has_ground_truth:
        raise UserError(
            f"{first}: there is an object {highest}, and no mask of this video has an object"
            f" {absent[0]}, which would score 100 %. Number the objects from 1 without gaps."
        )
    later = sorted(set().union(*present).difference(range(highest + 1)))
    if later:
        print0(
            f"{printable(video.name)}: object {later[0]} is not in the first mask,"
            f" {printable(first)}. What appears later is not scored, as in davis2017-evaluation."
        )
    return size


def read_labels(path):
    """The labels (H, W) uint8 of an indexed mask. Void counts as background, as for the scores."""
    mask = open_mask(path)
    if mask.mode not in ("P", "L", "1"):
        raise UserError(
            f"{path}: its pixels are colours ({mask.mode}), not the numbers of objects as in"
            " DAVIS's indexed PNG. Take the original files."
        )
    labels = np.array(mask, np.uint8)
    labels[labels == VOID] = BACKGROUND
    return labels


def save_mask(path, labels):
    """Write a label map (H, W) uint8 as an indexed PNG, whole or not at all."""
    image = Image.fromarray(np.asarray(labels, np.uint8))
    image.putpalette(palette().tobytes())
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def palette():
    """Colours of the labels, (256, 3) uint8: those of the file that the official code downloads.

    PASCAL VOC's, with 191 where VOC (and DAVIS's own masks) have 192, and greys from 22 on.
    """
    colors = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    for label in range(VOC_COLORS):
        # three bits of the label at a time: one for each of red, green and blue, high bits first
        bits = [[label >> (3 * i + channel) & 1 for channel in range(3)] for i in range(3)]
        colors[label] = sum(np.array(bits[i]) << (7 - i) for i in range(3))
    colors[:VOC_COLORS][colors[:VOC_COLORS] == 192] = 191
    return colors
