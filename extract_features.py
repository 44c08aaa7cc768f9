# SPDX-License-Identifier: Apache-2.0
"""Features of any images, by a frozen backbone, as one file for numpy or safetensors.

    python extract_features.py --pretrained_weights runs/photos/backbone.pth --data_path photos/ \\
        --output photos.npz --neighbours 8
    torchrun --standalone --nproc_per_node=8 extract_features.py --data_path imagenet/ \\
        --output imagenet.safetensors --tokens last4 --amp_dtype bfloat16    # published weights

The file holds `features`, which are not normalised, `labels`, -1 without one, `paths` and
`settings`; dino.evaluation.feature_files.read_features maps it into memory. Features go to the disk
as they are computed, so that they need not fit into memory. Run the same command again to resume
an interrupted extraction, with any number of processes, to the same result. As in the evaluations
the network sees the central crop of an image, not turned by EXIF.
"""

import contextlib
import hashlib
import math
import os
import time
from pathlib import Path

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from dino.command_line import (
    Parser,
    add_image_arguments,
    add_image_size_argument,
    add_launch_arguments,
    add_precision_argument,
    add_weights_arguments,
    loader_workers,
    number,
)
from dino.data.channels import as_picture, reader
from dino.data.images import ImageFiles, limit_pixels
from dino.data.items import image_of
from dino.data.labels import class_name, list_images, unlabelled
from dino.distributed import heartbeat, init_distributed, is_main_process, print0, shut_down
from dino.errors import UserError, exit_on_user_error
from dino.evaluation.extraction import TransformedImages, fill
from dino.evaluation.feature_files import SUFFIXES, read_features, write_features
from dino.evaluation.neighbour_pictures import (
    Panel,
    draw_neighbours,
    nearest_rows,
    neighbour_panel,
    spread_rows,
    without_self,
)
from dino.evaluation.tokens import TOKENS, token_features
from dino.evaluation.unfinished import FEATURES, LABELS, Unfinished, check_settings
from dino.meters import peak_memory_mb
from dino.output_checks import check_output_file
from dino.precision import choose_amp_dtype
from dino.run_lock import owned
from dino.same_on_ranks import check_same_flags
from dino.training import plots
from dino.weights.files import hash_weights
from dino.weights.pretrained import open_backbone

QUERIES = 8  # of a picture, and without --queries in all


def get_args_parser():
    parser = Parser(prog="extract_features.py", description="Features of any images as a file.")
    add_weights_arguments(parser.add_argument_group("backbone"))
    features = parser.add_argument_group("features")
    add = features.add_argument
    add(
        "--data_path",
        default="",
        help="a folder of images, with or without class folders; a data set with train/ and val/;"
        " or a text file with a path on each line, and after a tab perhaps a label",
    )
    add("--output", required=True, help=f"the file to write, {' or '.join(SUFFIXES)}")
    add(
        "--tokens",
        default="cls",
        choices=TOKENS,
        help="cls, the output of the backbone; the patch tokens of the last block; their mean; or"
        " [CLS] of the last 4 blocks side by side, which the linear evaluation sees",
    )
    add_image_size_argument(features)
    add(
        "--dtype",
        default="float32",
        choices=["float32", "float16"],
        help="type of the numbers in the file; float16 has half the size and three digits",
    )
    add("--batch_size_per_gpu", default=128, type=number(int, 1), help="images per forward pass")
    add_precision_argument(features, default="float32")
    add(
        "--on_bad_image",
        default="error",
        choices=["error", "skip"],
        help="an image that cannot be read stops the extraction, or its features are nan",
    )
    add_image_arguments(features)
    add = parser.add_argument_group("pictures").add_argument
    add(
        "--neighbours",
        default=0,
        type=number(int, 0, 20),
        metavar="N",
        help="draw the N nearest neighbours, by cosine similarity, of query images; 0 for none",
    )
    add(
        "--queries",
        default=None,
        help="an image, or a folder or list of images, to look up for --neighbours; by default"
        f" {QUERIES} from all over --data_path",
    )
    add_launch_arguments(parser.add_argument_group("launch"))
    return parser


