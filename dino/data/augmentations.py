# SPDX-License-Identifier: Apache-2.0
"""What happens to an image: DINO's multi-crop augmentation (Sec. 3.2), and evaluation.

Drawing is apart from applying. Everything random about an image is drawn at once, from its own
generator, into arrays with one row per view; what applies them draws nothing.
"""

import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import ImageFilter, ImageOps
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

FLIP_P = 0.5
JITTER_P = 0.8
# Brightness, contrast and saturation are multiplied by U(1 - x, 1 + x); hue turns by U(-x, x) of a
# circle.
JITTER_STRENGTH = np.array([0.4, 0.4, 0.2, 0.1])
GRAYSCALE_P = 0.2
BLUR_RADIUS = (0.1, 2.0)  # pixels of the crop: the standard deviation of the Gaussian
LOG_RATIO = np.log([3 / 4, 4 / 3])  # of a crop's width to its height
CROP_ATTEMPTS = 10


@dataclass(frozen=True)
class View:
    """One kind of crop: pixels, range of its share of the image, and what it alone may undergo."""

    size: int
    scale: tuple[float, float]
    blur_p: float
    solarize_p: float = 0.0


class ViewParameters(NamedTuple):
    """All that is random about the V views of one image; each array has V rows.

    Of a batch, the arrays are tensors and have a dimension of B before that.
    """

    boxes: np.ndarray  # (V, 4) int: top, left, height, width, in pixels of the image
    flip: np.ndarray  # (V,) bool
    jitter: np.ndarray  # (V,) bool
    jitter_order: np.ndarray  # (V, 4) int: a permutation of brightness, contrast, saturation, hue
    jitter_factors: np.ndarray  # (V, 4) float, in the order above; three factors and a turn
    grayscale: np.ndarray  # (V,) bool
    blur_radius: np.ndarray  # (V,) float, 0 where the view is not blurred
    solarize: np.ndarray  # (V,) bool


def draw_views(rng, views, width, height):
    """ViewParameters for an image of `width` x `height` pixels.

    Each view reads its own stretch of the generator's stream, so that what it draws does not
    depend on the other views, nor on whether an operation took place.
    """
    uniform = rng.random((len(views), 2 * CROP_ATTEMPTS + 2 + 4 + 10))
    areas, ratios, position, order, factors, rest = np.split(
        uniform, np.cumsum([CROP_ATTEMPTS, CROP_ATTEMPTS, 2, 4, 4]), axis=1
    )
    flip, jitter, grayscale, blur, radius, solarize = rest.T
    smallest, largest = BLUR_RADIUS
    return ViewParameters(
        boxes=draw_boxes(
            areas, ratios, position, np.array([view.scale for view in views]), width, height
        ),
        flip=flip < FLIP_P,
        jitter=jitter < JITTER_P,
        jitter_order=order.argsort(axis=1),
        jitter_factors=np.array([1, 1, 1, 0]) + JITTER_STRENGTH * (2 * factors - 1),
        grayscale=grayscale < GRAYSCALE_P,
        blur_radius=np.where(
            blur < np.array([view.blur_p for view in views]),
            smallest + (largest - smallest) * radius,
            0.0,
        ),
        solarize=solarize < np.array([view.solarize_p for view in views]),
    )


def draw_boxes(areas, ratios, position, scale, width, height):
    """Boxes (V, 4) as torchvision's RandomResizedCrop draws them, from uniform numbers in [0, 1).

    `areas` and `ratios` (V, attempts): the first attempt that fits in the image counts; where none
    does, the largest central box of an allowed ratio. `position` (V, 2), `scale` (V, 2).
    """
    areas = width * height * (scale[:, :1] + (scale[:, 1:] - scale[:, :1]) * areas)
    ratios = np.exp(LOG_RATIO[0] + (LOG_RATIO[1] - LOG_RATIO[0]) * ratios)
    widths = np.rint(np.sqrt(areas * ratios)).astype(int)
    heights = np.rint(np.sqrt(areas / ratios)).astype(int)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = (np.arange(len(areas)), fits.argmax(axis=1))
    widths, heights = widths[first], heights[first]
    tops = (position[:, 0] * (height - heights + 1)).astype(int)
    lefts = (position[:, 1] * (width - widths + 1)).astype(int)
    boxes = np.stack([tops, lefts, heights, widths], axis=1)
    boxes[~fits.any(axis=1)] = central_box(width, height)
    return boxes


