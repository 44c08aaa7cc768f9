# SPDX-License-Identifier: Apache-2.0
"""The multi-crop augmentation in two stages: crops on the loader's workers, colours on the device.

The same draws as MultiCrop's give the same views, to a few of 255 levels; the tests say how many
for each operation. Decoding, cropping and flipping leave uint8 tensors; what costs the workers most
(jitter, most of all the hue, and blur) is done for whole batches, each image by its own parameters.
Values are whole levels, 0 to 255, after each operation, as in Pillow.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import default_collate

from dino.data.augmentations import NEUTRAL, MultiCrop, ViewParameters, shrink
from dino.data.channels import RGB, to_levels_tensor
from dino.errors import UserError

LUMA = (19595, 38470, 7471)  # ITU-R 601-2 in units of 1/65536, as in Pillow
BLUR_PASSES = 3  # of a box, which Pillow takes for a Gaussian


class CroppedViews(NamedTuple):
    """The views of an image, or with a dimension of B before the others of a batch."""

    crops: list[torch.Tensor]  # (v, C, S, S) uint8, flipped and turned, by size: views_by_size
    parameters: ViewParameters


def views_by_size(views):
    """{size: numbers of the views of that size}, in the order in which sizes first occur."""
    numbers = {}
    for number, view in enumerate(views):
        numbers.setdefault(view.size, []).append(number)
    return numbers


def fits_stages(augmentation):
    """Whether the two stages do all that a MultiCrop does: a subclass may have operations of its
    own, which they do not know.
    """
    kind = type(augmentation)
    return kind.__call__ is MultiCrop.__call__ and kind.apply is MultiCrop.apply


def colours_on_device(choice, augmentation, device):
    """Whether --augment `choice` leaves the colours of this MultiCrop to the device; UserError if
    it should, and has operations of its own.
    """
    fits = fits_stages(augmentation)
    if choice == "device" and not fits:
        raise UserError(
            f"--augment device: {type(augmentation).__name__} has operations of its own, which the"
            " device would leave out. Give --augment cpu."
        )
    return choice == "device" or (choice == "auto" and device.type == "cuda" and fits)


class CropStage:
    """First stage of a MultiCrop: a PIL image -> CroppedViews, by the same draws."""

    def __init__(self, augmentation):
        self.augmentation = augmentation

    def __call__(self, image, key=None):
        image = shrink(image, self.augmentation.shorter_side)
        parameters = self.augmentation.draw(image, key)
        # channels last in memory, for which torch resizes 8-bit images fastest
        pixels = to_levels_tensor(image)
        groups = views_by_size(self.augmentation.views)
        return CroppedViews(
            [self.crop(pixels, parameters, size, numbers) for size, numbers in groups.items()],
            parameters,
        )

    def crop(self, pixels, parameters, size, numbers):
        """The views with these `numbers`, all of one size, of an image (C, H, W)."""
        crops = torch.empty(len(numbers), len(pixels), size, size, dtype=torch.uint8)
        for crop, number in zip(crops, numbers, strict=True):
            top, left, height, width = parameters.boxes[number].tolist()
            box = pixels[None, :, top : top + height, left : left + width]
            resized = resize_as_pillow(box, size)[0]
            sides = [-1] * bool(parameters.flip[number]) + [-2] * bool(parameters.vflip[number])
            resized = resized.flip(sides) if sides else resized
            crop.copy_(resized.rot90(int(parameters.turns[number]), (-2, -1)))
        return crops


def resize_as_pillow(pixels, size):
    """(1, C, H, W) uint8 -> (1, C, size, size), bicubic, to one level of Pillow's.

    To two in 53 of 136 million values: 2,600 official crops of 26 photographs to 224 and 96 pixels.
    Both round to whole levels between the pass along the rows and the one along the columns, so
    that the order of the passes moves some pixels by up to 12 levels. torch takes the rows first.
    """
    height, width = pixels.shape[-2:]
    if takes_columns_first() and height > size and 2 * width < height + size:
        pixels = F.interpolate(pixels, size=(size, width), mode="bicubic", antialias=True)
    return F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)


@functools.cache
def takes_columns_first():
    """Whether this Pillow takes the columns first where an image is shrunk along them much more.

    Pillow 13 does, found by trying: for a square result where 2 W < H + size, in 3,000 of 3,000
    sizes.
    """
    noise = np.random.default_rng(0).integers(0, 256, (64, 8), dtype=np.uint8)
    image = Image.fromarray(noise)
    in_two = image.resize((8, 16), Image.BICUBIC).resize((16, 16), Image.BICUBIC)
    return np.array_equal(np.asarray(image.resize((16, 16), Image.BICUBIC)), np.asarray(in_two))


def on_workers(augmentation):
    """All of `augmentation`, for loader processes: any number of channels, and no device."""
    whole = len(augmentation.mean) == RGB or not fits_stages(augmentation)
    return augmentation if whole else BothStages(augmentation)


class BothStages:
    """Both stages on the loader's workers, for images of other channels, which Pillow cannot do."""

    def __init__(self, augmentation):
        self.crop_stage = CropStage(augmentation)
        self.device_stage = DeviceStage(augmentation, torch.device("cpu"))

    def __call__(self, image, key=None):
        crops = default_collate([self.crop_stage(image, key)])
        return [view[0] for view in self.device_stage(crops)]


