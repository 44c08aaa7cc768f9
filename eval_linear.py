# SPDX-License-Identifier: Apache-2.0
"""Linear classifier on a frozen backbone (Sec. 4.1): trains it, or evaluates one that is trained.

    python eval_linear.py --pretrained_weights runs/photos/backbone.pth --data_path photos/ \
        --lr 0.001 0.01 0.1 --output_dir runs/photos/linear
    python eval_linear.py --pretrained_weights runs/photos/backbone.pth --data_path photos/ \
        --evaluate --classifier runs/photos/linear/best_linear.pth
    python eval_linear.py --evaluate --data_path imagenet/   # published backbone and classifier

--data_path holds train/ and val/, each with one folder of images per class. For the last command
the authors report 77.0. The best rate differs from backbone to backbone, and the paper sweeps it:
give several, they train side by side in the time of one. The first command again resumes.
"""

import argparse
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from augmentations import LinearProbeAugmentation, eval_transform
from backbones import canonical_name, check_takes_sizes, is_vit
from checkpoints import read, restore, with_prefix, without_prefix, write_atomically
from data import evaluation_loader, list_labelled_images, training_loader
from distributed import get_world_size, init_distributed, is_main_process, print0, shut_down
from errors import Diverged, UserError, exit_on_user_error
from flags import (
    Parser,
    add_launch_arguments,
    add_weights_arguments,
    given_flags,
    loader_workers,
    number,
)
from linear import (
    FrozenFeatures,
    LinearClassifier,
    evaluate,
    fingerprint,
    load_head,
    train_one_epoch,
)
from metrics import RunLog
from pretrained import load_backbone, published_head
from utils import bool_flag, choose_amp_dtype, fix_random_seeds

__all__ = ["LinearClassifier", "eval_linear", "get_args_parser"]

# What a head's file says of its features, so that --evaluate needs no flag for it.
HEAD_FLAGS = ("arch", "patch_size", "checkpoint_key", "n_last_blocks", "avgpool_patchtokens")


def get_args_parser():
    parser = Parser(prog="eval_linear.py", description="Linear classifier on frozen features.")
    group = parser.add_argument_group("backbone")
    add_weights_arguments(group)
    add = group.add_argument
    add(
        "--n_last_blocks",
        default=4,
        type=number(int, 1),
        help="blocks of a ViT whose [CLS] tokens are used; the authors take 4 of a ViT-S, 1 of a"
        " ViT-B",
    )
    add(
        "--avgpool_patchtokens",
        default=False,
        type=bool_flag,
        help="add the mean patch token of the last block; the authors do for a ViT-B, with"
        " --n_last_blocks 1",
    )
    add(
        "--image_size",
        default=None,
        type=number(int, 1),
        help="pixels of the crops; by default what the backbone was trained with, else 224",
    )
    add(
        "--amp_dtype",
        default="float32",
        choices=["auto", "bfloat16", "float16", "float32"],
        help="type in which the backbone computes; auto is bfloat16 or else float16 on a GPU,"
        " several times as fast as the official float32",
    )
    add = parser.add_argument_group("training").add_argument
    add("--epochs", default=100, type=number(int, 1), help="passes over train/")
    add(
        "--lr",
        default=[0.001],
        nargs="+",
        type=number(float, above=0),
        help="learning rates at the start, for 256 images a step; they are scaled linearly by the"
        " global batch. Each trains a classifier of its own, and the best is reported",
    )
    add("--batch_size_per_gpu", default=128, type=number(int, 1), help="images per process and step")
    add("--seed", default=0, type=number(int, 0), help="of the classifier, order of images, crops")
    add(
        "--data_path",
        default="/path/to/imagenet/",
        help="a folder with train/ and val/, each of class folders; --evaluate needs val/ only",
    )
    add(
        "--num_labels",
        default=1000,
        type=number(int, 1),
        help="not needed: classes are counted in the data. If given, it must be their number",
    )
    add("--val_freq", default=1, type=number(int, 1), help="epochs between two validations")
    add("--output_dir", default=".", help="for checkpoints and log; a run that is there is resumed")
    add = parser.add_argument_group("evaluation").add_argument
    add("--evaluate", action="store_true", help="evaluate a trained classifier on val/")
    add(
        "--classifier",
        default="",
        help="that classifier: best_linear.pth or last_linear.pth, which need no further flag;"
        " without it, the one that the authors published for the backbone",
    )
    add_launch_arguments(parser.add_argument_group("launch"))
    return parser