def central_box(width, height):
    """(top, left, height, width) of the largest central box whose ratio is allowed."""
    lowest, highest = np.exp(LOG_RATIO)
    box_width = min(width, round(height * highest))
    box_height = min(height, round(width / lowest))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


class DataAugmentationDINO:
    """Multi-crop: a PIL image -> [global 1, global 2, local 1, ...], normalised, each (3, S, S).

    With a `key` (integers, such as seed, epoch and number of the image) the result is a function
    of image and key alone. Without, the key comes from torch's global generator.
    """

    def __init__(
        self,
        global_crops_scale,
        local_crops_scale,
        local_crops_number,
        global_crop_size=224,
        local_crop_size=96,
    ):
        global_crops_scale, local_crops_scale = tuple(global_crops_scale), tuple(local_crops_scale)
        self.views = [
            View(global_crop_size, global_crops_scale, blur_p=1.0),
            View(global_crop_size, global_crops_scale, blur_p=0.1, solarize_p=0.2),
            *[View(local_crop_size, local_crops_scale, blur_p=0.5)] * local_crops_number,
        ]

    def __call__(self, image, key=None):
        parameters = self.draw(image, key)
        return [self.apply(image, number, parameters) for number in range(len(self.views))]

    def draw(self, image, key=None):
        """The ViewParameters of an image under a key."""
        if key is None:
            key = (torch.randint(2**62, ()).item(),)
        return draw_views(np.random.default_rng(key), self.views, *image.size)

    def apply(self, image, number, parameters):
        """View `number` of a PIL image, (3, S, S): the official operations in their order."""
        size = self.views[number].size
        view = F.resized_crop(
            image, *parameters.boxes[number].tolist(), [size, size], InterpolationMode.BICUBIC
        )
        if parameters.flip[number]:
            view = F.hflip(view)
        if parameters.jitter[number]:
            for operation in parameters.jitter_order[number]:
                view = ADJUST[operation](view, float(parameters.jitter_factors[number, operation]))
        if parameters.grayscale[number]:
            view = F.rgb_to_grayscale(view, num_output_channels=3)
        if parameters.blur_radius[number]:
            view = view.filter(ImageFilter.GaussianBlur(float(parameters.blur_radius[number])))
        if parameters.solarize[number]:
            view = ImageOps.solarize(view)
        return F.normalize(F.to_tensor(view), IMAGENET_MEAN, IMAGENET_STD)


class LinearProbeAugmentation:
    """What the linear evaluation trains on: a box of a PIL image, flipped or not, as (3, S, S).

    The box has 8 to 100 % of the image and is resized bilinearly, officially, where everything else
    is bicubic. A function of image and `key` alone, as DataAugmentationDINO's views are.
    """

    def __init__(self, image_size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        self.view = View(image_size, (0.08, 1.0), blur_p=0.0)
        self.mean, self.std = mean, std

    def __call__(self, image, key):
        parameters = draw_views(np.random.default_rng(key), [self.view], *image.size)
        size = [self.view.size] * 2
        box = parameters.boxes[0].tolist()
        image = F.resized_crop(image, *box, size, InterpolationMode.BILINEAR)
        if parameters.flip[0]:
            image = F.hflip(image)
        return F.normalize(F.to_tensor(image), self.mean, self.std)


class GaussianBlur:
    """Blurs a PIL image with probability `p` by a radius from U(radius_min, radius_max) pixels.

    For code that composes its own transforms with the official name; draws from Python's `random`.
    """

    def __init__(self, p=0.5, radius_min=BLUR_RADIUS[0], radius_max=BLUR_RADIUS[1]):
        self.p, self.radius_min, self.radius_max = p, radius_min, radius_max

    def __call__(self, image):
        if random.random() > self.p:
            return image
        return image.filter(
            ImageFilter.GaussianBlur(random.uniform(self.radius_min, self.radius_max))
        )


class Solarization:
    """Inverts the values of a PIL image from 128 up, with probability `p`. See GaussianBlur."""

    def __init__(self, p):
        self.p = p

    def __call__(self, image):
        return ImageOps.solarize(image) if random.random() < self.p else image


def eval_transform(image_size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Central crop of `image_size` pixels after resizing the short side to 256/224 of that."""
    return transforms.Compose(
        [
            transforms.Resize(round(image_size * 256 / 224), InterpolationMode.BICUBIC),
            transforms.CenterCrop(image_size),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
