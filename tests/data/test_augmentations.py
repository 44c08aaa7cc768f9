# SPDX-License-Identifier: Apache-2.0
"""The augmentation draws what torchvision's transforms draw, and applies what they apply."""

import numpy as np
import pytest
import torch
from conftest import photograph
from PIL import Image, ImageFilter, ImageOps
from scipy.stats import ks_2samp, kstest
from torchvision import transforms
from torchvision.transforms import functional as F

from dino.data.augmentations import (
    DataAugmentationDINO,
    MultiCrop,
    View,
    draw_views,
    eval_transform,
)
from dino.official_helpers import GaussianBlur, Solarization


def many_parameters(augmentation, width, height, images=400):
    return [
        draw_views(np.random.default_rng((0, 0, i)), augmentation.views, width, height)
        for i in range(images)
    ]


@pytest.mark.parametrize(("width", "height"), [(500, 375), (100, 900), (40, 40)])
def test_boxes_are_distributed_as_those_of_random_resized_crop(width, height):
    augmentation = DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 4)
    drawn = many_parameters(augmentation, width, height)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    for view, scale in [(0, (0.4, 1.0)), (4, (0.05, 0.4))]:
        ours = np.array([parameters.boxes[view] for parameters in drawn])
        theirs = np.array(
            [
                transforms.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3))
                for _ in range(2000)
            ]
        )
        assert (ours[:, :2] >= 0).all()
        assert (ours[:, 0] + ours[:, 2] <= height).all()
        assert (ours[:, 1] + ours[:, 3] <= width).all()
        for column in range(4):
            assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3, (view, column)


@pytest.mark.parametrize(("width", "height"), [(5000, 1), (1, 5000), (900, 100), (1, 1)])
def test_an_image_of_an_extreme_shape_falls_back_to_the_box_of_torchvision(width, height):
    augmentation = DataAugmentationDINO((0.9, 1.0), (0.9, 1.0), 0)
    box = many_parameters(augmentation, width, height, images=1)[0].boxes[0]
    ratio = (3 / 4, 4 / 3)
    image = torch.empty(3, height, width)
    expected = transforms.RandomResizedCrop.get_params(image, (0.9, 1.0), ratio)
    assert box.tolist() == list(expected)


def test_probabilities_and_ranges_are_the_official_ones():
    augmentation = DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 8)
    drawn = many_parameters(augmentation, 100, 100, images=3000)

    def column(name):
        return np.array([getattr(parameters, name) for parameters in drawn])

    def rate(name):
        return (column(name) != 0).mean(axis=0)

    # three standard deviations of a share of 3,000 are 2.7 points
    np.testing.assert_allclose(rate("flip"), 0.5, atol=0.03)
    np.testing.assert_allclose(rate("jitter"), 0.8, atol=0.03)
    np.testing.assert_allclose(rate("grayscale"), 0.2, atol=0.03)
    np.testing.assert_allclose(rate("blur_radius"), [1, 0.1] + [0.5] * 8, atol=0.03)
    np.testing.assert_allclose(rate("solarize"), [0, 0.2] + [0] * 8, atol=0.03)
    radii = column("blur_radius")[:, 0]
    assert kstest(radii, "uniform", (0.1, 1.9)).pvalue > 1e-3
    factors = column("jitter_factors")[:, 3]
    for i, (low, width) in enumerate([(0.6, 0.8), (0.6, 0.8), (0.8, 0.4), (-0.1, 0.2)]):
        assert kstest(factors[:, i], "uniform", (low, width)).pvalue > 1e-3
    orders, counts = np.unique(column("jitter_order")[:, 5], axis=0, return_counts=True)
    assert len(orders) == 24
    assert counts.min() > 80  # 125 expected


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_view_equals_the_official_operations_on_pillow_images(number):
    """The drawn parameters, handed to torchvision and Pillow one by one in the official order."""
    image = photograph()
    augmentation = DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 1, 64, 32)
    for seed in range(12):
        drawn = draw_views(np.random.default_rng(seed), augmentation.views, *image.size)
        top, left, height, width = drawn.boxes[number]
        size = 32 if number == 2 else 64
        view = image.crop((left, top, left + width, top + height))
        view = view.resize((size, size), Image.Resampling.BICUBIC)
        if drawn.flip[number]:
            view = ImageOps.mirror(view)
        if drawn.jitter[number]:
            for i in drawn.jitter_order[number]:
                name = ("brightness", "contrast", "saturation", "hue")[i]
                view = getattr(F, f"adjust_{name}")(view, drawn.jitter_factors[number][i])
        if drawn.grayscale[number]:
            view = view.convert("L").convert("RGB")
        if drawn.blur_radius[number] > 0:
            view = view.filter(ImageFilter.GaussianBlur(float(drawn.blur_radius[number])))
        if drawn.solarize[number]:
            view = view.point(lambda value: value if value < 128 else 255 - value)
        pixels = torch.from_numpy(np.array(view)).permute(2, 0, 1) / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        expected = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        found = augmentation(image, key=seed)[number]
        torch.testing.assert_close(found, expected)


