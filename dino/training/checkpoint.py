# SPDX-License-Identifier: Apache-2.0
"""What a training checkpoint holds, and how a run resumes from one.

The official entries, `student`, `teacher`, `optimizer`, `dino_loss`, `epoch` (of the next epoch),
`args` and, with float16, `fp16_scaler`, under the official key names; `args` is a plain dict.
Beside them `rng`, the random state of each rank, and the fields of Progress.
"""

import os
from dataclasses import dataclass, field

import torch

from dino.backbones import canonical_name, has_batchnorms
from dino.distributed import get_rank, get_world_size, print0, rank_share
from dino.errors import UserError
from dino.json_files import is_number
from dino.networks import unwrap
from dino.printable import brief, printable
from dino.randomness import set_random_state
from dino.weights.files import is_named, read, with_prefix
from dino.weights.loading import restore

# Flags that say what the networks and the optimizer's state are: a run cannot change them.
FIXED = (
    "arch",
    "stem",
    "in_chans",
    "patch_size",
    "out_dim",
    "norm_last_layer",
    "use_bn_in_head",
    "head_hidden_dim",
    "head_bottleneck_dim",
    "predictor",
    "global_crop_size",
    "optimizer",
)
# Flags that do not affect what is learned.
INDIFFERENT = {
    *("output_dir", "preset", "device", "num_workers", "dist_url", "local_rank", "resume"),
    *("auto", "hours", "download"),
    *("init_from", "saveckp_freq", "saveckp_iters", "saveckp_minutes", "keep_checkpoints"),
    *("resume_freq", "log_freq", "tensorboard", "wandb", "report", "knn_data_path", "knn_freq"),
}

# Beside the flags, texts that tell a run's images from others.
SETS = {"train_set": "What is trained on", "knn_set": "What the k-NN accuracy is of"}

MOST = 2**53  # of counts: what a float holds exactly


@dataclass
class Progress:
    """How far a run is. Its fields are entries of the checkpoint."""

    epoch: int = 0  # finished ones
    iteration: int = 0  # steps done
    iterations_per_epoch: int = 0
    global_batch: int = 0
    images: int = 0  # of the current epoch that its steps have used, by all processes
    best_knn: float = 0.0  # percent, of the best teacher so far
    best_rank: float = 0.0  # RankMe, likewise, where there are no labels
    student_ahead: int = 0  # 1 if the student was better than the teacher when last measured
    sums: dict = field(default_factory=dict)  # of the figures of an epoch in progress
    unlogged: dict = field(default_factory=dict)  # means of an epoch not yet measured and logged

    @property
    def steps(self):
        """Steps done in the current epoch."""
        return self.iteration - self.epoch * self.iterations_per_epoch

    @property
    def epochs_done(self):
        """Epochs done, with a fraction: what the log calls `epoch`."""
        return self.iteration / self.iterations_per_epoch

    @property
    def logged_epochs(self):
        """Epochs with a line in log.txt."""
        return self.epoch - bool(self.unlogged)

    def count_step(self):
        self.iteration += 1
        self.images += self.global_batch

    def count_epoch(self):
        self.epoch += 1
        self.images = 0
        self.sums = {}  # of a save inside the epoch; the next one begins at 0


def training_payload(state, progress, args, rng):
    """The content of a training checkpoint.

    `state`: student, teacher, dino_loss, optimizer and scaler by these names; `progress`, `args`:
    dicts of plain values; `rng`: the random_state of each rank.

    The official student is always wrapped in DistributedDataParallel, the teacher only if it has
    batch norms; the keys say so here whether or not there was a wrapper, so that either code reads
    the other's file.
    """
    teacher_prefix = "module." if has_batchnorms(state["teacher"]) else ""
    payload = {
        "student": with_prefix(unwrap(state["student"]).state_dict(), "module."),
        "teacher": with_prefix(unwrap(state["teacher"]).state_dict(), teacher_prefix),
        "optimizer": state["optimizer"].state_dict(),
        "dino_loss": state["dino_loss"].state_dict(),
        "args": args,
        "rng": rng,
        **progress,
    }
    if state["scaler"].is_enabled():
        payload["fp16_scaler"] = state["scaler"].state_dict()
    return payload


def restore_training(checkpoint, source, state):
    """Load a training checkpoint, ours or official, into the objects of `state`.

    `source` names the flag and the file, for errors. A float16 scaler may be new to the run: where
    the checkpoint has none, it starts afresh. So do random states that are not of as many ranks,
    and moments that are absent; both are told.
    """
    objects = {name: value for name, value in state.items() if name != "scaler"}
    if state["scaler"].is_enabled() and "fp16_scaler" in checkpoint:
        objects["fp16_scaler"] = state["scaler"]
    restore(checkpoint, source, **objects)
    if any(group["weight_decay"] for group in state["optimizer"].param_groups[1:]):
        raise UserError(f"{source}: optimizer decays biases, which no run does.")
    warn_of_missing_moments(unwrap(state["student"]), state["optimizer"], source)
    restore_random_state(checkpoint.get("rng", []), source)


def warn_of_missing_moments(student, optimizer, source):
    """Name the parameters that an optimizer with moments has none of, but for the last layer, which
    is frozen at first.
    """
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    missing = [name for name, p in trained.items() if not optimizer.state.get(p)]
    if any("last_layer" not in name for name in missing):
        print0(
            printable(
                f"Warning: {source}: optimizer has no moments of {len(missing)} of {len(trained)}"
                f" parameters, such as {missing[0]}; they begin at 0. That is right for what was"
                " frozen so far, and else not as an unbroken run."
            )
        )


