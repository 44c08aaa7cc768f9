# SPDX-License-Identifier: Apache-2.0
"""What is written down of a run while it trains: one wait for the device per logged iteration."""

import math

import torch

from distributed import all_reduce_sum, get_world_size
from errors import Diverged
from metrics import MetricLogger, RunLog, SmoothedValue, is_due, peak_memory_mb
from monitor import Health, Monitor

OFFICIAL = ("loss", "lr", "wd")
# Of these log.txt has the means over an epoch's logged iterations, after the official three.
EPOCH_FIGURES = ("teacher_entropy", "kl", "outputs_used", "agreement", "grad_norm", "images_per_s")


class Recorder:
    """Takes every step's loss, and at the logged ones looks, judges, prints and writes.

    `log` has the files, `monitor` the look at the loss's inputs, `health` the verdicts.
    """

    def __init__(self, output_dir, dino_loss, *, freeze_last_layer, log_freq, tensorboard=False):
        self.log = RunLog(output_dir, tensorboard)
        self.monitor = Monitor(dino_loss)
        self.log_out_dim = math.log(dino_loss.center.shape[1])
        said = {line["verdict"] for line in self.log.read("verdict")}
        self.health = Health(self.log_out_dim, freeze_last_layer, said=said)
        self.log_freq = log_freq

    def steps(self, loader, epoch, epochs):
        """Yield the batches of an epoch, and show progress."""
        self.epoch, self.iterations = epoch, len(loader)
        self.global_batch = loader.batch_size * get_world_size()
        self.logger = console_logger()
        self.figures = MetricLogger()  # for log.txt, too many for a line of the console
        self.losses = []  # of the steps since the last logged one, still on the device
        batches = self.logger.log_every(loader, self.log_freq, f"Epoch: [{epoch}/{epochs}]")
        for i, images in enumerate(batches):
            self.monitor.watching = is_due(i, self.iterations, self.log_freq)
            yield images

    def add(self, iteration, loss, grad_norm, *, lr, weight_decay, **schedules):
        """Take what a step gave, on the device. Raises Diverged for a loss that is not finite."""
        self.losses.append(loss)
        self.logger.update(lr=lr, wd=weight_decay)
        if not self.monitor.watching:
            return
        losses, figures = fetch_means(self.losses, self.monitor.figures | {"grad_norm": grad_norm})
        self.losses = []
        for number, value in enumerate(losses, start=iteration + 1 - len(losses)):
            if not math.isfinite(value):
                raise Diverged(f"the loss is {value} at epoch {self.epoch}, iteration {number}")
            self.logger.update(loss=value)
        record = self.record(iteration, losses[-1], figures)
        record |= {"lr": lr, "weight_decay": weight_decay, **schedules}
        self.logger.update(**{"h %": 100 * record["teacher_entropy_share"]})
        self.logger.update(**{"KL %": 100 * record["kl_share"]})
        self.figures.update(**{name: record[name] for name in EPOCH_FIGURES})
        self.health.add(record)
        self.log.iteration(record)

    def record(self, iteration, loss, figures):
        """A line of metrics.jsonl: entropies in nats and as shares of ln K, times in shares."""
        seconds, waited, steps = self.logger.lap()
        entropy, kl = figures["teacher_entropy"], loss - figures["teacher_entropy"]
        return {
            "iteration": iteration,
            "epoch": (iteration + 1) / self.iterations,
            "loss": loss,
            "teacher_entropy": entropy,
            "kl": kl,
            "teacher_entropy_share": entropy / self.log_out_dim,
            "kl_share": kl / self.log_out_dim,
            **{name: value for name, value in figures.items() if name != "teacher_entropy"},
            "images_per_s": steps * self.global_batch / seconds,
            "data_wait": waited / seconds,
            "peak_memory_mb": round(peak_memory_mb()),
        }

    def end_epoch(self):
        """The epoch's line of log.txt, the official keys first; its verdicts are printed."""
        for name, text in self.health.end_epoch(self.epoch):
            self.log.verdict(self.epoch + 1, (self.epoch + 1) * self.iterations, name, text)
        official = {f"train_{name}": self.logger.meters[name].global_avg for name in OFFICIAL}
        return official | {"epoch": self.epoch} | self.figures.means()


def console_logger():
    """Loss (median of the last 20, mean of the epoch), schedules, and h and KL in percent of ln K."""
    logger = MetricLogger(delimiter="  ")
    logger.add_meter("loss", SmoothedValue(fmt="{median:.4f} ({global_avg:.4f})"))
    logger.add_meter("lr", SmoothedValue(window_size=1, fmt="{value:.3e}"))
    logger.add_meter("wd", SmoothedValue(window_size=1, fmt="{value:.4f}"))
    for name in ("h %", "KL %"):
        logger.add_meter(name, SmoothedValue(window_size=1, fmt="{value:.1f}"))
    return logger


def fetch_means(losses, figures):
    """Means over all processes of scalars on the device, as floats: here the host waits."""
    scalars = torch.stack([*losses, *figures.values()])
    values = (all_reduce_sum(scalars) / get_world_size()).tolist()
    return values[: len(losses)], dict(zip(figures, values[len(losses) :], strict=True))
