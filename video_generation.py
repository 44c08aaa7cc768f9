# SPDX-License-Identifier: Apache-2.0
"""Attention video: where [CLS] looks in every frame, in the last block of a frozen ViT.

    python video_generation.py --pretrained_weights runs/photos/backbone.pth \\
        --input_path input/video.mp4 --output_path output/ --side_by_side
    python video_generation.py --input_path output/frames/ --output_path output/ --resize 256
    python video_generation.py --input_path output/attention --output_path output/ --video_only

The first writes the frames to output/frames/, a map of each to output/attention/, all maps as
numbers to output/attention.npy, and output/video.mp4; the second begins with frames, the third with
maps. The map is the mean of the heads, each patch a square of equal pixels. Videos need PyAV (pip
install av); no GPU is needed. Frames, maps and video carry a mark: a later run replaces those of an
earlier one, and refuses to replace any other.

Unlike in the official code, one colour scale serves the whole video; there each frame's own lowest
and highest value are its limits, so that the brightness flickers (--color_scale frame). --threshold
has an effect. A given --fps wins over the file's own rate, and frames are not held in memory.
"""

import itertools
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dino.atomic import replacing
from dino.command_line import (
    Parser,
    add_device_argument,
    add_image_arguments,
    add_weights_arguments,
    number,
    tell_idle,
)
from dino.data.frames import check_frames, list_frames
from dino.data.images import given_path, limit_pixels, read_image
from dino.data.own_pictures import MARK, check_own, is_own, remove_others, save
from dino.data.videos import (
    ENCODERS,
    frames_per_second,
    import_av,
    is_own_video,
    read_frames,
    writing,
)
from dino.distributed import print0
from dino.errors import UserError, exit_on_user_error
from dino.evaluation.attention import (
    attention_of_pixels,
    class_attention,
    fit_to_patches,
    keep_mass,
    open_for_attention,
    upsample,
)
from dino.figures import plt
from dino.meters import progress_bar
from dino.output_checks import check_output_file, check_output_folder
from dino.printable import printable
from dino.weights.published import PUBLISHED_FOR_PICTURES

# Names of files that this script writes, as regular expressions; and of what may be a frame.
EXTRACTED, MAPS, FRAMES = r"frame-\d{4,}\.jpg", r"attn-.*", r"(?!attn-).*"
OF_BACKBONE = ("pretrained_weights", "checkpoint_key", "arch", "patch_size", "device")
MAPS_FILE = "attention.npy"  # of all maps as numbers


def get_args_parser():
    parser = Parser(prog="video_generation.py", description="Video of a ViT's attention maps.")
    add_weights_arguments(parser.add_argument_group("backbone"), patch_size=8)
    add = parser.add_argument_group("video").add_argument
    add(
        "--input_path",
        required=True,
        help="a video file; or a folder of its frames (.jpg or .png); or, with --video_only, of its"
        " attention maps",
    )
    add("--output_path", default="./", help="folder of the video, the frames and the maps")
    add(
        "--threshold",
        default=None,
        type=number(float, high=1, above=0),
        help="show only the patches that hold this share of the attention, such as 0.6; in the"
        " official code the default is 0.6 and has no effect",
    )
    add(
        "--resize",
        default=None,
        nargs="+",
        type=number(int, 1, 2**13),
        metavar="PIXELS",
        help="height and width to resize frames to; or the short side alone, which keeps the aspect"
        " ratio; by default they stay as they are",
    )
    add(
        "--color_scale",
        default="video",
        choices=["video", "frame"],
        help="the colours run from the lowest to the highest value of the whole video; or, as in"
        " the official code, of each frame",
    )
    add("--side_by_side", action="store_true", help="show the frames too, left of their maps")
    add(
        "--video_only",
        action="store_true",
        help="only make the video, of the maps in --input_path; no backbone is loaded",
    )
    add(
        "--fps",
        default=30.0,
        type=number(float, 0.01, 1000),
        help="frames per second; a video file's own unless the flag is given",
    )
    add("--video_format", default="mp4", choices=list(ENCODERS), help="mp4 is H.264, avi is MPEG-4")
    add_image_arguments(parser)
    add_device_argument(parser)
    return parser


def video_generation(args):
    """Write the video, and what it is made of."""
    source, output = given_path(args.input_path, "--input_path"), Path(args.output_path)
    video = output / f"video.{args.video_format}"
    check_flags(args, source, video)
    limit_pixels(args.max_image_pixels)
    import_av()  # or say at once that it is not there
    check_replaced(args, source, video)
    if args.video_only:
        tell_idle(args, OF_BACKBONE, "--video_only")
        film(video, args.fps, map(read_pixels, list_pictures(source, MAPS)))
        return
    fps = args.fps
    if source.is_file():
        own_fps = frames_per_second(source)  # or say at once that it is not a video
        fps = args.given.get("fps", own_fps)
    else:
        frames = list_pictures(source, FRAMES)
    pretrained = open_for_attention(args, PUBLISHED_FOR_PICTURES)
    if source.is_file():
        extract_frames(source, output / "frames")
        frames = list_pictures(output / "frames", EXTRACTED)
    output.mkdir(parents=True, exist_ok=True)
    open_frame = partial(read_fitting, resize=args.resize or [0], patch_size=pretrained.patch_size)
    maps = compute_maps(pretrained, frames, open_frame, output / MAPS_FILE)
    pictures = draw_maps(
        maps, frames, output / "attention", pretrained.patch_size, args.color_scale, args.threshold
    )
    if args.side_by_side:
        pictures = beside(map(open_frame, frames), pictures)
    film(video, fps, pictures)


