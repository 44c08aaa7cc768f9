# SPDX-License-Identifier: Apache-2.0
"""Attention quality in a number: Jaccard similarity of attention masks and objects (Fig. 4, App. D).

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

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from attention import class_attention, fit_to_patches, keep_mass, load_vit
from data import find_images, read_image
from distributed import Launch, choose_device, print0
from errors import UserError, exit_on_user_error
from flags import Parser, add_weights_arguments, given_flags, number
from metrics import progress_bar

# ViT-S/16 on the validation images of VOC2012, best head (App. D; Fig. 4 has the first three).
PAPER = {"untrained": 22.0, "supervised": 27.3, "DINO": 45.9, "DINO without multi-crop": 45.1}

BACKGROUND, VOID = 0, 255  # labels of VOC; void is what its annotators left undecided

# Where VOC keeps the masks for --ground_truth; the first folder that exists serves.
VOC_MASKS = {
    "objects": ("SegmentationObject",),
    "foreground": ("SegmentationClass", "SegmentationObject"),
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
        type=number(int, 0),
        help="short side in pixels to resize images to; 0 for images as they are",
    )
    add("--output", default=None, help="JSON file to write the figures of every image to")
    add(
        "--device",
        default="auto",
        choices=["auto", "cuda", "cpu"],
        help="auto takes CUDA if there is any",
    )
    return parser


def eval_attention(args, given=()):
    """Print and return {threshold: summary}, see `summarise`. `given`: the command line's flags."""
    is_voc = (Path(args.data_path) / "JPEGImages").is_dir()
    ground_truth = args.ground_truth or ("objects" if is_voc else "foreground")
    samples = (list_voc if is_voc else list_pairs)(args.data_path, ground_truth)
    read_labels = read_voc_labels if is_voc else read_pair_labels
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    device = choose_device(args.device, Launch("python"))
    pretrained = load_vit(args, given)
    pretrained.backbone.to(device)
    scores = {}  # name of the image: {threshold: (h + 1, n) Jaccard}
    for name, image_path, mask_path in progress_bar(samples, "attention masks"):
        truth = true_masks(read_labels(mask_path), ground_truth)
        image_scores = score_image(pretrained, image_path, *truth, args.image_size, args.threshold)
        if image_scores:
            scores[name] = image_scores
    if not scores:
        raise UserError(f"--data_path {args.data_path}: no mask has an object in it.")
    summaries = {
        share: summarise([image[share] for image in scores.values()]) for share in args.threshold
    }
    report(summaries, scores, len(samples))
    if is_voc:
        values = ", ".join(f"{name} {value}" for name, value in PAPER.items())
        print0(
            "The paper, ViT-S/16 on VOC2012, best head for each object, 60 % (Fig. 4) or 80 %"
            f" (App. D): {values}"
        )
    if args.output:
        network = {"arch": pretrained.arch, "patch_size": pretrained.patch_size}
        protocol = {"ground_truth": ground_truth, "image_size": args.image_size}
        write_json(args.output, {**network, **protocol}, summaries, scores)
    return summaries


def list_voc(data_path, ground_truth):
    """(name, path of the image, path of the mask) of VOC2012's validation images."""
    root = Path(data_path)
    masks = [root / name for name in VOC_MASKS[ground_truth] if (root / name).is_dir()]
    names_file = root / "ImageSets" / "Segmentation" / "val.txt"
    if not masks or not names_file.is_file():
        missing = f"{VOC_MASKS[ground_truth][0]}/" if not masks else str(names_file)
        raise UserError(
            f"--data_path {data_path}: it looks like VOC2012's folder, but has no {missing}, which"
            f" --ground_truth {ground_truth} needs."
        )
    return check_files(
        (name, root / "JPEGImages" / f"{name}.jpg", masks[0] / f"{name}.png")
        for name in names_file.read_text().split()
    )


def list_pairs(data_path, ground_truth):
    """The same of images/ and masks/, which go together by their paths without suffix."""
    folders = [Path(data_path) / name for name in ("images", "masks")]
    if not all(folder.is_dir() for folder in folders):
        raise UserError(
            f"--data_path {data_path}: neither VOC2012's folder, with JPEGImages/,"
            " SegmentationObject/ or SegmentationClass/ and ImageSets/Segmentation/val.txt, nor"
            " one with images/ and masks/."
        )
    if ground_truth == "objects":
        raise UserError(
            "--ground_truth objects: masks/ does not tell objects apart, VOC2012's layout does."
            " Leave the flag out."
        )
    images, masks = map(by_name, folders)
    for name in sorted(images.keys() ^ masks.keys()):
        other = folders[1] if name in images else folders[0]
        raise UserError(f"{images.get(name) or masks[name]}: no counterpart in {other}.")
    return check_files((name, images[name], masks[name]) for name in images)


