# SPDX-License-Identifier: Apache-2.0
"""Ablations as runs of main_dino.py: what each run changes, and what the paper found.

`theirs` holds the authors' numbers on ImageNet, in percent unless a unit is given; a run that the
paper does not have has none. The last two studies are ours, about small data.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Variant:
    """One row of a table: the flags that make it, and the paper's numbers for it."""

    flags: dict
    theirs: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """One figure or table: the flags that all of its runs share, and its runs by name.

    `source`: where the paper has it, if it does. `paper`: the authors' settings; `demo`: those for
    the embedded data. `demo_variants`: its runs on that, if they are others. Two flags are not
    main_dino.py's: `global_batch` stands for the --batch_size_per_gpu of all processes together,
    `epochs_share` for --epochs as a share of the study's.
    """

    title: str
    source: str | None
    paper: dict
    demo: dict
    variants: dict
    demo_variants: dict | None = None

    def runs(self, demo):
        """{name: Variant}."""
        return self.demo_variants if demo and self.demo_variants else self.variants

    @property
    def varied(self):
        """The flags that each of its runs sets, so that a command line would set them in vain."""
        names = set.intersection(*(set(variant.flags) for variant in self.variants.values()))
        return {name.replace("global_batch", "batch_size_per_gpu") for name in names}


# The settings of the released ViT-S/16, shorter: the paper's ablations last 100 or 300 epochs. The
# authors' batch is that of 16 GPUs.
SHORT = dict(preset="vits16", epochs=100, global_batch=1024)
LONG = SHORT | dict(epochs=300)
WITHOUT_LOCAL_CROPS = dict(local_crops_number=0, global_crops_scale=(0.14, 1.0))
UNSHARPENED = dict(warmup_teacher_temp=0.1, teacher_temp=0.1)  # the student's temperature
UNCENTERED = dict(center_momentum=1.0)
# Over --preset demo: a smaller head and fewer crops, so that a run takes half a minute of a core; a
# faster teacher, and no batch norms, which prevent the collapses that the studies are about.
DEMO = dict(
    preset="demo",
    epochs=2,
    global_batch=32,
    local_crops_number=2,
    out_dim=256,
    head_hidden_dim=256,
    head_bottleneck_dim=64,
    use_bn_in_head=False,
    momentum_teacher=0.9,
    warmup_epochs=0,
    freeze_last_layer=0,
    knn_freq=1,
    log_freq=3,
)
# For an image of 32 pixels; the default of 10 epochs of warm-up is longer than these runs.
SMALL_VIT = dict(
    arch="vit_nano",
    patch_size=4,
    global_crop_size=32,
    local_crop_size=16,
    augment="device",
    freeze_last_layer=0,
)


def knn_and_linear(knn, linear):
    return {"k-NN": knn, "linear": linear}