def check_flags(args, source, video):
    """Raise UserError for flags that exclude each other, and for wrong paths."""
    if args.resize and len(args.resize) > 2:
        raise UserError(
            f"--resize {' '.join(map(str, args.resize))}: give height and width, or the short side"
            " alone."
        )
    for flag in ("threshold", "resize", "color_scale", "side_by_side"):
        if args.video_only and flag in args.given:
            raise UserError(
                f"--{flag} has no effect with --video_only, which films maps as they are. Leave one"
                " of them out."
            )
    check_output_folder(args.output_path, "--output_path")
    if not source.exists():
        raise UserError(f"--input_path {source}: no such file or folder.")
    if source.resolve() == video.resolve():
        raise UserError(
            f"--input_path {source} would be overwritten by the result. Give another --output_path."
        )


def check_replaced(args, source, video):
    """Raise UserError for what would be replaced or removed and has no mark, or is in the way."""
    output, given = video.parent, f"--output_path {args.output_path}"
    files, folders = {video: is_own_video}, {}
    if source.is_file():
        folders[output / "frames"] = EXTRACTED
    if not args.video_only:
        files[output / MAPS_FILE] = is_own
        folders[output / "attention"] = MAPS
    for path, has_mark in files.items():
        check_output_file(path, f"{given}:")
        if path.is_file() and not has_mark(path):
            raise UserError(
                f"{given}: {path} would be replaced, and has no mark of this script: it is"
                " somebody's own, or of an earlier version. Move it away, or give another"
                " --output_path."
            )
    for folder, names in folders.items():
        check_output_folder(folder, f"{given}:")
        check_own(folder, names, given)


def list_pictures(folder, names):
    """Paths of the frames, or of the maps, in a folder, in order; UserError for unequal sizes."""
    if not folder.is_dir():
        raise UserError(f"--input_path {folder} is neither a folder nor a video file.")
    paths = list_frames(folder, names)
    if not paths:
        given, wanted = f"--input_path {folder}", "attn-*.jpg" if names == MAPS else "*.jpg"
        advice = " It holds maps: give --video_only." if list_frames(folder, MAPS) else ""
        raise UserError(f"{given}: there is no {wanted} (or .png) in this folder.{advice}")
    check_frames(progress_bar(paths, "checking frames"))
    return paths


def extract_frames(video, folder):
    """Write the frames of a video as folder/frame-0000.jpg, ...: its frames per second.

    Frames that a longer video left there are removed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for count, image in enumerate(progress_bar(read_frames(video), "reading the video")):
        paths.append(folder / f"frame-{count:04}.jpg")
        save(image, paths[-1])
    remove_others(folder, EXTRACTED, paths)
    return frames_per_second(video)


def mean_attention(model, image):
    """Mean of the heads' attention of [CLS], each patch as P x P equal pixels: (H', W').

    `image`: normalised (3, H, W), which is cut to whole patches at the bottom and on the right.
    """
    patch_size = model.patch_embed.patch_size
    height, width = (side - side % patch_size for side in image.shape[-2:])
    maps = attention_of_pixels(model, image[:, :height, :width])
    return upsample(maps.mean(dim=0), patch_size)


def read_fitting(path, resize, patch_size):
    """A frame as the network sees it: PIL, of whole patches."""
    name = printable(path)
    return fit_to_patches(read_image(path), resize, patch_size, name, flag="--resize")[0]


def compute_maps(pretrained, frames, open_frame, path):
    """The mean of the heads' maps of each frame, kept in the file `path`: (T, R, C) float32."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        for i, frame in enumerate(progress_bar(frames, "attention maps")):
            attention = class_attention(pretrained, open_frame(frame)).mean(dim=0).cpu().numpy()
            if i == 0:
                shape = len(frames), *attention.shape
                header = dict(descr="<f4", fortran_order=False, shape=shape)
                np.lib.format.write_array_header_1_0(file, header)
            file.write(attention.astype("<f4").tobytes())
        file.write(MARK.encode())  # NumPy reads no further than the numbers
    return np.load(path, mmap_mode="r")


def draw_maps(maps, frames, folder, patch_size, color_scale, threshold):
    """Yield the picture (H, W, 3) uint8 of each map, and write it to `folder`, as attn-FRAME."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"attn-{frame.name}" for frame in frames]
    remove_others(folder, MAPS, paths)
    low, high = maps.min(), maps.max()
    for path, map_ in zip(paths, progress_bar(maps, "video", len(maps)), strict=True):
        if color_scale == "frame":
            low, high = map_.min(), map_.max()
        scaled = (map_ - low) / (high - low) if high > low else np.zeros_like(map_)
        if threshold is not None:
            scaled = np.where(keep_mass(torch.tensor(map_), threshold), scaled, 0)
        colors = plt.colormaps["inferno"](scaled, bytes=True)[..., :3]
        picture = colors.repeat(patch_size, axis=0).repeat(patch_size, axis=1)
        save(Image.fromarray(picture), path)
        yield picture


def read_pixels(path):
    return np.asarray(read_image(path))


def beside(images, pictures):
    """Each image left of its picture."""
    for image, picture in zip(images, pictures, strict=True):
        yield np.concatenate([np.asarray(image), picture], axis=1)


def film(path, fps, pictures):
    """Write pictures (H, W, 3) of one size as a video."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = iter(pictures)
    first = next(pictures)
    height, width, _ = first.shape
    with writing(path, fps, width, height) as append:
        for picture in itertools.chain([first], pictures):
            append(picture)
    print0(printable(f"{path}: {width} x {height} pixels, {fps:g} frames per second"))


def main():
    with exit_on_user_error("video_generation.py"):
        video_generation(get_args_parser().parse_args())


if __name__ == "__main__":
    main()
