# SPDX-License-Identifier: Apache-2.0
"""Student and teacher as they stand at the start of a run, and the student's optimizer."""

import torch
from torch.nn.parallel import DistributedDataParallel

from backbones import build_backbone, check_takes_sizes, has_batchnorms, is_vit
from checkpoints import unwrap
from dino import MultiCropWrapper
from distributed import get_world_size, sync_batchnorms
from errors import UserError
from utils import LARS
from vision_transformer import DINOHead


def build_student_and_teacher(
    arch,
    device,
    *,
    patch_size,
    crop_sizes,
    drop_path_rate,
    out_dim,
    use_bn_in_head,
    norm_last_layer,
    hidden_dim,
    bottleneck_dim,
    grad_checkpointing=False,
):
    """(student, teacher) on `device`, with equal weights; no gradient ever reaches the teacher.

    With several processes the student is in a DistributedDataParallel and, if there are batch
    norms, so is the teacher, and all of these use the statistics of the global batch. The first of
    `crop_sizes` is the grid of a ViT's position embeddings. UserError if the arch cannot take one.
    """
    options = dict(patch_size=patch_size, img_size=crop_sizes[0])
    student_backbone, embed_dim = build_backbone(arch, drop_path_rate=drop_path_rate, **options)
    teacher_backbone, _ = build_backbone(arch, **options)
    if grad_checkpointing:
        checkpoint_gradients(student_backbone, arch)
    if not is_vit(teacher_backbone):
        check_takes_sizes(teacher_backbone, arch, crop_sizes)
    widths = dict(use_bn=use_bn_in_head, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim)
    student_head = DINOHead(embed_dim, out_dim, norm_last_layer=norm_last_layer, **widths)
    student = MultiCropWrapper(student_backbone, student_head).to(device)
    teacher = MultiCropWrapper(teacher_backbone, DINOHead(embed_dim, out_dim, **widths)).to(device)
    teacher.load_state_dict(student.state_dict())
    if get_world_size() > 1:
        device_ids = [device.index] if device.type == "cuda" else None
        if has_batchnorms(student):
            student, teacher = sync_batchnorms(student, device), sync_batchnorms(teacher, device)
            teacher = DistributedDataParallel(teacher, device_ids=device_ids)
        # gradients are views of what is reduced: no second copy of them
        student = DistributedDataParallel(
            student, device_ids=device_ids, gradient_as_bucket_view=True
        )
    teacher.requires_grad_(False)
    return student, teacher


def checkpoint_gradients(backbone, arch):
    """Keep the activations between blocks only, and compute the others again for the gradients."""
    if not hasattr(backbone, "set_grad_checkpointing"):
        raise UserError(
            f"--grad_checkpointing: --arch {arch} does not offer it; ViTs and timm's models do."
            " Use --accum_steps to save memory."
        )
    backbone.set_grad_checkpointing(True)


def compile_networks(student, teacher, dino_loss):
    """Compile backbones, heads and the loss in place: names of weights do not change.

    Once for each crop size, in each of student and teacher: shapes are fixed, which is faster than
    code for any shape.
    """
    for network in map(unwrap, (student, teacher)):
        network.backbone.compile(dynamic=False)
        network.head.compile(dynamic=False)
    dino_loss.compile_views()


def build_optimizer(name, params_groups):
    """AdamW, SGD or LARS; learning rate and weight decay are set at every step."""
    if name == "adamw":
        return torch.optim.AdamW(params_groups, fused=True)
    if name == "sgd":
        return torch.optim.SGD(params_groups, lr=0, momentum=0.9)
    return LARS(params_groups)
