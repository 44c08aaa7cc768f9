# SPDX-License-Identifier: Apache-2.0
"""What a run does around its steps: begin, resume, log, agree, save, measure, stop."""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dino.backbones import canonical_name
from dino.data.augmentations import MultiCrop
from dino.data.image_loader import ImageLoader
from dino.distributed import gather_objects, print0, shut_down
from dino.errors import UserError
from dino.evaluation.knn import KnnProbe
from dino.evaluation.without_labels import SampleProbe
from dino.loss import DINOLoss
from dino.networks import unwrap
from dino.printable import printable
from dino.randomness import random_state
from dino.signals import Interruption
from dino.training.agreement import Agreement
from dino.training.attention_history import AttentionHistory
from dino.training.checkpoint import (
    Progress,
    check_same_run,
    restore_progress,
    restore_training,
    same_labels,
    to_begin_anew,
    training_payload,
)
from dino.training.plots import draw_first_views, draw_run
from dino.training.recorder import Recorder
from dino.training.saver import NEWEST, Saver
from dino.weights.files import backbone_payload, flags_in
from dino.weights.starting import initialise_from, warn_of_other_images

SECONDS_PER_PICTURE = 60  # between two drawings of the curves, which take a second
BEST_KNN, BEST_RANK = "checkpoint_best_knn.pth", "checkpoint_best_rank.pth"


@dataclass
class TrainState:
    """What is stepped together, and so saved together, under these names."""

    student: nn.Module
    teacher: nn.Module
    dino_loss: DINOLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


@dataclass
class Probes:
    """What measures the backbones between epochs."""

    knn: KnnProbe | None  # None without labels
    sample: SampleProbe
    attention: AttentionHistory | None  # None without --report


