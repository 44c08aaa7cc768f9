# SPDX-License-Identifier: Apache-2.0
"""Before a run: which settings fit a data set, its mean and deviation, a picture of the views."""

import torch

from dino.command_line import spaced
from dino.data.augmentations_on_device import on_workers
from dino.data.levels import white
from dino.data.survey import survey
from dino.training.auto import device_name, fit_data, fit_white
from dino.training.data import build_augmentation
from dino.training.flags import parse_args
from dino.training.plots import draw_augmentations, view_names
from dino.training.presets import AUTO
from dino.training.settings import Settings

MOST_FOR_STATS = 10_000  # images
VIEWED = 8  # images on the contact sheet


def print_settings_that_fit(images, in_chans, views_path=None):
    """Print what --preset auto takes before it knows a run's length; draw its views if asked."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = Settings(vars(parse_args(["--preset", AUTO])), given=())
    fit_white(settings, images)
    seen = survey(images, skip_bad=True, in_chans=in_chans)
    fit_data(settings, seen, device, processes=1)
    print(f"\nWhat fits, and --preset auto takes on this {device_name(device)}: {seen}")
    print(settings.table())
    if views_path:
        augmentation = build_augmentation(settings.namespace())
        several = range(0, len(images), -(-len(images) // VIEWED))
        views = [views_of(augmentation, images[number], number) for number in several]
        names = view_names(views[0])
        draw_augmentations(views_path, views, names, augmentation.mean, augmentation.std)
        print(f"\n{views_path}: the views of {len(views)} images")


def views_of(augmentation, image, number):
    """The views of an image, each (C, S, S), as a run would see it in its first epoch."""
    return on_workers(augmentation)(image, key=(0, 0, number))


def print_stats(images, in_chans):
    """Print mean and standard deviation of each channel as flags."""
    seen = survey(images, skip_bad=True, in_chans=in_chans, sample=MOST_FOR_STATS)
    so_read = f"--white {white():g} " if white() else ""
    colors = f"--mean {spaced(seen.mean)} --std {spaced(seen.std)}"
    print(f"\nOf {seen.sample} images: {so_read}{colors}")
