# SPDX-License-Identifier: Apache-2.0
"""What a linear head sees, how it is trained and judged, against the definitions written out."""

import math

import numpy as np
import pytest
import torch
from conftest import photograph
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from dino.backbones import build_backbone
from dino.data.augmentations import LinearProbeAugmentation, draw_views
from dino.data.image_loader import EpochSampler
from dino.data.images import ImageFiles, list_labelled_images, read_image
from dino.data.loaders import training_loader
from dino.evaluation.features import FrozenFeatures
from dino.evaluation.linear import evaluate_heads, step_of_heads
from dino.evaluation.linear_run import build_heads
from eval_linear import LinearClassifier

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return build_backbone("vit_nano", 8, img_size=32)[0].eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def tokens_after_each_block(vit, images):
    """What the blocks give out, taken from them by hooks, after the final norm: (B, N, D) each."""
    outputs = []
    hooks = [
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        for block in vit.blocks
    ]
    with torch.no_grad():
        vit(images)
        tokens = [vit.norm(output) for output in outputs]
    for hook in hooks:
        hook.remove()
    return tokens


@pytest.mark.parametrize("n", [1, 4, 6])
def test_features_are_the_class_tokens_of_the_last_blocks_from_early_to_late(vit, images, n):
    features = FrozenFeatures(vit, 96, CPU, n_last_blocks=n)
    expected = [tokens[:, 0] for tokens in tokens_after_each_block(vit, images)[-n:]]
    found = features(images)
    assert features.dim == found.shape[1] == 96 * n
    for i, class_token in enumerate(expected):
        torch.testing.assert_close(found[:, 96 * i : 96 * (i + 1)], class_token)


def test_the_mean_patch_token_is_interleaved_as_the_released_heads_expect(vit, images):
    features = FrozenFeatures(vit, 96, CPU, n_last_blocks=1, avgpool_patchtokens=True)
    found = features(images)
    assert features.dim == found.shape[1] == 192
    last = tokens_after_each_block(vit, images)[-1]
    for b in range(2):
        for i in range(96):
            assert found[b, 2 * i].item() == pytest.approx(last[b, 0, i].item(), abs=1e-5)
            mean = sum(last[b, 1 + patch, i].item() for patch in range(16)) / 16
            assert found[b, 2 * i + 1].item() == pytest.approx(mean, abs=1e-5)


def test_of_other_networks_the_output_is_taken(images):
    backbone, width = build_backbone("resnet18")
    features = FrozenFeatures(backbone.eval(), width, CPU, n_last_blocks=4)
    assert features.dim == 512
    torch.testing.assert_close(features(images), backbone(images).detach())


def test_half_precision_is_of_the_backbone_only(vit, images):
    exact = FrozenFeatures(vit, 96, CPU, n_last_blocks=1)(images)
    rounded = FrozenFeatures(vit, 96, CPU, n_last_blocks=1, amp_dtype=torch.bfloat16)(images)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.1  # bfloat16 has three digits; values are up to 3


def test_classifier_starts_with_small_normal_weights_and_takes_any_shape():
    torch.manual_seed(0)
    head = LinearClassifier(6 * 50)
    assert (head.num_labels, head.linear.weight.shape) == (1000, (1000, 300))
    # 300,000 draws: their standard deviation is known to 0.13 %
    assert head.linear.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert head.linear.weight.abs().max() > 0.04
    assert not head.linear.bias.any()
    x = torch.randn(2, 6, 50)
    expected = x.reshape(2, 300) @ head.linear.weight.T
    torch.testing.assert_close(head(x), expected)


