# SPDX-License-Identifier: Apache-2.0
"""The method (Sec. 3.1, Algorithm 1): multi-crop forward, loss, center, EMA teacher.

Shapes: B images per process, V views of each (2 global, then the local ones), D embed_dim, K
outputs of the head. Stacked views come view by view: rows 0..B-1 are view 0 of every image.
"""

import itertools

import numpy as np
import torch
from torch import nn

from distributed import all_reduce_sum, get_world_size


class MultiCropWrapper(nn.Module):
    """Backbone and head over crops of several sizes: one backbone pass per size, one head pass.

    A final linear classifier called `fc` or `head` is taken off the backbone, as officially; a
    `head` of another type stays, since in some models it pools.
    """

    def __init__(self, backbone, head):
        super().__init__()
        for name in ("fc", "head"):
            if isinstance(getattr(backbone, name, None), nn.Linear):
                setattr(backbone, name, nn.Identity())
        self.backbone = backbone
        self.head = head

    def forward(self, crops):
        """List of V crops (B, C, H_v, W_v), equal sizes side by side -> (V B, K), in order."""
        if isinstance(crops, torch.Tensor):
            crops = [crops]
        features = [
            first_of(self.backbone(torch.cat(list(same_size))))
            for _, same_size in itertools.groupby(crops, key=lambda crop: crop.shape[-2:])
        ]
        return self.head(torch.cat(features))


def first_of(output):
    """The official XCiT returns a tuple whose first element is the [CLS] token."""
    return output[0] if isinstance(output, tuple) else output


class DINOLoss(nn.Module):
    """Cross-entropy of the student under the teacher, with the moving center (Eq. 1, 3, 4).

    Each global view teaches every *other* view, 2 (V - 1) pairs; Eq. 3 sums them, the official
    code and this one average. The teacher's temperature goes linearly from `warmup_teacher_temp`
    to `teacher_temp` over the first `warmup_teacher_temp_epochs` epochs, and changes between
    epochs only. With `accum_steps` the center moves after so many calls, by all of them.
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
        self.accum_steps = accum_steps  # calls that make up one batch
        self.part_sums = []  # of the teacher's logits, (1, K) each, of the calls so far
        self.view_functions = view_cross_entropy, view_gradient
        self.register_buffer("center", torch.zeros(1, out_dim))
        warmup = np.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs)
        constant = np.full(nepochs - warmup_teacher_temp_epochs, teacher_temp)
        self.teacher_temp_schedule = np.concatenate([warmup, constant])

    def forward(self, student_output, teacher_output, epoch):
        """(V B, K) and (2 B, K) logits -> mean loss of this process; then moves the center.

        So the loss of a step uses the center of the batches before it, on every process the same.
        """
        teacher_probs = self.teacher_probs(teacher_output, epoch)
        loss = ViewCrossEntropy.apply(
            student_output, teacher_probs, self.ncrops, self.student_temp, *self.view_functions
        )
        self.update_center(teacher_output)
        return loss

    @torch.no_grad()
    def teacher_probs(self, teacher_output, epoch):
        """softmax((g_t - C) / temp): centered against one output, sharpened against all."""
        temp = float(self.teacher_temp_schedule[epoch])
        return ((teacher_output.float() - self.center) / temp).softmax(dim=-1)

    @torch.no_grad()
    def update_center(self, teacher_output):
        """C <- m C + (1 - m) mean of the teacher's logits, over all processes (Eq. 4)."""
        self.part_sums.append(teacher_output.float().sum(dim=0, keepdim=True))
        if len(self.part_sums) < self.accum_steps:
            return
        batch_center, self.part_sums = sum(self.part_sums), []
        all_reduce_sum(batch_center)
        batch_center /= len(teacher_output) * self.accum_steps * get_world_size()
        self.center.lerp_(batch_center, 1 - self.center_momentum)

    def compile_views(self):
        """Fuse what is done to each logit of a view into one kernel, forward and backward."""
        self.view_functions = tuple(
            torch.compile(function, dynamic=False) for function in self.view_functions
        )


class ViewCrossEntropy(torch.autograd.Function):
    """Mean over images and pairs (t, s), s != t, of -sum_k P_t log P_s.

    The sum is linear in P_t: the targets of a student view are added first, and each view's
    log-softmax is taken once instead of once per pair. One view is in float32 at a time, forward
    and backward, so that no float32 copy of the (V B, K) logits exists.
    """

    @staticmethod
    def forward(ctx, student_output, teacher_probs, ncrops, student_temp, cross_entropy, gradient):
        ctx.save_for_backward(student_output, teacher_probs)
        ctx.ncrops, ctx.student_temp, ctx.gradient = ncrops, student_temp, gradient
        total = teacher_probs.new_zeros(())
        for view in student_views(student_output, teacher_probs, ncrops):
            total += cross_entropy(*view, student_temp)
        return total / num_terms(teacher_probs, ncrops)

    @staticmethod
    def backward(ctx, grad_loss):
        student_output, teacher_probs = ctx.saved_tensors
        grad = torch.empty_like(student_output)
        scale = grad_loss / num_terms(teacher_probs, ctx.ncrops)
        views = student_views(student_output, teacher_probs, ctx.ncrops)
        for grad_view, view in zip(grad.chunk(ctx.ncrops), views, strict=True):
            grad_view.copy_(ctx.gradient(*view, ctx.student_temp, scale))
        return grad, None, None, None, None, None


def view_cross_entropy(logits, target, num_teachers, student_temp):
    """Sum over images of -sum_k P_t log P_s, for one view of the student's: a scalar.

    log P_s is logits - logsumexp, and `target` (B, K) sums to `num_teachers` for each image.
    """
    logits = logits.float() / student_temp
    return num_teachers * logits.logsumexp(dim=-1).sum() - (target * logits).sum()


def view_gradient(logits, target, num_teachers, student_temp, scale):
    """The gradient (B, K) of `scale` times view_cross_entropy by `logits`."""
    probs = (logits.float() / student_temp).softmax(dim=-1)
    return (num_teachers * probs - target) * (scale / student_temp)


def student_views(student_output, teacher_probs, ncrops):
    """For each student view: its logits (B, K), its targets' sum (B, K), and their number."""
    first, second = teacher_probs.chunk(2)
    both = first + second
    for view, logits in enumerate(student_output.chunk(ncrops)):
        if view < 2:  # a view never teaches itself
            yield logits, (second, first)[view], 1
        else:
            yield logits, both, 2


def num_terms(teacher_probs, ncrops):
    """Images times pairs: every pair weighs the same."""
    return len(teacher_probs) // 2 * (2 * ncrops - 2)


@torch.no_grad()
def update_teacher(student, teacher, momentum):
    """theta_t <- momentum theta_t + (1 - momentum) theta_s (Sec. 3.1); buffers stay."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


def cancel_gradients_last_layer(epoch, model, freeze_last_layer):
    """In the first `freeze_last_layer` epochs the optimizer skips the last layer: no gradients."""
    if epoch >= freeze_last_layer:
        return
    for name, param in model.named_parameters():
        if "last_layer" in name:
            param.grad = None
