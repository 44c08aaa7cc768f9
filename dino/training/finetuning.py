# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning of a backbone as DeiT does it: its recipes, network, images and steps.

B images of a batch, C classes, D width of the backbone's features. Nothing random is left over
from one step to the next: each seeds the generators anew, so that a run can resume at any step.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup, auto_augment
from timm.data.random_erasing import RandomErasing
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import nn
from torchvision.transforms import InterpolationMode

from dino.backbones import build_backbone, first_of, has_batchnorms
from dino.data.augmentations import View, box_and_flip, normalised
from dino.distributed import get_rank, get_world_size
from dino.errors import UserError
from dino.evaluation.linear_files import LinearClassifier
from dino.networks import data_parallel, unwrap
from dino.precision import autocast
from dino.randomness import fix_random_seeds
from dino.sync_batchnorm import sync_batchnorms
from dino.weights.starting import load_resized

DEIT = dict(
    epochs=300,
    lr=2.5e-4,
    min_lr=1e-5,
    warmup_epochs=5,
    weight_decay=0.05,
    layer_decay=1.0,
    drop_path_rate=0.1,
    rand_augment="rand-m9-mstd0.5-inc1",
    mixup=0.8,
    cutmix=1.0,
    smoothing=0.1,
    erasing=0.25,
    ema_decay=0.99996,
    crop_scale=(0.08, 1.0),
)
RECIPES = {
    # DeiT's defaults, which the authors fine-tune with on ImageNet at 5e-4 for 512 images a step
    # (issue 31 of the official repository), but for repeated augmentation.
    "imagenet": DEIT,
    # The same with what a few thousand images and a few hundred steps need: a higher rate, lower
    # layers that move less, and hardly any regularisation. With mixup, cutmix, erasing, crops from
    # 0.35 and a third of the rate the demo's backbone ended below the linear probe: 60 and 71 % on
    # tiles; so it has 76.
    "small": DEIT
    | dict(
        epochs=50,
        lr=3e-3,
        layer_decay=0.75,
        rand_augment="",
        mixup=0.0,
        cutmix=0.0,
        erasing=0.0,
        ema_decay=0.999,
        crop_scale=(0.7, 1.0),
    ),
}
HEAD_SCALE = 0.1  # the authors start the head, which alone is random, from smaller weights (31)


class FineTuned(nn.Module):
    """A backbone and a linear head on its features: (B, in_chans, H, W) -> (B, C)."""

    def __init__(self, backbone, embed_dim, num_labels):
        super().__init__()
        self.backbone, self.head = backbone, LinearClassifier(embed_dim, num_labels)
        with torch.no_grad():
            self.head.linear.weight.mul_(HEAD_SCALE)

    def forward(self, images):
        return self.head(first_of(self.backbone(images)))

    def group_matcher(self, coarse=False):
        """For timm: which parameters of a ViT are of which layer; the norm and the head, of none
        of these, are the last one together.
        """
        stem = r"^backbone\.(?:cls_token|pos_embed|patch_embed)"
        return dict(stem=stem, blocks=r"^backbone\.blocks\.(\d+)")


@dataclass
class FineTuningState:
    """What is stepped together, and so saved together. The names are entries of the checkpoint."""

    model: nn.Module
    ema: nn.Module  # the moving average of `model`
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


def build_model(pretrained, num_labels, drop_path_rate, from_scratch):
    """A FineTuned network with the weights of `pretrained`, or random ones, in its image size."""
    backbone, embed_dim = build_backbone(
        pretrained.arch,
        pretrained.patch_size,
        img_size=pretrained.image_size,
        in_chans=pretrained.in_chans,
        drop_path_rate=drop_path_rate,
        stem=pretrained.stem,
    )
    if not from_scratch:
        load_resized(backbone, pretrained.backbone.state_dict(), "the pretrained backbone")
    return FineTuned(backbone, embed_dim, num_labels)


