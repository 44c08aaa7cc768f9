# SPDX-License-Identifier: Apache-2.0
"""A MultiCrop of one's own, checked before a run begins with it."""

import itertools
from numbers import Integral, Real

from dino.data.augmentations import MOST_HUE, MultiCrop, View
from dino.data.augmentations_on_device import on_workers
from dino.data.channels import RGB
from dino.data.images import UnreadableImage
from dino.data.items import image_of
from dino.errors import UserError
from dino.own_code import call_by_path
from dino.printable import brief


def own_augmentation(path):
    """What the function at `path`, MODULE:FUNCTION, returns, checked."""
    augmentation = call_by_path(path, "--augmentation")
    check_augmentation(augmentation, f"--augmentation {path}: what it returned")
    return augmentation


def check_augmentation(augmentation, source):
    """Raise UserError, which begins with `source`, unless it is a MultiCrop to train on."""
    if not isinstance(augmentation, MultiCrop):
        kind = type(augmentation).__name__
        raise UserError(f"{source} is a {kind}, not a dino.data.augmentations.MultiCrop.")
    check_views(augmentation.views, source)
    check_colors(augmentation.mean, augmentation.std, source)
    channels = len(augmentation.mean)
    if channels != RGB and any(view.jitter[3] for view in augmentation.views):
        raise UserError(
            f"{source}: mean is for {channels} channels, which have no hue. Give views with"
            " jitter=(b, c, s, 0)."
        )


def check_views(views, source):
    """These must be Views of valid fields, and the first two, the global ones, of one size."""
    if len(views) < 2 or not all(isinstance(view, View) for view in views):
        raise UserError(
            f"{source}: views are {brief(views)}. Give at least two Views, first the two global"
            " ones, which the teacher sees."
        )
    for number, view in enumerate(views):
        for name, (is_valid, meaning) in VALID.items():
            value = getattr(view, name)
            if not is_valid(value):
                raise UserError(f"{source}: views[{number}] has {name} {brief(value)}: {meaning}.")
    if views[0].size != views[1].size:
        raise UserError(
            f"{source}: the first two views have {views[0].size} and {views[1].size} pixels. They"
            " are the global ones, and need one size."
        )


def check_colors(mean, std, source):
    """Raise UserError unless every channel has a finite mean and a standard deviation above 0."""
    valid = all(within(value, -1e9, 1e9) for value in mean)
    valid &= all(within(value, 1e-9, 1e9) for value in std)
    if not valid or not 0 < len(mean) == len(std):
        raise UserError(
            f"{source}: mean is {brief(mean)} and std {brief(std)}. Give one number for each"
            " channel, std above 0."
        )


def check_returned(augmentation, images, source):
    """Raise UserError unless an image gives what `augmentation.views` and `mean` say.

    A __call__ of one's own may return anything. What it raises itself is not caught; an image that
    cannot be read, or that is not there, is left to the run, which knows what to do with it.
    """
    channels = len(augmentation.mean)
    if not len(images):
        return
    try:
        image = image_of(images[0], 0, channels)
    except UnreadableImage:
        return
    returned = on_workers(augmentation)(image, key=(0, 0, 0))
    views = returned if isinstance(returned, tuple | list) else [returned]
    found = [tuple(getattr(view, "shape", ())) or type(view).__name__ for view in views]
    wanted = [(channels, view.size, view.size) for view in augmentation.views]
    for number, (shape, right) in enumerate(itertools.zip_longest(found, wanted)):
        if shape != right:
            raise UserError(
                f"{source}: view {number} of an image is {shape}, and by its views and mean it must"
                f" be {right}. __call__ must return a tensor for each of the views, in their order."
            )


def within(value, lowest, highest):
    return isinstance(value, Real) and lowest <= value <= highest


def is_count(value, lowest):
    return isinstance(value, Integral) and within(value, lowest, 2**13)


def is_range(value, lowest, highest):
    """Whether these are two numbers, the smaller first."""
    numbers = isinstance(value, tuple | list) and len(value) == 2
    return numbers and within(value[0], lowest, highest) and within(value[1], value[0], highest)


def is_jitter(value):
    highest = (1, 1, 1, MOST_HUE)
    numbers = isinstance(value, tuple | list) and len(value) == len(highest)
    return numbers and all(map(within, value, (0,) * len(highest), highest))


def is_probability(value):
    return within(value, 0, 1)


PROBABILITY = (is_probability, "give a probability")
# Fields of a View: what they may be, as the flags, and what the error says of that.
VALID = {
    "size": (lambda value: is_count(value, 1), "give pixels, 1 to 8192"),
    "scale": (
        lambda value: is_range(value, 1e-9, 1),
        "give two shares of the image, above 0, the smaller first",
    ),
    "min_pixels": (lambda value: is_count(value, 0), "give pixels, 0 to 8192"),
    "jitter": (is_jitter, f"give four numbers of 0 to 1, the last, of the hue, to {MOST_HUE}"),
    "blur_radius": (
        lambda value: is_range(value, 0, 2**13),
        "give two radii in pixels, the smaller first",
    ),
    **{
        f"{name}_p": PROBABILITY
        for name in ("flip", "vflip", "turn", "jitter", "grayscale", "blur", "solarize")
    },
}
