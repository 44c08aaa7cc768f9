# SPDX-License-Identifier: Apache-2.0
"""Named recipes: `--preset NAME` sets the defaults of these flags; a flag on the command line wins.

What the authors report is theirs, on ImageNet, for the teacher: k-NN with k = 20, and a linear
classifier.
"""

from dataclasses import dataclass

AUTO, CONTINUE = "auto", "continue"
# dino/training/auto.py decides their flags, once the data and the device are known.
DECIDED = (AUTO, CONTINUE)


@dataclass(frozen=True)
class Preset:
    """Flags of a recipe, their source, and the accuracy that was reported."""

    flags: dict
    source: str
    reported: str


MULTI_CROP_RELEASED = dict(
    local_crops_number=10, global_crops_scale=(0.25, 1.0), local_crops_scale=(0.05, 0.25)
)
WARM_TEACHER = dict(warmup_teacher_temp=0.04, teacher_temp=0.07)

PRESETS = {
    "vanilla": Preset(
        dict(arch="vit_small", epochs=100, batch_size_per_gpu=64),
        source="README of the official repository, 8 GPUs; all flags at their defaults",
        reported="k-NN 69.3, linear 74.0 in 1.75 days",
    ),
    "boost": Preset(
        dict(
            arch="vit_small",
            epochs=300,
            batch_size_per_gpu=64,
            teacher_temp=0.07,
            warmup_teacher_temp_epochs=30,
            norm_last_layer=False,
        ),
        source="README of the official repository, 16 GPUs",
        reported="k-NN 73.3, linear 76.0 in 2.6 days",
    ),
    "vits16": Preset(
        dict(
            arch="vit_small",
            patch_size=16,
            epochs=800,
            batch_size_per_gpu=64,
            lr=5e-4,
            min_lr=1e-5,
            clip_grad=0.0,
            norm_last_layer=False,
            freeze_last_layer=1,
            warmup_teacher_temp_epochs=30,
            use_fp16=False,
            **WARM_TEACHER,
            **MULTI_CROP_RELEASED,
        ),
        source="arguments of the released ViT-S/16, 16 GPUs",
        reported="k-NN 74.5, linear 77.0",
    ),
    "vits8": Preset(
        dict(
            arch="vit_small",
            patch_size=8,
            epochs=800,
            batch_size_per_gpu=16,
            lr=5e-4,
            min_lr=1e-6,
            clip_grad=3.0,
            norm_last_layer=False,
            freeze_last_layer=1,
            warmup_teacher_temp_epochs=30,
            use_fp16=False,
            local_crops_number=10,
            **WARM_TEACHER,
        ),
        source="arguments of the released ViT-S/8, 64 GPUs",
        reported="k-NN 78.3, linear 79.7",
    ),
    "vitb16": Preset(
        dict(
            arch="vit_base",
            patch_size=16,
            epochs=400,
            batch_size_per_gpu=32,
            lr=7.5e-4,
            min_lr=2e-6,
            clip_grad=0.3,
            freeze_last_layer=3,
            warmup_teacher_temp_epochs=50,
            use_fp16=False,
            **WARM_TEACHER,
            **MULTI_CROP_RELEASED,
        ),
        source="arguments of the released ViT-B/16, 32 GPUs",
        reported="k-NN 76.1, linear 78.2",
    ),
    "vitb8": Preset(
        dict(
            arch="vit_base",
            patch_size=8,
            epochs=300,
            batch_size_per_gpu=6,
            lr=5e-4,
            min_lr=2e-6,
            clip_grad=3.0,
            freeze_last_layer=3,
            warmup_teacher_temp=0.03,
            teacher_temp=0.07,
            warmup_teacher_temp_epochs=50,
            use_fp16=False,
            **MULTI_CROP_RELEASED,
        ),
        source="arguments of the released ViT-B/8",
        reported="k-NN 77.4, linear 80.1",
    ),
    "resnet50": Preset(
        dict(
            arch="resnet50",
            optimizer="sgd",
            lr=0.03,
            weight_decay=1e-4,
            weight_decay_end=1e-4,
            global_crops_scale=(0.14, 1.0),
            local_crops_scale=(0.05, 0.14),
        ),
        source="README of the official repository, 8 GPUs, 100 epochs",
        reported="k-NN 67.5, linear 75.3 for the released model, which was trained longer",
    ),
    "no_multicrop": Preset(
        dict(
            arch="vit_small",
            epochs=300,
            local_crops_number=0,
            global_crops_scale=(0.14, 1.0),
            lr=5e-4,
            min_lr=1e-5,
            clip_grad=0.0,
            momentum_teacher=0.996,
        ),
        source="the first author in issue 122 of the official repository",
        reported="k-NN 67.9, linear 72.5 (Table 7 of the paper)",
    ),
    AUTO: Preset(
        {},
        source="ours, from a look at the data: small, grey or large, on a CPU or a GPU",
        reported="benchmarks/small_data.md",
    ),
    CONTINUE: Preset(
        {},
        source="ours: as auto, and small steps from the weights of --init_from",
        reported="benchmarks/continue.md",
    ),
    "demo": Preset(
        dict(
            arch="vit_nano",
            patch_size=8,
            global_crop_size=32,
            local_crop_size=16,
            local_crops_number=4,
            local_crops_scale=(0.14, 0.4),
            blur_radius=(0.014, 0.29),  # the official 0.1 to 2 pixels of 224
            out_dim=1024,
            use_bn_in_head=True,
            head_hidden_dim=512,
            head_bottleneck_dim=128,
            momentum_teacher=0.97,
            momentum_teacher_end=0.99,
            lr=0.003,
            epochs=14,
            warmup_epochs=2,
            augment="device",
            compile="false",  # which takes longer than the run on a GPU
            data_path="demo://",
            output_dir="runs/demo",
            knn_freq=2,
        ),
        source="ours, for 2,800 tiles of 14 photographs that come with scikit-image",
        reported="k-NN 70 on held-out tiles, untrained 49, raw pixels 40; 3 minutes on 2 CPU cores",
    ),
}
