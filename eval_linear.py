# SPDX-License-Identifier: Apache-2.0
r"""Linear classifier on a frozen backbone (Sec. 4.1): trains it, or evaluates one that is trained.

    python eval_linear.py --pretrained_weights runs/photos/backbone.pth --data_path photos/ \
        --lr 0.001 0.01 0.1 --output_dir runs/photos/linear
    python eval_linear.py --pretrained_weights runs/photos/backbone.pth --data_path photos/ \
        --evaluate --classifier runs/photos/linear/best_linear.pth
    python eval_linear.py --evaluate --data_path imagenet/   # published backbone and classifier

--data_path holds train/ and val/, each with one folder of images per class. For the last command
the authors report 77.0. The best rate differs from backbone to backbone, and the paper sweeps it:
give several, they train side by side in the time of one. Run the first command again to resume.
"""

import argparse
import math
from pathlib import Path

import torch

from dino.backbones import is_vit
from dino.command_line import (
    LARGEST_RATE,
    Parser,
    add_image_arguments,
    add_image_size_argument,
    add_launch_arguments,
    add_precision_argument,
    add_weights_arguments,
    bool_flag,
    loader_options,
    number,
    tell_idle,
)
from dino.data.augmentations import LinearProbeAugmentation
from dino.data.channels import reader
from dino.data.images import ImageFiles, limit_pixels, list_labelled_images
from dino.data.labels import describe_set
from dino.data.loaders import evaluation_loader, training_loader
from dino.distributed import get_world_size, init_distributed, is_main_process, print0, shut_down
from dino.errors import Diverged, UserError, exit_on_user_error
from dino.evaluation.features import FrozenFeatures
from dino.evaluation.linear import evaluate_head, evaluate_heads, train_heads_one_epoch
from dino.evaluation.linear_files import (
    BEST,
    LinearClassifier,
    check_backbone,
    check_head_description,
    describe_head,
    labels_of_head,
    load_head,
    published_head,
    stated_flags,
)
from dino.evaluation.linear_run import (
    NEWEST,
    HeadsProgress,
    build_heads,
    check_folder,
    resume_training,
    save_best_and_last,
    save_training,
)
from dino.output_checks import check_output_folder
from dino.precision import choose_amp_dtype
from dino.printable import printable
from dino.randomness import fix_random_seeds
from dino.run_lock import owned
from dino.run_log import RunLog
from dino.same_on_ranks import check_same_flags
from dino.weights.files import read
from dino.weights.pretrained import open_backbone

__all__ = ["LinearClassifier", "eval_linear", "get_args_parser"]


def get_args_parser():
    parser = Parser(prog="eval_linear.py", description="Linear classifier on frozen features.")
    group = parser.add_argument_group("backbone")
    add_weights_arguments(group)
    add = group.add_argument
    add(
        "--n_last_blocks",
        default=4,
        type=number(int, 1),
        help="blocks of a ViT that give their [CLS]; the authors take 4 of a ViT-S, 1 of a ViT-B",
    )
    add(
        "--avgpool_patchtokens",
        default=False,
        type=bool_flag,
        help="add the mean patch token, with --n_last_blocks 1; the authors do for a ViT-B",
    )
    add_image_size_argument(group)
    add_precision_argument(group, default="float32")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", default=100, type=number(int, 1), help="passes over train/")
    add(
        "--lr",
        default=[0.001],
        nargs="+",
        type=number(float, high=LARGEST_RATE, above=0),
        help="learning rates at the start, for 256 images a step; they are scaled linearly by the"
        " global batch. Each trains a classifier of its own, and the best is reported",
    )
    add("--batch_size_per_gpu", default=128, type=number(int, 1), help="images per process, step")
    add(
        "--seed",
        default=0,
        type=number(int, 0),
        help="of the classifier, order of images, crops",
    )
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
    add_image_arguments(parser)
    add_launch_arguments(parser.add_argument_group("launch"))
    return parser


def eval_linear(args):
    """Print accuracies and return the best top-1 in percent."""
    check_linear_flags(args)
    limit_pixels(args.max_image_pixels)
    _, device = init_distributed(args.device, args.dist_url)
    check_same_flags(args)
    torch.backends.cudnn.benchmark = True
    if args.evaluate:
        tell_idle(args, ("epochs", "lr", "seed", "val_freq", "output_dir"), "--evaluate")
        accuracy = evaluate(args, device)
    else:
        with owned(args.output_dir):
            accuracy = train_heads(args, device)
    shut_down()
    return accuracy