class DeviceStage:
    """Second stage: a batch of CroppedViews -> its V views (B, C, S, S), normalised, on `device`.

    A batch of finished views is only copied there. On CUDA this runs on a stream of its own, beside
    the step on the batch before, and of high priority: its many small kernels would else queue
    behind the step's large ones, and the next step waits for the last of them.
    """

    def __init__(self, augmentation, device):
        self.augmentation, self.device = augmentation, device
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def __call__(self, batch):
        if self.stream is None:
            return self.finish(batch)
        with torch.cuda.stream(self.stream):
            views = self.finish(batch)
        step = torch.cuda.current_stream(self.device)
        step.wait_stream(self.stream)
        for view in views:
            view.record_stream(step)  # or its memory would serve the next batch too early
        return views

    def finish(self, batch):
        """The views of a batch from the loader, in their order."""
        if not isinstance(batch, CroppedViews):
            return [view.to(self.device, non_blocking=True) for view in batch]
        views = {}
        groups = views_by_size(self.augmentation.views)
        for crops, numbers in zip(batch.crops, groups.values(), strict=True):
            parameters = rows_of(batch.parameters, numbers)
            views |= zip(numbers, self.coloured(crops, parameters), strict=True)
        return [views[number] for number in sorted(views)]

    @torch.no_grad()
    def coloured(self, crops, parameters):
        """(B, v, C, S, S) uint8 -> v views (B, C, S, S), with colours changed and normalised."""
        batch, views = crops.shape[:2]
        pixels = crops.to(self.device, non_blocking=True).transpose(0, 1).flatten(0, 1).float()
        operations, rows, amounts = zip(*colour_plan(parameters), strict=True)
        counts = [len(numbers) for numbers in rows]
        rows = self.send(torch.cat(rows)).split(counts)  # sent together, in one copy
        amounts = self.send(torch.cat(amounts).float()).split(counts)
        for operation, numbers, amount in zip(operations, rows, amounts, strict=True):
            if len(numbers):
                pixels[numbers] = operation(pixels[numbers], amount[:, None, None, None])
        mean, std = (
            self.send(torch.tensor(value)[:, None, None])
            for value in (self.augmentation.mean, self.augmentation.std)
        )
        return pixels.div_(255).sub_(mean).div_(std).unflatten(0, (views, batch)).unbind()

    def send(self, tensor):
        """A small tensor to the device without waiting for it."""
        if self.stream is not None:
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


def rows_of(parameters, numbers):
    """Of a batch's parameters (B, V, ...), those of some views, view by view: (v B, ...)."""
    return ViewParameters(
        *[value[:, numbers].transpose(0, 1).flatten(0, 1) for value in parameters]
    )


def colour_plan(parameters):
    """Yield (operation, numbers of the images that undergo it, an amount for each), in order.

    Jitter's four operations come in the order drawn for each image: at each of four places, each of
    them takes the images for which it is due.
    """
    for due in parameters.jitter_order.unbind(dim=1):
        for number, operation in enumerate(JITTER):
            factors = parameters.jitter_factors[:, number]
            chosen = parameters.jitter & (due == number) & (factors != NEUTRAL[number])
            rows = chosen.nonzero()[:, 0]
            yield operation, rows, factors[rows]
    radius = parameters.blur_radius
    for operation, amounts in (
        (to_greyscale, parameters.grayscale),
        (gaussian_blur, radius),
        (solarize, parameters.solarize),
    ):
        rows = amounts.nonzero()[:, 0]
        yield operation, rows, amounts[rows]


