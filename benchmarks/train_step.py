# SPDX-License-Identifier: Apache-2.0
"""Time and memory of main_dino.train_step, on images that are on the device already.

    python benchmarks/train_step.py --batch 64 --against OFFICIAL_CHECKOUT --monitor
    python benchmarks/train_step.py --batch 64 --arch vit_base --compile --amp_dtype float32

Every flag of main_dino.py counts here too; nothing is compiled unless --compile is given. Prints
one JSON line. The host waits for the device after each step, as in the official code. The
milliseconds by part are of further steps, in which it waits after each part as well, so that they
add up to more. `--against` times the official step before ours, in a process of its own: with
float16 where ours has half precision on a GPU, else with float32, as it knows nothing else.
"""

import argparse
import contextlib
import time
from collections import defaultdict
from unittest.mock import patch

import torch
from common import (
    describe_machine,
    eager_unless_asked,
    medians,
    peak_memory_gib,
    print_result,
    run_official_or_say_why,
    synchronize,
    with_ratios,
)
from flops import peak_flops, training_flops

import main_dino
from dino.distributed import choose_device
from dino.errors import exit_on_user_error
from dino.networks import choose_compile
from dino.precision import autocast, choose_amp_dtype
from dino.training.flag_checks import check_training_flags
from dino.training.health import Monitor

# Schedules do not change the time of a step; that the last layer learns does.
SCHEDULED = dict(lr=1e-4, weight_decay=0.04, momentum=0.996, epoch=1, freeze_last_layer=1)
SETTINGS = ("arch", "patch_size", "out_dim", "compile", "accum_steps", "grad_checkpointing")


def main(argv=None):
    args, training = parse_args(argv)
    with exit_on_user_error("train_step.py"):
        result = benchmark(args, training)
    print_result(result)


def benchmark(args, training):
    """What the JSON line says."""
    check_training_flags(training)
    device = choose_device(training.device)
    amp_dtype = choose_amp_dtype(training.amp_dtype, device, training.use_fp16)
    training.compile = choose_compile(training.compile, device)  # what auto means here
    steps = args.steps or (30 if device.type == "cuda" else 5)
    result = {
        "benchmark": "train_step",
        **describe_machine(device),
        **{name: getattr(training, name) for name in SETTINGS},
        "batch": training.batch_size_per_gpu,
        "local": training.local_crops_number,
        "precision": str(amp_dtype).removeprefix("torch."),
        "steps": steps,
    }
    if args.against:
        result["official"] = time_official(args.against, training, steps, device, amp_dtype)
    result |= Step(training, device, amp_dtype).measure(steps, args.warmup, args.monitor)
    return with_ratios(result)