def check_linear_flags(args):
    """Raise UserError for flags that exclude each other, before anything is opened."""
    if args.classifier and not args.evaluate:
        raise UserError(f"--classifier {args.classifier} is for --evaluate: add that flag.")
    if len(set(args.lr)) < len(args.lr):
        raise UserError(f"--lr {' '.join(map(str, args.lr))}: give each rate once.")
    if args.evaluate:
        return  # nothing is written
    check_output_folder(args.output_dir)
    check_folder(Path(args.output_dir))


def evaluate(args, device):
    """Top-1 in percent of --classifier or, without it, of the published head of the backbone."""
    paths, labels, names = list_labelled_images(args.data_path, "val")
    if args.classifier:
        source = f"--classifier {args.classifier}"
        entries = read(args.classifier, "--classifier")
        head, args = take_head(entries, args, source)
        pretrained = open_backbone(args, args.image_size or entries.get("image_size"))
        check_backbone(entries, pretrained, source, args.pretrained_weights)
    else:
        pretrained = open_backbone(args, args.image_size)
        source = f"the published linear head of {pretrained.arch}"
        entries = published_head(pretrained.arch, pretrained.patch_size)
        head, args = take_head(entries, args, source)
    if args.given.get("num_labels", head.num_labels) != head.num_labels:
        raise UserError(
            f"--num_labels {args.num_labels}: {source} knows {head.num_labels} classes. Leave the"
            " flag out."
        )
    labels = labels_of_head(labels, names, entries.get("classes"), head.num_labels, source)
    features = build_features(args, pretrained, device)
    if head.linear.in_features != features.dim:
        raise UserError(
            f"{source} is for features of {head.linear.in_features} numbers, and those of"
            f" {pretrained.arch} have {features.dim}. Check --n_last_blocks and"
            " --avgpool_patchtokens."
        )
    print0(printable(f"Loaded {source}, {head.num_labels} classes."))
    options = loader_options(args, device)
    loader = evaluation_loader(paths, labels, pretrained.transform, **options)
    what = f"the outputs of {pretrained.arch} with {source}"
    result = evaluate_head(features, head, loader, len(paths), what)
    print_result(result)
    print0(f"Accuracy of the network on the {len(paths)} test images: {result['acc1']:.1f}%")
    return result["acc1"]


def take_head(entries, args, source):
    """The head in the `entries` of a file, and `args` with the flags that the file states."""
    head = load_head(entries, source)
    check_head_description(entries, source)
    return head, argparse.Namespace(**{**vars(args), **stated_flags(entries, args.given, source)})


def build_features(args, pretrained, device):
    """The FrozenFeatures that the flags ask for. UserError for flags that do not go together."""
    for flag in ("n_last_blocks", "avgpool_patchtokens"):
        if flag in args.given and not is_vit(pretrained.backbone):
            raise UserError(
                f"--{flag} {args.given[flag]}: {pretrained.arch} is not one of our ViTs: the"
                " classifier takes its output directly. Leave the flag out."
            )
    return FrozenFeatures(
        pretrained.backbone,
        pretrained.embed_dim,
        device,
        n_last_blocks=args.n_last_blocks,
        avgpool_patchtokens=args.avgpool_patchtokens,
        amp_dtype=choose_amp_dtype(args.amp_dtype, device),
    )