# ---- operations: pixels (n, C, S, S) and amounts (n, 1, 1, 1) -> pixels ----


def luma(pixels):
    """Grey levels (n, 1, S, S); in float32 these sums are exact, as all of them are below 2^24.

    The mean where the channels are not red, green and blue.
    """
    if pixels.shape[1] != RGB:
        return pixels.mean(dim=1, keepdim=True).add_(0.5).floor_()
    red, green, blue = pixels.split(1, dim=1)
    return (
        (LUMA[0] * red).add_(LUMA[1] * green).add_(LUMA[2] * blue).add_(32768).div_(65536).floor_()
    )


def blend(degenerate, pixels, factor):
    """Away from `degenerate` by `factor`; Pillow cuts fractions off."""
    return torch.addcmul(degenerate, pixels - degenerate, factor).clamp_(0, 255).floor_()


def adjust_brightness(pixels, factor):
    return (pixels * factor).clamp_(max=255).floor_()


def adjust_contrast(pixels, factor):
    # double: the sum over a crop of more than 256 pixels a side may pass 2^24
    mean = luma(pixels).mean(dim=(-2, -1), keepdim=True, dtype=torch.float64)
    return blend(mean.add_(0.5).floor_().float(), pixels, factor)


def adjust_saturation(pixels, factor):
    return blend(luma(pixels), pixels, factor)


def adjust_hue(pixels, turn):
    """Through hue, saturation and value in 255 steps each, as Pillow has them."""
    value, smallest = pixels.amax(dim=1, keepdim=True), pixels.amin(dim=1, keepdim=True)
    chroma = value - smallest
    red, green, blue = ((value - pixels) / chroma.clamp(min=1)).split(1, dim=1)
    at_red, at_green, _ = (pixels == value).split(1, dim=1)
    sixths = torch.where(
        at_red, blue - green, torch.where(at_green, 2 + red - blue, 4 + green - red)
    )
    hue = (sixths / 6 + 1).remainder_(1).mul_(255).floor_()
    hue = (hue + (turn * 255).trunc()).remainder_(256)
    saturation = (255 * chroma / value.clamp(min=1)).floor_().div_(255)
    # red, green and blue fall off from the value at their own distances on the circle of six
    # 5, 3, 1: made on the device, where a tensor of Python numbers would be a copy to wait for
    offsets = torch.arange(5.0, 0.0, -2.0, device=pixels.device)[:, None, None]
    distance = (hue * (6 / 255) + offsets).remainder_(6)
    fall = torch.minimum(distance, 4 - distance).clamp_(0, 1)
    return (value - value * saturation * fall).round_()


def to_greyscale(pixels, _):
    return luma(pixels).expand_as(pixels)


def solarize(pixels, _):
    return torch.where(pixels < 128, pixels, 255 - pixels)


def gaussian_blur(pixels, radius):
    """Pillow's blur as a product with a matrix along each axis, edges included.

    A product of (n, S, S) matrices costs less than a convolution with a kernel for each image.
    """
    matrix = blur_matrix(radius.flatten(), pixels.shape[-1])
    for _ in range(2):  # along the rows, then, transposed, along the columns
        rows = pixels.flatten(1, 2) @ matrix.mT
        pixels = rows.view_as(pixels).mT.contiguous()
    return pixels.round_().clamp_(0, 255)


def blur_matrix(radius, size):
    """(n,) standard deviations in pixels -> (n, size, size): what blurs a row of pixels.

    Three passes of a box with fractional ends, whose variance is that of the Gaussian; a pixel
    beyond the edge counts as the one at the edge. (Gwosdek et al. 2011, as in Pillow.)
    """
    radius = radius[:, None, None]
    variance = radius**2 / BLUR_PASSES
    whole = ((12 * variance + 1) ** 0.5 - 1) / 2 // 1  # pixels to each side wholly in the box
    end = (
        (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    )  # share of the next one

    def share(distance):
        return (distance <= whole) + end * (distance == whole + 1)

    def share_from(distance):
        """Of all pixels at this distance or further, on one side."""
        return (whole + 1 - distance).clamp(min=0) + end * (distance <= whole + 1)

    position = torch.arange(size, device=radius.device)
    box = share((position[:, None] - position).abs())
    box[:, :, 0] = share_from(position[:, None])[..., 0]
    box[:, :, -1] = share_from(size - 1 - position[:, None])[..., 0]
    box = box / box.sum(dim=-1, keepdim=True)
    return box @ box @ box


JITTER = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)  # as in ViewParameters