def eval_linear(args, given=()):
    """Print the accuracies, and return the best top-1 in percent. `given`: flags of the command
    line.
    """
    check_args(args)
    _, device = init_distributed(args.device, args.dist_url)
    torch.backends.cudnn.benchmark = True
    accuracy = (evaluate_head if args.evaluate else train_heads)(args, given, device)
    shut_down()
    return accuracy


def check_args(args):
    """Raise UserError for flags that cannot be served, before anything is opened."""
    if args.classifier and not args.evaluate:
        raise UserError(f"--classifier {args.classifier} is for --evaluate: add that flag.")
    if len(set(args.lr)) < len(args.lr):
        raise UserError(f"--lr {' '.join(map(str, args.lr))}: give each rate once.")
    if args.evaluate:
        return
    folder = Path(args.output_dir)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(
            f"--output_dir {folder}: {existing} is no folder that can be written to. Give another."
        )
    for name in ("checkpoint.pth", "metrics.jsonl"):
        if (folder / name).exists():
            raise UserError(
                f"--output_dir {folder} holds a run of main_dino.py ({name}), whose log.txt would"
                f" be lost. Give the classifier a folder of its own, such as {folder / 'linear'}."
            )


# ---- evaluation of a trained head ----


def evaluate_head(args, given, device):
    """Top-1 in percent of --classifier or, without it, of the published head of the backbone."""
    if args.classifier:
        checkpoint, source = read(args.classifier, "--classifier"), f"--classifier {args.classifier}"
        head = load_head(checkpoint, source)
        args = with_flags_of(checkpoint, args, given, source)
        args.image_size = args.image_size or checkpoint.get("image_size")
        pretrained = load_backbone(args, given)
        check_backbone(pretrained.backbone, checkpoint, args)
    else:
        pretrained = load_backbone(args, given)
        checkpoint, flags = published_head(pretrained.arch, pretrained.patch_size)
        source = f"the published linear head of {pretrained.arch}"
        head = load_head(checkpoint, source)
        args = with_flags_of(flags, args, given, source)
    features = build_features(args, given, pretrained, device)
    if head.linear.in_features != features.dim:
        raise UserError(
            f"{source} is for features of {head.linear.in_features} numbers, and those of"
            f" {pretrained.arch} with these flags have {features.dim}. Check --arch,"
            " --n_last_blocks and --avgpool_patchtokens."
        )
    loader = validation_loader(args, pretrained, list_for_head(args, head, checkpoint, source), device)
    print0(f"Loaded {source}, for {head.num_labels} classes.")
    (result,) = evaluate(features, [head.to(device)], *loader)
    print_result(result)
    print0(f"Accuracy of the network on the {loader[1]} test images: {result['acc1']:.1f}%")
    return result["acc1"]


def with_flags_of(described, args, given, source):
    """`args` with the HEAD_FLAGS in `described`; UserError for a `given` one that says otherwise."""
    described = {flag: described[flag] for flag in HEAD_FLAGS if flag in described}
    for flag, value in described.items():
        if flag in given and canonical_name(str(given[flag])) != str(value):
            raise UserError(
                f"--{flag} {given[flag]}: {source} was trained with --{flag} {value}. Leave the"
                " flag out."
            )
    return argparse.Namespace(**{**vars(args), **described})


def check_backbone(backbone, checkpoint, args):
    """UserError unless `backbone` has the weights on whose features the head was trained."""
    if checkpoint.get("backbone", fingerprint(backbone)) != fingerprint(backbone):
        raise UserError(
            f"--classifier {args.classifier} was trained on the features of"
            f" {checkpoint['pretrained_weights'] or 'the published weights'}, and"
            f" {args.pretrained_weights or 'the published weights'} are others. Give the backbone"
            " that it belongs to."
        )


def list_for_head(args, head, checkpoint, source):
    """(paths, labels) of val/, numbered as the head numbers its classes."""
    paths, labels, names = list_labelled_images(args.data_path, "val")
    classes = checkpoint.get("classes", names)
    unknown = sorted(set(names) - set(classes))
    if unknown or len(classes) != head.num_labels:
        problem = f"not {unknown[0]!r}" if unknown else f"and val/ has {len(names)}"
        raise UserError(
            f"--data_path {args.data_path}: {source} knows {head.num_labels} classes, {problem}."
            " Train one on these classes without --evaluate, or give its best_linear.pth with"
            " --classifier."
        )
    return paths, torch.tensor([classes.index(name) for name in names])[labels]
