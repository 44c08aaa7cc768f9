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
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import utils
from augmentations import IMAGENET_MEAN, IMAGENET_STD, DataAugmentationDINO
from backbones import build_backbone, canonical_name, check_takes_sizes, has_batchnorms, is_vit
from checkpoints import load_training, save_backbone, save_training, unwrap
from data import list_training_images, training_loader
from demo import DEMO, write_demo_images
from dino import DINOLoss, MultiCropWrapper, cancel_gradients_last_layer, update_teacher
from distributed import (
    all_reduce_sum,
    get_world_size,
    init_distributed,
    print0,
    shut_down,
    sync_batchnorms,
)
from errors import Diverged, UserError, exit_on_user_error
from flags import loader_workers
from knn import KnnProbe, raw_pixels
from metrics import MetricLogger, append_json_line, is_due
from presets import PRESETS
from training_flags import check_args, get_args_parser, parse_args
from vision_transformer import DINOHead


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
    student, teacher = build_networks(args, device)
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
    report_start(args, launch, device, amp_dtype, loader)

    # ---- resume ----
    utils.fix_random_seeds(args.seed + launch.rank)  # from here each rank drops paths of its own
    output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint, start_epoch = output_dir / "checkpoint.pth", 0
    knn = {}  # epochs done: k-NN accuracy of the teacher's backbone
    if checkpoint.exists():
        start_epoch, knn = load_training(checkpoint, **vars(state))
        print0(f"Resumed from {checkpoint}: {start_epoch} of {args.epochs} epochs are done.")
    elif launch.rank == 0:
        (output_dir / "args.json").write_text(json.dumps(vars(args), indent=1) + "\n")

    # ---- training ----
    if start_epoch == 0:
        measure_knn(probe, knn, epochs_done=0, backbone=unwrap(teacher).backbone)
    for epoch in range(start_epoch, args.epochs):
        loader.sampler.set_epoch(epoch)
        stats = train_one_epoch(state, loader, schedules, epoch, args, amp_dtype)
        check_weights(student, epoch, args)
        if (epoch + 1) % args.knn_freq == 0 or epoch + 1 == args.epochs:
            measure_knn(probe, knn, epochs_done=epoch + 1, backbone=unwrap(teacher).backbone)
        save_epoch(state, output_dir, epoch, args, knn)
        append_json_line(output_dir / "log.txt", {**stats, "knn_teacher": knn.get(epoch + 1)})
    report_end(probe, knn)
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


def build_networks(args, device):
    """Student and teacher on `device`, with equal weights; no gradient ever reaches the teacher.

    With several processes the student is in a DistributedDataParallel and, if there are batch
    norms, so is the teacher, and all of them use the statistics of the global batch.
    """
    options = dict(patch_size=args.patch_size, img_size=args.global_crop_size)
    backbone, embed_dim = build_backbone(args.arch, drop_path_rate=args.drop_path_rate, **options)
    if not is_vit(backbone):
        sizes = (
            {args.global_crop_size, args.local_crop_size}
            if args.local_crops_number
            else {args.global_crop_size}
        )
        check_takes_sizes(backbone, args.arch, sorted(sizes))

    def head(norm_last_layer):
        return DINOHead(
            embed_dim,
            args.out_dim,
            use_bn=args.use_bn_in_head,
            norm_last_layer=norm_last_layer,
            hidden_dim=args.head_hidden_dim,
            bottleneck_dim=args.head_bottleneck_dim,
        )

    student = MultiCropWrapper(backbone, head(args.norm_last_layer)).to(device)
    teacher = MultiCropWrapper(build_backbone(args.arch, **options)[0], head(True)).to(device)
    teacher.load_state_dict(student.state_dict())
    if get_world_size() > 1:
        device_ids = [device.index] if device.type == "cuda" else None
        if has_batchnorms(student):
            student, teacher = sync_batchnorms(student, device), sync_batchnorms(teacher, device)
            teacher = DistributedDataParallel(teacher, device_ids=device_ids)
        student = DistributedDataParallel(student, device_ids=device_ids)
    teacher.requires_grad_(False)
    return student, teacher


def build_optimizer(name, params_groups):
    """AdamW, SGD or LARS; learning rate and weight decay are set at every step."""
    if name == "adamw":
        return torch.optim.AdamW(params_groups, fused=True)
    if name == "sgd":
        return torch.optim.SGD(params_groups, lr=0, momentum=0.9)
    return utils.LARS(params_groups)


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


def train_one_epoch(state, loader, schedules, epoch, args, amp_dtype):
    """All steps of an epoch; returns its line of log.txt, means over iterations and processes."""
    logger = MetricLogger(delimiter="  ")
    device = state.dino_loss.center.device
    losses = []  # of the steps since the last logged one, still on the device
    for i, images in enumerate(
        logger.log_every(loader, args.log_freq, f"Epoch: [{epoch}/{args.epochs}]")
    ):
        it = epoch * len(loader) + i
        loss = train_step(
            state,
            [view.to(device, non_blocking=True) for view in images],
            lr=schedules.lr[it],
            weight_decay=schedules.weight_decay[it],
            momentum=schedules.momentum[it],
            epoch=epoch,
            clip_grad=args.clip_grad,
            freeze_last_layer=args.freeze_last_layer,
            amp_dtype=amp_dtype,
        )
        losses.append(loss)
        logger.update(lr=schedules.lr[it], wd=schedules.weight_decay[it])
        if is_due(i, len(loader), args.log_freq):
            for number, value in enumerate(mean_over_processes(losses), start=i + 1 - len(losses)):
                if not math.isfinite(value):
                    raise Diverged(diverged(f"loss is {value}", epoch, number, args))
                logger.update(loss=value)
            losses = []
    return {f"train_{name}": logger.meters[name].global_avg for name in ("loss", "lr", "wd")} | {
        "epoch": epoch
    }


