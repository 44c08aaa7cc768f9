# SPDX-License-Identifier: Apache-2.0
"""Linear heads and their files: how heads start, how far their run is, what a file says of one.

A file of one head, such as best_linear.pth, holds its `state_dict` with clean keys and all that is
needed to use it: see `describe_head`. `checkpoint.pth.tar`, from which a run resumes, holds the
official entries, `epoch` (of the next epoch), `state_dict` (of the best head), `optimizer`,
`scheduler` and `best_acc`, and beside them the same description, all `heads`, and each one's best.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from dino.backbones import canonical_name, is_vit
from dino.distributed import is_main_process, print0
from dino.errors import UserError
from dino.json_files import is_number, read_lines
from dino.networks import unwrap
from dino.printable import brief
from dino.same_on_ranks import check_same_checkpoint
from dino.weights.files import (
    hash_weights,
    is_named,
    read,
    with_prefix,
    without_prefix,
    write_atomically,
)
from dino.weights.loading import (
    IMAGES,
    equal,
    list_names,
    load_exactly,
    restore,
    same_kind,
)
from dino.weights.published import PUBLISHED_HEADS, download, published_entry
from dino.weights.results import check_has_best, check_no_results, is_beginning

# The flags that a head's file states, so that --evaluate needs none of them.
HEAD_FLAGS = ("arch", "patch_size", "checkpoint_key", "n_last_blocks", "avgpool_patchtokens")
PUBLISHED = "the published backbone"
MOST_EPOCHS = 2**31
NEWEST, BEST, LAST = "checkpoint.pth.tar", "best_linear.pth", "last_linear.pth"
# Keys of a line of log.txt: those of the official code, and ours.
LOG_KEYS = {"train_loss", "train_lr", "epoch", "test_loss", "test_acc1", "test_acc5"}
LOG_KEYS |= {"lr", "train_loss_by_lr", "test_acc1_by_lr"}


class LinearClassifier(nn.Module):
    """A linear layer on whatever it is given, flattened: (B, *) of `dim` numbers -> (B, C)."""

    def __init__(self, dim, num_labels=1000):
        super().__init__()
        self.num_labels = num_labels
        self.linear = nn.Linear(dim, num_labels)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        return self.linear(x.flatten(1))


@dataclass
class HeadsState:
    """What is stepped together, and so saved together. The names are entries of the checkpoint."""

    heads: nn.ModuleList  # one for each learning rate
    optimizer: torch.optim.Optimizer  # with a group for each head
    scheduler: torch.optim.lr_scheduler.LRScheduler


def build_heads(dim, num_labels, lrs, epochs, device):
    """Heads that start alike, and their SGD: from each of `lrs` along a cosine to 0, by epochs."""
    first = LinearClassifier(dim, num_labels)
    heads = nn.ModuleList(copy.deepcopy(first) for _ in lrs).to(device)
    groups = [dict(params=head.parameters(), lr=lr) for head, lr in zip(heads, lrs, strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=0)
    return HeadsState(heads, optimizer, scheduler)


@dataclass
class HeadsProgress:
    """How far a run is. Its fields are entries of the checkpoint."""

    epoch: int = 0  # epochs done
    best_acc: float = -1.0  # top-1 in percent, of any head after any epoch
    best_head: int = 0  # the number of the head that had it
    head_bests: list = field(default_factory=list)  # (best top-1, after which epoch) of each

    @classmethod
    def of(cls, heads):
        """Of so many heads, before the first epoch."""
        return cls(head_bests=[(-1.0, 0)] * heads)

    def add(self, epoch, accuracies):
        """Take the accuracy of each head after `epoch`; True if one is better than all before."""
        self.head_bests = [
            max(best, (accuracy, epoch), key=lambda pair: pair[0])
            for best, accuracy in zip(self.head_bests, accuracies, strict=True)
        ]
        improved = max(accuracies) > self.best_acc
        if improved:
            self.best_acc = max(accuracies)
            self.best_head = accuracies.index(self.best_acc)
        return improved


def check_folder(folder):
    """Raise UserError if a run would replace results in `folder`: another program's log, or the
    heads of a run whose checkpoint is gone.
    """
    check_own_log(folder)
    if not (folder / NEWEST).exists():
        check_no_results(folder, (BEST, LAST, "log.txt"), NEWEST)


def check_own_log(folder):
    """Raise UserError if log.txt in `folder` is not of eval_linear.py, official or ours.

    A line that a killed run left unfinished is not held against it, unless it is the only one.
    """
    lines, damaged = read_lines(folder / "log.txt")
    if (damaged and not lines) or not all(line.keys() <= LOG_KEYS for line in lines):
        raise UserError(
            f"--output_dir {folder}: log.txt there is of a run of main_dino.py, or of another"
            " program than eval_linear.py, and would be lost. Give the classifier a folder of its"
            f" own, such as {folder / 'linear'}."
        )


def describe_head(pretrained, classes, **flags):
    """What a head's file says of the head: entries of plain values.

    `flags`: the rest of HEAD_FLAGS, and what else is worth keeping.
    """
    if not is_vit(pretrained.backbone):  # to other networks these two mean nothing
        del flags["n_last_blocks"], flags["avgpool_patchtokens"]
    return {
        "arch": pretrained.arch,
        "patch_size": pretrained.patch_size,
        "image_size": pretrained.image_size,
        **{name: getattr(pretrained, name) for name in IMAGES},
        "backbone": fingerprint(pretrained.backbone),
        "classes": classes,
        **flags,
    }


def fingerprint(module):
    """The beginning of `hash_weights`, which head files hold."""
    return hash_weights(module)[:16]


def save_best_and_last(folder, state, progress, description, *, accuracy, improved):
    """Write last_linear.pth from rank 0 and, if the head is the best so far, best_linear.pth.

    Both are of the learning rate that was best so far: the present head, and the one at its best.
    """
    if not is_main_process():
        return
    found = {
        "lr": description["lr"][progress.best_head],
        "epoch": progress.epoch - 1,
        "accuracy": accuracy,
    }
    head = state.heads[progress.best_head].state_dict()
    for name in (BEST, LAST)[not improved :]:
        write_atomically({**description, **found, "state_dict": head}, Path(folder) / name)


def load_head(checkpoint, source, wanted=BEST):
    """The LinearClassifier in the entry `state_dict` of a file: ours, official or released.

    UserError where there is none, which advises to give the file `wanted`.
    """
    entries = checkpoint if isinstance(checkpoint, dict) else {}
    state_dict = entries.get("state_dict")
    weights = without_prefix(state_dict, "module.") if is_named(state_dict) else {}
    matrix = weights.get("linear.weight")
    if not isinstance(matrix, torch.Tensor) or matrix.ndim != 2 or 0 in matrix.shape:
        raise UserError(
            f"{source} does not hold a linear classifier; its entries are {list_names(entries)}."
            f" Give a {wanted}."
        )
    num_labels, dim = matrix.shape
    head = LinearClassifier(dim, num_labels)
    load_exactly(head, weights, source)
    return head


def check_head_description(entries, source):
    """Raise UserError if a field of a head's file has an invalid type or range."""

    def is_count(value):
        return type(value) is int and 0 < value <= 2**13

    def is_list_of_names(value):
        return isinstance(value, list) and all(isinstance(name, str) for name in value)

    right = {
        **dict.fromkeys(("patch_size", "image_size", "n_last_blocks"), is_count),
        **dict.fromkeys(
            ("arch", "checkpoint_key", "backbone", "pretrained_weights"),
            lambda value: isinstance(value, str),
        ),
        "avgpool_patchtokens": lambda value: isinstance(value, bool),
        "classes": is_list_of_names,
    }
    for name in right.keys() & entries.keys():
        if not right[name](entries[name]):
            raise UserError(f"{source} has an invalid {name}: {brief(entries[name])}.")


