# SPDX-License-Identifier: Apache-2.0
"""Video object segmentation with frozen features: DAVIS 2017 (Tab. 5).

    python eval_video_segmentation.py --pretrained_weights runs/photos/backbone.pth \\
        --data_path davis-2017/DAVIS --output_dir runs/photos/davis
    python eval_video_segmentation.py --pretrained_weights runs/demo/backbone.pth \\
        --data_path demo:// --output_dir runs/demo/videos               # no data, no GPU

The mask of each video's first frame is carried on by nearest neighbours of patch tokens. The masks
are written as DAVIS wants them, and scored where all frames have a true one: J, F and their mean,
in the files of davis2017-evaluation too. For the first command the authors report J&F 61.8 with
ViT-S/16 and 71.4 with ViT-B/8. Run the same command again to resume: finished videos stay. The
second command makes videos with known masks from scikit-image's photographs.
"""

import hashlib
import json
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from dino.atomic import replacing
from dino.backbones import build_backbone, canonical_name
from dino.command_line import (
    Parser,
    add_device_argument,
    add_weights_arguments,
    check_output_file,
    check_output_folder,
    number,
)
from dino.data.augmentations import IMAGENET_STD
from dino.data.davis import check_video, find_videos, palette, read_labels, save_mask
from dino.data.demo import DEMO
from dino.data.demo_videos import write_demo_videos
from dino.data.images import read_image
from dino.distributed import Launch, choose_device, print0
from dino.errors import UserError, exit_on_user_error
from dino.evaluation.video_scores import boundary, score_video, summarise, write_tables
from dino.evaluation.video_segmentation import (
    FRAME_STD,
    LONG_SIDE_STEP,
    SHORT_SIDE,
    RawPixels,
    load_frame,
    segment_frames,
)
from dino.meters import peak_memory_mb, progress_bar
from dino.printable import printable
from dino.randomness import fix_random_seeds
from dino.training import plots
from dino.weights.pretrained import open_backbone
from vision_transformer import ARCHITECTURES

PROTOCOL = "segmentation.json"  # what the masks in --output_dir were made with
SHEET_FRAMES = 8


def get_args_parser():
    parser = Parser(
        prog="eval_video_segmentation.py", description="Video object segmentation on DAVIS 2017."
    )
    add_weights_arguments(parser.add_argument_group("backbone"))
    add = parser.add_argument_group("evaluation").add_argument
    add(
        "--data_path",
        default="/path/to/davis/",
        help="DAVIS 2017's folder, with ImageSets/, JPEGImages/ and Annotations/ in it;"
        f" {DEMO!r} for videos made of scikit-image's photographs",
    )
    add("--split", default="val", help="list of videos: ImageSets/2017/SPLIT.txt")
    add(
        "--output_dir",
        default=".",
        help="for the masks, a folder per video, and the tables of scores; a folder holds the"
        " results of one backbone",
    )
    add(
        "--n_last_frames",
        default=7,
        type=number(int, 0),
        help="frames before the present one from which labels are taken, besides the first frame",
    )
    add(
        "--size_mask_neighborhood",
        default=12,
        type=number(int, 0),
        help="patches, in each direction, around a place in which its sources are looked for; 0 for"
        " the whole frame",
    )
    add("--topk", default=5, type=number(int, 1), help="sources of a patch, by cosine similarity")
    add(
        "--image_size",
        default=SHORT_SIDE,
        type=number(int, LONG_SIDE_STEP),
        help="short side in pixels of a frame as the network sees it; the long side is squeezed to"
        f" a multiple of {LONG_SIDE_STEP}",
    )
    add("--bs", default=6, type=int, help="not used, as in the official code: frames come in turn")
    add("--output", default=None, help="JSON file to write all scores to")
    add(
        "--save_overlays",
        action="store_true",
        help="draw frames of each video with their masks, as overlays/VIDEO.png in --output_dir",
    )
    add_device_argument(parser)
    return parser


