# SPDX-License-Identifier: Apache-2.0
"""The flags of main_dino.py about what the networks see."""

from dino.command_line import number
from dino.data.augmentations import IMAGENET_MEAN, IMAGENET_STD, MEANS, STDS


def add_view_arguments(group):
    add = group.add_argument
    add(
        "--global_crops_scale",
        default=(0.4, 1.0),
        nargs="+",
        type=number(float, 0, 1),
        help="least and greatest share of the image in a global crop; 0.14 1 if there are no"
        " local crops",
    )
    add(
        "--local_crops_scale",
        default=(0.05, 0.4),
        nargs="+",
        type=number(float, 0, 1),
        help="the same of a local crop",
    )
    add(
        "--local_crops_number",
        default=8,
        type=number(int, 0, 1000),
        help="local crops per image; 0 for none",
    )
    add(
        "--global_crop_size",
        default=224,
        type=number(int, 1, 2**13),
        help="pixels to which a global crop is resized; also the grid of a ViT's position"
        " embeddings",
    )
    add(
        "--local_crop_size",
        default=96,
        type=number(int, 1, 2**13),
        help="pixels to which a local crop is resized",
    )
    add(
        "--shrink_images",
        default=0,
        type=number(int, 0, 2**13),
        help="pixels of the shorter side to which larger images are shrunk before they are cropped;"
        " 0 for none",
    )
    add(
        "--min_crop_pixels",
        default=0,
        type=number(int, 0, 2**13),
        help="side in pixels of the image that a square crop has at least, whatever the scale says:"
        " for data whose images have many sizes",
    )
    add(
        "--flip_p",
        default=0.5,
        type=number(float, 0, 1),
        help="probability that left and right change places; 0 for text and digits",
    )
    add(
        "--vflip_p",
        default=0.0,
        type=number(float, 0, 1),
        help="the same of top and bottom; 0.5 where no side is up: tissue, satellites",
    )
    add(
        "--turn_p",
        default=0.0,
        type=number(float, 0, 1),
        help="probability of a turn by one, two or three quarters; 0.75 makes all four equally"
        " likely",
    )
    add(
        "--jitter",
        default=(0.4, 0.4, 0.2, 0.1),
        nargs="+",
        type=number(float, 0, 1),
        help="greatest changes of brightness, contrast, saturation and hue, as fractions; the last"
        " two do nothing to grey images",
    )
    add(
        "--grayscale_p",
        default=0.2,
        type=number(float, 0, 1),
        help="probability that a crop loses its colours",
    )
    add(
        "--blur_radius",
        default=(0.1, 2.0),
        nargs="+",
        type=number(float, 0, 100),
        help="least and greatest standard deviation of the blur in pixels of the crop; the default"
        " is for crops of"
        " 224, 0.014 0.29 is the same for crops of 32",
    )
    add(
        "--solarize_p",
        default=0.2,
        type=number(float, 0, 1),
        help="probability that bright values are inverted, in the second global crop",
    )
    add(
        "--mean",
        default=IMAGENET_MEAN,
        nargs="+",
        type=number(float, *MEANS),
        help="mean of each channel on a scale of 0 to 1, for the normalisation: python"
        " check_data.py --stats PATH",
    )
    add(
        "--std",
        default=IMAGENET_STD,
        nargs="+",
        type=number(float, *STDS),
        help="standard deviation of each channel on that scale",
    )
    add(
        "--augmentation",
        default=None,
        metavar="MODULE:FUNCTION",
        help="your own views instead of all this: a function without arguments that returns a"
        " MultiCrop, such as my_module:build",
    )
    add(
        "--augment",
        default="auto",
        choices=["auto", "cpu", "device"],
        help="where the colour augmentation runs: cpu is Pillow in the loader's processes; device"
        " does whole batches, for about a fifth of the loader's time; auto is device on a GPU",
    )
