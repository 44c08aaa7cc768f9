# SPDX-License-Identifier: Apache-2.0
"""The loss and its moving center: H(P_t, P_s) and C of Algorithm 1, with multi-crop (Sec. 3.1).

Shapes: B images per process, V views of each (the 2 global ones first), K outputs of the head.
Stacked views come view by view: rows 0..B-1 are view 0 of every image.
"""

import numpy as np
import torch
from torch import nn

from dino.distributed import all_reduce_sum, get_world_size


class DINOLoss(nn.Module):
    """Cross-entropy of the student under the teacher, with the moving center (Eq. 1, 3, 4).

    Each global view teaches every *other* view, 2 (V - 1) pairs; Eq. 3 sums them, the official
    code and this one average. The teacher's temperature goes linearly from `warmup_teacher_temp`
    to `teacher_temp` over the first `warmup_teacher_temp_epochs` epochs, and changes between
    epochs only. `ncrops` counts all V views, `nepochs` the epochs of the run. With `accum_steps` =
    N the center is updated at every N-th call, from the outputs of N calls of equal size.
    """

    def __init__(
        self,
        out_dim,
        ncrops,
        warmup_teacher_temp,
        teacher_temp,
        warmup_teacher_temp_epochs,
        nepochs,
        student_temp=0.1,
        center_momentum=0.9,
        accum_steps=1,
    ):
        super().__init__()
        if warmup_teacher_temp_epochs > nepochs:
            raise ValueError(
                f"the teacher temperature would warm up for {warmup_teacher_temp_epochs} epochs"
                f" in a run of {nepochs}"
            )
        self.ncrops = ncrops
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.accum_steps = accum_steps
        self.part_sums = []  # of the teacher's logits, (1, K) each, since the last update
        self.register_buffer("center", torch.zeros(1, out_dim))
        warmup = np.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs)
        constant = np.full(nepochs - warmup_teacher_temp_epochs, teacher_temp)
        self.teacher_temp_schedule = np.concatenate([warmup, constant])

    def forward(self, student_output, teacher_output, epoch):
        """(V B, K) and (2 B, K) logits -> mean loss of this process; then updates the center.

        So the loss of a step uses the center of the batches before it, the same on every process.
        """
        loss = self.cross_entropy(student_output, self.teacher_probs(teacher_output, epoch))
        self.update_center(teacher_output)
        return loss

    @torch.no_grad()
    def teacher_probs(self, teacher_output, epoch):
        """P_t = softmax((g_t - C) / temp), (2 B, K) float32 from logits of that shape.

        Centering prevents the collapse to one output, sharpening the uniform one (Sec. 5.3).
        """
        temp = float(self.teacher_temp_schedule[epoch])
        return ((teacher_output.float() - self.center) / temp).softmax(dim=-1)

    def cross_entropy(self, student_output, teacher_probs):
        """H(P_t, P_s): mean over images and pairs of views of -sum_k P_t log P_s.

        (V B, K) logits and (2 B, K) probabilities -> a scalar.
        """
        first, second = teacher_probs.chunk(2)
        # View 0 learns from view 1, view 1 from view 0, each local view from both: H is linear in
        # P_t, so that two cross-entropies are one with the sum of the targets.
        targets = [second, first, *[first + second] * (self.ncrops - 2)]
        losses = []
        for logits, target in zip(student_output.chunk(self.ncrops), targets, strict=True):
            log_probs = (logits.float() / self.student_temp).log_softmax(dim=-1)
            losses.append(-(target * log_probs).sum(dim=-1).mean())
        return sum(losses) / (2 * self.ncrops - 2)

    @torch.no_grad()
    def update_center(self, teacher_output):
        """C <- m C + (1 - m) mean of the teacher's logits, over all processes (Eq. 4).

        (2 B, K) logits; C is (1, K).
        """
        self.part_sums.append(teacher_output.float().sum(dim=0, keepdim=True))
        if len(self.part_sums) < self.accum_steps:
            return
        batch_center, self.part_sums = sum(self.part_sums), []
        all_reduce_sum(batch_center)
        batch_center /= len(teacher_output) * self.accum_steps * get_world_size()
        self.center.lerp_(batch_center, 1 - self.center_momentum)
