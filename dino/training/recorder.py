# SPDX-License-Identifier: Apache-2.0
"""Logging during training. Synchronises with the device once per logged iteration."""

import math
from pathlib import Path

import torch

from dino.distributed import all_reduce_sum, get_world_size, heartbeat, is_main_process, print0
from dino.errors import Diverged
from dino.meters import MetricLogger, SmoothedValue, is_due, peak_memory_mb
from dino.printable import printable
from dino.run_log import RunLog, before_training
from dino.training.health import Health, Monitor
from dino.training.presets import PRESETS
from dino.training.settings import REASONS

# Means over all iterations of an epoch, by their official names, and over its logged ones, by ours.
# grad_norm and skipped_steps also cover all iterations.
OFFICIAL = ("loss", "lr", "wd")
FIGURES = ("teacher_entropy", "kl", "outputs_used", "agreement", "images_per_s")


class Recorder:
    """Collects every step's loss; on logged steps computes the figures, judges, prints and writes.

    `log` has the files.
    """

    def __init__(self, output_dir, dino_loss, args, progress):
        self.progress = progress
        self.log = RunLog(output_dir, args.tensorboard, args.wandb)
        self.monitor = Monitor(dino_loss)
        self.teacher_temps = dino_loss.teacher_temp_schedule.tolist()
        self.log_out_dim = math.log(dino_loss.center.shape[1])
        self.health = Health(self.log_out_dim, args.freeze_last_layer, args.warmup_epochs)
        self.epochs, self.log_freq = args.epochs, args.log_freq
        self.forget_epoch()

    def forget_epoch(self):
        self.logger, self.figures = console_logger(), MetricLogger()
        self.unread = []  # loss and gradient norm of the steps since the last fetch, on the device

    def recall_verdicts(self):
        """Do not repeat the verdicts in the log of a run that is resumed."""
        self.health.said = {line["verdict"] for line in self.log.read("verdict")}

    def steps(self, loader):
        """Yield the batches left of an epoch, show progress, and watch the steps to be logged."""
        progress = self.progress
        self.forget_epoch()
        self.restore_sums(progress.sums)
        header = f"Epoch: [{progress.epoch}/{self.epochs}]"
        for images in self.logger.log_every(loader, self.log_freq, header, start=progress.steps):
            self.monitor.watching = is_due(
                progress.steps, progress.iterations_per_epoch, self.log_freq
            )
            yield images

    def add(self, loss, grad_norm, scheduled):
        """Take what a step gave, on the device. Raises Diverged for a loss that is not finite."""
        self.unread += [loss, grad_norm]
        self.logger.update(lr=scheduled["lr"], wd=scheduled["weight_decay"])
        if self.monitor.watching:
            loss, figures = self.fetch(self.progress.iteration, self.monitor.take())
            self.write(loss, figures, scheduled)

    def fetch(self, last_iteration, figures):
        """(last loss, figures) as floats, means over all processes: here the host waits for it.

        All losses up to that of `last_iteration` go into the epoch's mean, and all gradient norms
        that are finite. The others, of steps that the scaler of float16 skips, are counted.
        Raises Diverged for a loss that is not finite.
        """
        heartbeat()
        scalars = torch.stack([*self.unread, *figures.values()])
        values = (all_reduce_sum(scalars) / get_world_size()).tolist()
        count, self.unread = len(self.unread), []
        losses, norms = values[:count:2], values[1:count:2]
        for iteration, loss in enumerate(losses, start=last_iteration + 1 - len(losses)):
            if not math.isfinite(loss):
                epoch = self.progress.epoch
                raise Diverged(f"the loss is {loss} at epoch {epoch}, iteration {iteration}")
            self.logger.update(loss=loss)
        for norm in norms:
            self.figures.update(skipped_steps=float(not math.isfinite(norm)))
            if math.isfinite(norm):
                self.figures.update(grad_norm=norm)
        figures = dict(zip(figures, values[count:], strict=True))
        return losses[-1], figures | {"grad_norm": norms[-1]}

    def write(self, loss, figures, scheduled):
        """A line of metrics.jsonl: entropies in nats and as shares of ln K, times as shares."""
        progress = self.progress
        seconds, waited, steps = self.logger.lap()
        entropy = figures.pop("teacher_entropy")
        kl = figures.pop("cross_entropy", loss) - entropy
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

    def end_epoch(self, loader, student):
        """The epoch's line of log.txt, the official keys first; prints new verdicts.

        Raises Diverged for a weight that is not finite, which a step after a finite loss can leave.
        """
        epoch = self.progress.epoch
        norms = torch.stack(torch._foreach_norm(list(student.parameters())))
        if not norms.isfinite().all():
            raise Diverged(f"a weight is no longer finite at the end of epoch {epoch}")
        for name, text in self.health.end_epoch(epoch):
            self.log.verdict(self.progress, name, text)
        self.log.bad_images(self.progress, loader)
        means = {f"train_{name}": self.logger.meters[name].global_avg for name in OFFICIAL}
        skipped = int(self.figures.meters["skipped_steps"].total)
        return means | {"epoch": epoch} | self.figures.means() | {"skipped_steps": skipped}

    def judge_measurements(self, knn):
        """Print and log the verdicts on all measurements so far; `knn` is the KnnProbe, or None."""
        if not is_main_process():  # which alone prints and logs
            return
        lines = self.log.read("rank_me")
        test_images = knn.test_images if knn else 0
        finished = self.progress.epoch == self.epochs
        for name, text in self.health.judge_features(lines, test_images, finished):
            self.log.verdict(self.progress, name, text)

    def sums(self):
        """Totals and counts of the epoch so far, for a checkpoint inside it."""
        if self.unread:
            self.fetch(self.progress.iteration - 1, {})
        meters = {name: self.logger.meters[name] for name in OFFICIAL} | self.figures.meters
        return {name: [meter.total, meter.count] for name, meter in meters.items()}

    def restore_sums(self, sums):
        """Take up the `sums` of a checkpoint; names that this version does not have are left."""
        for name, (total, count) in sums.items():
            if name in (*OFFICIAL, *FIGURES, "grad_norm", "skipped_steps"):
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


