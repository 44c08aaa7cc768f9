# SPDX-License-Identifier: Apache-2.0
"""Video object segmentation with frozen features: DAVIS 2017 (Tab. 5).

    python eval_video_segmentation.py --pretrained_weights runs/photos/backbone.pth \\
        --data_path davis-2017/DAVIS --output_dir runs/photos/davis
    python eval_video_segmentation.py --pretrained_weights runs/demo/backbone.pth \\
        --data_path demo:// --output_dir runs/demo/videos               # no data, no GPU

The mask of each video's first frame is carried on by nearest neighbours of patch tokens. The masks
are written as DAVIS wants them, and scored where all frames have a true one: J, F and their mean,
in the files of davis2017-evaluation too. On DAVIS 2017 the authors report J&F 61.8 with ViT-S/16
and 71.4 with ViT-B/8, whose weights are downloaded without --pretrained_weights. Run the same
command again to resume: finished videos stay. The second command makes videos with known masks from
scikit-image's photographs.
"""

import time
from pathlib import Path

from dino.backbones import canonical_name
from dino.command_line import (
    Parser,
    add_device_argument,
    add_image_arguments,
    add_weights_arguments,
    number,
)
from dino.data.davis import check_video, find_videos, read_labels
from dino.data.demo import DEMO
from dino.data.demo_videos import write_demo_videos
from dino.data.images import limit_pixels
from dino.distributed import choose_device, print0
from dino.errors import UserError, exit_on_user_error
from dino.evaluation.video_pictures import draw_video
from dino.evaluation.video_results import Results, check_apart, hash_files
from dino.evaluation.video_scores import summarise, table, table_files, write_tables
from dino.evaluation.video_segmentation import (
    LONG_SIDE_STEP,
    SHORT_SIDE,
    check_frame_size,
    lost_objects,
    score_baselines,
    segment_files,
)
from dino.evaluation.vits import open_vit
from dino.json_files import write_json
from dino.meters import peak_memory_mb, progress_bar
from dino.output_checks import check_output_file, check_output_folder
from dino.printable import printable
from dino.run_lock import owned
from dino.training import plots


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
        type=number(int, LONG_SIDE_STEP, 2**13),
        help="short side in pixels of a frame as the network sees it; the long side is squeezed to"
        f" a multiple of {LONG_SIDE_STEP}",
    )
    add("--bs", default=6, type=int, help="not used, as in the official code: frames come in turn")
    add(
        "--resume",
        default="auto",
        choices=["auto", "never"],
        help="auto keeps the masks in --output_dir of videos that are finished; never segments all"
        " videos again",
    )
    add("--output", default=None, help="JSON file to write all scores to")
    add(
        "--save_overlays",
        action="store_true",
        help="draw frames of each video with their masks, as overlays/NAME.png in --output_dir",
    )
    add_image_arguments(parser)
    add_device_argument(parser)
    return parser


def eval_video_segmentation(args):
    """Segment the videos; print and return {"J&F-Mean": ..., "J-Mean": ...}, see `summarise`.

    None where no video has true masks.
    """
    limit_pixels(args.max_image_pixels)
    check_output_folder(args.output_dir)
    if args.output:
        check_output_file(args.output, ending=".json")
    with owned(args.output_dir):
        videos = open_videos(args)
        results = Results(args.output_dir, describe_protocol(args))
        results.check_program(videos, table_files(results.folder, args.split))
        finished = results.finished(videos) if args.resume == "auto" else []
        print0(f"{len(videos)} videos, of which {len(finished)} were finished before")
        pretrained = None
        if len(finished) < len(videos):
            pretrained = open_fitting_vit(args)
            unfinished = [video for video in videos if video not in finished]
            results.begin(unfinished)
            segment_videos(args, unfinished, pretrained, results)
        scores = results.score(videos)
        if args.save_overlays:
            save_overlays(videos, results, scores)
        return report(args, videos, scores, results, pretrained) if scores else None