def test_steps_and_schedule_equal_the_formulas_written_out():
    """SGD with momentum 0.9 on softmax - onehot, its rate lr (1 + cos(pi e / E)) / 2 in epoch e."""
    torch.manual_seed(0)
    state = build_heads(5, 3, [0.4, 2.0], 4, CPU)
    lrs, momentum = np.array([0.4, 2.0]), 0.9
    start = state.heads[0].linear.weight.detach().double().numpy()
    weights, biases = [start.copy(), start.copy()], [np.zeros(3), np.zeros(3)]
    velocities = [[0.0, 0.0], [0.0, 0.0]]
    rng = np.random.default_rng(0)
    for epoch in range(4):
        factor = (1 + math.cos(math.pi * epoch / 4)) / 2
        assert state.scheduler.get_last_lr() == pytest.approx(lrs * factor)
        for _ in range(2):
            x, labels = rng.standard_normal((6, 5)), rng.integers(0, 3, 6)
            found = step_of_heads(
                state.heads,
                state.optimizer,
                torch.tensor(x, dtype=torch.float32),
                torch.tensor(labels),
            )
            for i, lr in enumerate(lrs * factor):
                exponentials = np.exp(x @ weights[i].T + biases[i])
                probs = exponentials / exponentials.sum(axis=1, keepdims=True)
                loss = -np.log(probs[np.arange(6), labels]).mean()
                assert found[i].item() == pytest.approx(loss, rel=1e-4)
                error = (probs - np.eye(3)[labels]) / 6
                gradients = [error.T @ x, error.sum(axis=0)]
                velocities[i] = [
                    momentum * velocity + gradient
                    for velocity, gradient in zip(velocities[i], gradients, strict=True)
                ]
                weights[i] -= lr * velocities[i][0]
                biases[i] -= lr * velocities[i][1]
        state.scheduler.step()
    assert state.scheduler.get_last_lr() == pytest.approx([0, 0])
    for head, weight, bias in zip(state.heads, weights, biases, strict=True):
        np.testing.assert_allclose(head.linear.weight.detach(), weight, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(head.linear.bias.detach(), bias, rtol=1e-4, atol=1e-5)


class Identity:
    """Features of images that are features already."""

    device = CPU

    def __call__(self, images):
        return images


@pytest.mark.parametrize("classes", [4, 7])
def test_accuracies_and_loss_are_means_over_images_and_top_5_needs_five_classes(classes):
    torch.manual_seed(0)
    heads = [LinearClassifier(8, classes) for _ in range(2)]
    x, labels = torch.randn(11, 8), torch.arange(11) % classes
    batches = list(zip(x.split(4), labels.split(4), strict=True))  # of 4, 4 and 3
    for head, found in zip(heads, evaluate_heads(Identity(), heads, batches, 11), strict=True):
        logits = head(x).detach().double().numpy()
        ranks = [sorted(-row).index(-row[label]) for row, label in zip(logits, labels, strict=True)]
        logs = [
            math.log(np.exp(row).sum()) - row[label]
            for row, label in zip(logits, labels, strict=True)
        ]
        expected = {
            "loss": np.mean(logs),
            "acc1": 100 * np.mean([rank < 1 for rank in ranks]),
            "acc5": 100 * np.mean([rank < 5 for rank in ranks]),
        }
        if classes < 5:
            del expected["acc5"]
        assert found == pytest.approx(expected)


def test_augmentation_crops_bilinearly_8_to_100_percent_and_flips_half():
    image, augmentation = photograph(), LinearProbeAugmentation(32, (0.5,) * 3, (0.2,) * 3)
    areas, flips = [], 0
    for seed in range(400):
        drawn = draw_views(np.random.default_rng((seed,)), [augmentation.view], *image.size)
        top, left, height, width = drawn.boxes[0].tolist()
        areas.append(height * width / (image.width * image.height))
        flips += bool(drawn.flip[0])
        if seed < 20:
            box = (left, top, left + width, top + height)
            view = F.resize(image.crop(box), [32, 32], InterpolationMode.BILINEAR)
            pixels = np.asarray(view)[:, ::-1] if drawn.flip[0] else np.asarray(view)
            expected = torch.tensor((pixels / 255 - 0.5) / 0.2).float().permute(2, 0, 1)
            torch.testing.assert_close(augmentation(image, (seed,)), expected)
    assert 160 < flips < 240  # 200 expected, with a standard deviation of 10
    torch.manual_seed(0)
    theirs = [
        math.prod(RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))[2:])
        for _ in range(400)
    ]
    area = np.mean(theirs) / (image.width * image.height)
    assert np.mean(areas) == pytest.approx(area, abs=0.06)  # each mean is known to 0.013
    assert min(areas) >= 0.075


def labelled_batches(folder, workers, epoch):
    paths, labels, _ = list_labelled_images(folder, "train")
    loader = training_loader(
        *(ImageFiles(paths), LinearProbeAugmentation(16)),
        **dict(batch_size=5, num_workers=workers, seed=3, pin_memory=False, labels=labels),
    )
    loader.sampler.set_epoch(epoch)
    return [torch.cat(parts) for parts in zip(*loader, strict=True)]


def test_every_labelled_image_comes_once_an_epoch_whatever_the_workers(class_folders):
    views, labels = labelled_batches(class_folders, 0, epoch=4)
    assert len(views) == 24, "the last batch, of 4, is not dropped"
    paths, own_labels, _ = list_labelled_images(class_folders, "train")
    augmentation = LinearProbeAugmentation(16)
    order = EpochSampler(paths, 1, 0, seed=3)
    order.set_epoch(4)
    for view, label, (_, index) in zip(views, labels, order, strict=True):
        assert label == own_labels[index]
        assert torch.equal(view, augmentation(read_image(paths[index]), (3, 4, index)))
    assert torch.equal(views, labelled_batches(class_folders, 2, epoch=4)[0])
    assert not torch.equal(views, labelled_batches(class_folders, 0, epoch=5)[0])