def report_start(args, launch, device, amp_dtype, images, scaled_lr, progress):
    """Every flag with its value, and what follows from them."""
    flags = sorted((flag, value) for flag, value in vars(args).items() if flag != REASONS)
    print0(*[printable(f"{flag}: {value}") for flag, value in flags], sep="\n")
    if args.preset:
        preset = PRESETS[args.preset]
        print0(f"Preset {args.preset}: {preset.source}. Reported: {preset.reported}.")
    if device.type == "cuda":
        place = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        place = f"CPU with {threads} thread{'s' * (threads > 1)}"
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
        f" at ln(out_dim) = {math.log(args.out_dim):.3f} means that nothing is learned"
    )
    if args.freeze_backbone >= args.epochs:
        print0(
            f"Warning: the backbone stays as it is, since --freeze_backbone {args.freeze_backbone}"
            f" lasts all of --epochs {args.epochs}. Give more epochs, or --freeze_backbone 0."
        )
    gpus = torch.cuda.device_count() if device.type == "cuda" else 1
    if launch.launcher == "python" and gpus > 1:
        command = f"torchrun --standalone --nproc_per_node={gpus} main_dino.py"
        print0(f"1 of {gpus} GPUs is used; for all of them: {command} ...")


def report_end(probe, log, args):
    """Where the result is; with labels the k-NN accuracy before and after, and of raw pixels.

    Before: of random weights, or of those of --init_from. After: of the better of teacher and
    student, which is in backbone.pth.
    """
    shown = "curves.png and report.html show" if args.report else "curves.png shows"
    result = Path(args.output_dir) / "backbone.pth"
    print0(printable(f"The result is {result}; beside it {shown} the run."))
    if probe is None:
        return
    raw = probe.raw_pixel_accuracy()  # by all processes
    measured = log.read("knn_teacher") if is_main_process() else []  # which alone has the log
    if not measured:
        return
    accuracy, network = max(
        (measured[-1][f"knn_{network}"], network) for network in ("student", "teacher")
    )
    before = "--init_from's backbone" if args.init_from else "untrained backbone"
    first = before_training(measured)
    untrained = {before: first["knn_teacher"]} if first else {}
    rows = {"raw pixels": raw, **untrained, "trained backbone": accuracy}
    print0(
        f"k-NN accuracy (k = {probe.k}) on the held-out images of {printable(probe.data_path)}:",
        *[f"  {name:{len(before)}} {value:5.1f} %" for name, value in rows.items()],
        sep="\n",
        end=f" (the {network}'s, in backbone.pth)\n",
    )