def open_videos(args):
    """The Videos, every file of them checked; the demo's are made first."""
    data_path = args.data_path
    if data_path == DEMO:
        data_path = Path(args.output_dir) / "demo_videos"
        write_demo_videos(data_path)
    videos = find_videos(data_path, args.split)
    check_apart(Path(args.output_dir), videos)
    for video in progress_bar(videos, "checking frames and masks"):
        check_frame_size(check_video(video), args.image_size, args.max_image_pixels, video.name)
    return videos


def describe_protocol(args):
    """What the masks depend on besides the videos: {name: value}, for JSON."""
    if args.pretrained_weights:
        weights = f"{hash_files(args.pretrained_weights)}, {args.checkpoint_key}"
    else:
        weights = f"published, {canonical_name(args.arch)}, patches of {args.patch_size}"
    flags = ("n_last_frames", "size_mask_neighborhood", "topk", "image_size")
    return {"weights": weights, **{flag: getattr(args, flag) for flag in flags}}


def open_fitting_vit(args):
    """`open_vit`, on --device; UserError unless its patches fit."""
    device = choose_device(args.device)
    pretrained = open_vit(args, lacks_patch_tokens)
    patch_size = pretrained.patch_size
    if args.image_size % patch_size or LONG_SIDE_STEP % patch_size:
        raise UserError(
            f"--image_size {args.image_size}: this side and the other, a multiple of"
            f" {LONG_SIDE_STEP}, must be multiples of the backbone's patch size, {patch_size}."
        )
    pretrained.backbone.to(device)
    return pretrained


def lacks_patch_tokens(arch):
    return "labels are carried on by the patch tokens of a ViT"


def segment_videos(args, videos, pretrained, results):
    """Write the masks of the videos."""
    start, options = time.perf_counter(), segmentation_options(args)
    for i, video in enumerate(videos, start=1):
        name, labels = printable(video.name), read_labels(video.annotations[0])
        print0(f"[{i}/{len(videos)}] {name}: {len(video.frames)} frames")
        for lost in lost_objects(labels, pretrained.patch_size, args.image_size):
            print0(
                f"{name}: object {lost} is too small for the grid of patches and is lost, as in the"
                " official code. A larger --image_size keeps it."
            )
        masks = segment_files(pretrained.backbone, pretrained, video.frames, labels, **options)
        results.write(video, masks)
    frames, seconds = sum(len(video.frames) for video in videos), time.perf_counter() - start
    print0(
        f"Segmented {frames} frames in {seconds:.0f} s; the most memory held so far:"
        f" {peak_memory_mb():.0f} MiB"
    )


def segmentation_options(args):
    """How labels are carried on, for segment_files."""
    return dict(
        short_side=args.image_size,
        n_last_frames=args.n_last_frames,
        radius=args.size_mask_neighborhood,
        topk=args.topk,
    )


def save_overlays(videos, results, scores):
    folder = results.folder / "overlays"
    folder.mkdir(exist_ok=True)
    for video in progress_bar(videos, "overlays"):
        figure = draw_video(video, results.read(video), scores.get(video.name))
        plots.save(figure, folder / f"{video.name}.png")


# ---- scores ----


def report(args, videos, scores, results, pretrained):
    """Print the scores, write them to files, and return the means over all objects."""
    total, objects = summarise(scores)
    print0(f"{len(scores)} videos with {len(objects)} objects", *table(total, objects), sep="\n")
    write_tables(results.folder, args.split, total, objects)
    if args.output:
        write_json(args.output, {**results.protocol, "total": total, "objects": objects})
    if args.data_path == DEMO and pretrained:
        print0(f"J&F on the {len(videos)} videos of {DEMO}")
        for name, baseline in score_baselines(pretrained, videos, **segmentation_options(args)):
            print0(f"  {name:18} {100 * summarise(baseline)[0]['J&F-Mean']:5.1f}")
        print0(f"  {'this backbone':18} {100 * total['J&F-Mean']:5.1f}")
    return total


def main():
    with exit_on_user_error("eval_video_segmentation.py"):
        eval_video_segmentation(get_args_parser().parse_args())


if __name__ == "__main__":
    main()
