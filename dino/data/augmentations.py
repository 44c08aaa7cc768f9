# SPDX-License-Identifier: Apache-2.0
"""Views of an image: DINO's multi-crop augmentation (Sec. 3.2), the linear probe's, evaluation's.

Drawing is apart from applying. Everything random about an image is drawn at once, from its own
generator, into arrays with one row per view; what applies them draws nothing.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from dino.data.channels import RGB, size_of, to_levels_tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Ranges of what channels of 0 to 1 may be normalised by; a survey gives a constant one the lowest.
MEANS, STDS = (0.0, 1.0), (0.001, 1.0)

LOG_RATIO = np.log([3 / 4, 4 / 3])  # of a crop's width to its height
CROP_ATTEMPTS = 10
MOST_HUE = 0.5  # of a circle: half a turn to either side reaches every hue
NEUTRAL = np.array([1.0, 1.0, 1.0, 0.0])  # factors of jitter that change nothing


@dataclass(frozen=True)
class View:
    """One kind of crop and what it may undergo, in this order; the defaults are the official ones.

    Brightness, contrast and saturation are multiplied by U(1 - x, 1 + x), hue turns by U(-x, x) of
    a circle, x from `jitter`. Blur radii are the standard deviation of the Gaussian in pixels of
    the crop. Vertical flips, quarter turns and a smallest crop are ours, and off by default.
    """

    size: int  # side in pixels, after resizing
    scale: tuple[float, float]  # range of the crop's share of the image
    min_pixels: int = 0  # side in pixels of the image of the smallest square crop
    flip_p: float = 0.5
    vflip_p: float = 0.0
    turn_p: float = 0.0  # of a turn by one, two or three quarters
    jitter_p: float = 0.8
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    grayscale_p: float = 0.2
    blur_p: float = 0.0
    blur_radius: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0.0


def dino_views(
    global_crops_scale,
    local_crops_scale,
    local_crops_number,
    global_crop_size=224,
    local_crop_size=96,
    *,
    solarize_p=0.2,
    **fields,
):
    """The official Views: two global ones, unlike in blur and solarization, and the local ones.

    `fields` are further fields of every View, in place of their defaults.
    """
    global_crops_scale, local_crops_scale = tuple(global_crops_scale), tuple(local_crops_scale)
    return [
        View(global_crop_size, global_crops_scale, blur_p=1.0, **fields),
        View(global_crop_size, global_crops_scale, blur_p=0.1, solarize_p=solarize_p, **fields),
        *[View(local_crop_size, local_crops_scale, blur_p=0.5, **fields)] * local_crops_number,
    ]


# ---- drawing ----


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
    vflip: np.ndarray  # (V,) bool
    turns: np.ndarray  # (V,) int: quarter turns, counter-clockwise


# Uniform numbers that a view takes from the generator, in this order, whatever it does with them.
DRAWN = {
    "areas": CROP_ATTEMPTS,
    "ratios": CROP_ATTEMPTS,
    "position": 2,
    "jitter_order": 4,
    "jitter_factors": 4,
    "flip": 1,
    "jitter": 1,
    "grayscale": 1,
    "blur": 1,
    "blur_radius": 1,
    "solarize": 1,
}
# The same, drawn after all of the above, which stay what they were without them.
DRAWN_LATER = {"vflip": 1, "turn": 1, "turns": 1}


def draw_views(rng, views, width, height):
    """ViewParameters for an image of `width` x `height` pixels.

    Each view reads its own stretch of the generator's stream, so that what it draws depends neither
    on the other views nor on whether an operation took place.
    """
    drawn = uniform_columns(rng, DRAWN, len(views)) | uniform_columns(rng, DRAWN_LATER, len(views))

    def field(name):
        return np.array([getattr(view, name) for view in views])

    def happens(name):
        return drawn[name][:, 0] < field(f"{name}_p")

    smallest, largest = field("blur_radius").T
    # all of the image where it has fewer pixels than that
    least_share = np.minimum(1.0, field("min_pixels") ** 2 / (width * height))
    scale = np.maximum(field("scale"), least_share[:, None])
    return ViewParameters(
        boxes=draw_boxes(drawn["areas"], drawn["ratios"], drawn["position"], scale, width, height),
        flip=happens("flip"),
        jitter=happens("jitter"),
        jitter_order=drawn["jitter_order"].argsort(axis=1),
        jitter_factors=NEUTRAL + field("jitter") * (2 * drawn["jitter_factors"] - 1),
        grayscale=happens("grayscale"),
        blur_radius=np.where(
            happens("blur"), smallest + (largest - smallest) * drawn["blur_radius"][:, 0], 0.0
        ),
        solarize=happens("solarize"),
        vflip=happens("vflip"),
        turns=np.where(happens("turn"), 1 + (3 * drawn["turns"][:, 0]).astype(int), 0),
    )


def uniform_columns(rng, widths, views):
    """{name: (views, width) uniform numbers} of {name: width}."""
    ends = np.cumsum(list(widths.values()))
    columns = np.split(rng.random((views, ends[-1])), ends[:-1], axis=1)
    return dict(zip(widths, columns, strict=True))


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


# ---- applying ----

QUARTER_TURNS = (None, Image.ROTATE_90, Image.ROTATE_180, Image.ROTATE_270)
ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def shrink(image, shorter_side):
    """An image, PIL or (H, W, C), with at most so many pixels on its shorter side; 0: as it is."""
    if not 0 < shorter_side < min(size_of(image)):
        return image
    resize = transforms.Resize(shorter_side, InterpolationMode.BICUBIC)
    if isinstance(image, Image.Image):
        return resize(image)
    return resize(to_levels_tensor(image)).permute(1, 2, 0).numpy()


class MultiCrop:
    """A PIL image -> its views in order, normalised by `mean` and `std`, each (3, S, S).

    Images are shrunk to `shorter_side` first, see `shrink`. The first two views are the global
    ones, which the teacher sees. With a `key` (integers, such as seed, epoch and number of the
    image) the result is a function of image and key alone. Without, the key comes from torch's
    global generator.
    """

    shorter_side = 0  # for subclasses whose own __init__ does not set it

    def __init__(self, views, mean=IMAGENET_MEAN, std=IMAGENET_STD, shorter_side=0):
        self.views, self.mean, self.std = list(views), tuple(mean), tuple(std)
        self.shorter_side = shorter_side

    def __call__(self, image, key=None):
        image = shrink(image, self.shorter_side)
        parameters = self.draw(image, key)
        return [self.apply(image, number, parameters) for number in range(len(self.views))]

    def draw(self, image, key=None):
        """The ViewParameters of an image under a key."""
        if key is None:
            key = (torch.randint(2**62, ()).item(),)
        return draw_views(np.random.default_rng(key), self.views, *size_of(image))

    def apply(self, image, number, parameters):
        """View `number` of a PIL image, (3, S, S): the official operations in their order."""
        size = self.views[number].size
        view = F.resized_crop(
            image, *parameters.boxes[number].tolist(), [size, size], InterpolationMode.BICUBIC
        )
        if parameters.flip[number]:
            view = F.hflip(view)
        if parameters.vflip[number]:
            view = F.vflip(view)
        if parameters.turns[number]:
            view = view.transpose(QUARTER_TURNS[parameters.turns[number]])
        if parameters.jitter[number]:
            for operation in parameters.jitter_order[number]:
                factor = parameters.jitter_factors[number, operation]
                if factor != NEUTRAL[operation]:
                    view = ADJUST[operation](view, float(factor))
        if parameters.grayscale[number]:
            view = F.rgb_to_grayscale(view, num_output_channels=3)
        if parameters.blur_radius[number]:
            view = view.filter(ImageFilter.GaussianBlur(float(parameters.blur_radius[number])))
        if parameters.solarize[number]:
            view = ImageOps.solarize(view)
        return F.normalize(F.to_tensor(view), self.mean, self.std)


class DataAugmentationDINO(MultiCrop):
    """The official views; the arguments are those of `dino_views`, and MultiCrop's other ones."""

    def __init__(self, *args, mean=IMAGENET_MEAN, std=IMAGENET_STD, shorter_side=0, **kwargs):
        super().__init__(dino_views(*args, **kwargs), mean, std, shorter_side)


