# SPDX-License-Identifier: Apache-2.0
"""Is the run healthy? Figures of the logged steps, and what they mean in words.

The loss is H(P_t, P_s) = h(P_t) + KL(P_t || P_s) (Sec. 5.3, Fig. 7): the teacher's entropy, and
what the student has left to learn. A collapse shows in the two of them, and may not in their sum.
"""

import math

import torch

from dino.ablations import AblatedLoss
from dino.distributed import all_reduce_sum, get_world_size
from dino.run_log import before_training

NEARLY_ALL, NEARLY_NONE = 0.98, 0.01  # shares of ln K: uniform, few outputs
FEW_OUTPUTS = 10
LOST_RANK = 1 / 3  # share of the untrained backbone's RankMe that is left
PERSISTENCE = 20  # iterations, and a whole epoch, that a collapse must last before it is reported
WAITING = 0.3  # share of the time waiting for data that is reported


class Monitor:
    """Figures of the logged steps, from tensors that these steps compute anyway.

    A hook reads the loss's inputs before the center moves, and changes nothing.
    """

    def __init__(self, dino_loss):
        self.watching = False
        self.parts = []  # of the current batch: one, unless gradients are accumulated
        dino_loss.register_forward_pre_hook(self.look)

    @torch.no_grad()
    def look(self, dino_loss, inputs):
        if not self.watching:
            return
        student_output, teacher_output, epoch = inputs
        teacher_probs = dino_loss.teacher_probs(teacher_output, epoch)  # (2B, K)
        batch = len(teacher_probs) // 2
        # each global view's teacher, and the student on the other global view of the image
        choices = teacher_probs.argmax(dim=-1), student_output[: 2 * batch].argmax(dim=-1)
        figures = {
            "teacher_entropy": entropy(teacher_probs).mean(),
            "agreement": (choices[0] == choices[1].roll(batch)).float().mean(),
            "center_norm": dino_loss.center.norm(),
        }
        if isinstance(dino_loss, AblatedLoss):  # whose loss may not be H(P_t, P_s)
            figures["cross_entropy"] = dino_loss.cross_entropy(student_output, teacher_probs)
        self.parts.append(figures | {"mean_probs": teacher_probs.mean(dim=0)})

    def take(self):
        """The figures of the batch as scalars on the device.

        `outputs_used`, exp of the entropy of the mean distribution, is over the images of all
        processes, the others over this one's.
        """
        figures = {
            name: sum(part[name] for part in self.parts) / len(self.parts) for name in self.parts[0]
        }
        self.parts = []
        mean_probs = all_reduce_sum(figures.pop("mean_probs")) / get_world_size()
        return figures | {"outputs_used": entropy(mean_probs).exp()}


def entropy(probs):
    """In nats, over the last dimension."""
    return torch.special.entr(probs).sum(dim=-1)


class Health:
    """Turns logged records into verdicts; each is given once."""

    def __init__(self, log_out_dim, freeze_last_layer, warmup_epochs=0):
        self.log_out_dim = log_out_dim  # ln K
        self.freeze_last_layer = freeze_last_layer
        self.first_judged_epoch = max(freeze_last_layer, warmup_epochs)
        self.since = {}  # {collapse: iteration from which on all records show it}
        self.epoch_records = []
        self.loss_before = None  # mean of the epoch before
        self.said = set()

    def add(self, record):
        """`record` as it goes to metrics.jsonl."""
        self.epoch_records.append(record)
        entropy, kl = record["teacher_entropy"] / self.log_out_dim, record["kl"] / self.log_out_dim
        certain, used = entropy < NEARLY_NONE, record["outputs_used"]
        shows = {
            # noise in nearly uniform logits lowers the entropy and raises the divergence by as much
            "uniform collapse": entropy > NEARLY_ALL and entropy + kl > 1 - NEARLY_NONE,
            "one-output collapse": certain and used < 1.5,
            "few-output collapse": certain and kl < NEARLY_NONE and 1.5 <= used < FEW_OUTPUTS,
        }
        for name, shown in shows.items():
            if shown:
                self.since.setdefault(name, record["iteration"])
            else:
                self.since.pop(name, None)

    def end_epoch(self, epoch):
        """The verdicts that are new at the end of `epoch`, as (name, text)."""
        records, self.epoch_records = self.epoch_records, []
        if not records:  # resumed after the last step of an epoch
            return []
        first, last = records[0]["iteration"], records[-1]["iteration"]
        loss = sum(record["loss"] for record in records) / len(records)
        verdicts = []
        if epoch >= self.freeze_last_layer:  # until then outputs may be alike in a healthy run
            long_enough = min(first, last + 1 - PERSISTENCE)
            verdicts = [name for name, since in self.since.items() if since <= long_enough]
        rose = self.loss_before is not None and loss > 1.05 * self.loss_before
        if epoch == self.freeze_last_layer > 0 and rose and not self.since:
            verdicts.append("unfreezing")
        at_ln_k = loss > (1 - NEARLY_NONE) * self.log_out_dim
        if epoch >= self.first_judged_epoch and at_ln_k and not self.since:
            verdicts.append("nothing learned")
        waited = sum(record["data_wait"] for record in records[1:]) / max(1, len(records) - 1)
        if waited > WAITING:
            verdicts.append("waiting for data")
        loss_before, self.loss_before = self.loss_before, loss
        values = dict(epoch=epoch, loss=loss, before=loss_before or loss, waited=100 * waited)
        return self.new(verdicts, **values)

    def judge_features(self, lines, test_images, finished):
        """New verdicts, as (name, text), from all measurements so far; the first is of epoch 0.

        `test_images`: how many the k-NN accuracy is of. A verdict needs two measurements in a row,
        or the last one of the run, after the epochs in which the learning rate rises: features may
        get worse first in a sound run.
        """
        before, lines = before_training(lines), lines[1:]
        if before is None:  # a log that was lost
            return []
        judged = [line for line in lines if line["epoch"] > self.first_judged_epoch]
        last = lines[-1:] if finished else judged[-2:] if len(judged) > 1 else []
        verdicts = []
        gains = [knn_gain(line, before, test_images) for line in last]
        if last and max(gains) < -2:
            verdicts.append("worse than untrained")
        # RankMe falls in sound short runs too: it is ignored where labels say that the features got
        # better, by one standard error.
        lost = all(line["rank_me"] < LOST_RANK * before["rank_me"] for line in last)
        if last and lost and min(gains) <= 1:
            verdicts.append("features lose rank")
        values = dict(now=lines[-1], before=before) if lines else {}
        return self.new(verdicts, **values)

    def new(self, verdicts, **values):
        """Those not said before, as (name, text)."""
        new = [name for name in verdicts if name not in self.said]
        self.said.update(new)
        return [(name, VERDICTS[name].format(ln_k=self.log_out_dim, **values)) for name in new]


