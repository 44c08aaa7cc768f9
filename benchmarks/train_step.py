# SPDX-License-Identifier: Apache-2.0
"""Time and memory of main_dino.train_step, on images that are on the device already.

    python benchmarks/train_step.py --batch 64 [--against OFFICIAL_CHECKOUT] [--monitor]
    python benchmarks/train_step.py --batch 64 --arch vit_base --compile true --amp_dtype float32

Every flag of main_dino.py counts here too. One JSON line. Each step is waited for, so that its time
is that of both host and device; the milliseconds by part come from further steps, which wait after
every part, so that they add up to more. `--against` times the official step in a process of its
own, before ours: float16 where ours is in half precision on a GPU, else float32, for it has no
other.
"""

import argparse
import contextlib
import time
from unittest.mock import patch

import torch
from common import describe_machine, medians, peak_memory_gib, print_result, run_official
from common import synchronize as wait_for
from flops import flops_per_image, peak_flops

import main_dino
import training_flags
import utils
from distributed import Launch, choose_device
from errors import exit_on_user_error
from monitor import Monitor

# What a step needs to know, and what does not change its time.
SCHEDULED = dict(lr=1e-4, weight_decay=0.04, momentum=0.996, epoch=1, freeze_last_layer=1)
SETTINGS = "arch patch_size out_dim use_bn_in_head compile accum_steps grad_checkpointing".split()


def main():
    args, training = parse_args()
    device = choose_device(training.device, Launch("python"))
    amp_dtype = utils.choose_amp_dtype(training.use_fp16, training.amp_dtype, device)
    result = {
        "benchmark": "train_step",
        **describe_machine(device),
        "batch": training.batch_size_per_gpu,
        "local": training.local_crops_number,
        **{name: getattr(training, name) for name in SETTINGS},
        "precision": str(amp_dtype).removeprefix("torch."),
        "steps": args.steps,
    }
    official = args.against and time_official(args, training, amp_dtype)
    result |= time_step(args, training, device, amp_dtype)
    if official:
        result["official"] = official
        result["ratio"] = {
            "images_per_s": round(result["images_per_s"] / official["images_per_s"], 2),
            "peak_memory": round(result["peak_memory_gib"] / official["peak_memory_gib"], 2),
        }
    print_result(result)
