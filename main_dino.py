# SPDX-License-Identifier: Apache-2.0
"""Train DINO: self-distillation with no labels (Caron et al. 2021,
https://arxiv.org/abs/2104.14294).

    python main_dino.py --preset demo                                      # no data, no GPU, a few
    minutes
    python main_dino.py --data_path photos/ --output_dir runs/photos       # one GPU
    torchrun --standalone --nproc_per_node=8 main_dino.py --data_path imagenet/train --output_dir
    runs/vits16

The last line is the authors' "vanilla" run: 100 epochs of ViT-S/16 on 8 GPUs took them 1.75 days
and gave k-NN 69.3, linear 74.0 (README of the official repository). The same command again resumes
a run.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import utils
from augmentations import IMAGENET_MEAN, IMAGENET_STD, DataAugmentationDINO
from backbones import canonical_name
from checkpoints import load_training, save_backbone, save_training, unwrap
from data import list_training_images, training_loader
from demo import DEMO, write_demo_images
from dino import DINOLoss, cancel_gradients_last_layer, update_teacher
from distributed import (
    get_world_size,
    init_distributed,
    print0,
    shut_down,
)
from errors import Diverged, UserError, exit_on_user_error
from flags import loader_workers
from knn import KnnProbe
from networks import build_optimizer, build_student_and_teacher
from plots import draw_first_views, draw_run
from recorder import Recorder
from report import report_end, report_start
from training_flags import check_args, get_args_parser, parse_args


@dataclass
class TrainState:
    """What is stepped together, and so saved together. The names are those of the checkpoint's
    entries.
    """

    student: nn.Module
    teacher: nn.Module
    dino_loss: DINOLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


@dataclass
class Progress:
    """How far a run is. Its fields are entries of the checkpoint."""

    epoch: int = 0  # epochs done
    best_knn: float = 0.0  # percent, of the best teacher so far


def train_dino(args):
    """The whole job, in the order of the work. `args` may lack the flags that are ours."""
    args = argparse.Namespace(**{**vars(get_args_parser().parse_args([])), **vars(args)})
    check_args(args)
    output_dir = Path(args.output_dir)

    # ---- processes ----
    launch, device = init_distributed(args.device, args.dist_url)
    utils.fix_random_seeds(args.seed)  # the same on every rank: all start from the same weights
    torch.backends.cudnn.benchmark = True
    amp_dtype = utils.choose_amp_dtype(args.use_fp16, args.amp_dtype, device)

    # ---- data ----
    if args.data_path == DEMO:
        args.data_path, args.knn_data_path = write_demo_images(output_dir / "demo_images")
    loader = build_loader(args, pin_memory=device.type == "cuda")
    probe = build_probe(args, device, amp_dtype)

    # ---- student and teacher, loss, optimizer ----
    student, teacher = build_student_and_teacher(
        args.arch,
        device,
        patch_size=args.patch_size,
        crop_sizes=[args.global_crop_size, args.local_crop_size][
            : 1 + (args.local_crops_number > 0)
        ],
        drop_path_rate=args.drop_path_rate,
        out_dim=args.out_dim,
        use_bn_in_head=args.use_bn_in_head,
        norm_last_layer=args.norm_last_layer,
        hidden_dim=args.head_hidden_dim,
        bottleneck_dim=args.head_bottleneck_dim,
    )
    dino_loss = DINOLoss(
        args.out_dim,
        2 + args.local_crops_number,
        args.warmup_teacher_temp,
        args.teacher_temp,
        args.warmup_teacher_temp_epochs,
        args.epochs,
    ).to(device)
    optimizer = build_optimizer(args.optimizer, utils.get_params_groups(student))
    scaler = torch.amp.GradScaler(
        device.type, enabled=amp_dtype == torch.float16
    )  # else it does nothing
    state = TrainState(student, teacher, dino_loss, optimizer, scaler)
    schedules = Schedules(args, len(loader))
    report_start(
        args,
        launch,
        device,
        amp_dtype,
        images=len(loader.dataset),
        iterations=len(loader),
        scaled_lr=scaled_lr(args),
    )

    # ---- resume ----
    utils.fix_random_seeds(args.seed + launch.rank)  # from here each rank drops paths of its own
    output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint, progress = output_dir / "checkpoint.pth", Progress()
    recorder = Recorder(
        output_dir,
        dino_loss,
        freeze_last_layer=args.freeze_last_layer,
        log_freq=args.log_freq,
        tensorboard=args.tensorboard,
    )
    if checkpoint.exists():
        load_training(checkpoint, vars(state), vars(progress))
        recorder.log.rewind(progress.epoch, progress.epoch * len(loader))
        print0(f"Resumed from {checkpoint}: {progress.epoch} of {args.epochs} epochs are done.")
    else:
        recorder.log.start(vars(args))
        draw_first_views(output_dir / "augmentations.png", loader.dataset)
        measure_knn(probe, state, 0, 0, recorder)

    # ---- training ----
    for epoch in range(progress.epoch, args.epochs):
        loader.sampler.set_epoch(epoch)
        means = train_one_epoch(state, loader, schedules, epoch, args, amp_dtype, recorder)
        names = checkpoint_names(epoch, args.saveckp_freq)
        progress.epoch = epoch + 1
        if progress.epoch % args.knn_freq == 0 or progress.epoch == args.epochs:
            knn = measure_knn(probe, state, progress.epoch, progress.epoch * len(loader), recorder)
            means |= knn
            if knn.get("knn_teacher", 0.0) > progress.best_knn:
                progress.best_knn = knn["knn_teacher"]
                names.append("checkpoint_best_knn.pth")
        save_training(
            [output_dir / name for name in names], vars(state), vars(progress), vars(args)
        )
        save_teacher(output_dir / "backbone.pth", teacher, args)
        recorder.log.epoch(means)
        draw_run(output_dir)
    report_end(probe, recorder.log)
    shut_down()


def build_loader(args, pin_memory):
    """Loader of augmented views. UserError if there are fewer images than one global batch."""
    paths = list_training_images(args.data_path)
    augmentation = DataAugmentationDINO(
        args.global_crops_scale,
        args.local_crops_scale,
        args.local_crops_number,
        args.global_crop_size,
        args.local_crop_size,
    )
    loader = training_loader(
        paths,
        augmentation,
        batch_size=args.batch_size_per_gpu,
        num_workers=loader_workers(args.num_workers),
        seed=args.seed,
        pin_memory=pin_memory,
    )
    if len(loader) == 0:
        global_batch = args.batch_size_per_gpu * get_world_size()
        raise UserError(
            f"--data_path {args.data_path}: {len(paths)} images are fewer than one batch of"
            f" {global_batch}"
            f" (--batch_size_per_gpu {args.batch_size_per_gpu} on {get_world_size()} processes)."
            " Lower the batch size."
        )
    return loader


def build_probe(args, device, amp_dtype):
    """The k-NN measurement on --knn_data_path, or None."""
    if args.knn_data_path is None:
        return None
    return KnnProbe(
        args.knn_data_path,
        args.global_crop_size,
        device,
        batch_size=max(128, args.batch_size_per_gpu),
        num_workers=loader_workers(args.num_workers),
        amp_dtype=amp_dtype,
    )


class Schedules:
    """Lists with a value for each iteration of the run."""

    def __init__(self, args, iterations_per_epoch):
        def cosine(start, end, warmup_epochs=0):
            return utils.cosine_scheduler(
                start, end, args.epochs, iterations_per_epoch, warmup_epochs
            ).tolist()

        self.lr = cosine(scaled_lr(args), args.min_lr, args.warmup_epochs)
        self.weight_decay = cosine(args.weight_decay, args.weight_decay_end)
        self.momentum = cosine(args.momentum_teacher, 1)


def scaled_lr(args):
    """Linear scaling rule (Goyal et al. 2017)."""
    return args.lr * args.batch_size_per_gpu * get_world_size() / 256


def train_one_epoch(state, loader, schedules, epoch, args, amp_dtype, recorder):
    """All steps of an epoch; returns its line of log.txt, means over iterations and processes."""
    device = state.dino_loss.center.device
    for i, images in enumerate(recorder.steps(loader, epoch, args.epochs)):
        it = epoch * len(loader) + i
        scheduled = dict(
            lr=schedules.lr[it],
            weight_decay=schedules.weight_decay[it],
            momentum=schedules.momentum[it],
        )
        loss, grad_norm = train_step(
            state,
            [view.to(device, non_blocking=True) for view in images],
            **scheduled,
            epoch=epoch,
            clip_grad=args.clip_grad,
            freeze_last_layer=args.freeze_last_layer,
            amp_dtype=amp_dtype,
        )
        teacher_temp = float(state.dino_loss.teacher_temp_schedule[epoch])
        recorder.add(it, loss, grad_norm, **scheduled, teacher_temp=teacher_temp)
    check_weights(state.student, epoch)
    return recorder.end_epoch()


def train_step(
    state, images, *, lr, weight_decay, momentum, epoch, clip_grad, freeze_last_layer, amp_dtype
):
    """One update of student, center and teacher: Algorithm 1 with multi-crop.

    `images`: the V views, each (B, 3, S, S). Returns the loss and the norm of all gradients before
    clipping, both on the device: nothing here waits for it.
    """
    set_lr_and_weight_decay(state.optimizer, lr, weight_decay)
    with torch.autocast(images[0].device.type, dtype=amp_dtype, enabled=amp_dtype != torch.float32):
        with torch.no_grad():
            teacher_output = state.teacher(images[:2])  # (2B, K): only the global views
        student_output = state.student(images)  # (VB, K): every view
        loss = state.dino_loss(student_output, teacher_output, epoch)  # moves the center too
    state.optimizer.zero_grad()
    state.scaler.scale(loss).backward()
    state.scaler.unscale_(state.optimizer)
    norms = utils.clip_gradients(state.student, clip_grad)
    cancel_gradients_last_layer(epoch, state.student, freeze_last_layer)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    update_teacher(state.student, state.teacher, momentum)
    return loss.detach(), torch.stack(norms).norm()


def set_lr_and_weight_decay(optimizer, lr, weight_decay):
    """Only the first of the groups of get_params_groups has weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay


