# SPDX-License-Identifier: Apache-2.0
"""Weighted k-NN accuracy of a frozen backbone (Sec. 4.1).

    python eval_knn.py --pretrained_weights runs/photos/backbone.pth --data_path photos/
    torchrun --standalone --nproc_per_node=8 eval_knn.py --data_path imagenet/   # published weights

--data_path holds train/ and val/, each with one folder of images per class. For the second command
the authors report 74.5 with k = 20.
"""

import os
import tempfile
import time
from pathlib import Path

import torch

from dino.command_line import (
    Parser,
    add_image_arguments,
    add_image_size_argument,
    add_launch_arguments,
    add_precision_argument,
    add_weights_arguments,
    bool_flag,
    loader_workers,
    number,
    tell_idle,
)
from dino.data.images import limit_pixels, list_labelled_images
from dino.distributed import init_distributed, is_main_process, print0, shut_down
from dino.errors import UserError, exit_on_user_error
from dino.evaluation.features import image_features
from dino.evaluation.knn import knn_accuracies, knn_classifier
from dino.meters import peak_memory_mb
from dino.output_checks import check_output_folder
from dino.precision import choose_amp_dtype
from dino.printable import printable
from dino.same_on_ranks import check_same_flags
from dino.weights.files import read, write_atomically
from dino.weights.pretrained import open_backbone

__all__ = ["eval_knn", "get_args_parser", "knn_classifier"]

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
ROUNDING = 1e-2  # that the length of a row may be off 1: bfloat16 takes 4e-3 of a number at most
# Flags without a part in what --load_features says.
OF_IMAGES = ("pretrained_weights", "checkpoint_key", "arch", "patch_size", "data_path")
OF_IMAGES += ("image_size", "batch_size_per_gpu", "amp_dtype")
# The official files of --dump_features, in the order in which they are passed around here.
FEATURE_FILES = ("trainfeat.pth", "trainlabels.pth", "testfeat.pth", "testlabels.pth")


def get_args_parser():
    parser = Parser(prog="eval_knn.py", description="Weighted k-NN on frozen features.")
    add_weights_arguments(parser.add_argument_group("backbone"))
    evaluation = parser.add_argument_group("evaluation")
    add = evaluation.add_argument
    add(
        "--data_path",
        default="/path/to/imagenet/",
        help="a folder with train/ and val/, each of class folders",
    )
    add_image_size_argument(evaluation)
    add(
        "--nb_knn",
        default=[10, 20, 100, 200],
        nargs="+",
        type=number(int, 1),
        help="numbers of neighbours; 20 is usually best",
    )
    add(
        "--temperature",
        default=0.07,
        type=number(float, 0.012),
        help="temperature of the weighted vote",
    )
    add("--batch_size_per_gpu", default=128, type=number(int, 1), help="images per forward pass")
    add(
        "--use_cuda",
        default=True,
        type=bool_flag,
        help="keep the features on the GPU, if there is one; false if they do not fit there",
    )
    add_precision_argument(evaluation, default="float32")
    add("--dump_features", default=None, help="folder to write features and labels to")
    add("--load_features", default=None, help="folder to read them from, instead of any image")
    add_image_arguments(parser)
    add_launch_arguments(parser.add_argument_group("launch"))
    return parser


def eval_knn(args):
    """Print and return {k: (top-1, top-5)} in percent; top-5 is nan for fewer than 5 classes."""
    check_knn_flags(args)
    limit_pixels(args.max_image_pixels)
    _, device = init_distributed(args.device, args.dist_url)
    check_same_flags(args)
    if args.load_features:
        tell_idle(args, OF_IMAGES, f"--load_features {printable(args.load_features)}")
        features = load_features(args.load_features)
    else:
        features = compute_features(args, device)
        if args.dump_features and is_main_process():
            dump_features(args.dump_features, features)
    if args.use_cuda:
        features = [tensor.to(device) for tensor in features]
    train_features, train_labels, test_features, test_labels = features
    train_labels, test_labels, num_classes = count_classes(train_labels, test_labels)
    ks = clip_ks(args.nb_knn, len(train_labels))
    print0(
        f"{len(train_labels)} training and {len(test_labels)} test images of {num_classes} classes,"
        f" features of {train_features.shape[1]} dimensions"
    )
    start = time.perf_counter()
    accuracies = knn_accuracies(
        train_features,
        train_labels,
        test_features,
        test_labels,
        ks,
        args.temperature,
        num_classes,
    )
    print0(
        f"Neighbours and votes took {time.perf_counter() - start:.1f} s; the most memory held so"
        f" far: {peak_memory_mb():.0f} MiB"
    )
    for k, (top1, top5) in accuracies.items():
        rest = f", Top5: {top5:.2f}" if num_classes >= 5 else ""
        print0(f"{k}-NN classifier result: Top1: {top1:.2f}{rest}")
    shut_down()
    return accuracies