def eval_video_segmentation(args):
    """Segment the videos, print and return {"J&F-Mean": ..., "J-Mean": ...}, see `summarise`.

    None where no video has true masks.
    """
    check_output_folder(args.output_dir)
    if args.output:
        check_output_file(args.output)
    folder, data_path = Path(args.output_dir), args.data_path
    if data_path == DEMO:
        data_path = folder / "demo_videos"
        write_demo_videos(data_path)
    videos = find_videos(data_path, args.split)
    protocol = describe_protocol(args)
    check_protocol(folder, protocol, videos)
    unfinished = [video for video in videos if not is_finished(folder, video)]
    for video in progress_bar(unfinished, "checking frames and masks"):
        check_video(video)

    device = choose_device(args.device, Launch("python"))
    if unfinished:
        pretrained = open_vit(args)
        pretrained.backbone.to(device)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PROTOCOL, protocol)
        segment_unfinished(args, videos, unfinished, pretrained, device)
    else:
        print0(f"All {len(videos)} videos are segmented in {folder}.")

    scores = score_videos(folder, videos)
    if args.save_overlays:
        draw_overlays(folder, videos, scores)
    if not scores:
        print0("No video has true masks beside that of its first frame: nothing is scored.")
        return None
    total, objects = summarise(scores)
    print_table(total, objects, scores)
    write_tables(folder, args.split, total, objects)
    if args.output:
        write_json(args.output, {**protocol, "total": total, "objects": objects})
    if args.data_path == DEMO and unfinished:
        print_baselines(args, videos, pretrained, device, total)
    return total


# ---- what was done before ----


def describe_protocol(args):
    """What the masks depend on besides the videos: {name: value}, for JSON."""
    if args.pretrained_weights and Path(args.pretrained_weights).is_file():
        with open(args.pretrained_weights, "rb") as file:
            weights = f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"
        weights += f", {args.checkpoint_key}"
    else:
        weights = f"published, {canonical_name(args.arch)}, patches of {args.patch_size}"
    return {
        "weights": weights,
        "n_last_frames": args.n_last_frames,
        "size_mask_neighborhood": args.size_mask_neighborhood,
        "topk": args.topk,
        "image_size": args.image_size,
    }


def check_protocol(folder, protocol, videos):
    """Raise UserError if the folder holds masks that another protocol, or another program, made."""
    path = folder / PROTOCOL
    if not path.is_file():
        for video in videos:
            if (folder / video.name).exists():
                raise UserError(
                    f"--output_dir {folder}: {printable(folder / video.name)} is there, but no"
                    f" {PROTOCOL}, which says how its masks were made. Give another folder."
                )
        return
    try:
        before = json.loads(path.read_text())
    except ValueError:
        before = {}
    for name, value in protocol.items():
        found = before.get(name) if isinstance(before, dict) else None
        if found != value:
            raise UserError(
                f"--output_dir {folder}: its masks were made with {name} {printable(found)}, not"
                f" {value}. Give another folder, or delete this one."
            )


def is_finished(folder, video):
    return all(mask_path(folder, video, frame).is_file() for frame in video.frames)


def mask_path(folder, video, frame):
    """Where the mask of a frame goes: the frame's own name, the first one's too.

    In the official code the first result is always 00000.png.
    """
    return folder / video.name / f"{frame.stem}.png"


# ---- segmentation ----


def open_vit(args):
    """`open_backbone`; UserError for a network without patch tokens, or whose patches do not fit."""
    if not args.pretrained_weights:
        check_is_vit(args.arch, f"--arch {args.arch}")  # rather than download it
    pretrained = open_backbone(args)
    check_is_vit(pretrained.arch, f"--pretrained_weights {args.pretrained_weights}")
    patch_size = pretrained.patch_size
    if args.image_size % patch_size or LONG_SIDE_STEP % patch_size:
        raise UserError(
            f"--image_size {args.image_size}: this side and the other, a multiple of"
            f" {LONG_SIDE_STEP}, must be multiples of the backbone's patch size, {patch_size}."
        )
    return pretrained


def check_is_vit(arch, source):
    if canonical_name(arch) not in ARCHITECTURES:
        raise UserError(
            f"{source} ({arch}): labels are carried on by the patch tokens of a ViT. Take --arch"
            f" {' or '.join(ARCHITECTURES)}, with --pretrained_weights of such a network."
        )


def segment_unfinished(args, videos, unfinished, pretrained, device):
    """Write the masks of the videos, each file whole or not at all."""
    start, count = time.perf_counter(), 0
    for i, video in enumerate(videos):
        if video not in unfinished:
            continue
        print0(f"[{i + 1}/{len(videos)}] {printable(video.name)}: {len(video.frames)} frames")
        masks = segment(args, video, pretrained.backbone, pretrained, device)
        bar = progress_bar(zip(video.frames, masks, strict=True), video.name, len(video.frames))
        for frame, labels in bar:
            path = mask_path(Path(args.output_dir), video, frame)
            path.parent.mkdir(exist_ok=True)
            save_mask(path, labels)
        count += len(video.frames)
    seconds = time.perf_counter() - start
    print0(
        f"Segmented {count} frames in {seconds:.0f} s; the most memory held so far:"
        f" {peak_memory_mb():.0f} MiB"
    )


