# SPDX-License-Identifier: Apache-2.0
"""The folder of segmented videos: their masks, what these were made with, their scores.

folder/NAME/00000.png        the mask of each frame of a video, the given one of the first included
folder/segmentation.json     what all masks depend on besides the videos
"""

import hashlib
import os
from pathlib import Path

import numpy as np

from dino.data.davis import read_labels, save_mask
from dino.distributed import print0
from dino.errors import UserError
from dino.evaluation.video_scores import score_video
from dino.json_files import read_object, write_json
from dino.meters import progress_bar
from dino.printable import printable
from dino.weights.files import check_is_file
from dino.weights.layouts import CONFIG

PROTOCOL = "segmentation.json"


class Results:
    """The masks in a folder, which were all made by one protocol: {name: value}, for JSON."""

    def __init__(self, folder, protocol):
        self.folder, self.protocol = Path(folder), protocol

    def path(self, video, frame):
        """Where the mask of a frame goes: under the frame's name.

        In the official code the first one is always 00000.png.
        """
        return self.folder / video.name / f"{frame.stem}.png"

    def check_program(self, videos, tables):
        """Raise UserError if the folder holds masks of `videos`, or one of the files `tables`, that
        another program made.
        """
        if (self.folder / PROTOCOL).exists():
            return
        for video in videos:
            if any(self.path(video, frame).exists() for frame in video.frames):
                raise UserError(
                    f"--output_dir {self.folder}: {video.name} has masks, but no {PROTOCOL}"
                    " says what they were made with. Give another folder, or move them away."
                )
        for path in tables:
            if path.exists():
                raise UserError(
                    f"--output_dir {self.folder}: {path.name} would be replaced, and without a"
                    f" {PROTOCOL} it is not this script's. Give another folder, or move it away."
                )

    def check_protocol(self):
        """Raise UserError if the folder holds masks made by another protocol."""
        try:
            before = read_object(self.folder / PROTOCOL)
        except FileNotFoundError:
            return
        for name, value in self.protocol.items():
            if before.get(name) != value:
                raise UserError(
                    f"--output_dir {self.folder}: its masks were made with {name}"
                    f" {before.get(name)}, not {value}. Give another folder, or --resume never to"
                    " replace them."
                )

    def finished(self, videos):
        """Those with a mask for every frame, made by this protocol; UserError for any other."""
        self.check_protocol()
        return [video for video in videos if self.is_finished(video)]

    def is_finished(self, video):
        """Whether every frame has its mask, and the first the one that is given now."""
        paths = [self.path(video, frame) for frame in video.frames]
        return all(path.is_file() for path in paths) and np.array_equal(
            read_labels(paths[0]), read_labels(video.annotations[0])
        )

    def begin(self, videos):
        """Remove what there is of these videos, so that all masks are of the protocol it writes."""
        for video in videos:
            for frame in video.frames:
                self.path(video, frame).unlink(missing_ok=True)
        write_json(self.folder / PROTOCOL, self.protocol)

    def write(self, video, masks):
        """Save the masks of a video as they come, each atomically."""
        bar = progress_bar(masks, printable(video.name), len(video.frames))
        for frame, labels in zip(video.frames, bar, strict=True):
            path = self.path(video, frame)
            path.parent.mkdir(exist_ok=True)
            save_mask(path, labels)

    def read(self, video):
        """The label maps of all frames."""
        return [read_labels(self.path(video, frame)) for frame in video.frames]

    def score(self, videos):
        """{name: (J, F)}, see `score_video`, of the videos whose frames all have true masks."""
        scores = {}
        for video in progress_bar(videos, "scoring"):
            if video.has_ground_truth and len(video.frames) > 2:
                scores[video.name] = score_video(video.read_annotations(), self.read(video))
        if len(scores) < len(videos):
            print0(
                f"{len(videos) - len(scores)} of {len(videos)} videos are not scored: they have"
                " frames without a true mask, or no frame between the first and the last."
            )
        return scores


def check_apart(folder, videos):
    """Raise UserError if the masks of `videos` in `folder` would lie among the data set's files.

    Links are followed, of folders and of files.
    """
    files = [path for video in videos for path in (*video.frames, *video.annotations)]
    folders = {path.parent for path in files}
    of_data = {real(path) for path in folders} | {real(path.parent) for path in folders}
    of_linked_files = {real(path).parent for path in files}
    for place in (folder, *(folder / video.name for video in videos)):
        found = real(place)
        if found in of_linked_files or not of_data.isdisjoint((found, *found.parents)):
            raise UserError(
                f"--output_dir {folder}: the masks would be written to {found}, among the frames or"
                " masks of --data_path. Give another folder, such as results/."
            )


def real(path):
    """The absolute path without links. Path.resolve fails for a link to itself."""
    return Path(os.path.realpath(path))


def hash_files(path):
    """The SHA-256 of --pretrained_weights: a file, or all files of a folder with a config.json.

    UserError unless it is one of these.
    """
    files, digest = [Path(path)], hashlib.sha256()
    if (Path(path) / CONFIG).is_file():
        files = sorted(filter(Path.is_file, Path(path).iterdir()))
    for file in files:
        check_is_file(file, f"--pretrained_weights {path}")
        with open(file, "rb") as opened:
            hashlib.file_digest(opened, lambda: digest)
    return f"sha256 {digest.hexdigest()}"
