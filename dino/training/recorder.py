# SPDX-License-Identifier: Apache-2.0
"""What is written down of a run while it trains: one wait for the device per logged iteration."""

import math

import torch

from distributed import all_reduce_sum, get_world_size, heartbeat
from errors import Diverged
from metrics import MetricLogger, RunLog, SmoothedValue, is_due, peak_memory_mb
from monitor import Health, Monitor

# Means over all iterations of an epoch, by their official names, and over its logged ones, by ours.
OFFICIAL = ("loss", "lr", "wd")
FIGURES = ("teacher_entropy", "kl", "outputs_used", "agreement", "grad_norm", "images_per_s")


class Recorder:
    """Takes every step's loss, and at the logged ones looks, judges, prints and writes.

    `log` has the files. `stop` is whether the ranks agreed, at the last logged iteration, to stop.
    """

    def __init__(self, output_dir, dino_loss, args):
        self.log = RunLog(output_dir, args.tensorboard)
        self.monitor = Monitor(dino_loss)
        self.teacher_temps = dino_loss.teacher_temp_schedule.tolist()
        self.log_out_dim = math.log(dino_loss.center.shape[1])
        said = {line["verdict"] for line in self.log.read("verdict")}
        self.health = Health(self.log_out_dim, args.freeze_last_layer, said)
        self.epochs, self.log_freq, self.save_iters = args.epochs, args.log_freq, args.saveckp_iters
        self.stop = False

    def steps(self, loader, progress, interruption):
        """Yield the batches of an epoch, or those that are left of it, and show progress."""
        self.logger, self.figures = console_logger(), MetricLogger()
        self.restore_sums(progress.sums)
        self.interruption = interruption
        self.losses = []  # of the steps since the last logged one, still on the device
        header = f"Epoch: [{progress.epoch}/{self.epochs}]"
        batches = self.logger.log_every(loader, self.log_freq, header, start=progress.steps)
        for images in batches:
            self.monitor.watching = self.is_watched(progress)
            yield images

    def is_watched(self, progress):
        """Whether to look at the coming step: to log it, to save after it, or to stop after it.

        Of these only the first two are the same on every rank by themselves.
        """
        logged = is_due(progress.steps, progress.iterations_per_epoch, self.log_freq)
        saved = self.save_iters and (progress.iteration + 1) % self.save_iters == 0
        return bool(logged or saved or (get_world_size() == 1 and self.interruption.requested))

    def add(self, progress, loss, grad_norm, scheduled, time_to_save):
        """Take what a step gave, on the device; return whether a rank's clock says to save now.

        Raises Diverged for a loss that is not finite.
        """
        self.losses.append(loss)
        self.logger.update(lr=scheduled["lr"], wd=scheduled["weight_decay"])
        if not self.monitor.watching:
            return False
        heartbeat()
        wishes = torch.tensor(
            [float(self.interruption.requested), float(time_to_save)], device=loss.device
        )
        figures = self.monitor.take() | {"grad_norm": grad_norm}
        losses, figures, (stop, save) = fetch_means(self.losses, figures, wishes)
        self.losses, self.stop = [], stop > 0
        for back, value in enumerate(losses, start=1 - len(losses)):
            if not math.isfinite(value):
                raise Diverged(
                    f"the loss is {value} at epoch {progress.epoch},"
                    f" iteration {progress.iteration + back}"
                )
            self.logger.update(loss=value)
        self.write(progress, losses[-1], figures, scheduled)
        return save > 0

    def write(self, progress, loss, figures, scheduled):
        """A line of metrics.jsonl: entropies in nats and as shares of ln K, times as shares."""
        seconds, waited, steps = self.logger.lap()
        entropy = figures.pop("teacher_entropy")
        kl = loss - entropy
        record = {
            "iteration": progress.iteration,
            "epoch": (progress.iteration + 1) / progress.iterations_per_epoch,
            "loss": loss,
            "teacher_entropy": entropy,
            "kl": kl,
            "teacher_entropy_share": entropy / self.log_out_dim,
            "kl_share": kl / self.log_out_dim,
            **figures,
            **scheduled,
            "teacher_temp": self.teacher_temps[progress.epoch],
            "images_per_s": steps * progress.global_batch / seconds,
            "data_wait": waited / seconds,
            "peak_memory_mb": round(peak_memory_mb()),
        }
        self.logger.update(**{"h %": 100 * record["teacher_entropy_share"]})
        self.logger.update(**{"KL %": 100 * record["kl_share"]})
        self.figures.update(**{name: record[name] for name in FIGURES})
        self.health.add(record)
        self.log.iteration(record)

    def end_epoch(self, progress, loader, student):
        """The epoch's line of log.txt, the official keys first; says what the epoch has shown.

        Raises Diverged for a weight that is not finite, which a step after a finite loss can leave.
        """
        norms = torch.stack(torch._foreach_norm(list(student.parameters())))
        if not norms.isfinite().all():
            raise Diverged(f"a weight is no longer finite at the end of epoch {progress.epoch}")
        for name, text in self.health.end_epoch(progress.epoch):
            self.log.verdict(progress, name, text)
        self.log.bad_images(progress, loader)
        means = {f"train_{name}": self.logger.meters[name].global_avg for name in OFFICIAL}
        return means | {"epoch": progress.epoch} | self.figures.means()

    def sums(self):
        """Totals and counts of the epoch under way, for a checkpoint inside it."""
        meters = {name: self.logger.meters[name] for name in OFFICIAL} | self.figures.meters
        return {name: [meter.total, meter.count] for name, meter in meters.items()}

    def restore_sums(self, sums):
        for name, (total, count) in sums.items():
            meter = (self.logger if name in OFFICIAL else self.figures).meters[name]
            meter.total, meter.count = total, count


def console_logger():
    """Loss (median of the last 20, mean of the epoch), schedules, h and KL in percent of ln K."""
    logger = MetricLogger(delimiter="  ")
    logger.add_meter("loss", SmoothedValue(fmt="{median:.4f} ({global_avg:.4f})"))
    logger.add_meter("lr", SmoothedValue(window_size=1, fmt="{value:.3e}"))
    logger.add_meter("wd", SmoothedValue(window_size=1, fmt="{value:.4f}"))
    for name in ("h %", "KL %"):
        logger.add_meter(name, SmoothedValue(window_size=1, fmt="{value:.1f}"))
    return logger


def fetch_means(losses, figures, wishes):
    """Means over all processes of scalars on the device, as floats: here the host waits for it."""
    scalars = torch.cat([torch.stack([*losses, *figures.values()]), wishes])
    values = (all_reduce_sum(scalars) / get_world_size()).tolist()
    values, wishes = values[: -len(wishes)], values[-len(wishes) :]
    split = len(losses)
    return values[:split], dict(zip(figures, values[split:], strict=True)), wishes
