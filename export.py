# SPDX-License-Identifier: Apache-2.0
"""A trained backbone for other libraries: timm, transformers, safetensors, torch.export, ONNX.

    python export.py --pretrained_weights runs/photos/backbone.pth --format timm --output vit_timm
    python export.py --arch vit_small --format onnx --output dino.onnx      # published weights

The library loads its export, and both networks see the same photographs. If their features differ
by more than 1e-4 nothing is kept. Every script reads the exports for timm, transformers and
safetensors back: --pretrained_weights vit_timm.
"""

import os
import shutil
from pathlib import Path

import torch

from dino.backbones import first_of, is_vit
from dino.command_line import Parser, add_image_arguments, add_weights_arguments, number
from dino.data.augmentations import IMAGENET_MEAN, IMAGENET_STD, eval_transform
from dino.data.channels import RGB
from dino.data.demo import open_photograph
from dino.data.images import limit_pixels, list_training_images, read_image
from dino.distributed import print0
from dino.errors import UserError, exit_on_user_error
from dino.output_checks import check_output_file
from dino.printable import printable
from dino.weights.exports import FORMATS, check_libraries
from dino.weights.files import check_name_is_text, sync_folder
from dino.weights.pretrained import open_backbone

# Of any feature, times the largest if that is below 1. Rounding makes about 1e-6.
TOLERANCE = 1e-4
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg")
MOST_PHOTOGRAPHS = 16


def get_args_parser():
    parser = Parser(prog="export.py", description="Write a backbone for another library.")
    add_weights_arguments(parser.add_argument_group("backbone"))
    add = parser.add_argument_group("export").add_argument
    add(
        "--format",
        required=True,
        choices=FORMATS,
        help="timm and transformers write a folder, the others one file",
    )
    add("--output", required=True, help="the new file or folder")
    add(
        "--image_size",
        default=None,
        type=number(int, 1, 2**13),
        help="pixels of the images; by default what the backbone was trained with, else 224. timm"
        " and transformers are exact at this size only, as they interpolate position embeddings in"
        " their own way; torch_export and onnx are exact at every size",
    )
    add(
        "--check_images",
        default=None,
        help="photographs to compare the networks on: a folder or a list of paths, of which the"
        f" first {MOST_PHOTOGRAPHS} count; by default {len(PHOTOGRAPHS)} that come with"
        " scikit-image",
    )
    add_image_arguments(parser)
    return parser


def export(args):
    """Write the export. Returns the largest difference of its features from the backbone's."""
    format_, output = FORMATS[args.format], Path(args.output)
    limit_pixels(args.max_image_pixels)
    check_libraries(args.format)
    check_new_output(output, format_.suffix)
    photographs = open_photographs(args.check_images)
    pretrained = open_backbone(args, args.image_size)
    temporary = output.with_name(f".{output.name}.tmp")
    written = temporary / output.name
    shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
    try:
        temporary.mkdir(parents=True)
        format_.write(pretrained, written)
        difference = compare(args.format, pretrained, written, photographs)
        write_through(written)
        os.replace(written, output)
        sync_folder(output.parent)
    except OSError as error:
        error.filename = error.filename or str(output)  # a full disk names no file
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    megabytes = sum(file.stat().st_size for file in files_of(output)) / 1e6
    print0(f"Wrote {printable(output)}, {megabytes:.1f} MB. To load it:")
    for line in format_.usage(pretrained).replace("PATH", printable(output)).splitlines():
        print0(f"    {line}")
    return difference


def check_new_output(output, suffix):
    """Raise UserError unless `output` is new, can be written, and ends in `suffix`."""
    flag = f"--output {printable(output)}"
    if os.path.lexists(output):
        raise UserError(f"{flag} exists. Give another name, or remove it.")
    if suffix and output.suffix != suffix:
        raise UserError(f"{flag}: this format is a file whose name ends in {suffix}.")
    check_name_is_text(output, flag)
    check_output_file(output)


def open_photographs(path):
    """PIL images to compare the networks on."""
    if path is None:
        return [open_photograph(name) for name in PHOTOGRAPHS]
    paths = list_training_images(path, flag="--check_images")
    return [read_image(path) for path in paths[:MOST_PHOTOGRAPHS]]


def files_of(path):
    return list(path.iterdir()) if path.is_dir() else [path]


def write_through(path):
    """fsync the files of an export, so that after a crash its name stands for all of it."""
    for file in files_of(path):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