def by_name(folder):
    """{path without suffix, relative to `folder`: path} of the images in it, at any depth."""
    paths = {}
    for path in find_images(folder):
        other = paths.setdefault(str(Path(path).relative_to(folder).with_suffix("")), path)
        if other != path:
            raise UserError(f"{other} and {path} have the same name but for the suffix.")
    return paths


def check_files(samples):
    """The list of `samples`; UserError if it is empty or a file of it does not exist."""
    samples = list(samples)
    if not samples:
        raise UserError("--data_path: there are no images to measure.")
    for _, *paths in samples:
        for path in paths:
            if not Path(path).is_file():
                raise UserError(f"{path}: no such file, but --data_path lists it.")
    return samples


def read_voc_labels(path):
    """(H, W) uint8: BACKGROUND, VOID, or the number of an object or a class."""
    mask = open_mask(path)
    if mask.mode != "P":
        raise UserError(
            f"{path}: its pixels are colours or greys ({mask.mode}), not labels with a palette as"
            " in VOC2012. Take the original files."
        )
    return np.asarray(mask)


def read_pair_labels(path):
    """(H, W): BACKGROUND or not. With a palette, labels as in VOC, and so perhaps VOID; in any
    other file each pixel that is not black is foreground, 255 too.
    """
    mask = open_mask(path)
    if mask.mode == "P":
        return np.asarray(mask)
    pixels = np.asarray(mask)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if mask.mode in ("LA", "RGBA"):
        pixels = pixels[..., :-1]  # opacity says nothing
    return (pixels != 0).any(axis=-1).astype(np.uint8)


def open_mask(path):
    read_image(path)  # raises, with the name of the file, for what cannot be decoded
    mask = Image.open(path)
    if mask.format == "JPEG":
        raise UserError(
            f"{path}: JPEG blurs the edge of a mask. Save masks as PNG, from their source."
        )
    return mask


def true_masks(labels, ground_truth):
    """(objects (n, H, W) bool, which pixels count (H, W) bool) of labels (H, W).

    "objects": one for each label, and all pixels count, so that void is background: the authors'
    rule. "foreground": all objects as one, and void does not count, as PASCAL scores.
    """
    if ground_truth == "objects":
        names = np.setdiff1d(labels, [BACKGROUND, VOID])
        objects, counted = labels == names[:, None, None], np.ones(labels.shape, bool)
    else:
        counted = labels != VOID
        objects = ((labels != BACKGROUND) & counted)[None]
    return torch.from_numpy(objects), torch.from_numpy(counted)


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
    rows, columns = (
        patch_of_pixels(pixels, size, patch_size) for pixels, size in zip(counted.shape, resized)
    )
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


def summarise(scores):
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


def report(summaries, scores, num_samples):
    """A row for each way to choose a head, a column for each threshold."""
    objects = sum(next(iter(image.values())).shape[1] for image in scores.values())
    left_out = num_samples - len(scores)
    ending = f"; {left_out} without any are left out" if left_out else ""
    print0(f"{len(scores)} images with {objects} true masks{ending}")
    summaries = {f"{100 * share:g} %": summary for share, summary in summaries.items()}
    rows = {"Jaccard similarity (%) of masks that hold": summaries}
    rows["best head for each true mask"] = [f"{s['best_head']:.1f}" for s in summaries.values()]
    single = [s["best_single_head"] for s in summaries.values()]
    rows["best single head"] = [f"{s['jaccard']:.1f} (head {s['head']})" for s in single]
    rows["mean of heads"] = [f"{s['mean_of_heads']:.1f}" for s in summaries.values()]
    for name, cells in rows.items():
        print0(f"{name:42}", *[f"{cell:>16}" for cell in cells])


def write_json(path, protocol, summaries, scores):
    """The protocol, the summaries, and the summary of every image by itself."""
    images = {
        name: {share: summarise([values]) for share, values in image.items()}
        for name, image in scores.items()
    }
    content = {**protocol, "thresholds": summaries, "images": images}
    Path(path).write_text(json.dumps(content, indent=1) + "\n")


def main():
    parser = get_args_parser()
    with exit_on_user_error("eval_attention.py"):
        eval_attention(parser.parse_args(), given_flags(parser))


if __name__ == "__main__":
    main()