def segment(args, video, model, pretrained, device):
    """Label maps of a video's frames, one by one; `pretrained` says how the model is fed."""
    # The official odd value goes with the official ones beside it.
    std = FRAME_STD if tuple(pretrained.std) == IMAGENET_STD else pretrained.std
    frames = (
        load_frame(frame, args.image_size, pretrained.mean, std)[0].to(device)
        for frame in video.frames
    )
    first_mask = read_labels(video.annotations[0])
    return segment_frames(
        model, frames, first_mask, args.n_last_frames, args.size_mask_neighborhood, args.topk
    )


# ---- scores ----


def score_videos(folder, videos):
    """{name: (J, F)} of the videos that have true masks."""
    scores = {}
    for video in progress_bar([video for video in videos if video.has_ground_truth], "scoring"):
        if len(video.frames) < 3:
            print0(f"{printable(video.name)}: not scored, its first and last frame do not count.")
            continue
        found = [read_labels(mask_path(folder, video, frame)) for frame in video.frames]
        scores[video.name] = score_video([read_labels(path) for path in video.annotations], found)
    return scores


def print_table(total, objects, scores):
    """A row for each object, and the means over all of them, in percent."""
    print0(f"{len(scores)} videos with {len(objects)} objects")
    width = max(map(len, [*map(printable, objects), "all objects"]))
    print0(f"{'':{width}}      J&F        J  recall   decay        F  recall   decay")
    rows = {printable(name): (j_and_f(row), row) for name, row in objects.items()}
    rows["all objects"] = total["J&F-Mean"], total
    for name, (mean, row) in rows.items():
        cells = [row[f"{measure}-{column}"] for measure in "JF" for column in STATISTICS]
        shown = " ".join(f"{100 * cell:{7 + (i % 3 == 0)}.1f}" for i, cell in enumerate(cells))
        print0(f"{name:{width}} {100 * mean:8.1f} {shown}")


STATISTICS = ("Mean", "Recall", "Decay")


def j_and_f(row):
    return (row["J-Mean"] + row["F-Mean"]) / 2


def print_baselines(args, videos, pretrained, device, total):
    """J&F of raw pixels and of an untrained backbone, beside that of the backbone."""
    fix_random_seeds(0)
    untrained, _ = build_backbone(
        pretrained.arch, pretrained.patch_size, img_size=pretrained.image_size
    )
    models = {"raw pixels": RawPixels(pretrained.patch_size), "untrained backbone": untrained}
    print0(f"J&F on the {len(videos)} videos of {DEMO}")
    for name, model in models.items():
        model.eval().to(device)
        scores = {
            video.name: score_video(
                [read_labels(path) for path in video.annotations],
                list(segment(args, video, model, pretrained, device)),
            )
            for video in progress_bar(videos, name)
        }
        print0(f"  {name:18} {100 * summarise(scores)[0]['J&F-Mean']:5.1f}")
    print0(f"  {'this backbone':18} {100 * total['J&F-Mean']:5.1f}")


# ---- files ----


def write_json(path, content):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def draw_overlays(folder, videos, scores):
    """A contact sheet for each video: frames from all over it, with their masks."""
    (folder / "overlays").mkdir(exist_ok=True)
    for video in videos:
        indices = np.linspace(0, len(video.frames) - 1, SHEET_FRAMES).round().astype(int)
        frames = [video.frames[i] for i in dict.fromkeys(indices.tolist())]
        pictures = {
            frame.stem: overlay(read_image(frame), read_labels(mask_path(folder, video, frame)))
            for frame in frames
        }
        title = video.name
        if video.name in scores:
            j, f = (100 * values.mean() for values in scores[video.name])
            title += f": J {j:.1f}, F {f:.1f}"
        draw_sheet(folder / "overlays" / f"{video.name}.png", printable(title), pictures)


def overlay(image, labels):
    """The frame (H, W, 3) uint8 with its objects tinted and outlined in white."""
    pixels = np.asarray(image)
    tinted = np.where(labels[..., None] > 0, (pixels / 2 + palette()[labels] / 2), pixels)
    tinted[boundary(labels)] = 255
    return tinted.astype(np.uint8)


def draw_sheet(path, title, pictures, columns=4):
    height, width, _ = next(iter(pictures.values())).shape
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(3.5 * columns, rows * (3.5 * height / width + 0.3) + 0.4),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, pixels) in zip(axes.flat, pictures.items(), strict=False):
        axis.imshow(pixels)
        axis.set_title(printable(name), fontsize=9, parse_math=False)
    figure.suptitle(title, fontsize=12, parse_math=False)
    plots.save(figure, path)


def main():
    with exit_on_user_error("eval_video_segmentation.py"):
        eval_video_segmentation(get_args_parser().parse_args())


if __name__ == "__main__":
    main()