def restore_random_state(rng, source):
    """Continue the random numbers of this rank; a warning if they are of other ranks."""
    if not isinstance(rng, list):
        raise UserError(f"{source}: rng is a {type(rng).__name__}, not a list with each rank's.")
    if len(rng) != get_world_size():
        print0(
            printable(
                f"{source} has the random states of {len(rng)} processes, and this run has"
                f" {get_world_size()}: stochastic depth draws others than in an unbroken run."
            )
        )
        return
    try:
        set_random_state(rng[get_rank()])
    except Exception:  # whatever torch may raise on somebody's values
        raise UserError(f"{source}: rng does not hold the random states of the ranks.") from None


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
                f"--{name} {now}: {path} is of a run with {brief(before)}, which cannot resume with"
                f" another value. Give that one, or {to_begin_anew(args.get('resume', 'auto'))}."
            )
    for name, (before, now) in changed.items():
        what = SETS.get(name, f"--{name}")
        print0(
            printable(f"{what} was {brief(before)} when {path} was written; from here it is {now}.")
        )

    weights, began = args.get("init_from"), saved.get("init_from")
    if weights and weights != began:
        print0(
            printable(
                f"Warning: --init_from {weights} has no effect: {path} is resumed, whose run began"
                f" from {brief(began) if began else 'random weights'}. Give another --output_dir to"
                " start from these."
            )
        )


def same_labels(saved, args):
    """Whether k-NN accuracies of the run with the flags `saved` compare with those under `args`.

    Flags of earlier versions do not say what images they were of.
    """
    return saved.get("knn_set", args.get("knn_set")) == args.get("knn_set")


def to_begin_anew(resume):
    """What begins a new run under --resume `resume`, for a sentence that lists what to give."""
    return "another --output_dir" if resume in ("auto", "never") else "no --resume"


def same(name, a, b):
    """Whether two values of a flag are equivalent: list and tuple, `deit_small` and `vit_small`."""
    if name == "arch":
        return canonical_name(str(a)) == canonical_name(b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same("", *pair) for pair in zip(a, b, strict=True))
    return not isinstance(a, torch.Tensor) and a == b


def restore_progress(progress, checkpoint, source, images):
    """Fill `progress`, which has the sizes of this run, from a checkpoint: `source` says which.

    If the number of iterations per epoch has changed with the global batch or the `images`, the
    rest of the epoch is the images that it has not used, and the run resumes at the share of its
    schedules that leaves room for them. UserError for invalid values.
    """
    now, batch_now = progress.iterations_per_epoch, progress.global_batch
    for name, default in vars(progress).items():
        value = checkpoint.get(name, default)
        if not is_valid(value, default, is_sum if name == "sums" else is_number):
            raise UserError(f"{source}: invalid value {brief(value)} for entry {name!r}.")
        setattr(progress, name, value)
    before = progress.iterations_per_epoch
    # official checkpoints, of ends of epochs, have no iteration
    steps = progress.steps if "iteration" in checkpoint else 0
    if before == 0 or not 0 <= steps <= before:
        raise UserError(f"{source}: claims {steps} steps of a {before}-step epoch.")
    if "images" not in checkpoint:
        progress.images = steps * progress.global_batch
    if progress.images > before * progress.global_batch:
        raise UserError(f"{source}: claims {progress.images} used images of an epoch of fewer.")
    if progress.unlogged and progress.unlogged.get("epoch") != progress.epoch - 1:
        raise UserError(f"{source}: its entry 'unlogged' is not of epoch {progress.epoch - 1}.")
    left = rank_share(max(0, images - progress.images)) * get_world_size()
    by_images = max(0, now - left // batch_now)
    if (before, progress.global_batch) != (now, batch_now):
        print0(
            f"An epoch had {before} iterations of {progress.global_batch} images, and has {now} of"
            f" {batch_now} now: the schedules resume at the same share of the run."
        )
        steps = by_images
    elif steps != by_images:
        raise UserError(
            f"{source}: claims {steps} steps of an epoch and {progress.images} used images, which"
            f" are those of {by_images}. Give another checkpoint, or another --output_dir."
        )
    if steps and not progress.sums:
        print0(f"Warning: {source} has no 'sums': what log.txt says of this epoch is of its rest.")
    progress.iterations_per_epoch, progress.global_batch = now, batch_now
    progress.iteration = progress.epoch * now + steps


def is_valid(value, default, is_figure):
    """Whether an entry of a checkpoint can take the place of a field of Progress.

    `is_figure`: whether something can be a value of a dict.
    """
    if isinstance(default, dict):
        return is_named(value) and all(map(is_figure, value.values()))
    return type(value) is type(default) and is_number(value) and 0 <= value <= MOST


def is_sum(value):
    """[total, count]."""
    is_pair = isinstance(value, list) and len(value) == 2 and all(map(is_number, value))
    return is_pair and type(value[1]) is int and value[1] > 0


def restart_from_checkpoint(ckp_path, run_variables=None, **kwargs):
    """Official interface: load each named object, and the run variables, if the file exists.

    Unlike the official function it raises UserError where something is absent or does not fit.
    """
    if not os.path.isfile(ckp_path):
        return
    checkpoint = read(ckp_path, "resume from")
    restore(
        checkpoint,
        f"resume from {ckp_path}",
        **{name: value for name, value in kwargs.items() if value is not None},
    )
    for name in run_variables or {}:
        run_variables[name] = checkpoint.get(name, run_variables[name])
