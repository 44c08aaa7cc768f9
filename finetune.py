# SPDX-License-Identifier: Apache-2.0
r"""Supervised fine-tuning of a pretrained backbone (Table 6), as DeiT trains; or its evaluation.

    python finetune.py --pretrained_weights runs/photos/backbone.pth --data_path photos/ \
        --output_dir runs/photos/finetuned
    python finetune.py --evaluate --pretrained_weights runs/photos/finetuned/best_finetuned.pth \
        --data_path photos/
    torchrun --nproc_per_node=8 finetune.py --preset imagenet --batch_size_per_gpu 128 \
        --data_path imagenet/ --output_dir runs/finetuned   # the published ViT-S/16

--data_path holds train/ and val/, each with one folder of images per class. Run the same command
again to resume. best_finetuned.pth holds the backbone too: every script takes it as
--pretrained_weights. On ImageNet the authors report 81.5 for ViT-S/16 and 82.8 for ViT-B/16.
"""

import argparse
from pathlib import Path

import torch

from dino.backbone_checks import check_gradients, check_takes_sizes
from dino.backbones import build_backbone, canonical_name, check_arch, is_vit
from dino.command_line import (
    LARGEST_RATE,
    Parser,
    add_image_arguments,
    add_image_size_argument,
    add_launch_arguments,
    add_minutes_argument,
    add_precision_argument,
    add_weights_arguments,
    loader_options,
    number,
    tell_idle,
)
from dino.data.channels import RGB, reader
from dino.data.images import ImageFiles, limit_pixels, list_labelled_images
from dino.data.labels import describe_set
from dino.data.loaders import evaluation_loader, training_loader
from dino.distributed import get_world_size, init_distributed, print0, shut_down
from dino.errors import UserError, exit_on_user_error
from dino.evaluation.features import FrozenFeatures
from dino.evaluation.linear import evaluate_head
from dino.evaluation.linear_files import (
    check_head_description,
    fingerprint,
    labels_of_head,
    load_head,
)
from dino.json_files import read_lines
from dino.optim import cosine_scheduler
from dino.output_checks import check_output_folder
from dino.precision import choose_amp_dtype
from dino.printable import printable
from dino.randomness import fix_random_seeds
from dino.run_lock import owned
from dino.same_on_ranks import check_same_flags
from dino.signals import exit_when_stopped, listen
from dino.training.finetuning import (
    RECIPES,
    FineTuningAugmentation,
    Regularisation,
    build_finetuning,
    build_model,
    build_rand_augment,
)
from dino.training.finetuning_run import BEST, FineTuningRun
from dino.training.saver import NEWEST, Saver, own_checkpoints
from dino.weights.layouts import read_weights
from dino.weights.pretrained import Pretrained, open_backbone
from dino.weights.results import check_no_results

WARMUP_LR = 1e-6  # DeiT's
OF_TRAINING = ("preset", "seed", "val_freq", "output_dir", "saveckp_minutes")  # and the recipe's


def get_args_parser():
    parser = Parser(prog="finetune.py", description="Fine-tune a backbone on labelled images.")
    group = parser.add_argument_group("backbone")
    add_weights_arguments(group)
    add = group.add_argument
    add("--from_scratch", action="store_true", help="random weights instead, for comparison")
    add_image_size_argument(group)
    add_precision_argument(group)
    add_recipe_arguments(parser.add_argument_group("recipe"))
    run = parser.add_argument_group("run")
    add = run.add_argument
    add("--batch_size_per_gpu", default=128, type=number(int, 1), help="images per process, step")
    add("--seed", default=0, type=number(int, 0), help="seed of everything random")
    add(
        "--data_path",
        default="/path/to/imagenet/",
        help="a folder with train/ and val/, each of class folders; --evaluate needs val/ only",
    )
    add("--val_freq", default=1, type=number(int, 1), help="epochs between two validations")
    add("--output_dir", default=".", help="for checkpoints and log; a run that is there is resumed")
    add_minutes_argument(run)
    add(
        "--evaluate",
        action="store_true",
        help=f"evaluate on val/ the {BEST} that --pretrained_weights names",
    )
    add_image_arguments(parser)
    add_launch_arguments(parser.add_argument_group("launch"))
    return parser


