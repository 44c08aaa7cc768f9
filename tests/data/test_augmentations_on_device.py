# SPDX-License-Identifier: Apache-2.0
"""The augmentation in two stages against Pillow's, given the same draws."""

import numpy as np
import pytest
import torch
from conftest import PHOTOGRAPHS, photograph
from helpers import Waits, no_waits_for_the_gpu
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as F

from dino.data import augmentations_on_device as stages
from dino.data.augmentations import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataAugmentationDINO,
    MultiCrop,
    View,
)
from dino.data.augmentations_on_device import (
    CropStage,
    DeviceStage,
    on_workers,
    resize_as_pillow,
)
from dino.data.images import ImageFiles
from dino.data.items import TrainingImages, collate_readable

NAMES = ("astronaut.png", "coffee.png", "chelsea.png")
AUGMENTATION = DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 3, 64, 32)


def levels(image):
    """PIL image -> (1, 3, H, W) of 0 to 255."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()


def differences(ours, image):
    return (ours - levels(image)).abs()


OPERATIONS = {
    # name: ours, Pillow's, amounts, most levels apart, most levels apart on average
    "brightness": (stages.adjust_brightness, F.adjust_brightness, (0.6, 0.93, 1.2, 1.4), 1, 0.02),
    # where the exact product is a whole number, such as 1.2 * 5, rounding decides which level it is
    "contrast": (stages.adjust_contrast, F.adjust_contrast, (0.6, 0.93, 1.2, 1.4), 1, 0.06),
    "saturation": (stages.adjust_saturation, F.adjust_saturation, (0.8, 0.93, 1.2), 1, 0.06),
    # one step of its 255 is up to 255 * 6 / 255 levels; few pixels are at the edge of a step
    "hue": (stages.adjust_hue, F.adjust_hue, (-0.1, -0.03, 0, 0.05, 0.1), 6, 0.01),
    # Pillow rounds after each of its six passes, the product of matrices only at its end
    "blur": (
        stages.gaussian_blur,
        lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius)),
        (0.1, 0.3, 0.7, 1.3, 2.0),
        3,
        0.7,
    ),
    "greyscale": (stages.to_greyscale, lambda image, _: F.rgb_to_grayscale(image, 3), (1,), 0, 0),
    "solarisation": (stages.solarize, lambda image, _: ImageOps.solarize(image), (1,), 0, 0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_agrees_with_pillow_to_a_few_levels(name):
    ours, pillow, amounts, most, most_on_average = OPERATIONS[name]
    for image in (photograph(photo).crop((40, 30, 264, 254)) for photo in NAMES):
        for amount in amounts:
            found = ours(levels(image), torch.tensor(float(amount)).view(1, 1, 1, 1))
            apart = differences(found, pillow(image, amount))
            assert apart.max() <= most
            assert apart.mean() <= most_on_average


def test_crops_and_flips_agree_with_pillow_to_one_level():
    crops, reference = CropStage(AUGMENTATION), AUGMENTATION
    for number, image in enumerate(map(photograph, NAMES)):
        cropped = crops(image, key=number)
        drawn = reference.draw(image, key=number)
        for found, expected in zip(cropped.parameters, drawn, strict=True):
            np.testing.assert_array_equal(found, expected)
        for view, found in enumerate([crop for group in cropped.crops for crop in group]):
            top, left, height, width = drawn.boxes[view].tolist()
            box = image.crop((left, top, left + width, top + height))
            expected = box.resize(found.shape[-2:], Image.BICUBIC)
            expected = ImageOps.mirror(expected) if drawn.flip[view] else expected
            assert differences(found.float(), expected).max() <= 1


def test_tall_crops_of_every_photograph_agree_with_pillow_to_two_levels():
    """Of 300 x 400 pixels, where Pillow takes the columns first: up to 12 levels if we did not.

    Two levels in fewer than one of a million values.
    """
    apart = []
    for path in sorted(PHOTOGRAPHS.glob("*.[pj][np]g")):
        with Image.open(path) as image:
            if image.width < 300 or image.height < 400:
                continue
            box = image.convert("RGB").crop((0, 0, 300, 400))
        found = resize_as_pillow(levels(box).byte(), 224)
        apart.append(differences(found.float(), box.resize((224, 224), Image.BICUBIC)))
    apart = torch.stack(apart)
    assert len(apart) > 10
    assert apart.max() <= 2
    assert (apart > 1).double().mean() < 1e-6


def test_both_stages_together_agree_with_the_reference():
    """A level of 255 here can be a step of hue there: 1 level on average, 99 % within 8."""
    device = torch.device("cpu")
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    apart = []
    for key in range(8):
        images = [photograph(name) for name in NAMES]
        batch = collate_readable([CropStage(AUGMENTATION)(image, key) for image in images])
        found = DeviceStage(AUGMENTATION, device)(batch)
        expected = [AUGMENTATION(image, key) for image in images]
        for view in range(5):
            reference = torch.stack([views[view] for views in expected])
            assert found[view].shape == reference.shape
            apart.append(((found[view] - reference) * std * 255).abs().flatten())
    apart = torch.cat(apart)
    assert apart.mean() < 1
    assert apart.quantile(0.99) < 8


def test_an_image_does_not_depend_on_the_others_of_its_batch():
    stage = DeviceStage(AUGMENTATION, torch.device("cpu"))
    items = [CropStage(AUGMENTATION)(photograph(name), key=7) for name in NAMES]
    together = stage(collate_readable(items))
    for row, item in enumerate(items):
        for view, alone in zip(together, stage(collate_readable([item])), strict=True):
            torch.testing.assert_close(view[row], alone[0], atol=1e-6, rtol=0)  # sums in any order


def test_no_local_crops_are_no_views():
    augmentation = DataAugmentationDINO((0.14, 1.0), (0.05, 0.4), 0, 32, 16)
    item = CropStage(augmentation)(photograph(), key=0)
    views = DeviceStage(augmentation, torch.device("cpu"))(collate_readable([item]))
    assert [tuple(view.shape) for view in views] == [(1, 3, 32, 32)] * 2


OWN_VIEWS = [
    View(64, (0.5, 1.0), flip_p=0.0, jitter_p=1.0, jitter=(0.4, 0.0, 0.0, 0.0)),
    View(32, (0.3, 1.0), jitter_p=0.0, grayscale_p=1.0),
    View(48, (0.2, 0.6), vflip_p=0.5, turn_p=0.75, blur_p=1.0, blur_radius=(3.0, 5.0)),
    View(64, (0.1, 0.2), vflip_p=1.0, turn_p=1.0, solarize_p=1.0),
    View(32, (0.001, 0.01), min_pixels=50),
]


def test_views_of_any_number_size_and_strength_are_the_same_on_workers_and_device():
    mean, std = (0.2, 0.5, 0.7), (0.3, 0.2, 0.1)
    augmentation = MultiCrop(OWN_VIEWS, mean, std)
    stage = DeviceStage(augmentation, torch.device("cpu"))
    for key, name in enumerate(NAMES):
        image = photograph(name)
        found = stage(collate_readable([CropStage(augmentation)(image, key)]))
        expected = augmentation(image, key)
        assert [view.shape[-1] for view in found] == [view.size for view in OWN_VIEWS]
        for number, view in enumerate(expected):
            levels = (found[number][0] - view) * torch.tensor(std)[:, None, None] * 255
            assert levels.abs().mean() < 1
    grey = found[1][0] * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    torch.testing.assert_close(grey[0], grey[2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("bands", [3, 5])
def test_images_are_shrunk_before_they_are_cropped_on_workers_and_device(bands):
    views = [View(24, (0.3, 1.0), jitter_p=0.0, grayscale_p=0.0)] * 2
    colors = dict(mean=(0.5,) * bands, std=(0.25,) * bands)
    large = photograph().resize((90, 120))
    small = large.resize((30, 40), Image.BICUBIC)
    if bands != 3:
        large, small = (np.asarray(image)[..., [0, 1, 2, 0, 1]] for image in (large, small))
    plain, shrinking = MultiCrop(views, **colors), MultiCrop(views, **colors, shorter_side=30)
    expected = on_workers(plain)(small, key=1)
    device = DeviceStage(shrinking, torch.device("cpu"))
    crops = collate_readable([CropStage(shrinking)(large, key=1)])
    for found in (on_workers(shrinking)(large, key=1), [view[0] for view in device(crops)]):
        for ours, theirs in zip(found, expected, strict=True):
            # in levels: both resizes round, and torch's not where Pillow's does
            assert (ours - theirs).abs().max() * 0.25 * 255 < 5.5
    untouched = on_workers(MultiCrop(views, **colors, shorter_side=300))(large, key=1)
    assert torch.equal(torch.stack(untouched), torch.stack(on_workers(plain)(large, key=1)))


def test_jitter_of_strength_0_leaves_an_image_as_it_is():
    """Not through hue, saturation and value and back, which moves levels."""
    still = View(64, (1.0, 1.0), flip_p=0.0, jitter_p=1.0, jitter=(0.0,) * 4, grayscale_p=0.0)
    image = photograph().resize((64, 64))
    augmentation = MultiCrop([still], mean=(0.0,) * 3, std=(1.0,) * 3)
    staged = CropStage(augmentation)(image, key=1)
    on_device = DeviceStage(augmentation, torch.device("cpu"))(collate_readable([staged]))
    drawn = augmentation.draw(image, key=1)
    box = levels(
        F.resized_crop(image, *drawn.boxes[0].tolist(), [64, 64], F.InterpolationMode.BICUBIC)
    )
    assert torch.equal(augmentation(image, key=1)[0] * 255, box[0])
    torch.testing.assert_close(on_device[0] * 255, box, atol=1, rtol=0)


def test_finished_views_pass_the_device_stage_unchanged(class_folders):
    paths = [str(path) for path in sorted((class_folders / "train").rglob("*.png"))[:2]]
    dataset = TrainingImages(ImageFiles(paths), AUGMENTATION)
    batch = collate_readable([dataset[0, 0], dataset[0, 1]])
    for found, expected in zip(
        DeviceStage(AUGMENTATION, torch.device("cpu"))(batch), batch, strict=True
    ):
        assert torch.equal(found, expected)


def test_a_black_and_a_white_image_stay_finite():
    for level in (0, 255):
        image = Image.new("RGB", (40, 40), (level,) * 3)
        for key in range(5):
            views = DeviceStage(AUGMENTATION, torch.device("cpu"))(
                collate_readable([CropStage(AUGMENTATION)(image, key)])
            )
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
            for view in views:
                values = view * std + mean
                assert values.min() > -1e-5
                assert values.max() < 1 + 1e-5


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_asks_the_device_nothing(name):
    ours, _, amounts, *_ = OPERATIONS[name]
    pixels = levels(photograph("coffee.png").resize((32, 32))).repeat(len(amounts), 1, 1, 1)
    amounts = torch.tensor(amounts, dtype=torch.float32)[:, None, None, None]
    with Waits() as waits:
        ours(pixels, amounts)
    assert waits.found == []


@pytest.mark.cuda
def test_the_device_stage_on_cuda_agrees_with_the_cpu_and_never_waits():
    """One level: multiply and add are one rounding on CUDA."""
    batch = collate_readable([CropStage(AUGMENTATION)(photograph(name), key=3) for name in NAMES])
    expected = DeviceStage(AUGMENTATION, torch.device("cpu"))(batch)
    stage = DeviceStage(AUGMENTATION, torch.device("cuda", 0))
    stage(batch)  # makes what is made once
    with no_waits_for_the_gpu():
        found = stage(batch)
    for ours, reference in zip(found, expected, strict=True):
        apart = (ours.cpu() - reference).abs() * 255 * min(IMAGENET_STD)
        assert apart.mean() < 0.05
        assert apart.quantile(0.99) <= 1