def published_head(arch, patch_size):
    """Entries of the released linear head's file, downloaded once, and the flags it is for."""
    found = published_entry(PUBLISHED_HEADS, arch, patch_size)
    if found is None:
        raise UserError(
            f"there is no published linear head for --arch {arch} --patch_size {patch_size}: give"
            " --classifier, or train one without --evaluate."
        )
    file, flags = found

    def check(content):
        load_head(content, f"the published file {file}")

    why = "--evaluate without --classifier takes the published head"
    return {**download(file, why, check), **flags}


def load_pretrained_linear_weights(linear_classifier, model_name, patch_size):
    """Official interface: load the released head of a backbone; without one, leave it random.

    Unlike the official function it takes a classifier in a DistributedDataParallel or without one:
    the released files are of the former.
    """
    if published_entry(PUBLISHED_HEADS, model_name, patch_size) is None:
        print0(f"No released linear weights for {model_name}, {patch_size}: they stay random.")
        return
    head = load_head(published_head(model_name, patch_size), "the released linear weights")
    load_exactly(unwrap(linear_classifier), head.state_dict(), "the released linear weights")
    print0(f"Loaded the released linear weights of {model_name}.")


def check_backbone(description, pretrained, source, weights):
    """Raise UserError unless the head was trained on `pretrained`, which was read from `weights`.

    The same backbone makes other features of images that are normalised otherwise.
    """
    for name in IMAGES:
        own = getattr(pretrained, name)
        if name in description and not equal(description[name], own):
            raise UserError(
                f"{source} was trained with {name} {brief(description[name])}, and"
                f" {weights or PUBLISHED} states {brief(own)}. Give the file of weights that it was"
                " trained with."
            )
    if description.get("backbone") not in (None, fingerprint(pretrained.backbone)):
        trained_on = description.get("pretrained_weights")
        raise UserError(
            f"{source} was trained on the features of {trained_on or PUBLISHED}, but the weights"
            f" of {weights or PUBLISHED} are different."
        )