def test_views_come_in_official_order_and_sizes():
    crops = DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 8)(photograph())
    assert [tuple(crop.shape) for crop in crops] == [(3, 224, 224)] * 2 + [(3, 96, 96)] * 8


def test_a_view_depends_on_its_key_and_number_alone():
    image = photograph()
    few = DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 1, 32, 16)
    many = DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 6, 32, 16)
    first, again, more = few(image, (1, 2, 3)), few(image, (1, 2, 3)), many(image, (1, 2, 3))
    for a, b, c in zip(first, again, more, strict=False):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    for other in [(0, 2, 3), (1, 0, 3), (1, 2, 0)]:
        assert not torch.equal(first[0], few(image, other)[0])


def test_what_is_drawn_by_default_is_what_it_was_before_flips_and_turns_were_added():
    views = DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 2).views
    before = np.random.default_rng(5).random((4, 36))  # the 36 numbers of each view, in order
    drawn = draw_views(np.random.default_rng(5), views, 300, 200)
    np.testing.assert_array_equal(drawn.flip, before[:, 30] < 0.5)
    np.testing.assert_array_equal(drawn.solarize, before[:, 35] < [0, 0.2, 0, 0])
    np.testing.assert_array_equal(drawn.jitter_order, before[:, 22:26].argsort(axis=1))
    assert not drawn.vflip.any()
    assert not drawn.turns.any()


def test_no_crop_is_smaller_than_so_many_pixels_of_the_image():
    view = View(16, (0.05, 0.4), min_pixels=12)
    for width, height in [(16, 16), (40, 30), (400, 300), (8, 9)]:
        boxes = np.array(
            [
                draw_views(np.random.default_rng(i), [view], width, height).boxes[0]
                for i in range(300)
            ]
        )
        areas = boxes[:, 2] * boxes[:, 3]
        least = min(144, width * height, 0.74 * min(width, height) ** 2)
        assert areas.min() > 0.9 * least  # sides are whole pixels
        assert areas.max() <= max(0.4 * width * height, 144) * 1.1
    assert areas.max() == 72  # all of an image of 8 x 9


def test_vertical_flips_and_quarter_turns_are_those_of_numpy():
    image = photograph().crop((0, 0, 64, 64))
    turned = View(64, (1, 1), flip_p=0, vflip_p=0.5, turn_p=0.75, jitter_p=0, grayscale_p=0)
    augmentation = MultiCrop([turned], (0.0,) * 3, (1.0,) * 3)
    seen = set()
    for key in range(40):
        drawn = augmentation.draw(image, key)
        top, left, height, width = drawn.boxes[0]
        view = image.crop((left, top, left + width, top + height))
        pixels = np.array(view.resize((64, 64), Image.Resampling.BICUBIC))
        pixels = pixels[::-1] if drawn.vflip[0] else pixels
        pixels = np.rot90(pixels, drawn.turns[0])
        expected = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
        torch.testing.assert_close(augmentation(image, key)[0], expected)
        seen.add((bool(drawn.vflip[0]), int(drawn.turns[0])))
    assert len(seen) == 8


def test_without_a_key_torchs_seed_decides():
    augmentation, image = DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 0, 32), photograph()
    torch.manual_seed(0)
    first, second = augmentation(image)[0], augmentation(image)[0]
    torch.manual_seed(0)
    assert torch.equal(augmentation(image)[0], first)
    assert not torch.equal(first, second)


def test_blur_and_solarisation_by_their_official_names():
    image = photograph()
    blurred = np.array(GaussianBlur(1.0, 1.5, 1.5)(image))
    np.testing.assert_array_equal(blurred, np.array(image.filter(ImageFilter.GaussianBlur(1.5))))
    assert GaussianBlur(0.0)(image) is image
    solarized = np.array(Solarization(1.0)(image))
    original = np.array(image)
    np.testing.assert_array_equal(solarized, np.where(original < 128, original, 255 - original))
    assert Solarization(0.0)(image) is image


def test_evaluation_sees_the_official_central_crop():
    image = photograph("coffee.png")  # 600 x 400
    expected = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )(image)
    assert torch.equal(eval_transform()(image), expected)
    assert eval_transform(96)(image).shape == (3, 96, 96)
