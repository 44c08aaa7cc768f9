# SPDX-License-Identifier: Apache-2.0
"""What main_dino.py prints before it starts and after it has ended."""

import math

import torch

from distributed import is_main_process, print0
from knn import raw_pixels
from presets import PRESETS


def report_start(args, launch, device, amp_dtype, images, scaled_lr, progress):
    """Every flag with its value, and what follows from them."""
    print0(*[f"{flag}: {value}" for flag, value in sorted(vars(args).items())], sep="\n")
    if args.preset:
        preset = PRESETS[args.preset]
        print0(f"Preset {args.preset}: {preset.source}. Reported: {preset.reported}.")
    if device.type == "cuda":
        place = torch.cuda.get_device_name(device)
    else:
        place = f"CPU with {torch.get_num_threads()} threads"
    processes = "process" if launch.world_size == 1 else "processes"
    precision = str(amp_dtype).removeprefix("torch.")
    iterations, global_batch = progress.iterations_per_epoch, progress.global_batch
    print0(
        f"{launch.world_size} {processes} by {launch.launcher}, {place}, {precision},"
        f" PyTorch {torch.__version__}"
    )
    print0(
        f"{images} images, {iterations} iterations of {global_batch} images per epoch,"
        f" {iterations * args.epochs} in all"
    )
    print0(
        f"learning rate {args.lr:g} x {global_batch} / 256 = {scaled_lr:.3g}; a loss that stays"
        f" at ln(out_dim) = {math.log(args.out_dim):.3f} means that nothing is learnt"
    )
    gpus = torch.cuda.device_count() if device.type == "cuda" else 1
    if launch.launcher == "python" and gpus > 1:
        command = f"torchrun --standalone --nproc_per_node={gpus} main_dino.py"
        print0(f"1 of {gpus} GPUs is used; for all of them: {command} ...")


def report_end(probe, log):
    """The accuracy before and after training, and that of no network at all."""
    if probe is None:
        return
    measured = log.read("knn_teacher")
    raw = probe.accuracy(raw_pixels())
    if is_main_process():
        print0(
            f"k-NN accuracy (k = {probe.k}) on the held-out images of {probe.data_path}:\n"
            f"  raw pixels         {raw:5.1f} %\n"
            f"  untrained backbone {measured[0]['knn_teacher']:5.1f} %\n"
            f"  trained backbone   {measured[-1]['knn_teacher']:5.1f} %"
        )
