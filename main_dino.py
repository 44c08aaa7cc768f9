# SPDX-License-Identifier: Apache-2.0
"""Train DINO: self-distillation with no labels (Caron et al. 2021, arXiv 2104.14294).

    python main_dino.py --preset demo                                   # no data, no GPU: 3 minutes
    python main_dino.py --data_path photos/ --output_dir runs/photos    # one GPU
    torchrun --standalone --nproc_per_node=8 main_dino.py --data_path imagenet/train/ ...

The last one is the authors' "vanilla" run: 100 epochs of ViT-S/16 on 8 GPUs took them 1.75 days and
gave k-NN 69.3, linear 74.0 (README of the official repository). Run the same command again to
resume an interrupted run.
"""

import contextlib
import functools
import gc
import os

# Threads that wait for each other yield their core; this must be set before torch is loaded.
# Without it a step of the demo takes 3 s, not 0.5 s, on cores that other programs use as well.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch.nn.parallel import DistributedDataParallel

from dino.command_line import loader_workers
from dino.data.augmentations import DataAugmentationDINO
from dino.data.images import limit_pixels
from dino.data.levels import set_white
from dino.distributed import get_world_size, init_distributed, shut_down
from dino.errors import exit_on_user_error
from dino.loss import DINOLoss
from dino.networks import update_teacher
from dino.optim import (
    cancel_gradients_backbone,
    cancel_gradients_last_layer,
    clip_gradients,
    set_lr_and_weight_decay,
)
from dino.precision import autocast, choose_amp_dtype
from dino.randomness import fix_random_seeds
from dino.run_lock import owned
from dino.same_on_ranks import check_same_flags, check_same_images
from dino.signals import StopRequested, exit_when_stopped, listen
from dino.training.auto import decide_settings
from dino.training.budget import seconds_per_step
from dino.training.building import build_loader, build_probes, build_schedules, build_state
from dino.training.checkpoint import Progress
from dino.training.correlation import view_correlation
from dino.training.data import build_augmentation, check_batch, describe_images, open_images
from dino.training.failures import divergence_explained, lost_ranks_explained
from dino.training.flag_checks import check_iterations, check_training_flags
from dino.training.flags import complete, get_args_parser, parse_args
from dino.training.html_report import report_run
from dino.training.idle_flags import tell_idle_flags
from dino.training.own_views import check_augmentation, check_returned
from dino.training.presets import DECIDED
from dino.training.recorder import report_end, report_start
from dino.training.run import Run
from dino.training.saver import check_resume, find_checkpoint, own_checkpoints
from dino.weights.layouts import read_weights

__all__ = ["DINOLoss", "DataAugmentationDINO", "get_args_parser", "train_dino", "train_step"]


