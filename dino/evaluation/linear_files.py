# SPDX-License-Identifier: Apache-2.0
"""Linear heads and what a file says of one: on which backbone and classes it was trained.

A file of one head, such as best_linear.pth, holds its `state_dict` with clean keys and all that is
needed to use it: see `describe_head`.
"""

import torch
from torch import nn

from dino.backbones import canonical_name, is_vit
from dino.distributed import print0
from dino.errors import UserError
from dino.networks import unwrap
from dino.printable import brief
from dino.weights.files import hash_weights, is_named, without_prefix
from dino.weights.loading import IMAGES, equal, list_names, load_exactly
from dino.weights.published import PUBLISHED_HEADS, download, published_entry

# The flags that a head's file states, so that --evaluate needs none of them.
HEAD_FLAGS = ("arch", "patch_size", "checkpoint_key", "n_last_blocks", "avgpool_patchtokens")
PUBLISHED = "the published backbone"
BEST, LAST = "best_linear.pth", "last_linear.pth"


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

    def is_text(value):
        return isinstance(value, str)

    right = {
        **dict.fromkeys(("patch_size", "image_size", "n_last_blocks"), is_count),
        **dict.fromkeys(("arch", "checkpoint_key", "backbone", "pretrained_weights"), is_text),
        "avgpool_patchtokens": lambda value: isinstance(value, bool),
        "classes": lambda value: isinstance(value, list) and all(map(is_text, value)),
    }
    for name, is_right in right.items():
        if name in entries and not is_right(entries[name]):
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