def add_recipe_arguments(group):
    """--preset and the flags that it sets, whose defaults are those of `small`."""
    defaults, add = RECIPES["small"], group.add_argument
    add(
        "--preset",
        default="small",
        choices=list(RECIPES),
        help="defaults of the flags of this group: small for thousands of images, imagenet is"
        " DeiT's recipe without repeated augmentation; a flag that is given wins",
    )
    share, positive = number(float, 0, 1), number(float, 0)
    rate = number(float, 0, LARGEST_RATE)
    kinds = {
        "epochs": (number(int, 1), "passes over train/"),
        "lr": (
            number(float, high=LARGEST_RATE, above=0),
            "highest rate, of the head, for 256 images a step",
        ),
        "min_lr": (rate, "rate at the end"),
        "warmup_epochs": (number(int, 0), "epochs in which the rate rises from 1e-6"),
        "weight_decay": (rate, "weight decay of AdamW"),
        "layer_decay": (
            number(float, above=0, high=1),
            "factor from each layer's rate to that of the one below it; 1 for networks that are not"
            " our ViTs",
        ),
        "drop_path_rate": (number(float, 0, 0.99), "stochastic depth of the last block"),
        "rand_augment": (str, "timm's text for RandAugment, '' for none"),
        "mixup": (positive, "alpha of mixup, 0 for none"),
        "cutmix": (positive, "alpha of cutmix, 0 for none"),
        "smoothing": (number(float, 0, 0.99), "label smoothing"),
        "erasing": (share, "probability of random erasing"),
        "ema_decay": (share, "decay of the moving average of the weights, which is evaluated too"),
    }
    for name, (kind, text) in kinds.items():
        add(f"--{name}", default=defaults[name], type=kind, help=text)
    add(
        "--crop_scale",
        default=defaults["crop_scale"],
        nargs=2,
        type=number(float, above=0, high=1),
        help="range of a crop's share of the image",
    )


def finetune(args):
    """Print accuracies and return the best top-1 in percent."""
    interruption = listen()
    args = over_recipe(args)
    check_flags(args)
    limit_pixels(args.max_image_pixels)
    _, device = init_distributed(args.device, args.dist_url)
    check_same_flags(args)
    torch.backends.cudnn.benchmark = True
    if args.evaluate:
        tell_idle(args, (*OF_TRAINING, *RECIPES["small"]), "--evaluate")
        accuracy = evaluate(args, device)
    else:
        with owned(args.output_dir):
            accuracy = train(args, device, interruption)
    shut_down()
    return accuracy


def over_recipe(args):
    """`args` with the values of --preset for flags that were not given."""
    flags = {**vars(args), **RECIPES[args.preset], **args.given}
    return argparse.Namespace(**{**flags, "crop_scale": tuple(flags["crop_scale"])})


def check_flags(args):
    """Raise UserError for flags that exclude each other, before anything is opened."""
    if args.crop_scale[0] > args.crop_scale[1]:
        low, high = args.crop_scale
        raise UserError(f"--crop_scale {low} {high}: give the smaller share first.")
    if args.rand_augment:
        build_rand_augment(args.rand_augment, {})
    if args.warmup_epochs > args.epochs:
        raise UserError(
            f"--warmup_epochs {args.warmup_epochs} is more than --epochs {args.epochs}: lower it."
        )
    if (args.mixup or args.cutmix) and args.batch_size_per_gpu % 2:
        raise UserError(
            f"--batch_size_per_gpu {args.batch_size_per_gpu}: mixup and cutmix pair the images of a"
            " batch. Give an even number, or --mixup 0 --cutmix 0."
        )
    if args.evaluate and (args.from_scratch or not args.pretrained_weights):
        raise UserError(f"--evaluate: give a {BEST} as --pretrained_weights, no --from_scratch.")
    if args.evaluate:
        return  # nothing is written
    check_output_folder(args.output_dir)
    folder = Path(args.output_dir)
    if any("layer_decay" not in line for line in read_lines(folder / "log.txt")[0]):
        raise UserError(
            f"--output_dir {folder}: log.txt there is of a run of another script, and would be"
            f" lost. Give this run a folder of its own, such as {folder / 'finetuned'}."
        )
    if not own_checkpoints(folder):
        check_no_results(folder, (BEST, "log.txt"), NEWEST)


def evaluate(args, device):
    """Top-1 in percent of the fine-tuned network --pretrained_weights."""
    source = f"--pretrained_weights {args.pretrained_weights}"
    paths, labels, names = list_labelled_images(args.data_path, "val")
    entries = read_weights(args.pretrained_weights)
    head = load_head(entries, source, BEST)
    check_head_description(entries, source)
    labels = labels_of_head(labels, names, entries.get("classes"), head.num_labels, source)
    pretrained = open_backbone(args, args.image_size)
    amp_dtype = choose_amp_dtype(args.amp_dtype, device)
    features = FrozenFeatures(
        pretrained.backbone, pretrained.embed_dim, device, n_last_blocks=1, amp_dtype=amp_dtype
    )
    if head.linear.in_features != features.dim:
        raise UserError(f"{source}: its head does not fit its backbone.")
    loader = evaluation_loader(paths, labels, pretrained.transform, **loader_options(args, device))
    result = evaluate_head(features, head, loader, len(paths), f"the outputs of {source}")
    print0(f"Accuracy of the network on the {len(paths)} test images: {result['acc1']:.1f}%")
    return result["acc1"]


def open_network(args):
    """The Pretrained to fine-tune: --from_scratch without weights takes --arch as it begins."""
    if args.pretrained_weights or not args.from_scratch:
        return open_backbone(args, args.image_size)
    check_arch(args.arch)
    size = args.image_size or Pretrained.image_size
    fix_random_seeds(args.seed)  # a run that resumes must find the same weights
    backbone, embed_dim = build_backbone(args.arch, args.patch_size, img_size=size)
    check_takes_sizes(backbone, args.arch, [size], RGB, f"--image_size {size}: {args.arch}")
    return Pretrained(backbone, embed_dim, canonical_name(args.arch), args.patch_size, size)