@dataclass
class Run:
    """A run: what it trains, on what, and how far it is."""

    args: argparse.Namespace
    state: TrainState
    loader: ImageLoader
    probes: Probes
    schedules: dict  # {name: a value for each iteration}, the arguments of train_step
    progress: Progress
    augmentation: MultiCrop
    amp_dtype: torch.dtype
    interruption: Interruption

    def __post_init__(self):
        args = self.args
        self.recorder = Recorder(args.output_dir, self.state.dino_loss, args, self.progress)
        often = args.saveckp_iters, args.saveckp_minutes
        self.saver = Saver(args.output_dir, *often, args.keep_checkpoints)
        self.agreement = Agreement(self.interruption)
        self.drawn = time.monotonic()  # when the curves were, or the run began

    def begin(self, weights=None):
        """Start a new run: initial weights, empty logs, a picture of its views, first measurements.

        `weights` is the content of the file --init_from, if that is given.
        """
        if weights is not None:
            state = self.state
            networks = state.student, state.teacher, state.dino_loss
            initialise_from(weights, self.args.init_from, *networks)
            warn_of_other_images(weights, self.args.init_from, **self.image_flags())
        self.saver.folder.mkdir(parents=True, exist_ok=True)
        self.recorder.log.start(vars(self.args))
        draw_first_views(self.saver.folder / "augmentations.png", self.loader, self.augmentation)
        self.measure()
        self.keep_attention()

    def resume(self, images, path, checkpoint):
        """Resume an interrupted run, on so many images: everything as saved, or a UserError."""
        saved = flags_in(checkpoint)
        check_same_run(path, saved, vars(self.args))
        flag = "--output_dir" if self.args.resume == "auto" else "--resume"
        restore_training(checkpoint, f"{flag} {path}", vars(self.state))
        progress = self.progress
        restore_progress(progress, checkpoint, f"{flag} {path}", images)
        if not same_labels(saved, vars(self.args)):
            progress.best_knn = 0.0
        done, least = f"{progress.epoch}", "as many"
        if progress.steps:  # backbone.pth is of these, too
            done += f" and {progress.steps} iterations of the next"
            least = f"{progress.epoch + 1}"
        if progress.iteration > self.args.epochs * progress.iterations_per_epoch:
            raise UserError(
                f"--epochs {self.args.epochs}: {path} has done {done}. Give at least {least}, or"
                f" {to_begin_anew(self.args.resume)}."
            )
        self.saver.folder.mkdir(parents=True, exist_ok=True)
        if progress.logged_epochs < self.args.epochs:  # else nothing is done with these flags
            self.recorder.log.rewind(vars(self.args), progress.logged_epochs, progress.epochs_done)
        self.recorder.recall_verdicts()
        inside = f" and {progress.steps} iterations" if progress.steps else ""
        done = f"{progress.epoch} of {self.args.epochs} epochs{inside}"
        print0(printable(f"Resumed from {path}: {done} are done."))
        self.save_missing(path)

    def save_missing(self, path):
        """Write the numbered checkpoint that is due with `path`, if a kill came between the two."""
        names = [name for name in self.numbered_due() if not (self.saver.folder / name).exists()]
        names = gather_objects(names)[0]  # rank 0 writes
        if names and Path(path) == self.saver.folder / NEWEST:
            self.save(names)
            self.saver.wait()  # loader processes are forked next

    def steps(self):
        """Yield (views, the values of the schedules) for the steps of an epoch that are left."""
        self.loader.sampler.set_position(self.progress.epoch, self.progress.images)
        self.loader.while_waiting = self.agreement.while_waiting
        for views in self.recorder.steps(self.loader):
            iteration = self.progress.iteration
            yield views, {name: float(line[iteration]) for name, line in self.schedules.items()}

    def after_step(self, loss, grad_norm, scheduled):
        """All that happens between two steps, in order. Raises StopRequested to end the run."""
        self.recorder.add(loss, grad_norm, scheduled)
        self.progress.count_step()
        last_of_epoch = self.progress.steps == self.progress.iterations_per_epoch
        wanted = self.agreement.after_step(save=self.saver.is_time())
        if (wanted or self.saver.is_due(self.progress.iteration)) and not last_of_epoch:
            self.save()

    def end_epoch(self):
        """After the last step of an epoch: means, checkpoint, measurement if due, line of log.txt.

        The checkpoint comes before the measurement, so that nothing can lose the epoch.
        """
        self.progress.unlogged = self.recorder.end_epoch(self.loader, self.state.student)
        self.progress.count_epoch()
        if self.is_measurement_due():
            self.save()
        self.agreement.settle()
        self.log_epoch()

    def log_epoch(self):
        """Measure and log the epoch in `progress.unlogged`; write the checkpoints due after it."""
        progress, best, measured = self.progress, [], {}
        if self.is_measurement_due():
            measured = self.measure()
            best = self.best_of(measured)
            ahead = measured.get("knn_student", 0) > measured.get("knn_teacher", 0)
            progress.student_ahead = int(ahead)
            self.recorder.judge_measurements(self.probes.knn)
        self.keep_attention()
        # before the save: a resumed run drops a line, adds none
        self.recorder.log.epoch(progress.unlogged | measured)
        progress.unlogged = {}
        numbered = self.numbered_due()
        if numbered or measured or progress.epoch % self.args.resume_freq == 0:
            # the best one first: killed in between, the run measures again, and finds it best again
            self.save([*best, NEWEST, *numbered])
        self.draw_if_due()

    def numbered_due(self):
        """[name of the numbered checkpoint that is due after this epoch], or [].

        None is due inside an epoch, or before its line of the log.
        """
        epoch, every = self.progress.epoch - 1, self.args.saveckp_freq
        if epoch < 0 or self.progress.steps or self.progress.unlogged:
            return []
        return [f"checkpoint{epoch:04}.pth"] if every and epoch % every == 0 else []

    def draw_if_due(self):
        """Draw now and then while training; at the end of the run that is done anyway."""
        ended = self.progress.epoch == self.args.epochs
        if not ended and time.monotonic() > self.drawn + SECONDS_PER_PICTURE:
            self.draw()

    def draw(self):
        """Draw the curves and the attention maps."""
        draw_run(self.saver.folder)
        if self.probes.attention:
            self.probes.attention.draw()
        self.drawn = time.monotonic()

    def is_measurement_due(self):
        epochs = self.progress.epoch
        return epochs % self.args.knn_freq == 0 or epochs == self.args.epochs

    def measure(self):
        """k-NN of both backbones in percent, if there are labels, and the teacher's other measures.

        Returns what is logged: {"knn_teacher", "knn_student", "rank_me", ...}.
        """
        self.saver.wait()  # the probes fork loader workers: better while no other thread runs
        state, probes, until_asked = self.state, self.probes, self.agreement.until_asked
        measured, labels = {}, {}
        with torch.compiler.set_stance("force_eager"):  # other shapes would be compiled anew
            if probes.knn:
                networks = {"knn_teacher": state.teacher, "knn_student": state.student}
                backbones = [unwrap(network).backbone for network in networks.values()]
                accuracies = probes.knn.accuracies(backbones, until_asked)
                measured |= zip(networks, accuracies, strict=True)
                labels = {"knn_set": probes.knn.images}
            measured |= probes.sample.measure(unwrap(state.teacher).backbone, until_asked)
        self.recorder.log.measurement(self.progress, measured, labels)
        return measured

    def keep_attention(self):
        if self.probes.attention:
            teacher = unwrap(self.state.teacher)
            self.probes.attention.after_epoch(teacher.backbone, self.progress.epoch)

    def best_of(self, measured):
        """The names of the checkpoints for which this teacher is the best so far."""
        progress, knn = self.progress, measured.get("knn_teacher")
        if knn is not None and knn > progress.best_knn:
            progress.best_knn = knn
            return [BEST_KNN]
        if knn is None and measured["rank_me"] > progress.best_rank:
            progress.best_rank = measured["rank_me"]
            return [BEST_RANK]
        return []

    def save(self, names=(NEWEST,)):
        """Write a checkpoint of this moment under each of `names`, and the better backbone.

        That is the teacher's, unless the last k-NN accuracy of the student was higher.
        """
        rng = gather_objects(random_state())
        self.progress.sums = self.recorder.sums() if self.progress.steps else {}
        training = training_payload(vars(self.state), vars(self.progress), vars(self.args), rng)
        network = self.better_network()
        backbone = backbone_payload(
            getattr(self.state, network),
            network=network,
            arch=canonical_name(self.args.arch),
            stem=self.args.stem,
            patch_size=self.args.patch_size,
            image_size=self.augmentation.views[0].size,
            **self.image_flags(),
        )
        self.saver.save(dict.fromkeys(names, training) | {"backbone.pth": backbone})

    def image_flags(self):
        """What is made of an image before the backbone sees it, by the names of the flags."""
        return dict(
            mean=self.augmentation.mean,
            std=self.augmentation.std,
            shrink_images=self.augmentation.shorter_side,
            white=self.args.white,
        )

    def better_network(self):
        """The name of the one whose backbone is in backbone.pth."""
        return "student" if self.progress.student_ahead else "teacher"

    def better_backbone(self):
        return unwrap(getattr(self.state, self.better_network())).backbone

    def stop(self, why):
        """Save, and exit with the code of the signal."""
        self.save()
        self.saver.finish()
        print0(f"Stopped by {why}: {self.progress.iteration} iterations are done and saved.")
        shut_down()
        raise SystemExit(self.interruption.exit_code)