STUDIES = {
    "teacher": Study(
        "Which network teaches",
        "Fig. 6: ViT-S/16, 300 epochs; k-NN",
        LONG,
        # A moving average needs the time: with 0.9, over ten steps, it is hardly one (55.8 % for
        # 59.8), and after two epochs the previous epoch is ahead of it.
        DEMO | dict(epochs=5, momentum_teacher=0.97, momentum_teacher_end=0.996),
        {
            "momentum": Variant(dict(teacher_update="ema"), {"k-NN": 72.8}),
            "previous epoch": Variant(dict(teacher_update="previous_epoch"), {"k-NN": 66.6}),
            "previous iteration": Variant(dict(teacher_update="previous_iteration"), {"k-NN": 0.1}),
            "student copy": Variant(dict(teacher_update="student"), {"k-NN": 0.1}),
        },
    ),
    "collapse": Study(
        "Collapse: the teacher's entropy, and KL(teacher, student)",
        "Fig. 7, Sec. 5.3; where the curves end",
        SHORT,
        DEMO | dict(knn_data_path=None),  # the figure has no accuracies
        {
            "both": Variant({}, {"h": "between", "KL": "between"}),
            "no centering": Variant(UNCENTERED, {"h": "0", "KL": "0"}),
            "no sharpening": Variant(UNSHARPENED, {"h": "ln K", "KL": "0"}),
            "neither": Variant(UNCENTERED | UNSHARPENED),
        },
    ),
    "components": Study(
        "What each component gives",
        "Table 7: ViT-S/16, 300 epochs",
        LONG,
        DEMO,
        {
            "DINO": Variant({}, knn_and_linear(72.8, 76.1)),
            "no momentum": Variant(dict(teacher_update="student"), knn_and_linear(0.1, 0.1)),
            "Sinkhorn-Knopp": Variant(dict(sinkhorn_iterations=3), knn_and_linear(72.2, 76.0)),
            "no multi-crop": Variant(WITHOUT_LOCAL_CROPS, knn_and_linear(67.9, 72.5)),
            "MSE": Variant(dict(loss="mse"), knn_and_linear(52.6, 62.4)),
            "predictor": Variant(dict(predictor=True), knn_and_linear(71.8, 75.6)),
        },
    ),
    "multicrop": Study(
        "What multi-crop costs and gives",
        "Table 8: ViT-S/16, 300 epochs on two machines of 8 GPUs",
        LONG,
        DEMO,
        {
            "2 global": Variant(
                WITHOUT_LOCAL_CROPS, {"linear": 72.5, "hours": 45.9, "GB per GPU": 9.3}
            ),
            "2 global, 2 local": Variant(
                dict(local_crops_number=2), {"linear": 74.5, "hours": 51.0, "GB per GPU": 10.5}
            ),
            "2 global, 6 local": Variant(
                dict(local_crops_number=6), {"linear": 75.9, "hours": 60.9, "GB per GPU": 12.9}
            ),
            "2 global, 10 local": Variant(
                dict(local_crops_number=10), {"linear": 76.1, "hours": 72.6, "GB per GPU": 15.4}
            ),
        },
    ),
    "batch-size": Study(
        "How small a batch may be",
        "Table 9: ViT-S/16, 100 epochs without multi-crop; k-NN",
        dict(preset="no_multicrop", epochs=100),
        DEMO | WITHOUT_LOCAL_CROPS,
        {
            "128": Variant(dict(global_batch=128), {"k-NN": 57.9}),
            "256": Variant(dict(global_batch=256), {"k-NN": 59.1}),
            "512": Variant(dict(global_batch=512), {"k-NN": 59.6}),
            "1024": Variant(dict(global_batch=1024), {"k-NN": 59.9}),
        },
        {
            "16": Variant(dict(global_batch=16)),
            "32": Variant(dict(global_batch=32)),
            "64": Variant(dict(global_batch=64)),
            "128": Variant(dict(global_batch=128), {"k-NN": 57.9}),
        },
    ),
    "small-data": Study(
        "Settings for small data, at equal times on one thread of a CPU",
        None,
        dict(epochs=8),
        dict(epochs=8),
        {
            "auto": Variant(dict(preset="auto")),
            # --preset demo before blur and crops followed from the size of the images
            "earlier demo": Variant(
                SMALL_VIT
                | dict(
                    epochs_share=0.5,
                    local_crops_number=4,
                    out_dim=1024,
                    use_bn_in_head=True,
                    head_hidden_dim=512,
                    head_bottleneck_dim=128,
                    momentum_teacher=0.98,
                    lr=0.004,
                    warmup_epochs=1,
                )
            ),
            "official": Variant(SMALL_VIT | dict(epochs_share=0.2, warmup_epochs=0)),
        },
    ),
    "auto-rules": Study(
        "The rules of --preset auto, each replaced alone",
        None,
        dict(preset="auto", epochs=8),
        dict(preset="auto", epochs=8),
        {
            "auto": Variant({}),
            "ViT": Variant(dict(arch="vit_nano")),
            # bfloat16 on a CPU cannot train that stem on crops of 16 pixels
            "stem of ImageNet": Variant(dict(stem="imagenet", amp_dtype="float32")),
            "features of the whole image": Variant(dict(arch="resnet_nano")),
            "official crops": Variant(
                dict(global_crops_scale=(0.4, 1), local_crops_scale=(0.05, 0.4), min_crop_pixels=0)
            ),
            "images as they are": Variant(dict(shrink_images=0)),
            "8 local crops": Variant(dict(local_crops_number=8)),
            "official blur": Variant(dict(blur_radius=(0.1, 2))),
            "official colours": Variant(
                dict(jitter=(0.4, 0.4, 0.2, 0.1), grayscale_p=0.2, solarize_p=0.2)
            ),
            "mean and std of ImageNet": Variant(
                dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
            ),
            "4096 outputs": Variant(dict(out_dim=4096)),
            "no batch norm": Variant(dict(use_bn_in_head=False)),
            "official teacher": Variant(dict(momentum_teacher=0.996, momentum_teacher_end=1.0)),
            "momentum to 1": Variant(dict(momentum_teacher_end=1.0)),
            "official lr": Variant(dict(lr=0.0005)),
            "float32": Variant(dict(amp_dtype="float32")),
        },
    ),
}
