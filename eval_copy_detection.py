# SPDX-License-Identifier: Apache-2.0
"""Copy detection on Copydays with a frozen ViT (Sec. 4.2, Table 4).

    python eval_copy_detection.py --data_path copydays/ --whitening_path w/ --distractors_path d/
    python eval_copy_detection.py --data_path copydays/ --pretrained_weights backbone.pth

--data_path holds original/, strong/, jpegqual/3/ ... and crops/10/ ...: every image is a query,
searched among the originals and the distractors. The first command downloads the published ViT-B/8;
with 20,000 random images of YFCC100M for the whitening and 10,000 others as distractors the authors
report mAP 0.858 on strong. As in the official code, the whitening uses second moments around zero,
not around the mean, and images are resized to a square whatever their aspect ratio.
"""

from functools import partial

from dino.backbone_checks import check_takes_sizes
from dino.command_line import (
    Parser,
    add_image_arguments,
    add_launch_arguments,
    add_precision_argument,
    add_use_cuda_argument,
    add_weights_arguments,
    device_flag,
    loader_workers,
    number,
)
from dino.data.copydays import list_folder, load_image, open_copydays, shared
from dino.data.images import limit_pixels
from dino.distributed import init_distributed, is_main_process, print0, shut_down
from dino.errors import UserError, exit_on_user_error
from dino.evaluation.copy_detection import descriptor, score_blocks
from dino.evaluation.features import describe_images
from dino.evaluation.vits import check_flag_is_vit, open_vit
from dino.json_files import write_json
from dino.output_checks import check_output_file
from dino.precision import choose_amp_dtype
from dino.same_on_ranks import check_same_flags

NOT_GIVEN = {  # the official defaults, which mean "none"
    "whitening_path": "/path/to/whitening_data/",
    "distractors_path": "/path/to/distractors/",
}


def get_args_parser():
    parser = Parser(prog="eval_copy_detection.py", description="Copies found by frozen features.")
    backbone = parser.add_argument_group("backbone")
    add_weights_arguments(backbone, patch_size=8, arch="vit_base")
    evaluation = parser.add_argument_group("evaluation")
    add = evaluation.add_argument
    add(
        "--data_path",
        default="/path/to/copydays/",
        help="Copydays: original/ and the folders of copies",
    )
    add(
        "--whitening_path",
        default=NOT_GIVEN["whitening_path"],
        help="folder of images to learn a whitening on, none of them a distractor or of"
        " --data_path; without this flag, no whitening. The authors took 20,000 of YFCC100M",
    )
    add(
        "--distractors_path",
        default=NOT_GIVEN["distractors_path"],
        help="folder of images to search beside the originals; without this flag, none. The"
        " authors took 10,000 of YFCC100M",
    )
    add(
        "--imsize",
        default=320,
        type=number(int, 1, 2**13),
        help="side in pixels of the square that images are resized to; the authors take 320 for"
        " ViT-B/8 and 224 for ViT-B/16",
    )
    add("--batch_size_per_gpu", default=16, type=number(int, 1), help="images per forward pass")
    add_use_cuda_argument(evaluation)
    add_precision_argument(evaluation, default="float32")
    add("--output", default=None, help="JSON file for the scores of every block")
    add_image_arguments(parser)
    add_launch_arguments(parser.add_argument_group("launch"))
    return parser


def eval_copy_detection(args):
    """Print and return the scores of each block: see copy_detection.score_blocks."""
    check_flags(args)
    limit_pixels(args.max_image_pixels)
    _, device = init_distributed(device_flag(args), args.dist_url)
    check_same_flags(args)
    copydays = open_copydays(args.data_path)
    distractors = optional_folder(args.distractors_path, "distractors_path")
    whitening_set = optional_folder(args.whitening_path, "whitening_path")
    check_sets_are_apart(args, copydays, distractors, whitening_set)
    pretrained = open_vit(args, lacks_patch_tokens)
    check_fits(pretrained, args)
    describe = partial(
        describe_images,
        partial(descriptor, pretrained.backbone.to(device)),
        load=partial(load_image, imsize=args.imsize, mean=pretrained.mean, std=pretrained.std),
        device=device,
        batch_size=args.batch_size_per_gpu,
        num_workers=loader_workers(args.num_workers),
        amp_dtype=choose_amp_dtype(args.amp_dtype, device),
    )
    scores = score_blocks(copydays, distractors, whitening_set, describe)
    print_scores(scores)
    if args.output and is_main_process():
        protocol = dict(
            arch=pretrained.arch,
            patch_size=pretrained.patch_size,
            imsize=args.imsize,
            distractors=len(distractors),
            images_for_whitening=len(whitening_set),
        )
        write_json(args.output, {**protocol, "blocks": scores})
    shut_down()
    return scores


def check_flags(args):
    """Raise UserError for invalid flags, before anything is opened."""
    if args.output:
        check_output_file(args.output, ending=".json")
    check_flag_is_vit(args, lacks_patch_tokens)


def lacks_patch_tokens(arch):
    return "a descriptor is made of the [CLS] and patch tokens of a ViT"


def check_fits(pretrained, args):
    """Raise UserError unless an image holds at least one patch, and not too many."""
    if args.imsize < pretrained.patch_size:
        raise UserError(
            f"--imsize {args.imsize}: an image must hold at least one patch of"
            f" {pretrained.patch_size} x {pretrained.patch_size} pixels."
        )
    side = args.imsize - args.imsize % pretrained.patch_size
    source = f"--imsize {args.imsize}: {pretrained.arch}"
    check_takes_sizes(pretrained.backbone, pretrained.arch, [side], source=source)


def optional_folder(path, name):
    """Paths of the images in the folder given with --`name`; [] if the flag has its default.

    A missing folder is an error; the official script silently does without it.
    """
    return [] if path in ("", NOT_GIVEN[name]) else list_folder(path, f"--{name}")


def check_sets_are_apart(args, copydays, distractors, whitening_set):
    """Raise UserError for an image that is in two sets, by its path without links."""
    own = [path for paths in copydays.blocks.values() for path in paths]
    for path in shared(distractors, own):
        raise UserError(
            f"--distractors_path {args.distractors_path}: {path} is an image of --data_path, and as"
            " a distractor it would count as a wrong result. Give a folder of other images."
        )
    for path in shared(whitening_set, [*own, *distractors]):
        raise UserError(
            f"--whitening_path {args.whitening_path}: {path} is an image that is scored, too, and"
            " the scores would be too good. Give a folder of other images."
        )


def print_scores(scores):
    """The lines of the official script, and one of ours."""
    for block, of_block in scores.items():
        if block != "copies":
            print0(f"eval on {block} mAP={of_block['mAP']:.3f}")
    names = {"strong": "strong", "copies": f"all {scores['copies']['images']} copies"}
    found = [f"{names[key]} {scores[key]['micro-AP']:.3f}" for key in names if key in scores]
    print0(f"micro-AP (ours, not in the official script): {', '.join(found)}")


def main():
    with exit_on_user_error("eval_copy_detection.py"):
        eval_copy_detection(get_args_parser().parse_args())


if __name__ == "__main__":
    main()
