# SPDX-License-Identifier: Apache-2.0
"""Train DINO: self-distillation with no labels (Caron et al. 2021, arXiv 2104.14294).

    python main_dino.py --preset demo                                   # no data, no GPU: 3 minutes
    python main_dino.py --data_path photos/ --output_dir runs/photos    # one GPU
    torchrun --standalone --nproc_per_node=8 main_dino.py --data_path imagenet/train/ ...

The last one is the authors' "vanilla" run: 100 epochs of ViT-S/16 on 8 GPUs took them 1.75 days and
gave k-NN 69.3, linear 74.0 (README of the official repository). The same command again goes on with
a run that was interrupted.
"""

import argparse
import os
from pathlib import Path

# Threads that wait for each other give their core away, which must be said before torch is loaded.
# Else, on cores that other programs use as well, a step of the demo takes 3 s instead of 0.5 s.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

import utils
from augmentations import DataAugmentationDINO
from data import list_training_images
from demo import DEMO, IMAGES, write_demo_images
from device_augmentation import CropsDINO, DeviceStage
from dino import DINOLoss, cancel_gradients_last_layer, update_teacher
from distributed import get_world_size, init_distributed, lost_ranks, shut_down
from errors import Diverged, LostRank, UserError, exit_on_user_error
from flags import loader_workers
from interruption import Interruption, StopRequested
from knn import KnnProbe
from loading import training_loader
from networks import build_optimizer, build_student_and_teacher, compile_networks
from recorder import Recorder
from report import report_end, report_start
from resume import Progress
from run import Run, TrainState
from saving import NEWEST, Saver, find_checkpoint
from training_checks import check_args
from training_flags import get_args_parser, parse_args


def train_dino(args):
    """The whole job, in the order of the work. `args` may lack the flags that are ours."""
    args = argparse.Namespace(**{**vars(get_args_parser().parse_args([])), **vars(args)})
    check_args(args)
    output_dir = Path(args.output_dir)
    found = find_checkpoint(args.resume, output_dir)

    # ---- processes ----
    launch, device = init_distributed(args.device, args.dist_url)
    utils.fix_random_seeds(args.seed)  # the same on every rank: all start from the same weights
    torch.backends.cudnn.benchmark = True
    amp_dtype = utils.choose_amp_dtype(args.use_fp16, args.amp_dtype, device)

    # ---- data ----
    if args.data_path == DEMO:
        check_batch(args, IMAGES)
        args.data_path, args.knn_data_path = write_demo_images(output_dir / "demo_images")
    workers = loader_workers(args.num_workers)
    loader = build_loader(args, workers, device)
    probe = build_probe(args, workers, device, amp_dtype)

    # ---- student, teacher, loss, optimizer ----
    state = build_state(args, device, amp_dtype)
    progress = Progress(iterations_per_epoch=len(loader), global_batch=global_batch(args))
    report_start(args, launch, device, amp_dtype, len(loader.dataset), scaled_lr(args), progress)
    run = Run(
        args,
        Schedules(args, len(loader)),
        progress,
        Recorder(output_dir, state.dino_loss, args),
        Saver(output_dir, args.saveckp_iters, args.saveckp_minutes, args.keep_checkpoints),
        Interruption(),
        amp_dtype,
    )

    # ---- begin, or resume ----
    if found is None:
        run.begin(state, loader, probe)
    utils.fix_random_seeds(args.seed + launch.rank)  # from here each rank drops paths of its own
    if found is not None:
        run.resume(state, *found)

    # ---- training ----
    run.interruption.listen()
    try:
        while run.progress.epoch < args.epochs:
            means = train_one_epoch(run, state, loader)
            run.end_epoch(state, probe, means)
    except StopRequested as stop:
        run.stop(state, stop)
    run.saver.finish()
    report_end(probe, run.recorder.log)
    shut_down()


def build_loader(args, workers, device):
    """Loader of views on `device`. UserError if there are fewer images than one global batch."""
    paths = list_training_images(args.data_path)
    on_device = args.augment == "device" or (args.augment == "auto" and device.type == "cuda")
    augmentation = (CropsDINO if on_device else DataAugmentationDINO)(
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
        num_workers=workers,
        seed=args.seed,
        pin_memory=device.type == "cuda",
        skip_bad=args.on_bad_image == "skip",
        finish=DeviceStage(device),
    )
    check_batch(args, len(paths))
    return loader