def train_step(
    state, images, *, lr, weight_decay, momentum, epoch, clip_grad, freeze_last_layer, amp_dtype
):
    """One update of student, center and teacher: Algorithm 1 with multi-crop.

    `images`: the V views, each (B, 3, S, S). Returns the loss, on the device: nothing here waits
    for it.
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
    if clip_grad:
        utils.clip_gradients(state.student, clip_grad)
    cancel_gradients_last_layer(epoch, state.student, freeze_last_layer)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    update_teacher(state.student, state.teacher, momentum)
    return loss.detach()


def set_lr_and_weight_decay(optimizer, lr, weight_decay):
    """Only the first of the groups of get_params_groups has weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay


def mean_over_processes(losses):
    """Scalars on the device -> their means over all processes, as floats: the only wait for the
    device.
    """
    return (all_reduce_sum(torch.stack(losses)) / get_world_size()).tolist()


def check_weights(student, epoch, args):
    """Raise Diverged unless every weight is finite: the last step may have broken them after a
    finite loss.
    """
    norms = torch.stack(torch._foreach_norm(list(student.parameters())))
    if not norms.isfinite().all():
        raise Diverged(diverged("a weight is no longer finite", epoch, "the last", args))


def diverged(what, epoch, iteration, args):
    checkpoint = Path(args.output_dir) / "checkpoint.pth"
    saved = (
        f"{checkpoint} is as the epoch before left it"
        if checkpoint.exists()
        else "no checkpoint was written yet"
    )
    return (
        f"{what} at epoch {epoch}, iteration {iteration} (--lr {args.lr} for 256 images,"
        f" {scaled_lr(args):.2g} for this batch); {saved}. Try --use_fp16 false, a lower --lr, a"
        " lower --clip_grad"
        " such as 0.3, or a lower --teacher_temp."
    )


def measure_knn(probe, knn, epochs_done, backbone):
    """Add the accuracy of `backbone` to `knn`, if there is a probe."""
    if probe is not None:
        knn[epochs_done] = probe.accuracy(backbone)
        print0(f"k-NN accuracy of the teacher after {epochs_done} epochs: {knn[epochs_done]:.1f} %")


def save_epoch(state, output_dir, epoch, args, knn):
    """checkpoint.pth and, every --saveckp_freq epochs, checkpointNNNN.pth; the teacher's backbone
    by itself.
    """
    paths = [output_dir / "checkpoint.pth"]
    if args.saveckp_freq and epoch % args.saveckp_freq == 0:
        paths.append(output_dir / f"checkpoint{epoch:04}.pth")
    save_training(paths, **vars(state), epoch=epoch + 1, args=vars(args), knn=knn)
    save_backbone(
        output_dir / "backbone.pth",
        state.teacher,
        arch=canonical_name(args.arch),
        patch_size=args.patch_size,
        image_size=args.global_crop_size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def report_start(args, launch, device, amp_dtype, loader):
    """Print every flag with its value, and what follows from them."""
    images, iterations = len(loader.dataset), len(loader)
    global_batch = args.batch_size_per_gpu * launch.world_size
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print0(*[f"{flag}: {value}" for flag, value in sorted(vars(args).items())], sep="\n")
    if args.preset:
        preset = PRESETS[args.preset]
        print0(f"Preset {args.preset}: {preset.source}. Reported: {preset.reported}.")
    processes = "process" if launch.world_size == 1 else "processes"
    print0(
        f"{launch.world_size} {processes} by {launch.launcher}, {name}, PyTorch {torch.__version__},"
        f" {str(amp_dtype).removeprefix('torch.')}"
    )
    print0(
        f"{images} images, {iterations} iterations of {global_batch} images per epoch,"
        f" {iterations * args.epochs} in all"
    )
    print0(
        f"learning rate {args.lr:g} x {global_batch} / 256 = {scaled_lr(args):.3g}; a loss that stays"
        f" at ln(out_dim) = {math.log(args.out_dim):.3f} means that nothing is learnt"
    )
    if device.type == "cuda" and launch.launcher == "python" and torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        print0(
            f"1 of {count} GPUs is used. For all: torchrun --standalone --nproc_per_node={count}"
            " main_dino.py ..."
        )


def report_end(probe, knn):
    """The accuracy before and after, and that of no network at all."""
    if probe is None:
        return
    print0(
        f"k-NN accuracy (k = {probe.k}) on held-out images of {probe.data_path}:\n"
        f"  raw pixels         {probe.accuracy(raw_pixels()):5.1f} %\n"
        f"  untrained backbone {knn[0]:5.1f} %\n"
        f"  trained backbone   {knn[max(knn)]:5.1f} %"
    )


def main():
    with exit_on_user_error("main_dino.py"):
        train_dino(parse_args())


if __name__ == "__main__":
    main()
