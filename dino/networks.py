# SPDX-License-Identifier: Apache-2.0
"""Student and teacher: built alike, fed with crops of several sizes, the teacher the student's EMA.

Shapes: B images per process, V views of each, K outputs of the head.
"""

import itertools

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dino.backbone_checks import check_takes_sizes
from dino.backbones import build_backbone, first_of, has_batchnorms, is_vit
from dino.distributed import get_world_size, print0
from dino.errors import UserError
from dino.printable import printable
from dino.signals import signals_blocked
from dino.sync_batchnorm import sync_batchnorms
from vision_transformer import DINOHead


class MultiCropWrapper(nn.Module):
    """Backbone and head over crops of several sizes: one backbone pass per size, one head pass.

    A final linear classifier called `fc` or `head` is taken off the backbone, as in the official
    code; a `head` of another type stays, since in some models it pools.
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


def unwrap(model):
    """The module inside a DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@torch.no_grad()
def update_teacher(student, teacher, momentum):
    """theta_t <- momentum theta_t + (1 - momentum) theta_s (Sec. 3.1); buffers stay.

    The two are paired by their names, since the student may have more (see PredictorHead).
    """
    theta_t = dict(unwrap(teacher).named_parameters())
    theta_s = dict(unwrap(student).named_parameters())
    pairs = list(theta_t.values()), [theta_s[name] for name in theta_t]
    torch._foreach_lerp_(*pairs, 1 - momentum)


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
    student_head=DINOHead,
    in_chans=3,
    stem="auto",
):
    """(student, teacher) on `device`, with equal weights; no gradient ever reaches the teacher.

    With several processes the student is in a DistributedDataParallel and, if there are batch
    norms, so is the teacher, and all of these use the statistics of the global batch. The first of
    `crop_sizes` sets the grid of a ViT's position embeddings. UserError if the arch cannot take
    one. `student_head` is the class of the student's head.
    """
    options = dict(patch_size=patch_size, img_size=crop_sizes[0], in_chans=in_chans, stem=stem)
    student_backbone, embed_dim = build_backbone(arch, drop_path_rate=drop_path_rate, **options)
    teacher_backbone, _ = build_backbone(arch, **options)
    if grad_checkpointing:
        checkpoint_gradients(student_backbone, arch)
    check_takes_sizes(teacher_backbone, arch, crop_sizes, in_chans)
    widths = dict(use_bn=use_bn_in_head, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim)
    head = student_head(embed_dim, out_dim, norm_last_layer=norm_last_layer, **widths)
    student = MultiCropWrapper(student_backbone, head).to(device)
    teacher = MultiCropWrapper(teacher_backbone, DINOHead(embed_dim, out_dim, **widths)).to(device)
    weights = student.state_dict()
    teacher.load_state_dict({name: weights[name] for name in teacher.state_dict()})
    if get_world_size() > 1:
        if has_batchnorms(student):
            student, teacher = sync_batchnorms(student, device), sync_batchnorms(teacher, device)
            teacher = data_parallel(teacher, device)
        student = data_parallel(student, device)
    teacher.requires_grad_(False)
    return student, teacher


def data_parallel(model, device):
    """`model` in a DistributedDataParallel whose gradients are views of its buckets, not copies."""
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def checkpoint_gradients(backbone, arch):
    """Keep only the activations between blocks; recompute the others in the backward pass."""
    if not hasattr(backbone, "set_grad_checkpointing"):
        raise UserError(
            f"--grad_checkpointing: --arch {arch} does not offer it; ViTs and timm's models do."
            " Use --accum_steps to save memory."
        )
    backbone.set_grad_checkpointing(True)


def choose_compile(choice, device, student=None):
    """Whether to compile, by --compile `choice` (auto, true or false); auto does on CUDA.

    auto leaves a `student` with synchronised batch norms as it is: torch's select the processes
    that had images by a mask, which breaks the graph at each layer (a ResNet-18 becomes 67 graphs).

    Compiles a trivial function first, since an installation may lack what torch.compile needs,
    such as a C compiler. If that fails, auto prints a warning and true raises UserError.
    """
    choice = str(choice).lower()  # a bool of a Python caller's is taken too
    is_broken = student is not None and any(
        isinstance(module, nn.SyncBatchNorm) for module in student.modules()
    )
    if choice == "false" or (choice == "auto" and (device.type != "cuda" or is_broken)):
        return False
    try:
        with signals_blocked():  # a signal to all processes of a job would end the compiler's
            torch.compile(torch.square)(torch.zeros(8, device=device))
    except Exception as error:  # of many kinds; the first line says what is missing
        reason = f"torch.compile does not work here ({(str(error).splitlines() or [error])[0]})"
        if choice == "true":
            raise UserError(f"--compile true: {reason}. Leave the flag out.") from None
        print0(printable(f"Warning: {reason}: steps will be slower. --compile false is silent."))
        return False
    return True


def compile_networks(student, teacher, dino_loss, backend="inductor"):
    """Compile backbones, heads and the loss in place: names of weights do not change.

    Once for each crop size, in each of student and teacher: fixed shapes give faster code. In a
    DistributedDataParallel a ViT is compiled block by block, so that the gradients of late blocks
    are averaged while those of early ones are computed, wherever torch would cut the whole
    backbone (benchmarks/README.md). Blocks that are alike share their code.
    """
    # The versions of one function, such as a block's, beyond which torch runs it uncompiled.
    torch._dynamo.config.recompile_limit = 64
    # GELU and LayerNorm are computed again in the backward pass, matrix products and attention are
    # not: 0.6 of the bytes of a ViT's activations, by count, under autocast in bfloat16.
    if torch._functorch.config.activation_memory_budget == 1.0:  # unless the user has set another
        torch._functorch.config.activation_memory_budget = 0.9
    options = dict(dynamic=False, backend=backend)
    for network in (student, teacher):
        backbone, head = unwrap(network).backbone, unwrap(network).head
        block_by_block = network is not unwrap(network) and is_vit(backbone)
        for part in [head, *(backbone.blocks if block_by_block else [backbone])]:
            part.compile(**options)
    dino_loss.cross_entropy = torch.compile(dino_loss.cross_entropy, **options)
