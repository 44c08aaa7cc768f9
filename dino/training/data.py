# SPDX-License-Identifier: Apache-2.0
"""The images and the views that the flags of main_dino.py ask for."""

from dino.data.augmentations import DataAugmentationDINO
from dino.data.channels import RGB, count_channels, reader
from dino.data.datasets import Items, open_dataset
from dino.data.demo import DEMO, NUMBER_OF_IMAGES, demo_folder, write_demo_images
from dino.data.images import ImageFiles, list_training_images
from dino.data.labels import describe_set
from dino.distributed import get_world_size, rank_share
from dino.errors import UserError
from dino.training.own_views import own_augmentation
from dino.training.presets import DECIDED


def open_images(args, images=None):
    """(`images`, or those of --data_path as a sequence, --knn_data_path).

    The demo's are written first. A preset that decides flags finds out --in_chans.
    """
    if images is not None:
        return Items(images, OSError), args.knn_data_path
    if args.dataset:
        return open_dataset(args.dataset, args.data_path, args.download), args.knn_data_path
    if args.data_path != DEMO:
        paths = list_training_images(args.data_path)
        if args.preset in DECIDED and "in_chans" not in getattr(args, "given", ()):
            args.in_chans = count_channels(paths)
        return ImageFiles(paths, reader(args.in_chans)), args.knn_data_path
    if args.preset not in DECIDED:  # which fit the batch to the images
        check_batch(args, NUMBER_OF_IMAGES)
    folder = demo_folder(args.output_dir)
    write_demo_images(folder)
    return ImageFiles(list_training_images(folder / "images")), args.knn_data_path or folder


def describe_images(images, args):
    """A text that tells the images to train on from others: their number and, of files, names."""
    if not isinstance(images, ImageFiles):
        return f"{len(images)} images"
    folder = demo_folder(args.output_dir) if args.data_path == DEMO else args.data_path
    return describe_set(images.paths, folder)


def check_batch(args, count):
    """Raise UserError if a rank's share of `count` images is smaller than one batch."""
    global_batch = args.batch_size_per_gpu * get_world_size()
    if rank_share(count) < args.batch_size_per_gpu:
        raise UserError(
            f"--data_path {args.data_path}: {count} images are fewer than one batch of"
            f" {global_batch} (--batch_size_per_gpu {args.batch_size_per_gpu} on"
            f" {get_world_size()} processes). Lower the batch size."
        )


def build_augmentation(args):
    """The official views, of the sizes and strengths in the flags, or --augmentation's own."""
    if args.augmentation:
        return own_augmentation(args.augmentation)
    return DataAugmentationDINO(
        args.global_crops_scale,
        args.local_crops_scale,
        args.local_crops_number,
        args.global_crop_size,
        args.local_crop_size,
        mean=args.mean,
        std=args.std,
        shorter_side=args.shrink_images,
        solarize_p=args.solarize_p,
        min_pixels=args.min_crop_pixels,
        flip_p=args.flip_p,
        vflip_p=args.vflip_p,
        turn_p=args.turn_p,
        **colours(args),
        blur_radius=tuple(args.blur_radius),
    )


def colours(args):
    """Fields of a View about colours.

    Without red, green and blue there are no hues, and grey is the mean over the channels.
    """
    brightness, contrast, saturation, hue = args.jitter
    if args.in_chans != RGB:
        hue = 0.0
    if args.in_chans == 1:  # which is grey as it is
        return dict(jitter=(brightness, contrast, 0.0, 0.0), grayscale_p=0.0)
    return dict(jitter=(brightness, contrast, saturation, hue), grayscale_p=args.grayscale_p)