def knn_gain(line, before, test_images):
    """How much better than untrained teacher and student are on average, in standard errors.

    0 if one of the two is better and one is worse, and without labels.
    """
    if test_images == 0 or "knn_teacher" not in line or "knn_teacher" not in before:
        return 0.0
    untrained, *now = (
        value / 100 for value in (before["knn_teacher"], line["knn_teacher"], line["knn_student"])
    )
    if min(now) <= untrained <= max(now):
        return 0.0
    mean = sum(now) / 2
    error = math.sqrt((untrained * (1 - untrained) + mean * (1 - mean)) / test_images)
    return (mean - untrained) / max(error, 1e-9)


VERDICTS = {
    "uniform collapse": "Uniform collapse: teacher and student give every output the same share for"
    " every image, so that the loss stays at ln(out_dim) = {ln_k:.3f} and nothing is learned."
    " Common with small or grey data. Try --use_bn_in_head true first; then a lower"
    " --warmup_teacher_temp and --teacher_temp (0.02), a smaller --out_dim, milder crops"
    " (--global_crops_scale 0.5 1), a"
    " higher --lr, a longer --freeze_last_layer.",
    "nothing learned": "The loss, {loss:.3f}, is above ln(out_dim) = {ln_k:.3f} or less than 1 %"
    " below it: hardly anything is learned so far. Common with small or grey data. Try milder crops"
    " (--global_crops_scale 0.5 1), a higher --lr, a smaller --out_dim, and the other value of"
    " --use_bn_in_head.",
    "one-output collapse": "One-output collapse: the teacher gives all images to one and the same"
    " output, so that its entropy and the loss are 0 and nothing is learned. The center cannot keep"
    " up: try a higher --teacher_temp (0.04 to 0.07), a lower --lr, a lower --clip_grad.",
    "few-output collapse": "Collapse to a few outputs: the teacher gives each image to one of fewer"
    " than 10 outputs and the student agrees, so that the loss is 0 and nothing is left to learn."
    " Try a higher --teacher_temp (0.04 to 0.07), a lower --lr, a lower --clip_grad.",
    "worse than untrained": "The k-NN accuracy, {now[knn_teacher]:.1f} % of the teacher and"
    " {now[knn_student]:.1f} % of the student, is below that of the backbone before"
    " training, {before[knn_teacher]:.1f} %: the features get worse, whatever the loss does. Try"
    " crops with more in common (--global_crops_scale 0.5 1, --local_crops_scale 0.2 0.4 for small"
    " images), a lower --lr, a smaller --out_dim, --use_bn_in_head false.",
    "features lose rank": "RankMe, the effective rank of the features, fell from"
    " {before[rank_me]:.1f} before training to {now[rank_me]:.1f}: the images become alike to the"
    " backbone, whatever the loss does. A sound run may show this in its first epochs; with"
    " --knn_data_path, the accuracy decides. Try milder crops (--global_crops_scale 0.5 1), a lower"
    " --lr, a smaller --out_dim, and the other value of --use_bn_in_head.",
    "unfreezing": "The loss rose from {before:.2f} to {loss:.2f} as the head's last layer began to"
    " learn in epoch {epoch} (--freeze_last_layer). This is normal; it falls again.",
    "waiting for data": "{waited:.0f} % of the time of epoch {epoch} was spent waiting for images."
    " --augment device, if it is not on, needs about a fifth of the loader's time; more"
    " --num_workers help if there are idle cores; smaller image files or a faster disk help if"
    " there are none.",
}
