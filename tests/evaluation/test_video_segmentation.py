# SPDX-License-Identifier: Apache-2.0
"""Label propagation beside its definition, and what becomes of masks on the way."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dino.backbones import build_backbone
from dino.evaluation.video_segmentation import (
    frame_size,
    load_frame,
    load_mask,
    lost_objects,
    neighborhood_mask,
    one_hot_patches,
    propagate_labels,
    segment_video,
    to_label_map,
)


def propagate_by_definition(target, sources, labels, radius, topk):
    """All pairs at once: a = exp(cos / 0.1), 0 outside of the square, the topk largest kept."""
    count, classes, height, width = labels.shape
    cosines = F.normalize(sources, dim=-1).flatten(0, 1) @ F.normalize(target, dim=-1).T
    weights = (cosines / 0.1).exp()  # (n hw, hw)
    for t in range(height * width):
        for s in range(count * height * width):
            (i, j), (p, q) = divmod(t, width), divmod(s % (height * width), width)
            if radius and (abs(p - i) > radius or abs(q - j) > radius):
                weights[s, t] = 0
    smallest = weights.topk(min(topk, len(weights)), dim=0).values[-1]
    weights[weights < smallest] = 0
    weights /= weights.sum(dim=0)
    flat = labels.permute(1, 0, 2, 3).reshape(classes, -1)
    return (flat @ weights).view(classes, height, width)


@pytest.mark.parametrize(
    ("size", "radius", "topk"),
    [((5, 7), 2, 5), ((5, 7), 0, 3), ((14, 13), 1, 40), ((3, 26), 12, 5), ((2, 2), 5, 1000)],
)
def test_blocks_of_targets_give_what_the_definition_gives(size, radius, topk):
    """Also where a neighbourhood, or the whole context, has fewer than `topk` sources."""
    torch.manual_seed(0)
    height, width = size
    target, sources = torch.randn(height * width, 6), torch.randn(2, height * width, 6)
    labels = torch.rand(2, 3, height, width)
    found = propagate_labels(target, sources, labels, radius, topk)
    expected = propagate_by_definition(target, sources, labels, radius, topk)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_sources_that_tie_with_the_last_one_kept_are_kept():
    labels = torch.rand(1, 2, 4, 5)
    found = propagate_labels(torch.ones(20, 3), torch.ones(1, 20, 3), labels, radius=0, topk=2)
    mean = labels.mean(dim=(0, 2, 3))
    torch.testing.assert_close(found, mean[:, None, None].expand(2, 4, 5))


def test_the_neighbourhood_is_a_square_cut_at_the_border():
    near = neighborhood_mask(4, 5, 1).view(4, 5, 4, 5)
    assert near[0, 0].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert near[2, 2].sum() == 9
    assert neighborhood_mask(3, 3, 0).all()


def test_sources_are_the_first_frame_and_the_last_ones_with_their_soft_labels():
    """Each frame of segment_video is that of a loop that keeps everything."""
    torch.manual_seed(0)
    model = build_backbone("vit_nano", 8, img_size=32)[0].eval()
    frames = torch.randn(6, 3, 32, 40)
    first_mask = np.zeros((50, 61), np.uint8)
    first_mask[10:40, 20:50], first_mask[:10] = 2, 1
    with torch.no_grad():
        features = [model.get_intermediate_layers(frame[None])[0][0, 1:] for frame in frames]
    labels = [one_hot_patches(first_mask, 4, 5)[0]]
    for t in range(1, 6):
        context = [0, *range(max(1, t - 2), t)]
        sources = torch.stack([features[i] for i in context])
        soft = torch.stack([labels[i] for i in context])
        labels.append(propagate_by_definition(features[t], sources, soft, radius=1, topk=3))
    expected = [first_mask, *(to_label_map(soft, 8, 50, 61) for soft in labels[1:])]
    found = segment_video(model, frames, first_mask, n_last_frames=2, radius=1, topk=3)
    np.testing.assert_array_equal(found, np.stack(expected))
    alone = segment_video(model, frames, first_mask, n_last_frames=0, radius=1, topk=3)
    soft = propagate_by_definition(features[5], features[0][None], labels[0][None], 1, 3)
    np.testing.assert_array_equal(alone[5], to_label_map(soft, 8, 50, 61))


def test_a_video_has_the_size_that_it_has_in_the_official_code():
    sizes = {
        (480, 854): (480, 832),
        (480, 910): (480, 896),
        (480, 1152): (480, 1152),
        (1080, 1920): (480, 832),
        (480, 500): (480, 448),
        (60, 60): (480, 448),
        (854, 480): (832, 480),
    }
    assert {size: frame_size(*size) for size in sizes} == sizes


@pytest.mark.parametrize("size", [(64, 64), (50, 90), (90, 50)])
def test_the_mask_follows_the_frame_in_videos_of_every_shape(size, tmp_path):
    """In the official code that of a square video is transposed."""
    picture = np.zeros((*size, 3), np.uint8)
    picture[: size[0] // 3, : size[1] // 2] = 255  # top left, and not symmetric
    Image.fromarray(picture).save(tmp_path / "frame.png")
    Image.fromarray(picture[..., 0] // 255).save(tmp_path / "mask.png")
    frame, *original = load_frame(tmp_path / "frame.png")
    one_hot, labels = load_mask(tmp_path / "mask.png", 16)
    assert tuple(original) == labels.shape == size
    assert one_hot.shape[-2:] == (frame.shape[-2] // 16, frame.shape[-1] // 16)
    bright = F.avg_pool2d(frame[:1], 16)[0] > 0
    assert (bright == (one_hot[0, 1] > 0)).float().mean() > 0.98


def test_frames_are_resized_without_antialiasing_and_normalised_with_the_official_values(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (960, 1920, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "frame.png")
    frame, height, width = load_frame(tmp_path / "frame.png")
    assert (height, width, *frame.shape) == (960, 1920, 3, 480, 960)
    # at half the size, a pixel is the mean of 2 x 2 with bilinear weights, whatever is around
    mean = pixels.reshape(480, 2, 960, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1) / 255
    expected = (mean - np.c_[0.485, 0.456, 0.406].reshape(3, 1, 1)) / np.c_[
        0.228, 0.224, 0.225
    ].reshape(3, 1, 1)
    np.testing.assert_allclose(frame, expected, atol=0.6 / 255 / 0.224)


def test_each_class_is_scaled_to_its_own_range_before_the_largest_wins():
    scores = torch.tensor([[[0.9, 0.8, 0.7]], [[0.1, 0.2, 0.3]]])
    assert to_label_map(scores, 1, 1, 3).tolist() == [[0, 0, 1]]  # a tie goes to the first
    background = torch.stack([torch.ones(2, 2), torch.zeros(2, 2)])
    assert not to_label_map(background, 4, 8, 8).any()


def test_an_object_that_no_patch_gets_is_lost_as_in_the_official_code():
    labels = np.zeros((64, 64), np.uint8)
    labels[1, 1], labels[20:40, 20:40], labels[62, 3] = 1, 2, 3
    assert lost_objects(labels, 16, short_side=64) == [1, 3]
    one_hot = one_hot_patches(labels, 4, 4)
    assert one_hot.shape == (1, 3, 4, 4)  # 3 is gone, 1 is empty
    assert one_hot.sum(dim=(0, 2, 3)).tolist() == [15, 0, 1]