def build_finetuning(model, device, *, weight_decay, layer_decay, ema_decay, amp_dtype):
    """(FineTuningState on `device`, what averages its model).

    [CLS], position embeddings, biases and norms have no weight decay, as in DeiT. `layer_decay` is
    the factor from each layer's rate to that of the one below it; for ViTs only.
    """
    model = model.to(device)
    average = ModelEmaV3(model, decay=ema_decay, use_warmup=True)
    options = dict(
        weight_decay=weight_decay,
        no_weight_decay_list=("backbone.cls_token", "backbone.pos_embed"),
    )
    if layer_decay == 1:
        groups = param_groups_weight_decay(model, **options)
    else:
        groups = param_groups_layer_decay(model, layer_decay=layer_decay, **options)
    optimizer = torch.optim.AdamW(groups, fused=True)
    if get_world_size() > 1:
        if has_batchnorms(model):
            model = sync_batchnorms(model, device)
        model = data_parallel(model, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    return FineTuningState(model, average.module, optimizer, scaler), average


# ---- images ----


class FineTuningAugmentation:
    """Image -> a box of it, flipped or not, after timm's RandAugment: (C, S, S), normalised.

    PIL or, of other channels than RGB, an array (H, W, C), of which RandAugment can change nothing;
    shrunk to `shorter_side` first. A function of image and `key` alone. `rand_augment` is timm's
    text for it, "" for none.
    """

    def __init__(self, image_size, mean, std, crop_scale, rand_augment, shorter_side=0):
        self.shorter_side = shorter_side
        self.view, self.mean, self.std = View(image_size, tuple(crop_scale)), mean, std
        color = tuple(max(0, min(255, round(255 * value))) for value in mean)
        options = dict(translate_const=int(0.45 * image_size), img_mean=color)
        options["interpolation"] = Image.Resampling.BICUBIC
        self.change = build_rand_augment(rand_augment, options) if rand_augment else None

    def __call__(self, image, key):
        bicubic = InterpolationMode.BICUBIC
        image = box_and_flip(image, self.view, key, bicubic, self.shorter_side)
        if self.change:
            seed = seed_of(*key)  # timm draws from these two
            random.seed(seed)
            np.random.seed(seed)
            image = self.change(image)
        return normalised(image, self.mean, self.std)


def build_rand_augment(text, options):
    """timm's RandAugment; UserError for a text that it does not take."""
    try:
        change = auto_augment.rand_augment_transform(text, options)
    except (AssertionError, ValueError, KeyError):
        raise UserError(
            f"--rand_augment {text}: timm does not take it. Give one like"
            f" {DEIT['rand_augment']}, or '' for none."
        ) from None
    for operation in change.ops:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = posterize
    return change


def posterize(image, bits, **options):
    """timm's, and black where no bit is kept, as it was until Pillow 13 refused that.

    DeiT's text for RandAugment asks for it once in about 1,000 images.
    """
    if bits <= 0:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits, **options)


def seed_of(*numbers):
    """One seed for a few whole numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Regularisation:
    """What a batch undergoes on the device: random erasing, mixup or cutmix, smoothed labels."""

    def __init__(self, device, num_labels, *, mixup, cutmix, smoothing, erasing):
        self.erase = RandomErasing(erasing, mode="pixel", device=device) if erasing else None
        self.device, self.smoothing, self.mix = device, smoothing, None
        if mixup or cutmix:
            self.mix = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=num_labels)

    def batch(self, images, labels):
        """(B, C, H, W) and (B,) -> images, and targets for cross-entropy: (B,) or (B, C)."""
        if self.erase:
            images = self.erase(images)
        return self.mix(images, labels) if self.mix else (images, labels)

    def loss(self, output, targets):
        smoothing = self.smoothing if targets.ndim == 1 else 0.0  # Mixup has smoothed its own
        return F.cross_entropy(output, targets, label_smoothing=smoothing)


# ---- steps ----


def finetuning_step(state, average, regularisation, images, labels, *, lr, key, amp_dtype, number):
    """One step of all weights; the loss, on the device.

    `lr` is the head's. `key`: seed, epoch and step, from which, with the rank, all that the step
    draws follows. `number` counts steps from 1, for the average's warm-up.
    """
    fix_random_seeds(seed_of(*key, get_rank()))
    device = regularisation.device
    images, labels = (part.to(device, non_blocking=True) for part in (images, labels))
    images, targets = regularisation.batch(images, labels)
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    state.optimizer.zero_grad()
    with autocast(device, amp_dtype):
        loss = regularisation.loss(state.model(images), targets)
    state.scaler.scale(loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    average.update(unwrap(state.model), step=number)
    return loss.detach()