def stated_flags(description, given, source):
    """{flag: value} of those HEAD_FLAGS that `description` has; UserError for one that is `given`
    another value.
    """
    stated = {flag: description[flag] for flag in HEAD_FLAGS if flag in description}
    for flag, value in stated.items():
        if flag in given and canonical_name(str(given[flag])) != str(value):
            raise UserError(
                f"--{flag} {given[flag]}: {source} was trained with {value}. Leave the flag out."
            )
    return stated


def labels_of_head(labels, names, classes, num_labels, source):
    """`labels`, which number the class folders `names`, as the head numbers them.

    That is by `classes`, if its file names them, else by their order. UserError for other classes.
    """
    classes = classes or names
    unknown = [name for name in names if name not in classes]
    if unknown or len(classes) != num_labels:
        found = f"{unknown[0]!r} is none of them" if unknown else f"there are {len(names)}"
        raise UserError(
            f"{source} knows {num_labels} classes, and in val/ of --data_path {found}. Give one"
            " that was trained on these classes, or train one without --evaluate."
        )
    return torch.tensor([classes.index(name) for name in names])[labels]


def save_training(path, state, progress, description):
    """Write `checkpoint.pth.tar` from rank 0."""
    if is_main_process():
        best_head = state.heads[progress.best_head].state_dict()
        objects = {name: value.state_dict() for name, value in vars(state).items()}
        official = {"state_dict": with_prefix(best_head, "module."), **objects, **vars(progress)}
        write_atomically({**description, **official}, path)


def resume_training(path, state, progress, description):
    """Resume from `path` if it has progress: True. Else write the beginning there: False.

    So results without a checkpoint are never those of a run that was killed. UserError for a run
    with another description, or whose best head is gone.
    """
    checkpoint = read(path, "--output_dir") if path.exists() else None
    check_same_checkpoint("--output_dir", checkpoint)
    if checkpoint is None or is_beginning(path, checkpoint, BEST):
        save_training(path, state, progress, description)
        return False
    load_training(checkpoint, f"--output_dir {path}", state, progress, description)
    check_schedule(state, progress.epoch, f"--output_dir {path}")
    if progress.best_acc >= 0:
        check_has_best(path, BEST, progress.head_bests[progress.best_head][1])
    return True


def load_training(checkpoint, source, state, progress, description):
    """Restore what `save_training` wrote. UserError if it is of a run with another description."""
    restore(checkpoint, source, description=description, **vars(state))
    restore_heads_progress(progress, checkpoint, source, len(state.heads))


def check_schedule(state, epoch, source):
    """Raise UserError unless optimizer and scheduler are those of the end of `epoch` epochs."""
    groups, scheduler = state.optimizer.param_groups, state.scheduler
    due = scheduler._get_closed_form_lr()  # of which the steps' own differs by rounding
    right = (
        scheduler.last_epoch == epoch
        and all(group["weight_decay"] == 0 for group in groups)
        and all(
            abs(g["lr"] - lr) < 1e-6 * g["initial_lr"] for g, lr in zip(groups, due, strict=True)
        )
    )
    if not right:
        raise UserError(
            f"{source}: its optimizer and scheduler are not those of {epoch} epochs. Give another"
            " --output_dir."
        )
    if epoch and not all(state.optimizer.state.get(p) for g in groups for p in g["params"]):
        raise UserError(
            f"{source}: its optimizer has no momentum of some heads. Give another --output_dir."
        )


def restore_heads_progress(progress, checkpoint, source, heads):
    """Fill `progress` of so many heads from a checkpoint; UserError for invalid values."""
    limits = {"epoch": MOST_EPOCHS, "best_acc": 100, "best_head": heads - 1}
    for name, highest in limits.items():
        value = checkpoint.get(name)
        if (
            not is_number(value)
            or not -1 <= value <= highest
            or (name != "best_acc" and (type(value) is not int or value < 0))
        ):
            raise UserError(f"{source}: invalid value {brief(value)} for entry {name!r}.")
        setattr(progress, name, value)
    bests = checkpoint.get("head_bests")
    if not same_kind(bests, [[0.0, 0]] * heads):
        raise UserError(f"{source}: invalid value {brief(bests)} for entry 'head_bests'.")
    progress.head_bests = [tuple(best) for best in bests]