def check_batch(args, images):
    """UserError if the ranks' equal shares of so many images are no batch each."""
    if -(-images // get_world_size()) < args.batch_size_per_gpu:
        raise UserError(
            f"--data_path {args.data_path}: {images} images are fewer than one batch of"
            f" {global_batch(args)} (--batch_size_per_gpu {args.batch_size_per_gpu} on"
            f" {get_world_size()} processes). Lower the batch size."
        )


def build_probe(args, workers, device, amp_dtype):
    """The k-NN measurement on --knn_data_path, or None."""
    if args.knn_data_path is None:
        return None
    return KnnProbe(
        args.knn_data_path,
        args.global_crop_size,
        device,
        batch_size=max(128, args.batch_size_per_gpu),
        num_workers=workers,
        amp_dtype=amp_dtype,
        flag="--knn_data_path",
    )


def build_state(args, device, amp_dtype):
    """Everything that is trained, as it stands before the first step."""
    student, teacher = build_student_and_teacher(
        args.arch,
        device,
        patch_size=args.patch_size,
        crop_sizes=[args.global_crop_size] + [args.local_crop_size] * (args.local_crops_number > 0),
        drop_path_rate=args.drop_path_rate,
        out_dim=args.out_dim,
        use_bn_in_head=args.use_bn_in_head,
        norm_last_layer=args.norm_last_layer,
        hidden_dim=args.head_hidden_dim,
        bottleneck_dim=args.head_bottleneck_dim,
        grad_checkpointing=args.grad_checkpointing,
    )
    dino_loss = DINOLoss(
        args.out_dim,
        2 + args.local_crops_number,
        args.warmup_teacher_temp,
        args.teacher_temp,
        args.warmup_teacher_temp_epochs,
        args.epochs,
        accum_steps=args.accum_steps,
    )
    if args.compile:
        compile_networks(student, teacher, dino_loss)
    optimizer = build_optimizer(args.optimizer, utils.get_params_groups(student))
    # a scaler that is not enabled does nothing
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    return TrainState(student, teacher, dino_loss.to(device), optimizer, scaler)


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

    def at(self, iteration):
        return {name: values[iteration] for name, values in vars(self).items()}


def global_batch(args):
    """Images per step."""
    return args.batch_size_per_gpu * get_world_size()


def scaled_lr(args):
    """Linear scaling rule (Goyal et al. 2017)."""
    return args.lr * global_batch(args) / 256


def train_one_epoch(run, state, loader):
    """The steps of an epoch, or what is left of them; returns its line of log.txt.

    Saves inside the epoch where that is due. Raises StopRequested, on all ranks after the same
    step, when one of them got a signal to stop.
    """
    args, progress = run.args, run.progress
    loader.sampler.set_position(progress.epoch, progress.steps * args.batch_size_per_gpu)
    for images in run.recorder.steps(loader, progress, run.interruption):
        scheduled = run.schedules.at(progress.iteration)
        loss, grad_norm = train_step(
            state,
            images,
            **scheduled,
            epoch=progress.epoch,
            clip_grad=args.clip_grad,
            freeze_last_layer=args.freeze_last_layer,
            amp_dtype=run.amp_dtype,
            accum_steps=args.accum_steps,
        )
        time_to_save = run.recorder.add(progress, loss, grad_norm, scheduled, run.saver.is_time())
        progress.iteration += 1
        if run.recorder.stop:
            raise StopRequested(run.interruption.name)
        if (time_to_save or run.saver.is_due(progress.iteration)) and progress.steps < len(loader):
            run.save(state)
    return run.recorder.end_epoch(progress, loader, state.student)


def train_step(
    state,
    images,
    *,
    lr,
    weight_decay,
    momentum,
    epoch,
    clip_grad,
    freeze_last_layer,
    amp_dtype,
    accum_steps=1,
):
    """One update of student, center and teacher: Algorithm 1 with multi-crop.

    `images`: the V views, each (B, 3, S, S), which pass the networks in `accum_steps` parts.
    Returns the loss and the norm of all gradients before clipping, both on the device: nothing here
    waits for it.
    """
    utils.set_lr_and_weight_decay(state.optimizer, lr, weight_decay)
    autocast = torch.autocast(
        images[0].device.type, dtype=amp_dtype, enabled=amp_dtype != torch.float32
    )
    state.optimizer.zero_grad()
    losses = []
    for views in utils.in_parts(state.student, images, accum_steps):
        with autocast:
            with torch.no_grad():
                teacher_output = state.teacher(views[:2])  # (2B, K): only the global views
            student_output = state.student(views)  # (VB, K): every view
            loss = state.dino_loss(student_output, teacher_output, epoch)  # moves the center too
        state.scaler.scale(loss / accum_steps).backward()
        losses.append(loss.detach())
    state.scaler.unscale_(state.optimizer)
    norms = utils.clip_gradients(state.student, clip_grad)
    cancel_gradients_last_layer(epoch, state.student, freeze_last_layer)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    update_teacher(state.student, state.teacher, momentum)
    return torch.stack(losses).mean(), torch.stack(norms).norm()


PRECISION_TO_TRY = {
    torch.float16: "--amp_dtype bfloat16 or, slower, float32, ",
    torch.bfloat16: "--amp_dtype float32, ",
    torch.float32: "",
}


def explain_divergence(error, args):
    """The error, with what is saved and what to try."""
    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    precision = PRECISION_TO_TRY[utils.choose_amp_dtype(args.use_fp16, args.amp_dtype, device)]
    saved = Path(args.output_dir) / NEWEST
    kept = f"{saved} is from before that" if saved.exists() else "nothing is saved yet"
    return Diverged(
        f"{error} (--lr {args.lr:g} for 256 images, {scaled_lr(args):.3g} for this batch); {kept}."
        f" Try {precision}a lower --lr, a lower --clip_grad such as 0.3, a lower --teacher_temp."
    )


def main():
    args = parse_args()
    with exit_on_user_error("main_dino.py"):
        try:
            train_dino(args)
        except Diverged as error:
            raise explain_divergence(error, args) from None
        except RuntimeError as error:
            lost = lost_ranks() if get_world_size() > 1 else []
            if not lost:
                raise
            raise LostRank(
                f"rank {', '.join(map(str, lost))} is gone, so this one ends too. Its log says why,"
                " or the system's if it was killed. The same command goes on from the last"
                f" checkpoint. ({str(error).splitlines()[0]})"
            ) from None


if __name__ == "__main__":
    main()