def extract_features(args, images=None):
    """Write the file, and the pictures of --neighbours.

    `images`: any sequence of PIL images, or of tuples (image, label), instead of --data_path; their
    paths are their numbers.
    """
    check_flags(args)
    limit_pixels(args.max_image_pixels)
    if images is None:
        listed = list_images(args.data_path)
    else:
        listed = unlabelled([str(i) for i in range(len(images))])
    queries = list_queries(args.queries) if args.queries else None
    for path in picture_paths(args, queries):
        check_output_file(path, f"--output {args.output}:", ending=".png")

    _, device = init_distributed(args.device, args.dist_url)
    check_same_flags(args)
    pretrained = open_backbone(args, args.image_size)
    labels = None  # those of the images given
    if images is None:
        labels, images = listed.labels, ImageFiles(listed.paths, reader(pretrained.in_chans))
    amp_dtype = choose_amp_dtype(args.amp_dtype, device)
    describe = token_features(args.tokens, pretrained, device, amp_dtype)
    settings = describe_settings(args, listed, pretrained, amp_dtype, device)
    side = pretrained.image_size
    shape = describe(torch.zeros(1, pretrained.in_chans, side, side)).shape[1:]
    print0(listed)

    if os.path.exists(args.output):
        check_complete(args.output, settings, (len(listed.paths), *shape))
        print0(f"{args.output} is complete.")
    else:
        dataset = TransformedImages(
            images, labels, pretrained.transform, side, skip_bad=args.on_bad_image == "skip"
        )
        write(args, settings, listed.paths, dataset, describe, shape, device)
    if args.neighbours and is_main_process():
        draw_pictures(args, images, queries, pretrained, describe)
    shut_down()


def check_flags(args):
    """Raise UserError for flags that exclude each other, before anything is opened."""
    output = Path(args.output)
    if output.suffix not in SUFFIXES:
        raise UserError(f"--output {output}: the name must end in {' or '.join(SUFFIXES)}.")
    check_output_file(output)
    if args.neighbours and args.tokens == "patch":
        raise UserError(
            f"--neighbours {args.neighbours} and --tokens patch exclude each other: an image must"
            " have one vector. Take --tokens cls, mean or last4."
        )
    if args.neighbours and is_inside(output, args.data_path):
        raise UserError(
            f"--output {output} is in --data_path {args.data_path}: the picture of the neighbours"
            " would be taken for data next time. Give another folder."
        )
    if args.queries and not args.neighbours:
        raise UserError(f"--queries {args.queries} is for --neighbours: add --neighbours 8.")


def is_inside(path, folder):
    return os.path.isdir(folder) and path.resolve().is_relative_to(Path(folder).resolve())


def list_queries(path):
    """The ListedImages of --queries."""
    if path.lower().endswith(IMG_EXTENSIONS) and os.path.isfile(path):
        return unlabelled([path])
    return list_images(path, flag="--queries")


def describe_settings(args, listed, pretrained, amp_dtype, device):
    """What made the features, as plain values; a resumed extraction must have the same."""
    paths = "\0".join(listed.paths).encode("utf-8", "surrogateescape")
    return {
        "pretrained_weights": args.pretrained_weights or "published",
        "weights_sha256": hash_weights(pretrained.backbone),
        "arch": pretrained.arch,
        "patch_size": pretrained.patch_size,
        "tokens": args.tokens,
        "image_size": pretrained.image_size,
        "mean": list(pretrained.mean),
        "std": list(pretrained.std),
        "dtype": args.dtype,
        "amp_dtype": str(amp_dtype).removeprefix("torch."),
        "batch_size": args.batch_size_per_gpu,
        "on_bad_image": args.on_bad_image,
        "device": device.type,
        "torch": torch.__version__,
        "data_path": str(args.data_path),
        "images": len(listed.paths),
        "paths_sha256": hashlib.sha256(paths).hexdigest(),
        "classes": listed.classes,
    }