def train_dino(args, images=None, augmentation=None):
    """The whole job, in the order of the work.

    `args` may come from the official parser. `images`: any sequence of PIL images, or of tuples
    that begin with one, instead of --data_path. `augmentation`: a MultiCrop of your own views.
    Leaves checkpoints, backbone.pth and logs in --output_dir. Raises UserError for a mistake that
    the user can fix, Diverged if the loss is not finite, and SystemExit after a signal, once all is
    saved.
    """
    interruption = listen()
    args = complete(args)
    limit_pixels(args.max_image_pixels)
    check_resume(args.resume, args.output_dir)
    if args.preset not in DECIDED:
        check_training_flags(args, own_views=bool(augmentation or args.augmentation))
    begins = args.init_from and not own_checkpoints(args.output_dir)
    weights = read_weights(args.init_from, "--init_from") if begins else None

    # ---- processes ----
    launch, device = init_distributed(args.device, args.dist_url)
    check_same_flags(args)
    tell_idle_flags(args)
    fix_random_seeds(args.seed)  # the same on every rank: all start from the same weights
    torch.backends.cudnn.benchmark = True

    # ---- data ----
    images, knn_data_path = open_images(args, images)
    args, augmentation = settle(args, images, augmentation, device, weights)
    workers = loader_workers(args.num_workers)
    loader = build_loader(args, images, augmentation, workers, device)
    probes = build_probes(args, images, knn_data_path, augmentation, workers, device)
    if probes.knn:
        args.knn_set = probes.knn.images
        check_same_images("--knn_data_path", args.knn_set)

    # ---- student, teacher, loss, optimizer, schedules ----
    amp_dtype = choose_amp_dtype(args.amp_dtype, device, args.use_fp16)
    state = build_state(args, augmentation.views, device, amp_dtype)
    global_batch = args.batch_size_per_gpu * get_world_size()
    scaled_lr = args.lr * global_batch / 256  # linear scaling rule (Goyal et al. 2017)
    check_iterations(args, len(loader))
    schedules = build_schedules(args, scaled_lr, len(loader))

    progress = Progress(iterations_per_epoch=len(loader), global_batch=global_batch)
    report_start(args, launch, device, amp_dtype, len(images), scaled_lr, progress)

    with owned(args.output_dir), divergence_explained(args):
        # ---- begin, or resume ----
        found = find_checkpoint(args.resume, args.output_dir)
        run = Run(
            args=args,
            state=state,
            loader=loader,
            probes=probes,
            schedules=schedules,
            progress=progress,
            augmentation=augmentation,
            amp_dtype=amp_dtype,
            interruption=interruption,
        )
        if found is None:
            run.begin(weights)
        fix_random_seeds(args.seed + launch.rank)  # from here each rank drops paths of its own
        if found is not None:
            run.resume(len(images), *found)
        found = weights = None  # each rank would keep a checkpoint in memory

        # ---- training ----
        interruption.defer()
        try:
            if progress.unlogged:
                run.log_epoch()
            while progress.epoch < args.epochs:
                train_one_epoch(run)
                run.end_epoch()
        except StopRequested as stop:
            run.stop(stop)
        run.saver.finish()
        run.draw()  # also where a kill came between the last checkpoint and its pictures
        report_end(probes.knn, run.recorder.log, args)
        if args.report:
            report_run(args.output_dir, run.better_backbone(), images, augmentation)
    shut_down()


def settle(args, images, augmentation, device, weights):
    """(args, augmentation) as they stay, after --preset auto has decided what was not given.

    `augmentation` may be one's own, `weights` the content of --init_from. UserError for flags that
    do not fit each other or the images.
    """
    own_views = bool(augmentation or args.augmentation)
    described = describe_images(images, args)
    check_same_images("--data_path", described)
    if augmentation is not None:
        check_augmentation(augmentation, "augmentation")
    if own_views:
        source = "--augmentation" if args.augmentation else "augmentation"
        augmentation = augmentation or build_augmentation(args)
        check_returned(augmentation, images, source)
    if args.preset in DECIDED:
        trial = dict(images=images, augmentation=augmentation, device=device)
        args = decide_settings(
            args,
            images,
            device,
            functools.partial(correlate_views, **trial),
            functools.partial(time_a_step, **trial),
            weights,
            own_views,
        )
        gc.collect()  # compiled networks are in cycles: those on trial would stay on the device
        # the timed steps drew random numbers, how many depends on the clock
        fix_random_seeds(args.seed)
        check_training_flags(args, own_views)
    set_white(args.white)
    augmentation = augmentation or build_augmentation(args)
    args.mean, args.std = augmentation.mean, augmentation.std
    args.in_chans = len(augmentation.mean)
    args.train_set = described
    check_batch(args, len(images))
    return args, augmentation


def train_one_epoch(run):
    """The steps of an epoch, or those left of it."""
    args = run.args
    for views, scheduled in run.steps():
        loss, grad_norm = train_step(
            run.state,
            views,
            **scheduled,
            epoch=run.progress.epoch,
            clip_grad=args.clip_grad,
            freeze_last_layer=args.freeze_last_layer,
            freeze_backbone=args.freeze_backbone,
            amp_dtype=run.amp_dtype,
        )
        run.after_step(loss, grad_norm, scheduled)


