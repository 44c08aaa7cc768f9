# SPDX-License-Identifier: Apache-2.0
"""What a run does between its steps: begin, resume, measure, save, stop."""

import argparse
from dataclasses import dataclass

import torch
from torch import nn

from augmentations import IMAGENET_MEAN, IMAGENET_STD
from backbones import canonical_name
from checkpoints import (
    backbone_payload,
    flags_in,
    random_state,
    restore_training,
    training_payload,
    unwrap,
)
from dino import DINOLoss
from distributed import gather_objects, print0, shut_down
from interruption import Interruption
from plots import draw_first_views, draw_run
from recorder import Recorder
from resume import Progress, check_same_run, initialise_from, restore_progress
from saving import NEWEST, Saver

BEST = "checkpoint_best_knn.pth"


@dataclass
class TrainState:
    """What is stepped together, and so saved together, under these names."""

    student: nn.Module
    teacher: nn.Module
    dino_loss: DINOLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


@dataclass
class Run:
    """What a run carries along, beside the state that it trains."""

    args: argparse.Namespace
    schedules: object  # with the values of each iteration: `at`
    progress: Progress
    recorder: Recorder
    saver: Saver
    interruption: Interruption
    amp_dtype: torch.dtype

    def begin(self, state, loader, probe):
        """A new run: weights to start from, empty logs, the picture of its views, a first k-NN."""
        if self.args.init_from:
            initialise_from(self.args.init_from, state.student, state.teacher, state.dino_loss)
        self.saver.folder.mkdir(parents=True, exist_ok=True)
        self.recorder.log.start(vars(self.args))
        draw_first_views(self.saver.folder / "augmentations.png", loader)
        self.measure_knn(state, probe)

    def resume(self, state, path, checkpoint):
        """An interrupted run: everything as the checkpoint has it, or a UserError."""
        check_same_run(path, flags_in(checkpoint), vars(self.args))
        flag = "--output_dir" if self.args.resume == "auto" else "--resume"
        restore_training(checkpoint, f"{flag} {path}", vars(state))
        restore_progress(self.progress, checkpoint, f"{flag} {path}")
        self.saver.folder.mkdir(parents=True, exist_ok=True)
        self.recorder.log.rewind(vars(self.args), self.progress.epoch, self.progress.iteration)
        inside = f" and {self.progress.steps} iterations" if self.progress.steps else ""
        done = f"{self.progress.epoch} of {self.args.epochs} epochs{inside}"
        print0(f"Resumed from {path}: {done} are done.")

    def end_epoch(self, state, probe, means):
        """After the last step of an epoch: k-NN where it is due, checkpoints, log, curves."""
        args, progress, epoch = self.args, self.progress, self.progress.epoch
        names = [NEWEST]
        if args.saveckp_freq and epoch % args.saveckp_freq == 0:
            names.append(f"checkpoint{epoch:04}.pth")
        if (epoch + 1) % args.knn_freq == 0 or epoch + 1 == args.epochs:
            knn = self.measure_knn(state, probe)
            if knn.get("knn_teacher", 0.0) > progress.best_knn:
                progress.best_knn = knn["knn_teacher"]
                names.append(BEST)
            means |= knn
        self.recorder.log.epoch(means)  # before the save: a resumed run drops a line, adds none
        progress.epoch = epoch + 1
        self.save(state, names)
        draw_run(self.saver.folder)

    def measure_knn(self, state, probe):
        """k-NN of both backbones: {"knn_teacher": percent, "knn_student": percent}, or {}."""
        if probe is None:
            return {}
        self.saver.wait()  # the probe forks loader workers: better while no other thread runs
        with torch.compiler.set_stance("force_eager"):  # other shapes would be compiled anew
            accuracies = {
                f"knn_{name}": probe.accuracy(
                    unwrap(getattr(state, name)).backbone, self.interruption.unless_asked
                )
                for name in ("teacher", "student")
            }
        self.recorder.log.knn(self.progress, accuracies)
        return accuracies

    def save(self, state, names=(NEWEST,)):
        """A checkpoint of this moment under each of `names`, and the teacher's backbone."""
        rng = gather_objects(random_state())
        self.progress.sums = self.recorder.sums() if self.progress.steps else {}
        training = training_payload(vars(state), vars(self.progress), vars(self.args), rng)
        backbone = backbone_payload(
            state.teacher,
            arch=canonical_name(self.args.arch),
            patch_size=self.args.patch_size,
            image_size=self.args.global_crop_size,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        )
        self.saver.save(dict.fromkeys(names, training) | {"backbone.pth": backbone})

    def stop(self, state, why):
        """Save, and exit with the code of the signal."""
        self.save(state)
        self.saver.finish()
        print0(f"Stopped by {why}: {self.progress.iteration} iterations are done and saved.")
        shut_down()
        raise SystemExit(self.interruption.exit_code)