def parse_args(argv):
    """(the flags of this benchmark, those of the training)."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="All flags of main_dino.py are taken too.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--batch", type=int, default=64, help="images per step")
    add("--local", type=int, default=8, help="local crops per image")
    add("--steps", type=int, help="timed steps, of which the median counts; 30, or 5 on a CPU")
    add("--warmup", type=int, default=5, help="steps before these")
    add("--monitor", action="store_true", help="time what is looked at in logged steps")
    add("--against", metavar="OFFICIAL_CHECKOUT", help="time the official step as well")
    args, rest = parser.parse_known_args(argv)
    sizes = ("--batch_size_per_gpu", args.batch, "--local_crops_number", args.local)
    return args, main_dino.parse_args([*eager_unless_asked(rest), *map(str, sizes)])


class Step:
    """The training's state and random views, and what a step on them costs."""

    def __init__(self, training, device, amp_dtype):
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True
        self.training, self.device, self.amp_dtype = training, device, amp_dtype
        views = main_dino.build_augmentation(training).views
        self.state = main_dino.build_state(training, views, device, amp_dtype)
        self.crop_sizes = [view.size for view in views]
        batch = training.batch_size_per_gpu
        self.images = [torch.randn(batch, 3, size, size, device=device) for size in self.crop_sizes]

    def __call__(self):
        main_dino.train_step(
            self.state,
            self.images,
            **SCHEDULED,
            clip_grad=self.training.clip_grad,
            amp_dtype=self.amp_dtype,
        )

    def measure(self, steps, warmup, with_monitor):
        """Time, memory, FLOPs, and by request the monitor's share, for the JSON line."""
        start = time.perf_counter()
        medians(self, self.device, repeats=warmup, warmup=0)
        warmup_seconds = time.perf_counter() - start
        seconds, cpu_seconds = medians(self, self.device, repeats=steps, warmup=0)
        images_per_s = self.training.batch_size_per_gpu / seconds
        result = {
            "ms_per_step": round(1000 * seconds, 2),
            "images_per_s": round(images_per_s, 2),
            "cpu_ms_per_step": round(1000 * cpu_seconds, 2),
            "peak_memory_gib": peak_memory_gib(self.device),
            "warmup_s": round(warmup_seconds, 1),
            "ms_by_part": self.by_part(min(steps, 10)),
            **self.utilisation(images_per_s),
        }
        if with_monitor:
            result["monitor"] = self.monitor_cost(steps, seconds)
        return result

    def utilisation(self, images_per_s):
        """GFLOP of an image, and the share of the device's peak, None where that is unknown."""
        training = self.training
        flops = training_flops(
            training.arch,
            training.patch_size,
            training.out_dim,
            self.crop_sizes,
            training.head_hidden_dim,
            training.head_bottleneck_dim,
        )
        peak = peak_flops(describe_machine(self.device)["device"], self.amp_dtype)
        return {
            "gflop_per_image": round(flops / 1e9, 2),
            "tflops": round(flops * images_per_s / 1e12, 3),
            "mfu": peak and round(flops * images_per_s / peak, 3),
        }

    def by_part(self, steps):
        """Mean milliseconds of each part of a step."""
        parts = Parts(self.device)
        with parts.watching(self.state):
            for _ in range(steps):
                parts.start()
                self()
                parts.end("rest")
        return {name: round(1000 * seconds / steps, 2) for name, seconds in parts.seconds.items()}

    def monitor_cost(self, repeats, step_seconds):
        """Of the figures of a logged step: milliseconds, their share of it, and of all steps.

        From the networks' outputs to numbers on the host.
        """
        training, state = self.training, self.state
        monitor = Monitor(state.dino_loss)
        monitor.watching = True
        part = [view.chunk(training.accum_steps)[0] for view in self.images]
        with torch.no_grad(), autocast(self.device, self.amp_dtype):
            outputs = state.student(part), state.teacher(part[:2]), SCHEDULED["epoch"]

        def look():
            for _ in range(training.accum_steps):
                monitor.look(state.dino_loss, outputs)
            torch.stack(list(monitor.take().values())).tolist()

        seconds, _ = medians(look, self.device, repeats)
        share = seconds / step_seconds
        return {
            "ms": round(1000 * seconds, 2),
            "percent_of_a_logged_step": round(100 * share, 2),
            "percent_at_log_freq": round(100 * share / training.log_freq, 3),
            "log_freq": training.log_freq,
        }


class Parts:
    """Seconds of the parts of train_step, waiting for the device at the end of each.

    The step itself stays as it is: hooks and wrappers around what it calls tell where it is.
    """

    def __init__(self, device):
        self.device, self.seconds = device, defaultdict(float)

    def start(self):
        synchronize(self.device)
        self.last, self.before_teacher = time.perf_counter(), "rest"

    def end(self, name):
        """All since the end of the part before was `name`."""
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[name] += now - self.last
        self.last = now

    def end_loss(self):
        self.end("loss")
        self.before_teacher = "backward"  # of the next part, if gradients are accumulated

    @contextlib.contextmanager
    def watching(self, state):
        """Within it the steps of `state` are timed by part."""
        hooks = [
            state.teacher.register_forward_pre_hook(lambda *_: self.end(self.before_teacher)),
            state.teacher.register_forward_hook(lambda *_: self.end("teacher_forward")),
            state.student.register_forward_hook(lambda *_: self.end("student_forward")),
            state.dino_loss.register_forward_hook(lambda *_: self.end_loss()),
        ]

        def update_teacher(*args, function=main_dino.update_teacher):
            self.end("clip_and_optimizer")
            function(*args)
            self.end("ema")

        def unscale(optimizer, function=state.scaler.unscale_):
            self.end("backward")
            function(optimizer)

        with (
            patch.object(main_dino, "update_teacher", update_teacher),
            patch.object(state.scaler, "unscale_", unscale),
        ):
            yield
        for hook in hooks:
            hook.remove()


def time_official(checkout, training, steps, device, amp_dtype):
    """What official.py says of the same step."""
    options = ["--arch", training.arch, "--patch_size", training.patch_size]
    options += ["--batch", training.batch_size_per_gpu, "--local", training.local_crops_number]
    options += ["--out_dim", training.out_dim, "--steps", steps, "--device", device.type]
    options += ["--fp32"] if amp_dtype == torch.float32 else []
    return run_official_or_say_why(checkout, "step", *options)


if __name__ == "__main__":
    main()
