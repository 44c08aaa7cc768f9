# SPDX-License-Identifier: Apache-2.0
"""What a run consists of, by the flags of main_dino.py: loader, probes, networks, optimizer."""

import torch

from dino.ablations import PredictorHead, build_loss, copy_before_each_step, teacher_momentum
from dino.backbone_checks import check_gradients
from dino.data.augmentations import transform_of
from dino.data.augmentations_on_device import (
    CropStage,
    DeviceStage,
    colours_on_device,
    on_workers,
)
from dino.data.loaders import training_loader
from dino.evaluation.knn import KnnProbe
from dino.evaluation.without_labels import SampleProbe
from dino.networks import (
    build_student_and_teacher,
    choose_compile,
    compile_networks,
    unwrap,
)
from dino.optim import build_optimizer, cosine_scheduler, get_params_groups
from dino.training.attention_history import AttentionHistory
from dino.training.run import Probes, TrainState
from vision_transformer import DINOHead


def build_loader(args, images, augmentation, workers, device):
    """Loader of views on `device`."""
    on_device = colours_on_device(args.augment, augmentation, device)
    return training_loader(
        images,
        CropStage(augmentation) if on_device else on_workers(augmentation),
        batch_size=args.batch_size_per_gpu,
        num_workers=workers,
        seed=args.seed,
        pin_memory=device.type == "cuda",
        skip_bad=args.on_bad_image == "skip",
        finish=DeviceStage(augmentation, device),
        in_chans=args.in_chans,
    )


def build_probes(args, images, knn_data_path, augmentation, workers, device):
    """Measurements between epochs, in float32 as in eval_knn.py; k-NN with --knn_data_path only."""
    options = dict(batch_size=max(128, args.batch_size_per_gpu), num_workers=workers)
    sample = SampleProbe(
        images,
        augmentation,
        device,
        seed=args.seed,
        skip_bad=args.on_bad_image == "skip",
        **options,
    )
    knn = attention = None
    if args.report:
        attention = AttentionHistory(args.output_dir, images, augmentation, args.epochs)
    if knn_data_path is not None:
        transform = transform_of(augmentation)
        knn = KnnProbe(knn_data_path, transform, device, flag="--knn_data_path", **options)
    return Probes(knn, sample, attention)


def build_state(args, views, device, amp_dtype):
    """The TrainState before the first step."""
    crop_sizes = list(dict.fromkeys(view.size for view in views))
    student, teacher = build_student_and_teacher(
        args.arch,
        device,
        patch_size=args.patch_size,
        crop_sizes=crop_sizes,
        drop_path_rate=args.drop_path_rate,
        out_dim=args.out_dim,
        use_bn_in_head=args.use_bn_in_head,
        norm_last_layer=args.norm_last_layer,
        hidden_dim=args.head_hidden_dim,
        bottleneck_dim=args.head_bottleneck_dim,
        grad_checkpointing=args.grad_checkpointing,
        student_head=PredictorHead if args.predictor else DINOHead,
        stem=args.stem,
        in_chans=args.in_chans,
    )
    check_gradients(unwrap(student).backbone, crop_sizes, args.in_chans, device, amp_dtype)
    dino_loss = build_loss(
        args.loss,
        args.sinkhorn_iterations,
        args.out_dim,
        len(views),
        args.warmup_teacher_temp,
        args.teacher_temp,
        args.warmup_teacher_temp_epochs,
        args.epochs,
        center_momentum=args.center_momentum,
        accum_steps=args.accum_steps,
    )
    if choose_compile(args.compile, device, student):
        compile_networks(student, teacher, dino_loss)
    optimizer = build_optimizer(args.optimizer, get_params_groups(student))
    if args.teacher_update == "previous_iteration":
        copy_before_each_step(optimizer, student, teacher)
    # a scaler that is not enabled does nothing
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    return TrainState(student, teacher, dino_loss.to(device), optimizer, scaler)


def build_schedules(args, scaled_lr, iterations_per_epoch):
    """{"lr", "weight_decay", "momentum"}, arguments of train_step: a value for each iteration."""
    length = args.epochs, iterations_per_epoch
    momentum = cosine_scheduler(args.momentum_teacher, args.momentum_teacher_end, *length)
    return {
        "lr": cosine_scheduler(scaled_lr, args.min_lr, *length, args.warmup_epochs),
        "weight_decay": cosine_scheduler(args.weight_decay, args.weight_decay_end, *length),
        "momentum": teacher_momentum(args.teacher_update, momentum, iterations_per_epoch),
    }
