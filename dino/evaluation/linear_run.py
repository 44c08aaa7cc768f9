# SPDX-License-Identifier: Apache-2.0
"""A run of linear heads: how they start, how far they are, what is saved of them and restored.

`checkpoint.pth.tar`, from which a run resumes, holds the official entries, `epoch` (of the next
epoch), `state_dict` (of the best head), `optimizer`, `scheduler` and `best_acc`, and beside them
the description of a head's file, all `heads`, and each one's best.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from dino.distributed import is_main_process
from dino.errors import UserError
from dino.evaluation.linear_files import BEST, LAST, LinearClassifier
from dino.json_files import read_lines
from dino.printable import brief
from dino.same_on_ranks import check_same_checkpoint
from dino.weights.files import read, with_prefix, write_atomically
from dino.weights.loading import restore, restore_numbers, same_kind
from dino.weights.results import check_has_best, check_no_results, is_beginning

NEWEST = "checkpoint.pth.tar"
MOST_EPOCHS = 2**31
# Keys of a line of log.txt: those of the official code, and ours.
LOG_KEYS = {"train_loss", "train_lr", "epoch", "test_loss", "test_acc1", "test_acc5"}
LOG_KEYS |= {"lr", "train_loss_by_lr", "test_acc1_by_lr"}


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


def resume_training(path, state, progress, description):
    """Whether the run resumes from `path`; one that begins writes its beginning there.

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
    due = scheduler._get_closed_form_lr()  # a run's own, step by step, differ by rounding
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
    highest = {"epoch": MOST_EPOCHS, "best_acc": 100, "best_head": heads - 1}
    restore_numbers(progress, checkpoint, source, highest)
    bests = checkpoint.get("head_bests")
    if not same_kind(bests, [[0.0, 0]] * heads):
        raise UserError(f"{source}: invalid value {brief(bests)} for entry 'head_bests'.")
    progress.head_bests = [tuple(best) for best in bests]


def save_training(path, state, progress, description):
    """Write `checkpoint.pth.tar` from rank 0."""
    if is_main_process():
        best_head = state.heads[progress.best_head].state_dict()
        objects = {name: value.state_dict() for name, value in vars(state).items()}
        official = {"state_dict": with_prefix(best_head, "module."), **objects, **vars(progress)}
        write_atomically({**description, **official}, path)


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