def box_and_flip(image, view, key, interpolation, shorter_side):
    """A box of an image, resized, flipped or not, by `key`; nothing else of `view` is applied.

    A PIL image, or of an array (H, W, C) a tensor (C, S, S); shrunk to `shorter_side` first.
    """
    image = shrink(image, shorter_side)
    if not isinstance(image, Image.Image):
        image = to_levels_tensor(image)
    height, width = F.get_dimensions(image)[1:]
    parameters = draw_views(np.random.default_rng(key), [view], width, height)
    box, size = parameters.boxes[0].tolist(), [view.size] * 2
    image = F.resized_crop(image, *box, size, interpolation)
    return F.hflip(image) if parameters.flip[0] else image


class LinearProbeAugmentation:
    """What the linear evaluation trains on: a box of a PIL image, flipped or not, as (3, S, S).

    The box has 8 to 100 % of the image and is resized bilinearly, as in the official code, where
    everything else is bicubic. A function of image and `key` alone, as DataAugmentationDINO's views
    are.
    """

    def __init__(self, image_size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD, shorter_side=0):
        self.view = View(image_size, (0.08, 1.0))
        self.mean, self.std, self.shorter_side = mean, std, shorter_side

    def __call__(self, image, key):
        bilinear = InterpolationMode.BILINEAR
        image = box_and_flip(image, self.view, key, bilinear, self.shorter_side)
        return normalised(image, self.mean, self.std)


def eval_transform(image_size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD, shorter_side=0):
    """Central crop of `image_size` pixels after resizing the short side to 256/224 of that.

    A PIL image or, where `mean` is not of 3 channels, an array (H, W, C) -> normalised (C, S, S).
    Both are shrunk to `shorter_side` before. Its `in_chans`: the channels that it takes.
    """
    first = functools.partial(shrink, shorter_side=shorter_side)
    resize = transforms.Resize(resized_side(image_size), InterpolationMode.BICUBIC)
    crop, normalize = transforms.CenterCrop(image_size), transforms.Normalize(mean, std)
    if len(mean) == RGB:
        steps = [first, resize, crop, transforms.ToTensor(), normalize]
    else:
        steps = [first, to_levels_tensor, resize, crop, to_shares, normalize]
    transform = transforms.Compose(steps)
    transform.in_chans = len(mean)
    return transform


def transform_of(augmentation):
    """The eval_transform of a MultiCrop's settings, at the size of its global crops."""
    return eval_transform(
        augmentation.views[0].size, augmentation.mean, augmentation.std, augmentation.shorter_side
    )


def resized_side(image_size):
    """The short side, in pixels, from which `eval_transform` crops its centre."""
    return round(image_size * 256 / 224)


def normalised(image, mean, std):
    """A PIL image, or levels of other channels than RGB, uint8 (C, H, W), as float32 (C, H, W)."""
    shares = to_shares(image) if isinstance(image, torch.Tensor) else F.to_tensor(image)
    return F.normalize(shares, mean, std)


def to_shares(levels):
    """uint8 of 0 to 255 as float32 of 0 to 1."""
    return levels.float() / 255