def check_complete(path, settings, shape):
    """Raise UserError unless the file has features of this shape, made with these settings."""
    file = read_features(path)
    check_settings(file.settings, settings, path)
    if file.features.shape != shape:
        found, wanted = (" x ".join(map(str, sides)) for sides in (file.features.shape, shape))
        raise UserError(
            f"--output {path} has features of shape {found}, and this backbone gives {wanted} for"
            " these images. Move it away."
        )


def write(args, settings, paths, dataset, describe, shape, device):
    """Compute the features, or what an interrupted extraction left to do, and write the file.

    `shape` is that of the features of one image.
    """
    folder = Path(f"{args.output}.unfinished")
    with owned(folder, "--output"):
        unfinished = Unfinished(folder, settings, shape, args.dtype)
        left, start = len(unfinished.missing()), time.perf_counter()
        if left < unfinished.batches:
            print0(f"Resuming: {left} of {unfinished.batches} batches are left.")
        fill(
            unfinished,
            paths,
            dataset,
            describe,
            num_workers=loader_workers(args.num_workers),
            pin_memory=device.type == "cuda",
        )
        heartbeat()
        print0(
            f"Features took {time.perf_counter() - start:.1f} s; the most memory held so far:"
            f" {peak_memory_mb():.0f} MiB"
        )
        if is_main_process():
            write_features(args.output, folder / FEATURES, folder / LABELS, paths, settings)
            unfinished.remove()
    if is_main_process():
        with contextlib.suppress(OSError):  # somebody else's now
            folder.rmdir()
    shape = " x ".join(map(str, (len(paths), *shape)))
    print0(f"Wrote {args.output}: {shape} numbers of type {args.dtype}.")


# ---- pictures ----


@torch.no_grad()
def draw_pictures(args, images, queries, pretrained, describe):
    """Write a picture of the nearest neighbours of each QUERIES query images."""
    file = read_features(args.output)
    classes, k, in_chans = file.settings["classes"], args.neighbours, pretrained.in_chans
    if queries is None:
        rows = spread_rows(file.features, QUERIES)
        shown = [(images, row, class_name(file.labels[row], classes)) for row in rows]
        vectors = torch.from_numpy(file.features[rows].astype("float32"))
        found = nearest_rows(vectors, file.features, k + 1)
        similarities, neighbours = without_self(*found, torch.tensor(rows))
    else:
        files = ImageFiles(queries.paths, reader(in_chans))
        names = [class_name(label, queries.classes) for label in queries.labels.tolist()]
        shown = [(files, i, name) for i, name in enumerate(names)]
        vectors = [describe(pretrained.transform(image)[None]).cpu() for image in files]
        similarities, neighbours = nearest_rows(torch.cat(vectors), file.features, k)

    def row_of_panels(number):
        query_images, i, query_class = shown[number]
        yield Panel(picture_of(query_images[i], i, in_chans), query_class or "query")
        for similarity, row in zip(similarities[number], neighbours[number].tolist(), strict=True):
            name = class_name(file.labels[row], classes)
            picture = picture_of(images[row], row, in_chans)
            yield neighbour_panel(picture, similarity, name, query_class)

    title = f"{Path(args.output).name}: nearest neighbours of the images on the left"
    for start, path in zip(
        range(0, len(shown), QUERIES), picture_paths(args, queries), strict=True
    ):
        numbers = range(start, min(start + QUERIES, len(shown)))
        sheet = [list(row_of_panels(number)) for number in numbers]
        plots.save(draw_neighbours(sheet, title), path)
        print0(f"Drew {path}")


def picture_of(item, number, in_chans):
    """An item of a sequence of images as a PIL image, of its first three channels."""
    return as_picture(image_of(item, number, in_chans))


def picture_paths(args, queries):
    """Where the pictures of --neighbours go, one for each QUERIES of the ListedImages."""
    if not args.neighbours:
        return []
    output, pages = Path(args.output), math.ceil(len(queries.paths) / QUERIES) if queries else 1
    endings = [f"_{page}" for page in range(1, pages + 1)] if pages > 1 else [""]
    return [output.with_name(f"{output.stem}_neighbours{ending}.png") for ending in endings]


def main():
    with exit_on_user_error("extract_features.py"):
        extract_features(get_args_parser().parse_args())


if __name__ == "__main__":
    main()