def train_step(
    state,
    views,
    *,
    lr,
    weight_decay,
    momentum,
    epoch,
    clip_grad,
    freeze_last_layer,
    amp_dtype,
    freeze_backbone=0,
):
    """One update of student, center and teacher: Algorithm 1 with multi-crop.

    `views`: V tensors (B, C, S, S), S the view's own size, the two global ones first. They pass
    through the networks in `dino_loss.accum_steps` parts, whose gradients add up to one update.

    Returns the loss and the norm of all gradients, before clipping and with those that are then
    cancelled. Both stay on the device: the step does not synchronise with it, except in float16
    with SGD or LARS (see build_optimizer).
    """
    set_lr_and_weight_decay(state.optimizer, lr, weight_decay)
    state.optimizer.zero_grad()
    losses, parts = [], state.dino_loss.accum_steps
    for part in range(parts):
        crops = [view.chunk(parts)[part] for view in views]
        with no_sync(state.student, enabled=part < parts - 1):
            loss = forward(state, crops, epoch, amp_dtype)
            state.scaler.scale(loss / parts).backward()
        losses.append(loss.detach())
    state.scaler.unscale_(state.optimizer)
    norms = clip_gradients(state.student, clip_grad)
    cancel_gradients_last_layer(epoch, state.student, freeze_last_layer)
    cancel_gradients_backbone(epoch, state.student, freeze_backbone)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    update_teacher(state.student, state.teacher, momentum)
    return torch.stack(losses).mean(), torch.stack(norms).norm()


def forward(state, crops, epoch, amp_dtype):
    """Mean of H(P_t, P_s) over this process's B images; the loss then updates the center.

    `crops`: V tensors (B, C, S, S).
    """
    with autocast(crops[0].device, amp_dtype):
        with torch.no_grad():
            teacher_output = state.teacher(crops[:2])  # (2B, K): only the global views
        student_output = state.student(crops)  # (VB, K): every view
        return state.dino_loss(student_output, teacher_output, epoch)


def no_sync(student, enabled):
    """DistributedDataParallel's no_sync if `enabled`: gradients stay in their process."""
    if enabled and isinstance(student, DistributedDataParallel):
        return student.no_sync()
    return contextlib.nullcontext()


def build_trial(args, images, augmentation, device):
    """(loader, state, amp_dtype) of a throw-away run with these flags, on which to measure."""
    augmentation = augmentation or build_augmentation(args)
    amp_dtype = choose_amp_dtype(args.amp_dtype, device, args.use_fp16)
    fix_random_seeds(args.seed)
    state = build_state(args, augmentation.views, device, amp_dtype)
    fix_random_seeds(args.seed)  # building drew random numbers
    workers = loader_workers(args.num_workers, silent=True)
    return build_loader(args, images, augmentation, workers, device), state, amp_dtype


def correlate_views(args, images, augmentation, device):
    """How alike the views of an image are to the network before training, see view_correlation."""
    loader, state, _ = build_trial(args, images, augmentation, device)
    with torch.compiler.set_stance("force_eager"):  # three batches are not worth compiling for
        return view_correlation(state.student, loader)


def time_a_step(args, images, augmentation, device):
    """Seconds that a step of the run with these flags takes, with the loading of its images."""
    loader, state, amp_dtype = build_trial(args, images, augmentation, device)

    def step(views):
        train_step(
            state,
            views,
            lr=0.0,
            weight_decay=0.0,
            momentum=1.0,
            epoch=0,
            clip_grad=args.clip_grad,
            freeze_last_layer=0,
            amp_dtype=amp_dtype,
        )

    return seconds_per_step(step, loader, device)


def main(args=None):
    """Train, by the command line unless `args` are given; a stop or an error ends the process."""
    name = "main_dino.py"
    with exit_on_user_error(name), exit_when_stopped(name), lost_ranks_explained():
        train_dino(args or parse_args())


if __name__ == "__main__":
    main()
