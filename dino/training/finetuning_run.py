# SPDX-License-Identifier: Apache-2.0
"""A fine-tuning run around its steps: resume, validate, log, save, stop.

`checkpoint.pth`, from which a run resumes inside an epoch too, holds the FineTuningState, the
FineTuningProgress and a description of the run. `best_finetuned.pth` holds the backbone as
backbone.pth does, the head as a file of a linear head does, and the names of the classes.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.utils import ModelEmaV3

from dino.distributed import all_reduce_sum, get_world_size, is_main_process, print0, shut_down
from dino.errors import Diverged, UserError
from dino.evaluation.features import FrozenFeatures
from dino.evaluation.linear import evaluate_heads
from dino.meters import MetricLogger, is_due
from dino.networks import unwrap
from dino.printable import printable
from dino.run_log import RunLog
from dino.signals import Interruption, StopRequested
from dino.training.agreement import Agreement
from dino.training.finetuning import FineTuningState, Regularisation, finetuning_step
from dino.training.saver import NEWEST, Saver, newest_whole, own_checkpoints
from dino.weights.files import backbone_payload
from dino.weights.loading import restore, restore_numbers
from dino.weights.results import check_has_best, is_beginning

BEST = "best_finetuned.pth"
PRINT_FREQ = 20  # iterations between two lines of the console
MOST = 2**31


@dataclass
class FineTuningProgress:
    """How far a run is. Its fields are entries of the checkpoint."""

    epoch: int = 0  # epochs done, with their validation
    steps: int = 0  # steps done of the next one
    loss_sum: float = 0.0  # of these steps: means over the processes
    best_acc: float = -1.0  # top-1 in percent, of the weights or of their average
    best_epoch: int = 0


@dataclass
class FineTuningRun:
    """Everything a run needs; `train` does it."""

    state: FineTuningState
    average: ModelEmaV3
    regularisation: Regularisation
    schedule: list  # the head's learning rate at each step
    loader: object
    val_loader: object
    val_images: int  # of all processes together
    description: dict  # what must be the same for a run to resume, as plain values
    backbone: dict  # how to build and feed the backbone, for backbone_payload
    saver: Saver
    interruption: Interruption
    amp_dtype: torch.dtype
    seed: int
    progress: FineTuningProgress = field(default_factory=FineTuningProgress)

    def __post_init__(self):
        self.agreement = Agreement(self.interruption)
        self.folder = Path(self.saver.folder)
        self.log = RunLog(self.folder)
        self.total = None  # of the epoch's losses, on the device

    def resume(self, epochs):
        """Restore what an interrupted run saved, if there is one; UserError for another run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = newest_whole(own_checkpoints(self.folder))
        if found is not None and not is_beginning(*found, BEST):
            path, checkpoint = found
            source, progress = f"--output_dir {path}", self.progress
            optimizer = self.state.optimizer
            decays = [group["weight_decay"] for group in optimizer.param_groups]
            restore(checkpoint, source, description=self.description, **vars(self.state))
            restore_finetuning(progress, checkpoint, source, epochs, len(self.loader))
            steps = progress.epoch * len(self.loader) + progress.steps
            check_optimizer(optimizer, decays, steps, self.state.scaler.is_enabled(), source)
            done = f"{progress.epoch} of {epochs} epochs and {progress.steps} iterations"
            print0(printable(f"Resumed from {path}: {done} are done."))
            if progress.best_acc >= 0:
                check_has_best(path, BEST, progress.best_epoch)
        else:
            self.save()  # results without a checkpoint are another run's
        if is_main_process():
            self.log.keep("log.txt", lambda line: line["epoch"] < self.progress.epoch)

    def train(self, epochs, val_freq):
        """All epochs that are left. A request to stop saves, and exits with its code."""
        progress = self.progress
        self.interruption.defer()
        try:
            while progress.epoch < epochs:
                self.train_one_epoch()
                self.agreement.settle()
                last = progress.epoch + 1 == epochs
                self.end_epoch(validate=last or progress.epoch % val_freq == 0)
        except StopRequested as stop:
            self.save()
            self.saver.finish()
            done = f"{progress.epoch} epochs and {progress.steps} iterations"
            print0(f"Stopped by {stop}: {done} are done and saved.")
            shut_down()
            raise SystemExit(self.interruption.exit_code) from None
        self.saver.finish()

    def train_one_epoch(self):
        """The steps of an epoch, or those left of it."""
        progress, length = self.progress, len(self.loader)
        used = progress.steps * self.loader.batch_size * get_world_size()
        self.loader.sampler.set_position(progress.epoch, used)
        self.loader.while_waiting = self.agreement.while_waiting
        self.state.model.train()
        logger = MetricLogger(delimiter="  ")
        self.total = torch.tensor(
            progress.loss_sum, dtype=torch.float64, device=self.regularisation.device
        )
        header = f"Epoch: [{progress.epoch}]"
        for images, labels in logger.log_every(self.loader, PRINT_FREQ, header, progress.steps):
            number = progress.epoch * length + progress.steps
            loss = finetuning_step(
                self.state,
                self.average,
                self.regularisation,
                images,
                labels,
                lr=self.schedule[number],
                key=(self.seed, progress.epoch, progress.steps),
                amp_dtype=self.amp_dtype,
                number=number + 1,
            )
            self.total += all_reduce_sum(loss.double()) / get_world_size()
            if is_due(progress.steps, length, PRINT_FREQ):
                logger.update(loss=loss.item(), lr=self.schedule[number])
            progress.steps += 1
            if self.agreement.after_step(save=self.saver.is_time()):
                self.save()

    def end_epoch(self, validate):
        """Validate if that is due, log, count the epoch, save."""
        progress = self.progress
        loss = self.total.item() / len(self.loader)
        if not math.isfinite(loss):
            raise Diverged(
                f"the loss is {loss} in epoch {progress.epoch}. Try a lower --lr, --min_lr or"
                " --weight_decay."
            )
        lr = self.schedule[(progress.epoch + 1) * len(self.loader) - 1]
        line = {"train_loss": loss, "train_lr": lr, "epoch": progress.epoch}
        line |= {"layer_decay": self.description["layer_decay"]}
        best = None
        if validate:
            measured = {"": self.measure(unwrap(self.state.model))}
            measured["ema_"] = self.measure(self.state.ema)
            for prefix, result in measured.items():
                line |= {f"test_{prefix}{name}": value for name, value in result.items()}
            best = self.take(measured)
        self.log.epoch(line)
        progress.epoch, progress.steps, progress.loss_sum = progress.epoch + 1, 0, 0.0
        self.save(best)

    def measure(self, model):
        """{"loss", "acc1", "acc5"} of `model` on val/, printed."""
        model.eval()
        device, dim = self.regularisation.device, model.head.linear.in_features
        features = FrozenFeatures(
            model.backbone, dim, device, n_last_blocks=1, amp_dtype=self.amp_dtype
        )
        batches = self.agreement.until_asked(self.val_loader)
        (result,) = evaluate_heads(features, [model.head], batches, self.val_images)
        which = "average of the weights" if model is self.state.ema else "network"
        after = f"after epoch {self.progress.epoch} on the {self.val_images} test images"
        print0(f"Accuracy of the {which} {after}: {result['acc1']:.1f}%")
        return result

    def take(self, measured):
        """The content of BEST if one of the two networks is the best so far, else None."""
        progress = self.progress
        which = max(measured, key=lambda prefix: measured[prefix]["acc1"])
        accuracy = measured[which]["acc1"]
        if accuracy <= progress.best_acc:
            return None
        progress.best_acc, progress.best_epoch = accuracy, progress.epoch
        model = self.state.ema if which else unwrap(self.state.model)
        return {
            **self.description,
            **backbone_payload(model, network="finetuned", **self.backbone),
            "state_dict": model.head.state_dict(),
            "accuracy": accuracy,
            "epoch": progress.epoch,
        }

    def save(self, best=None):
        """Write the checkpoint of this moment and, before it, BEST if there is a new one."""
        self.progress.loss_sum = self.total.item() if self.progress.steps else 0.0
        objects = {
            name: (unwrap(value) if name == "model" else value).state_dict()
            for name, value in vars(self.state).items()
        }
        checkpoint = {**self.description, **objects, **vars(self.progress)}
        self.saver.save({**({BEST: best} if best else {}), NEWEST: checkpoint})


def check_optimizer(optimizer, decays, steps, may_skip, source):
    """Raise UserError unless the optimizer has taken so many steps, or fewer if it `may_skip` some,
    with these weight `decays` of its groups.
    """
    taken = max((int(moments["step"]) for moments in optimizer.state.values()), default=0)
    own = decays == [group["weight_decay"] for group in optimizer.param_groups]
    if not own or taken > steps or (taken < steps and not may_skip):
        what = f"has taken {taken} of {steps} steps" if own else "has other weight decays"
        raise UserError(f"{source}: its optimizer {what}. Give another --output_dir.")


def restore_finetuning(progress, checkpoint, source, epochs, length):
    """Fill `progress` from a checkpoint; UserError for values that a run cannot have."""
    if type(checkpoint.get("epoch")) is int and epochs < checkpoint["epoch"] < MOST:
        raise UserError(
            f"--epochs {epochs}: {source} has done {checkpoint['epoch']}. Give as many, or another"
            " --output_dir."
        )
    highest = dict(epoch=epochs, steps=length, loss_sum=math.inf, best_acc=100, best_epoch=epochs)
    restore_numbers(progress, checkpoint, source, highest)
