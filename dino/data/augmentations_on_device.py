# SPDX-License-Identifier: Apache-2.0
"""The multi-crop augmentation in two stages: crops on the loader's workers, colours on the device.

The same draws as DataAugmentationDINO's give the same views, to a few of 255 levels; the tests say
how many for each operation. Decoding, cropping and flipping leave uint8 tensors; what costs the
workers most (jitter, of it the hue, and blur) is done for whole batches, each image by its own
parameters. Values are whole levels, 0 to 255, after each operation, as in Pillow.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from augmentations import (
    BLUR_RADIUS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataAugmentationDINO,
    ViewParameters,
)

LUMA = (19595, 38470, 7471)  # ITU-R 601-2 in units of 1/65536, as in Pillow
BLUR_PASSES = 3  # of a box, which Pillow takes for a Gaussian


def whole_reach(variance):
    """Pixels wholly inside a box to each side of its centre, if its passes have this variance."""
    return ((12 * variance / BLUR_PASSES + 1) ** 0.5 - 1) / 2 // 1


# Pixels to each side that a pass can take from, the last one in part.
FURTHEST = int(whole_reach(BLUR_RADIUS[1] ** 2)) + 1


class CroppedViews(NamedTuple):
    """The views of an image, or with a dimension of B before the others of a batch."""

    global_crops: torch.Tensor  # (2, 3, S, S) uint8, flipped where that was drawn
    local_crops: torch.Tensor  # (V - 2, 3, s, s) uint8
    parameters: ViewParameters


class CropsDINO(DataAugmentationDINO):
    """First stage: a PIL image -> CroppedViews, by the draws of DataAugmentationDINO."""

    def __call__(self, image, key=None):
        parameters = self.draw(image, key)
        # channels last in memory, for which torch resizes 8-bit images fastest
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return CroppedViews(
            self.crop(pixels, parameters, slice(2)),
            self.crop(pixels, parameters, slice(2, None)),
            parameters,
        )

    def crop(self, pixels, parameters, numbers):
        """The views with these `numbers`, all of one size, of an image (3, H, W)."""
        views = self.views[numbers]
        size = views[0].size if views else 1
        crops = torch.empty(len(views), 3, size, size, dtype=torch.uint8)
        boxes, flips = parameters.boxes[numbers].tolist(), parameters.flip[numbers].tolist()
        for crop, (top, left, height, width), flip in zip(crops, boxes, flips, strict=True):
            box = pixels[None, :, top : top + height, left : left + width]
            resized = F.interpolate(box, size=(size, size), mode="bicubic", antialias=True)[0]
            crop.copy_(resized.flip(-1) if flip else resized)
        return crops


class DeviceStage:
    """Second stage: a batch of CroppedViews -> its V views (B, 3, S, S), normalised, on `device`.

    A batch of finished views is only copied there. On CUDA this runs on a stream of its own, beside
    the step on the batch before.
    """

    def __init__(self, device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch):
        if self.stream is None:
            return self.views(batch)
        with torch.cuda.stream(self.stream):
            views = self.views(batch)
        step = torch.cuda.current_stream(self.device)
        step.wait_stream(self.stream)
        for view in views:
            view.record_stream(step)  # or its memory would serve the next batch too early
        return views

    def views(self, batch):
        if not isinstance(batch, CroppedViews):
            return [view.to(self.device, non_blocking=True) for view in batch]
        return [
            *self.coloured(batch.global_crops, rows_of(batch.parameters, slice(2))),
            *self.coloured(batch.local_crops, rows_of(batch.parameters, slice(2, None))),
        ]

    @torch.no_grad()
    def coloured(self, crops, parameters):
        """(B, v, 3, S, S) uint8 -> v views (B, 3, S, S), with colours changed and normalised."""
        batch, views = crops.shape[:2]
        if not views:
            return []
        pixels = crops.to(self.device, non_blocking=True).transpose(0, 1).flatten(0, 1).float()
        plan = list(colour_plan(parameters))
        counts = [len(rows) for _, rows, _ in plan]
        rows, amounts = zip(*[(rows, amounts) for _, rows, amounts in plan], strict=True)
        rows, amounts = self.send(torch.cat(rows)), self.send(torch.cat(amounts).float())
        for (operation, _, _), rows_here, amounts_here in zip(
            plan, rows.split(counts), amounts.split(counts), strict=True
        ):
            if len(rows_here):
                pixels[rows_here] = operation(pixels[rows_here], amounts_here[:, None, None, None])
        mean, std = (
            self.send(torch.tensor(value)[:, None, None]) for value in (IMAGENET_MEAN, IMAGENET_STD)
        )
        return pixels.div_(255).sub_(mean).div_(std).unflatten(0, (views, batch)).unbind()

    def send(self, tensor):
        """A small tensor to the device without waiting for it."""
        if self.stream is not None:
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


def rows_of(parameters, views):
    """Of a batch's parameters (B, V, ...), those of `views`, view by view: (v B, ...)."""
    return ViewParameters(*[value[:, views].transpose(0, 1).flatten(0, 1) for value in parameters])


def colour_plan(parameters):
    """Yield (operation, numbers of the images that undergo it, an amount for each), in order.

    Jitter's four operations come in the order drawn for each image: at each of four places, each of
    them takes the images for which it is due.
    """
    for due in parameters.jitter_order.unbind(dim=1):
        for number, operation in enumerate(JITTER):
            rows = (parameters.jitter & (due == number)).nonzero()[:, 0]
            yield operation, rows, parameters.jitter_factors[rows, number]
    radius = parameters.blur_radius
    for operation, amounts in (
        (to_greyscale, parameters.grayscale),
        (gaussian_blur, radius),
        (solarize, parameters.solarize),
    ):
        rows = amounts.nonzero()[:, 0]
        yield operation, rows, amounts[rows]


# ---- operations: pixels (n, 3, S, S) and amounts (n, 1, 1, 1) -> pixels ----


def luma(pixels):
    """Grey levels (n, 1, S, S); in float32 these sums are exact, as all of them are below 2^24."""
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
    offsets = torch.tensor([5.0, 3.0, 1.0], device=pixels.device)[:, None, None]
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
    whole = whole_reach(radius**2)
    inner, variance = 2 * whole + 1, radius**2 / BLUR_PASSES
    end = inner * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    weight = 1 / (inner + 2 * end)  # of each pixel that is wholly in the box
    position = torch.arange(size, device=radius.device)
    box = torch.zeros(len(radius), size, size, device=radius.device)
    for offset in range(-FURTHEST, FURTHEST + 1):
        share = (whole + 1 - abs(offset)).clamp(0, 1)  # 1 inside, 0 outside
        share = torch.where(whole + 1 == abs(offset), end, share)
        column = (position + offset).clamp(0, size - 1)
        box[:, position, column] += (weight * share)[:, None]
    return box @ box @ box


JITTER = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)  # as in ViewParameters
