# SPDX-License-Identifier: Apache-2.0
"""Attention quality in a number: Jaccard similarity of its masks with objects (Fig. 4, App. D).

    python eval_attention.py --pretrained_weights runs/photos/backbone.pth --data_path VOC2012/
    python eval_attention.py --pretrained_weights runs/photos/backbone.pth --data_path pairs/

The first is PASCAL VOC2012's folder, whose validation images are measured; the second holds
images/ and masks/, with a mask for each image under the same name. On VOC2012 the authors report
45.9 for ViT-S/16. They did not publish the code, but told the rule (facebookresearch/dino#54):
each object is compared with the mask of every head and scores with the one that fits it best; an
image scores the mean of its objects, and the data set the mean of its images.

Images keep their aspect ratio. Masks are compared at the resolution of the true ones, of which a
pixel takes the patch that its centre falls into; pixels beyond the last whole patch, at the bottom
and on the right, are left out.
"""

import torch

from dino.command_line import (
    Parser,
    add_device_argument,
    add_image_arguments,
    add_weights_arguments,
    number,
)
from dino.data.images import limit_pixels, read_image
from dino.data.masks import SegmentedImages
from dino.distributed import print0
from dino.errors import UserError, exit_on_user_error
from dino.evaluation.attention import class_attention, fit_to_patches, keep_mass, open_for_attention
from dino.json_files import write_json
from dino.meters import progress_bar
from dino.output_checks import check_output_file

# Best head, validation images of VOC2012 (Fig. 4 and App. D, which alone has the last value).
PAPER = {
    "ViT-S/16": "untrained 22.0, supervised 27.3, DINO 45.9, DINO without multi-crop 45.1",
    "ViT-S/8": "untrained 21.8, supervised 23.7, DINO 44.7",
}


def get_args_parser():
    parser = Parser(prog="eval_attention.py", description="Jaccard similarity of attention masks.")
    add_weights_arguments(parser.add_argument_group("backbone"))
    add = parser.add_argument_group("evaluation").add_argument
    add(
        "--data_path",
        default="/path/to/VOC2012/",
        help="VOC2012's folder, or one with images/ and masks/",
    )
    add(
        "--ground_truth",
        default=None,
        choices=["objects", "foreground"],
        help="objects: each of VOC's objects by itself, void being background, which is the"
        " authors' rule; foreground: all in one, void left out. By default objects for VOC and"
        " foreground for images/ and masks/",
    )
    add(
        "--threshold",
        default=[0.6, 0.8],
        nargs="+",
        type=number(float, high=1, above=0),
        help="shares of the attention that masks hold; for the same figures the paper says 0.6 in"
        " Fig. 4 and 0.8 in App. D",
    )
    add(
        "--image_size",
        default=480,
        type=number(int, 0, 2**13),
        help="short side in pixels to resize images to; 0 for images as they are",
    )
    add("--output", default=None, help="JSON file to write the figures of every image to")
    add_image_arguments(parser)
    add_device_argument(parser)
    return parser


def eval_attention(args):
    """Print and return {threshold: summary}, see `summarise_scores`."""
    limit_pixels(args.max_image_pixels)
    if args.output:
        check_output_file(args.output, ending=".json")
    images = SegmentedImages(args.data_path, args.ground_truth)
    pretrained = open_for_attention(args)
    scores = {}  # name of the image: {threshold: Jaccard (h + 1, n)}
    for name, path, objects, counted in progress_bar(images, "attention masks"):
        image_scores = score_image(
            pretrained, path, objects, counted, args.image_size, args.threshold
        )
        if image_scores:
            scores[name] = image_scores
    if not scores:
        raise UserError(f"--data_path {args.data_path}: no mask has an object in it.")
    summaries = {
        share: summarise_scores([image[share] for image in scores.values()])
        for share in args.threshold
    }
    print_table(summaries, scores, images)
    if args.output:
        protocol = {
            "arch": pretrained.arch,
            "patch_size": pretrained.patch_size,
            "image_size": args.image_size,
            "ground_truth": images.ground_truth,
        }
        write_figures(args.output, protocol, summaries, scores)
    return summaries


