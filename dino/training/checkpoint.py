# SPDX-License-Identifier: Apache-2.0
"""How a run goes on from its checkpoint, and how a new one starts from somebody's weights."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from backbones import canonical_name
from checkpoints import is_named, load_exactly, read, unwrap, without_prefix
from distributed import print0
from errors import UserError
from pretrained import backbone_weights

# Flags that say what the networks and the optimizer's state are: a run cannot change them.
FIXED = (
    "arch",
    "patch_size",
    "out_dim",
    "norm_last_layer",
    "use_bn_in_head",
    "head_hidden_dim",
    "head_bottleneck_dim",
    "global_crop_size",
    "optimizer",
)
# Flags that have no part in what is learnt.
INDIFFERENT = {
    *("output_dir", "preset", "device", "num_workers", "dist_url", "local_rank", "resume"),
    *("init_from", "saveckp_freq", "saveckp_iters", "saveckp_minutes", "keep_checkpoints"),
    *("log_freq", "tensorboard", "knn_data_path", "knn_freq"),
}


@dataclass
class Progress:
    """How far a run is. Its fields are entries of the checkpoint."""

    epoch: int = 0  # finished ones, with their k-NN and their line of log.txt
    iteration: int = 0  # steps done
    iterations_per_epoch: int = 0
    global_batch: int = 0
    best_knn: float = 0.0  # percent, of the best teacher so far
    sums: dict = field(default_factory=dict)  # of the figures of an epoch under way

    @property
    def steps(self):
        """Steps done in the epoch under way."""
        return self.iteration - self.epoch * self.iterations_per_epoch


def check_same_run(path, saved, args):
    """Print which flags differ from those of the checkpoint; UserError for one that must not.

    `saved`: the flags in the checkpoint; official ones lack those that are ours.
    """
    changed = {
        name: (saved[name], value)
        for name, value in args.items()
        if name in saved and name not in INDIFFERENT and not same(name, saved[name], value)
    }
    for name in FIXED:
        if name in changed:
            before, now = changed[name]
            raise UserError(
                f"--{name} {now}: {path} is of a run with {before}, which cannot go on with another"
                " value. Give that one, or another --output_dir."
            )
    for name, (before, now) in changed.items():
        print0(f"--{name} was {before} when {path} was written; from here it is {now}.")


def same(name, a, b):
    """Whether the flag means the same twice; a list is as good as a tuple, an old name as a new."""
    if name == "arch":
        return canonical_name(str(a)) == canonical_name(b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return list(a) == list(b)
    return not isinstance(a, torch.Tensor) and a == b


def restore_progress(progress, checkpoint, source):
    """Fill `progress`, which has the sizes of this run, from a checkpoint: `source` says which.

    Where the number of iterations per epoch was another then, since the global batch or the images
    were, the run goes on at the same share of its epoch, and so of its schedules. UserError for
    what can be no progress.
    """
    now = progress.iterations_per_epoch
    batch_now = progress.global_batch
    for name, default in vars(progress).items():
        value = checkpoint.get(name, default)
        if type(value) is not type(default) or (name != "sums" and not value >= 0):
            raise UserError(f"{source}: its entry {name} is {value}, which can be no progress.")
        setattr(progress, name, value)
    before = progress.iterations_per_epoch
    steps = max(0, progress.steps)  # official checkpoints, of ends of epochs, have no iteration
    if before == 0 or steps > before:
        raise UserError(f"{source}: {steps} steps of an epoch of {before} can be no progress.")
    if before != now:
        print0(
            f"An epoch had {before} iterations of {progress.global_batch} images, and has {now} of"
            f" {batch_now} now: the schedules go on from the same share of the run."
        )
        steps = steps * now // before
    progress.iterations_per_epoch, progress.global_batch = now, batch_now
    progress.iteration = progress.epoch * now + steps


def initialise_from(path, student, teacher, dino_loss):
    """Start a new run from weights, ours or official: --init_from.

    A training checkpoint gives student, teacher, both with their heads, and center, as far as they
    fit; a backbone alone goes into both networks. Prints what was taken. The backbone must fit.
    """
    checkpoint = read(path, "--init_from")
    taken = []
    for name, network in (("student", unwrap(student)), ("teacher", unwrap(teacher))):
        key = name if isinstance(checkpoint, dict) and name in checkpoint else "teacher"
        weights = backbone_weights(checkpoint, key, path, flag="--init_from")
        load_backbone(network.backbone, weights, f"--init_from {path}: {key}")
        taken.append(f"backbone of the {name}")
        head = head_weights(checkpoint.get(name))
        if fits(network.head, head):
            load_exactly(network.head, head, f"--init_from {path}: head of the {name}")
            taken.append(f"head of the {name}")
    center = checkpoint.get("dino_loss")
    if fits(dino_loss, center):
        load_exactly(dino_loss, center, f"--init_from {path}: center")
        taken.append("center")
    everything = 5
    rest = "" if len(taken) == everything else "; the rest starts afresh"
    print0(f"From {path}: {', '.join(taken)}{rest}.")


def head_weights(state_dict):
    """The entries of DINO's head, without prefixes; {} of what is no state dict."""
    state_dict = without_prefix(state_dict, "module.") if is_named(state_dict) else {}
    head = {name: value for name, value in state_dict.items() if name.startswith("head.")}
    return without_prefix(head, "head.")


def fits(module, state_dict):
    """Whether names and shapes are those of `module`."""
    entries = state_dict if is_named(state_dict) else {}
    shapes = {name: getattr(value, "shape", None) for name, value in entries.items()}
    return shapes == {name: value.shape for name, value in module.state_dict().items()}


def load_backbone(backbone, weights, what):
    """load_exactly, after position embeddings were resized to the grid of `backbone`."""
    own = backbone.state_dict().get("pos_embed")
    positions = weights.get("pos_embed")
    if own is not None and positions is not None and own.shape != positions.shape:
        weights = {**weights, "pos_embed": resize_positions(positions, own.shape[1] - 1)}
        print0(f"{what}: position embeddings resized from {positions.shape[1] - 1} patches.")
    load_exactly(backbone, weights, what)


def resize_positions(positions, patches):
    """(1, 1 + n, D) -> (1, 1 + patches, D), both grids square, by bicubic interpolation."""
    size, new_size = round((positions.shape[1] - 1) ** 0.5), round(patches**0.5)
    grid = positions[:, 1:].unflatten(1, (size, size)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new_size, new_size), mode="bicubic")
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