def train_heads(args, device):
    """The whole job, in the order of the work; best top-1 in percent."""
    # ---- data and backbone ----
    paths, labels, classes = list_labelled_images(args.data_path, "train")
    val_paths, val_labels, _ = list_labelled_images(args.data_path, "val", classes)
    if args.given.get("num_labels", len(classes)) != len(classes):
        raise UserError(
            f"--num_labels {args.num_labels}: there are {len(classes)} class folders in train/ of"
            f" --data_path {args.data_path}. Leave the flag out."
        )
    pretrained = open_backbone(args, args.image_size)
    features = build_features(args, pretrained, device)
    augmentation = LinearProbeAugmentation(
        pretrained.image_size, pretrained.mean, pretrained.std, pretrained.shrink_images
    )
    options = loader_options(args, device)
    in_chans = pretrained.in_chans
    images = ImageFiles(paths, reader(in_chans))
    loader = training_loader(
        images, augmentation, labels=labels, seed=args.seed, in_chans=in_chans, **options
    )
    val_loader = evaluation_loader(val_paths, val_labels, pretrained.transform, **options)

    # ---- heads ----
    fix_random_seeds(args.seed)  # the same on every rank: all start from the same heads
    global_batch = args.batch_size_per_gpu * get_world_size()
    scaled_lrs = [lr * global_batch / 256 for lr in args.lr]  # Goyal et al. 2017
    state = build_heads(features.dim, len(classes), scaled_lrs, args.epochs, device)
    description = describe_head(
        pretrained,
        classes,
        checkpoint_key=args.checkpoint_key,
        n_last_blocks=args.n_last_blocks,
        avgpool_patchtokens=args.avgpool_patchtokens,
        pretrained_weights=args.pretrained_weights,
        lr=args.lr,
        epochs=args.epochs,
        global_batch=global_batch,
        seed=args.seed,
        train_set=describe_set(paths, args.data_path),
        val_set=describe_set(val_paths, args.data_path),
    )
    print0(
        f"{len(paths)} training and {len(val_paths)} test images of {len(classes)} classes,"
        f" features of {features.dim} dimensions, --lr x {global_batch} / 256 ="
        f" {', '.join(f'{lr:.3g}' for lr in scaled_lrs)}"
    )
    if len(args.lr) > 1:
        print0("The lines of an epoch are of the best classifier so far; log.txt has all of them.")

    # ---- resume ----
    output_dir, progress = Path(args.output_dir), HeadsProgress.of(len(state.heads))
    output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint, log = output_dir / NEWEST, RunLog(output_dir)
    if resume_training(checkpoint, state, progress, description):
        done = f"{progress.epoch} of {args.epochs} epochs"
        print0(printable(f"Resumed from {checkpoint}: {done} are done."))
    if is_main_process():
        log.keep("log.txt", lambda line: line["epoch"] < progress.epoch)

    # ---- training ----
    for epoch in range(progress.epoch, args.epochs):
        loader.sampler.set_epoch(epoch)
        lrs, results = state.scheduler.get_last_lr(), []
        losses = train_heads_one_epoch(
            features, state.heads, state.optimizer, loader, epoch, progress.best_head
        )
        check_one_is_finite(losses, epoch)
        state.scheduler.step()
        progress.epoch = epoch + 1
        if epoch % args.val_freq == 0 or progress.epoch == args.epochs:
            results = evaluate_heads(features, state.heads, val_loader, len(val_paths))
            check_one_is_finite([result["loss"] for result in results], epoch)
            improved = progress.add(epoch, [result["acc1"] for result in results])
            result = results[progress.best_head]
            print_validation(result, progress, len(val_paths))
            save_best_and_last(
                output_dir, state, progress, description, accuracy=result["acc1"], improved=improved
            )
        log.epoch(log_line(epoch, args.lr, lrs, losses, results, progress.best_head))
        save_training(checkpoint, state, progress, description)
    print_table(args.lr, progress)
    return progress.best_acc


def check_one_is_finite(losses, epoch):
    """Raise Diverged if no head's loss is a finite number."""
    if not any(map(math.isfinite, losses)):
        raise Diverged(f"the loss is {losses[0]} in epoch {epoch}. Try a lower --lr.")


def log_line(epoch, flags, lrs, losses, results, best):
    """A line of log.txt: the official keys for the best head, then every head's by its --lr."""
    line = {"train_loss": losses[best], "train_lr": lrs[best], "epoch": epoch}
    by_lr = {"train_loss_by_lr": losses}
    if results:
        line |= {f"test_{name}": value for name, value in results[best].items()}
        by_lr["test_acc1_by_lr"] = [result["acc1"] for result in results]
    names = list(map(str, flags))
    by_lr = {key: dict(zip(names, values, strict=True)) for key, values in by_lr.items()}
    return line | {"lr": flags[best]} | by_lr


def print_result(result):
    top5 = f" Acc@5 {result['acc5']:.3f}" if "acc5" in result else ""
    print0(f"* Acc@1 {result['acc1']:.3f}{top5} loss {result['loss']:.3f}")


def print_validation(result, progress, images):
    """The official lines, for the best head so far."""
    print_result(result)
    network = f"at epoch {progress.epoch - 1} of the network on the {images} test images"
    print0(f"Accuracy {network}: {result['acc1']:.1f}%")
    print0(f"Max accuracy so far: {progress.best_acc:.2f}%")


def print_table(flags, progress):
    """The best accuracy of each head, by its --lr, and the official last line."""
    print0(f"{'--lr':>10}  {'best top-1 %':>12}  after epoch")
    for i, (lr, (accuracy, epoch)) in enumerate(zip(flags, progress.head_bests, strict=True)):
        note = f"  {BEST}" if i == progress.best_head else ""
        print0(f"{lr:>10g}  {accuracy:>12.2f}  {epoch:>11}{note}")
    print0(f"Top-1 test accuracy: {progress.best_acc:.1f}")


def main():
    with exit_on_user_error("eval_linear.py"):
        eval_linear(get_args_parser().parse_args())


if __name__ == "__main__":
    main()