def score_image(pretrained, image_path, objects, counted, image_size, thresholds):
    """{threshold: Jaccard (h + 1, n)} of each head, and of their mean in the last row, with each
    of the n objects; {} where there are none.

    `objects` (n, H, W) and `counted` (H, W) may have another resolution than the image, but not
    another shape: UserError.
    """
    image = read_image(image_path)
    height, width = counted.shape
    if abs(image.width * height / width - image.height) > max(1, image.height / height):
        raise UserError(
            f"{image_path} is {image.width} x {image.height} pixels, its mask {width} x {height}:"
            " these are not the same picture."
        )
    patch_size = pretrained.patch_size
    fitted, resized = fit_to_patches(image, [image_size], patch_size, image_path)
    maps = class_attention(pretrained, fitted).cpu()
    maps = torch.cat([maps, maps.mean(dim=0, keepdim=True)])
    rows = patch_of_pixels(height, resized[0], patch_size)
    columns = patch_of_pixels(width, resized[1], patch_size)
    objects, counted = objects[:, : len(rows), : len(columns)], counted[: len(rows), : len(columns)]
    objects = objects[:, counted]
    objects = objects[objects.any(dim=1)]
    if len(objects) == 0:
        return {}
    return {
        share: jaccard(keep_mass(maps, share)[:, rows][:, :, columns][:, counted], objects)
        for share in thresholds
    }


def patch_of_pixels(pixels, size, patch_size):
    """Number of the patch, along one side, that holds the centre of each pixel of a mask.

    The mask has so many `pixels` along that side, the resized image `size`. Pixels beyond the last
    whole patch have none: the result may be shorter.
    """
    centres = (torch.arange(pixels, dtype=torch.float64) + 0.5) * size / pixels
    patches = (centres / patch_size).long()
    return patches[patches < size // patch_size]


def jaccard(masks, objects):
    """|A and B| / |A or B| of each mask with each object: bool (m, pixels), (n, pixels) -> (m, n).

    No object may be empty.
    """
    masks, objects = masks.double(), objects.double()
    both = masks @ objects.T
    return both / (masks.sum(dim=1, keepdim=True) + objects.sum(dim=1) - both)


def summarise_scores(scores):
    """Percentages, from the Jaccard similarities (h + 1, n) of one or more images.

    `best_head`: every object with the head that fits it best. `best_single_head`: the one head
    that is best on average, with its number. `mean_of_heads`: the mask of the mean of all maps.
    `heads`: each one on average.
    """
    heads, mean = zip(*[(image[:-1], image[-1]) for image in scores], strict=True)
    each = 100 * torch.stack([image.mean(dim=1) for image in heads]).mean(dim=0)
    return {
        "best_head": 100 * torch.stack([image.amax(dim=0).mean() for image in heads]).mean().item(),
        "best_single_head": {"head": int(each.argmax()), "jaccard": each.max().item()},
        "mean_of_heads": 100 * torch.stack([image.mean() for image in mean]).mean().item(),
        "heads": each.tolist(),
    }


def print_table(summaries, scores, images):
    """A row for each way to choose a head, a column for each threshold; and the paper's values."""
    masks = sum(next(iter(image.values())).shape[1] for image in scores.values())
    left_out = len(images) - len(scores)
    ending = f"; {left_out} without any are left out" if left_out else ""
    print0(f"{len(scores)} images with {masks} true masks ({images.ground_truth}){ending}")
    single = [summary["best_single_head"] for summary in summaries.values()]
    rows = {
        "Jaccard similarity (%) of masks that hold": [f"{100 * share:g} %" for share in summaries],
        "best head for each true mask": [f"{s['best_head']:.1f}" for s in summaries.values()],
        "best single head": [f"{s['jaccard']:.1f} (head {s['head']})" for s in single],
        "mean of heads": [f"{s['mean_of_heads']:.1f}" for s in summaries.values()],
    }
    for name, cells in rows.items():
        print0(f"{name:42}", *[f"{cell:>16}" for cell in cells])
    if images.is_voc:
        print0("The paper's, best head for each object, 60 % (Fig. 4) or 80 % (App. D):")
        print0(*[f"  {network:9} {values}" for network, values in PAPER.items()], sep="\n")


def write_figures(path, protocol, summaries, scores):
    """The protocol, the summaries, and the summary of every image by itself."""
    images = {
        name: {share: summarise_scores([values]) for share, values in image.items()}
        for name, image in scores.items()
    }
    write_json(path, {**protocol, "thresholds": summaries, "images": images})


def main():
    with exit_on_user_error("eval_attention.py"):
        eval_attention(get_args_parser().parse_args())


if __name__ == "__main__":
    main()