# ---- the comparison ----


@torch.no_grad()
def compare(name, pretrained, written, photographs):
    """Print how far the export's features are from the backbone's; return the largest difference.

    UserError if that is above TOLERANCE.
    """
    format_, network = FORMATS[name], FORMATS[name].load(pretrained, written)
    pixels = to_pixels(pretrained, photographs, pretrained.image_size)
    expected = features(pretrained, pixels)
    difference = max(largest(network(pixels[:n]) - expected[:n]) for n in (1, len(pixels)))
    if format_.any_size:
        difference = max(difference, compare_other_shape(name, pretrained, network, pixels))
    print0(
        f"Features of {len(pixels)} photographs from {name}: they differ by at most"
        f" {difference:.1e} from ours, of which the largest is {largest(expected):.2g}."
    )
    tolerance = TOLERANCE * min(1.0, largest(expected))
    if not difference <= tolerance:
        raise UserError(
            f"--format {name}: the features differ by {difference:.1e}, more than {tolerance:.2g},"
            " so nothing is kept. The other formats may do better."
        )
    if format_.load_transform:
        compare_transform(name, pretrained, network, written, photographs, expected)
    if format_.load_at_any_size and is_vit(pretrained.backbone):
        compare_interpolation(name, pretrained, written, photographs)
    return difference


def features(pretrained, pixels):
    return first_of(pretrained.backbone(pixels))


def to_pixels(pretrained, photographs, size):
    """Photographs as the network sees them at an image size: (B, C, size, size).

    Where C is not 3 their channels are repeated, normalised as ImageNet's.
    """
    rgb = pretrained.in_chans == RGB
    colors = (pretrained.mean, pretrained.std) if rgb else (IMAGENET_MEAN, IMAGENET_STD)
    transform = eval_transform(size, *colors, pretrained.shrink_images)
    pixels = torch.stack([transform(photograph) for photograph in photographs])
    return pixels[:, torch.arange(pretrained.in_chans) % RGB]


def largest(values):
    """The largest absolute value; infinite where there is a nan."""
    return float(values.abs().nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def compare_other_shape(name, pretrained, network, pixels):
    """The largest difference at three quarters of the width, if backbone and graph take that.

    A graph of one of our ViTs must: UserError.
    """
    unit = pretrained.patch_size if is_vit(pretrained.backbone) else 32  # most networks' stride
    narrow = pixels[..., : max(unit, pixels.shape[-1] * 3 // 4 // unit * unit)]
    try:
        expected = features(pretrained, narrow)
    except (RuntimeError, ValueError, AssertionError):  # as in check_takes_sizes
        return 0.0
    try:
        return largest(network(narrow) - expected)
    except Exception as error:  # each runtime has its own
        only = f"{name} takes images of {pixels.shape[-1]} pixels only ({type(error).__name__})"
        if is_vit(pretrained.backbone):
            raise UserError(f"--format {only}, so nothing is kept.") from None
        print0(f"{only}.")
        return 0.0


def compare_transform(name, pretrained, network, written, photographs, expected):
    """Print what the library's own preprocessing changes."""
    if pretrained.in_chans != RGB:
        return
    transform = FORMATS[name].load_transform(written)
    found = network(torch.stack([transform(photograph) for photograph in photographs]))
    each = (found - expected).abs().amax(dim=1)
    same = int((each <= TOLERANCE).sum())
    print0(
        f"With {name}'s own preprocessing {same} of {len(each)} photographs have the same features;"
        f" the largest difference is {largest(each):.1g}."
    )
    if pretrained.shrink_images:
        print0(
            f"{name} does not shrink images first: make their short side"
            f" {pretrained.shrink_images} pixels, as --shrink_images did in training."
        )


def compare_interpolation(name, pretrained, written, photographs):
    """Print what the library's own interpolation of position embeddings changes at another size."""
    patch = pretrained.patch_size
    size = pretrained.image_size * 3 // 2 // patch * patch
    pixels = to_pixels(pretrained, photographs, size)
    network = FORMATS[name].load_at_any_size(pretrained, written)
    difference = largest(network(pixels) - features(pretrained, pixels))
    print0(
        f"At {size} pixels {name} interpolates the position embeddings in its own way: the features"
        f" differ by {difference:.1e}. Export with --image_size {size} for exact ones."
    )


def main():
    with exit_on_user_error("export.py"):
        export(get_args_parser().parse_args())


if __name__ == "__main__":
    main()