def check_weights(student, epoch):
    """Raise Diverged for a weight that is not finite, which a step after a finite loss can leave."""
    norms = torch.stack(torch._foreach_norm(list(student.parameters())))
    if not norms.isfinite().all():
        raise Diverged(f"a weight is no longer finite at the end of epoch {epoch}")


def explain_divergence(error, args):
    """The error, with what is saved and what to try."""
    saved = Path(args.output_dir) / "checkpoint.pth"
    kept = (
        f"{saved} is as the last good epoch left it" if saved.exists() else "nothing is saved yet"
    )
    return Diverged(
        f"{error} (--lr {args.lr:g} for 256 images, {scaled_lr(args):.3g} for this batch); {kept}."
        " Try --use_fp16 false if the precision was not float32 already, a lower --lr, a lower"
        " --clip_grad such as 0.3, a lower --teacher_temp."
    )


def measure_knn(probe, state, epochs, iterations, recorder):
    """k-NN accuracy of both backbones: {"knn_teacher": percent, "knn_student": percent}."""
    if probe is None:
        return {}
    accuracies = {
        f"knn_{name}": probe.accuracy(unwrap(getattr(state, name)).backbone)
        for name in ("teacher", "student")
    }
    recorder.log.knn(epochs, iterations, accuracies)
    return accuracies


def checkpoint_names(epoch, saveckp_freq):
    """The newest, and every so many epochs one that stays, by the official names."""
    kept = saveckp_freq and epoch % saveckp_freq == 0
    return ["checkpoint.pth", f"checkpoint{epoch:04}.pth"] if kept else ["checkpoint.pth"]


def save_teacher(path, teacher, args):
    """The teacher's backbone, with all that the evaluation scripts need to know of it."""
    save_backbone(
        path,
        teacher,
        arch=canonical_name(args.arch),
        patch_size=args.patch_size,
        image_size=args.global_crop_size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def main():
    args = parse_args()
    with exit_on_user_error("main_dino.py"):
        try:
            train_dino(args)
        except Diverged as error:
            raise explain_divergence(error, args) from None


if __name__ == "__main__":
    main()
