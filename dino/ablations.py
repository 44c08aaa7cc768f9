# SPDX-License-Identifier: Apache-2.0
"""What the paper's ablations change in the method (Sec. 5, App. B). The defaults use none of it.

Shapes: B images per process, V views of each, K outputs of the head.
"""

import numpy as np
import torch
from torch import nn

from dino.distributed import all_reduce_max, all_reduce_sum
from dino.loss import DINOLoss
from dino.networks import update_teacher
from vision_transformer import DINOHead, init_linear_and_norm

TEACHER_UPDATES = ("ema", "previous_epoch", "previous_iteration", "student")
LOSSES = ("cross_entropy", "mse")

# ---- the teacher (Fig. 6) ----


def teacher_momentum(update, schedule, iterations_per_epoch):
    """The momentum of every iteration that makes the teacher the one that `update` names.

    `schedule` is that of the moving average. A momentum of 1 keeps the teacher, 0 makes it a copy
    of the student after its step: the next iteration's student. The teacher of epoch e is then the
    student at the end of epoch e - 1, in the first epoch the initial weights. So a checkpoint,
    which has the teacher, has all that a resumed run needs.
    """
    if update == "previous_epoch":
        done = np.arange(1, len(schedule) + 1)  # iterations
        return (done % iterations_per_epoch > 0).astype(float)
    constant = {"previous_iteration": 1.0, "student": 0.0}
    return np.full(len(schedule), constant[update]) if update in constant else schedule


def copy_before_each_step(optimizer, student, teacher):
    """Make the teacher of an iteration the student of the iteration before it.

    The student is copied before its step, so that the next iteration finds the weights from before
    the step in the teacher and those from after it in the student. A step that the scaler of
    float16 skips copies nothing.
    """
    optimizer.register_step_pre_hook(lambda *_: update_teacher(student, teacher, 0.0))


# ---- the loss (Table 7, App. B) ----


def build_loss(loss, sinkhorn_iterations, *args, **options):
    """The DINOLoss of these arguments, or its variant if `loss` or `sinkhorn_iterations` say so."""
    if loss == "cross_entropy" and not sinkhorn_iterations:
        return DINOLoss(*args, **options)
    return AblatedLoss(loss, sinkhorn_iterations, *args, **options)


class AblatedLoss(DINOLoss):
    """DINOLoss with the mean squared error, with Sinkhorn-Knopp in place of the center, or both.

    The paper gives no formula for its MSE. Here it is ||P_t - P_s||^2 over the same pairs of views,
    with the center and both temperatures as in the cross-entropy.
    """

    def __init__(self, loss, sinkhorn_iterations, *args, **options):
        super().__init__(*args, **options)
        self.squared, self.sinkhorn_iterations = loss == "mse", sinkhorn_iterations

    def forward(self, student_output, teacher_output, epoch):
        teacher_probs = self.teacher_probs(teacher_output, epoch)
        distance = self.squared_error if self.squared else self.cross_entropy
        loss = distance(student_output, teacher_probs)
        if not self.sinkhorn_iterations:
            self.update_center(teacher_output)
        return loss

    @torch.no_grad()
    def teacher_probs(self, teacher_output, epoch):
        if not self.sinkhorn_iterations:
            return super().teacher_probs(teacher_output, epoch)
        temp = float(self.teacher_temp_schedule[epoch])
        return sinkhorn_knopp(teacher_output.float() / temp, self.sinkhorn_iterations)

    def squared_error(self, student_output, teacher_probs):
        """Mean over images and pairs of views of sum_k (P_t - P_s)^2."""
        teachers = teacher_probs.chunk(2)
        students = (student_output.float() / self.student_temp).softmax(dim=-1).chunk(self.ncrops)
        losses = [
            (teacher - student).square().sum(dim=-1).mean()
            for t, teacher in enumerate(teachers)
            for s, student in enumerate(students)
            if s != t
        ]
        return torch.stack(losses).mean()


def sinkhorn_knopp(logits, iterations):
    """Scale exp(logits) until all outputs have an equal share of all images: (2B, K) -> (2B, K).

    Each iteration gives the columns, over the rows of all processes, equal sums, and then each row
    the sum 1. One iteration is the softmax over the batch of App. B; SwAV takes three. Computed as
    logarithms, since a small temperature makes exp(logits) overflow.
    """
    log_probs = logits
    for _ in range(iterations):
        log_probs = log_probs - log_sum_over_processes(log_probs)
        log_probs = log_probs.log_softmax(dim=-1)
    return log_probs.exp()


def log_sum_over_processes(log_values):
    """Logarithm of the column sums of exp(log_values), over all processes: (n, K) -> (1, K)."""
    highest = all_reduce_max(log_values.amax(dim=0, keepdim=True))
    return highest + all_reduce_sum((log_values - highest).exp().sum(dim=0, keepdim=True)).log()


# ---- the predictor (Table 7) ----


class PredictorHead(DINOHead):
    """The student's head with a predictor, an MLP of two layers, before the L2 normalisation.

    That is where BYOL has it. The paper does not say where; after the last layer, which is as wide
    as K, it would be larger than the network. The teacher's head has the other parameters, under
    the same names.
    """

    def __init__(self, in_dim, out_dim, *, use_bn, hidden_dim, bottleneck_dim, **options):
        widths = dict(use_bn=use_bn, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim)
        super().__init__(in_dim, out_dim, **widths, **options)
        norm = [nn.BatchNorm1d(hidden_dim)] if use_bn else []
        layers = [nn.Linear(bottleneck_dim, hidden_dim), *norm, nn.GELU()]
        self.predictor = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim))
        self.predictor.apply(init_linear_and_norm)

    def forward(self, x):
        return self.logits(self.predictor(self.mlp(x)))