def train(args, device, interruption):
    """The whole job, in the order of the work; best top-1 in percent."""
    # ---- data and backbone ----
    paths, labels, classes = list_labelled_images(args.data_path, "train")
    val_paths, val_labels, _ = list_labelled_images(args.data_path, "val", classes)
    pretrained = open_network(args)
    args.layer_decay = layer_decay_for(pretrained, args)
    args.rand_augment = rand_augment_for(pretrained, args)
    options, in_chans = loader_options(args, device), pretrained.in_chans
    augmentation = FineTuningAugmentation(
        pretrained.image_size,
        pretrained.mean,
        pretrained.std,
        args.crop_scale,
        args.rand_augment,
        pretrained.shrink_images,
    )
    loader = training_loader(
        ImageFiles(paths, reader(in_chans)),
        augmentation,
        labels=labels,
        seed=args.seed,
        drop_last=True,
        in_chans=in_chans,
        **options,
    )
    global_batch = args.batch_size_per_gpu * get_world_size()
    if not len(loader):
        raise UserError(
            f"--batch_size_per_gpu {args.batch_size_per_gpu}: a step takes {global_batch} images,"
            f" and train/ has {len(paths)}. Lower it."
        )
    val_loader = evaluation_loader(val_paths, val_labels, pretrained.transform, **options)

    # ---- network ----
    fix_random_seeds(args.seed)  # the same on every rank: all start from the same weights
    amp_dtype = choose_amp_dtype(args.amp_dtype, device)
    check_gradients(pretrained.backbone, [pretrained.image_size], in_chans, device, amp_dtype)
    state, average = build_finetuning(
        build_model(pretrained, len(classes), args.drop_path_rate, args.from_scratch),
        device,
        weight_decay=args.weight_decay,
        layer_decay=args.layer_decay,
        ema_decay=args.ema_decay,
        amp_dtype=amp_dtype,
    )
    mixing = {name: getattr(args, name) for name in ("mixup", "cutmix", "smoothing", "erasing")}
    scaled_lr = args.lr * global_batch / 256
    schedule = cosine_scheduler(
        scaled_lr, args.min_lr, args.epochs, len(loader), args.warmup_epochs, WARMUP_LR
    ).tolist()
    print0(
        f"{len(paths)} training and {len(val_paths)} test images of {len(classes)} classes,"
        f" --lr x {global_batch} / 256 = {scaled_lr:.3g}"
    )

    # ---- training ----
    description = dict(
        **pretrained.description,
        **{name: getattr(args, name) for name in RECIPES[args.preset]},
        from_scratch=args.from_scratch,
        seed=args.seed,
        classes=classes,
        global_batch=global_batch,
        pretrained_weights=args.pretrained_weights,
        train_set=describe_set(paths, args.data_path),
        val_set=describe_set(val_paths, args.data_path),
        initial_backbone=fingerprint(pretrained.backbone),
    )
    run = FineTuningRun(
        state,
        average,
        Regularisation(device, len(classes), **mixing),
        schedule,
        loader,
        val_loader,
        val_images=len(val_paths),
        description=description,
        backbone=pretrained.description,
        saver=Saver(args.output_dir, minutes=args.saveckp_minutes),
        interruption=interruption,
        amp_dtype=amp_dtype,
        seed=args.seed,
    )
    run.resume(args.epochs)
    run.train(args.epochs, args.val_freq)
    top1, epoch = run.progress.best_acc, run.progress.best_epoch
    print0(f"Top-1 test accuracy: {top1:.1f} after epoch {epoch}, in {BEST}")
    return top1


def layer_decay_for(pretrained, args):
    """--layer_decay, or 1 for a network whose layers are not known; UserError if it was given."""
    if is_vit(pretrained.backbone):  # the only network whose layers are known
        return args.layer_decay
    if args.given.get("layer_decay", 1) != 1:
        raise UserError(
            f"--layer_decay {args.layer_decay}: {pretrained.arch} is not one of our ViTs, whose"
            " layers are known. Leave the flag out."
        )
    return 1.0


def rand_augment_for(pretrained, args):
    """--rand_augment, or none for other channels than RGB, with a message; UserError if given."""
    if pretrained.in_chans == RGB or not args.rand_augment:
        return args.rand_augment
    source = f"--pretrained_weights {args.pretrained_weights}"
    if "rand_augment" in args.given:
        raise UserError(
            f"--rand_augment {args.rand_augment}: changes the colours of RGB images, and {source}"
            f" takes {pretrained.in_chans} channels. Leave the flag out."
        )
    print0(printable(f"{source} takes {pretrained.in_chans} channels, so there is no RandAugment."))
    return ""


def main():
    with exit_on_user_error("finetune.py"), exit_when_stopped("finetune.py"):
        finetune(get_args_parser().parse_args())


if __name__ == "__main__":
    main()