def check_knn_flags(args):
    """Raise UserError for flags that exclude each other, before anything is opened."""
    if args.dump_features and args.load_features:
        raise UserError(
            f"--dump_features {args.dump_features} and --load_features {args.load_features} exclude"
            " each other: leave one out."
        )
    if args.dump_features:
        check_output_folder(args.dump_features, "--dump_features")


def compute_features(args, device):
    """Features and labels of train/ and val/, in the order of FEATURE_FILES."""
    train_paths, train_labels, classes = list_labelled_images(args.data_path, "train")
    test_paths, test_labels, _ = list_labelled_images(args.data_path, "val", classes)
    pretrained = open_backbone(args, args.image_size)
    options = dict(
        device=device,
        batch_size=args.batch_size_per_gpu,
        num_workers=loader_workers(args.num_workers),
        amp_dtype=choose_amp_dtype(args.amp_dtype, device),
        keep_on_device=args.use_cuda,
    )
    train = image_features(pretrained, train_paths, train_labels, **options)
    return train + image_features(pretrained, test_paths, test_labels, **options)


def dump_features(folder, features):
    """Write the FEATURE_FILES.

    A write that fails leaves the earlier dump; a kill while files are exchanged leaves an
    incomplete one, which load_features refuses.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".features", dir=folder) as new:
        for name, tensor in zip(FEATURE_FILES, features, strict=True):
            write_atomically(tensor.cpu(), Path(new) / name)
        for name in FEATURE_FILES:  # a process that is killed here leaves too few files to load
            (folder / name).unlink(missing_ok=True)
        for name in FEATURE_FILES:
            os.replace(Path(new) / name, folder / name)


def load_features(folder):
    """What dump_features, or the official script, wrote to `folder`, as float32 and int64."""
    features = [read(Path(folder) / name, "--load_features") for name in FEATURE_FILES]
    for i in (0, 2):
        problem = mismatch_of(*features[i : i + 2], *FEATURE_FILES[i : i + 2])
        if problem:
            raise UserError(f"--load_features {folder}: {problem}.")
        features[i], features[i + 1] = features[i].float(), features[i + 1].long()
    widths = features[0].shape[1], features[2].shape[1]
    if widths[0] != widths[1]:
        raise UserError(
            f"--load_features {folder}: {widths[0]} numbers in a row of {FEATURE_FILES[0]} and"
            f" {widths[1]} in one of {FEATURE_FILES[2]}: they come from two networks."
        )
    for i in (0, 2):
        longest = deviating_length(features[i])
        if longest is not None:
            raise UserError(
                f"--load_features {folder}: {FEATURE_FILES[i]} has a row of length {longest:.3g},"
                " and the weights of the vote are for length 1. Normalise the features with"
                " torch.nn.functional.normalize."
            )
    return features


def deviating_length(table):
    """The length of the row (n, D) whose length is farthest from 1, or None if all are near 1."""
    lengths = table.norm(dim=1)
    worst = lengths[(lengths - 1).abs().argmax()].item()
    return None if abs(worst - 1) <= ROUNDING else worst


def mismatch_of(table, labels, table_name, labels_name):
    """What keeps these from being features (n, D) and class numbers (n,), or None."""
    if not isinstance(labels, torch.Tensor) or labels.ndim != 1 or labels.dtype not in INTEGERS:
        return f"{labels_name} is not a 1-D tensor of class numbers"
    if len(labels) and labels.min() < 0:
        return f"{labels_name} has negative class numbers"
    if not isinstance(table, torch.Tensor) or table.ndim != 2 or not table.is_floating_point():
        return f"{table_name} is not a 2-D tensor of floating-point numbers"
    if len(table) != len(labels) or len(table) == 0:
        return f"{table_name} does not have one row per label"
    if table.shape[1] == 0:
        return f"{table_name} has rows without a number"
    finite = table.float().isfinite().all()  # a float64 may be infinite as the float32 it becomes
    return None if finite else f"{table_name} has values that are not finite in float32"


def count_classes(train_labels, test_labels):
    """(labels numbered without gaps, in their order, of both sets; how many there are)."""
    classes, numbers = torch.cat([train_labels, test_labels]).unique(return_inverse=True)
    return *numbers.split([len(train_labels), len(test_labels)]), len(classes)


def clip_ks(ks, num_train):
    """The numbers of neighbours, at most as many as training images, with a message."""
    clipped = sorted({min(k, num_train) for k in ks})
    if max(ks) > num_train:
        print0(f"--nb_knn: there are {num_train} training images, so k is at most {num_train}.")
    return clipped


def main():
    with exit_on_user_error("eval_knn.py"):
        eval_knn(get_args_parser().parse_args())


if __name__ == "__main__":
    main()
