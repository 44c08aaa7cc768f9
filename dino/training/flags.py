# SPDX-License-Identifier: Apache-2.0
"""The flags of main_dino.py, official and ours."""

import argparse

from dino.command_line import (
    LARGEST_RATE,
    Parser,
    add_image_arguments,
    add_launch_arguments,
    add_minutes_argument,
    add_precision_argument,
    bool_flag,
    number,
)
from dino.data.demo import DEMO
from dino.data.levels import HIGHEST_WHITE
from dino.errors import UserError
from dino.small_resnet import STEMS
from dino.training.ablation_flags import add_ablation_arguments
from dino.training.presets import DECIDED, PRESETS
from dino.training.view_flags import add_view_arguments

LEAST_TEMPERATURE = 1e-4  # of the teacher: logits divided by less overflow, also in float16


def get_args_parser():
    """Parser without --help, for use as a parent."""
    parser = argparse.ArgumentParser("DINO", add_help=False)
    add_network_arguments(parser.add_argument_group("networks"))
    add_teacher_arguments(parser.add_argument_group("teacher"))
    add_optimisation_arguments(parser.add_argument_group("optimisation"))
    add_view_arguments(parser.add_argument_group("views"))
    add_ablation_arguments(parser.add_argument_group("ablations"))
    add_run_arguments(parser.add_argument_group("run"))
    add_launch_arguments(parser.add_argument_group("launch"))
    return parser


def add_network_arguments(group):
    add = group.add_argument
    add(
        "--arch",
        default="vit_small",
        help="vit_tiny, vit_small, vit_base or vit_large; a classifier of torchvision, such as"
        " resnet50; an XCiT, such as xcit_small_12_p16; timm:NAME; or, for"
        " runs on a CPU, vit_nano, resnet_nano, and resnet_nano_2x2, whose features keep the"
        " quarters of the image apart",
    )
    add(
        "--stem",
        default="auto",
        choices=STEMS,
        help="first layers of a ResNet; small (3 x 3, stride 1, no max-pool) is for crops below 64"
        " pixels; auto is small for resnet_nano's and imagenet for the others",
    )
    add(
        "--patch_size",
        default=16,
        type=number(int, 1),
        help="side of a ViT's patches in pixels; smaller patches are more accurate, slower, and"
        " less stable in float16",
    )
    add(
        "--in_chans",
        default=3,
        type=number(int, 1, 1024),
        help="channels of the images, with as many numbers for --mean and --std; other than 3:"
        " no change of hue, and grey is the mean over the channels; more than 4: TIFF or .npy",
    )
    add(
        "--white",
        default=0.0,
        type=number(float, 0, HIGHEST_WHITE),
        help="the number that is white in images of more than 8 bits a channel, 4095 for a sensor"
        " of 12; 0 for 65535 in files of 16 bits, 1, 255 or 65535 by the range in files of 32",
    )
    add(
        "--drop_path_rate",
        default=0.1,
        type=number(float, 0, 0.99),
        help="stochastic depth of the student: 0 at its first block, this at its last",
    )
    add(
        "--out_dim",
        default=65536,
        type=number(int, 2, 2**24),
        help="K, the outputs of the head; thousands are enough for small data",
    )
    add(
        "--norm_last_layer",
        default=True,
        type=bool_flag,
        help="fix the norms of the head's last layer; the authors' ViT-S were better without,"
        " and less stable",
    )
    add(
        "--use_bn_in_head",
        default=False,
        type=bool_flag,
        help="batch norms in the head; they keep a run on small data from collapsing",
    )
    add(
        "--head_hidden_dim",
        default=2048,
        type=number(int, 1, 2**16),
        help="width of the head's hidden layers",
    )
    add(
        "--head_bottleneck_dim",
        default=256,
        type=number(int, 1, 2**16),
        help="width of what the head normalises",
    )


def add_teacher_arguments(group):
    add = group.add_argument
    add(
        "--momentum_teacher",
        default=0.996,
        type=number(float, 0, 1),
        help="momentum of the teacher's moving average at the start. The authors advise 0.9995"
        " for 256 images a step; runs of less than 10,000 iterations need a faster teacher,"
        " such as 0.97 for 2,000",
    )
    add(
        "--momentum_teacher_end",
        default=1.0,
        type=number(float, 0, 1),
        help="momentum of the teacher at the end, along a cosine; below 1 the teacher of a short"
        " run keeps up with the student",
    )
    add(
        "--warmup_teacher_temp",
        default=0.04,
        type=number(float, LEAST_TEMPERATURE),
        help="teacher's temperature at the start; lower it if the loss does not fall",
    )
    add(
        "--teacher_temp",
        default=0.04,
        type=number(float, LEAST_TEMPERATURE),
        help="teacher's temperature after the warm-up; most runs are unstable above 0.07",
    )
    add(
        "--warmup_teacher_temp_epochs",
        default=0,
        type=number(int, 0),
        help="epochs in which the temperature goes from the one to the other",
    )


def add_optimisation_arguments(group):
    add = group.add_argument
    add("--epochs", default=100, type=number(int, 1, 10**5), help="passes over the images")
    add(
        "--hours",
        default=None,
        type=number(float, above=0),
        help="time to train for, instead of --epochs: with --preset auto or continue, which measure"
        " how many fit and take half an hour if neither is given",
    )
    add("--batch_size_per_gpu", default=64, type=number(int, 1), help="images per process and step")
    add(
        "--accum_steps",
        default=1,
        type=number(int, 1),
        help="parts in which a process's images pass the networks, for less memory: the same step,"
        " except that batch norms see the parts",
    )
    add(
        "--grad_checkpointing",
        action="store_true",
        help="compute activations again instead of keeping them: less memory, more time",
    )
    add("--optimizer", default="adamw", choices=["adamw", "sgd", "lars"], help="adamw for a ViT")
    add(
        "--lr",
        default=0.0005,
        type=number(float, 0, LARGEST_RATE),
        help="highest learning rate, for 256 images a step; it is scaled linearly by the global"
        " batch",
    )
    add(
        "--min_lr",
        default=1e-6,
        type=number(float, 0, LARGEST_RATE),
        help="learning rate at the end, not scaled",
    )
    add(
        "--warmup_epochs",
        default=10,
        type=number(int, 0),
        help="epochs in which the learning rate rises from 0",
    )
    add(
        "--weight_decay",
        default=0.04,
        type=number(float, 0, LARGEST_RATE),
        help="weight decay at the start",
    )
    add(
        "--weight_decay_end",
        default=0.4,
        type=number(float, 0, LARGEST_RATE),
        help="weight decay at the end, by a cosine",
    )
    add(
        "--clip_grad",
        default=3.0,
        type=number(float, 0),
        help="largest norm of each single gradient tensor, 0 for no limit; 0.3 to 1 help larger"
        " ViTs",
    )
    add(
        "--freeze_last_layer",
        default=1,
        type=number(int, 0),
        help="epochs in which the head's last layer stays as it is; more of them if the loss"
        " does not fall",
    )
    add(
        "--freeze_backbone",
        default=0,
        type=number(int, 0),
        help="epochs in which the head learns alone: for --init_from without a head",
    )
    add(
        "--use_fp16",
        default=True,
        type=bool_flag,
        help="mixed precision where the device has it; false if the loss is unstable",
    )
    add_precision_argument(group)
    add(
        "--compile",
        default="auto",
        nargs="?",
        const="true",
        choices=["auto", "true", "false"],
        help="torch.compile for networks and loss: minutes at the start, then shorter steps; auto"
        " does so on a GPU, but with several GPUs for no network that has batch norms",
    )


def add_run_arguments(group):
    add = group.add_argument
    add(
        "--preset",
        choices=list(PRESETS),
        help="a named recipe, which sets defaults: see README.md; auto looks at the images and"
        " decides, for one's own data, and prints what and why; continue does so to train on from"
        " the weights of --init_from",
    )
    add(
        "--data_path",
        default="/path/to/imagenet/train/",
        help="a folder of images, with or without class folders, or a text file with a path per"
        " line;"
        f" {DEMO!r} for the photographs that come with scikit-image",
    )
    add(
        "--dataset",
        default=None,
        metavar="NAME",
        help="a data set of torchvision, such as CIFAR10, with its files in --data_path; or your"
        " own, MODULE:FUNCTION, which returns a sequence of PIL images",
    )
    add(
        "--download",
        action="store_true",
        help="let torchvision download the files of --dataset into --data_path; never without this",
    )
    add(
        "--on_bad_image",
        default="error",
        choices=["error", "skip"],
        help="an image that cannot be read stops the run, or another one takes its place; more than"
        " 1 %% of such images stop the run anyway",
    )
    add_image_arguments(group)
    add("--output_dir", default=".", help="for checkpoints and logs")
    add(
        "--resume",
        default="auto",
        metavar="{auto,never,PATH}",
        help="auto resumes the run in --output_dir, if there is one; never refuses such a folder;"
        " or a checkpoint to resume from",
    )
    add(
        "--init_from",
        default=None,
        help="a checkpoint, ours or official, whose weights a new run starts from",
    )
    add(
        "--saveckp_freq",
        default=20,
        type=number(int, 0),
        help="epochs between two numbered checkpoints, which stay; 0 for none of them",
    )
    add(
        "--resume_freq",
        default=1,
        type=number(int, 1),
        help="epochs between two writes of checkpoint.pth, from which an interrupted run resumes",
    )
    add(
        "--saveckp_iters",
        default=0,
        type=number(int, 0),
        help="iterations between two saves inside epochs; 0 saves at their ends only",
    )
    add_minutes_argument(group)
    add(
        "--keep_checkpoints",
        default=0,
        type=number(int, 0),
        help="how many of the numbered checkpoints stay, the newest ones; 0 for all of them",
    )
    add(
        "--log_freq",
        default=10,
        type=number(int, 1),
        help="iterations between two lines of the log",
    )
    add(
        "--seed",
        default=0,
        type=number(int, 0),
        help="seed of the initial weights, the order of images, crops and stochastic depth",
    )
    add(
        "--knn_data_path",
        default=None,
        help="a folder with train/ and val/, each of class folders: k-NN accuracy on it is"
        " measured while training",
    )
    add(
        "--knn_freq",
        default=10,
        type=number(int, 1),
        help="epochs between two measurements of the features: k-NN with --knn_data_path; RankMe,"
        " alignment and uniformity, which need no labels; the first one is before training",
    )
    add("--tensorboard", action="store_true", help="write the figures as TensorBoard events too")
    add(
        "--wandb",
        action="store_true",
        help="log the figures to Weights & Biases too, set up by variables such as WANDB_PROJECT",
    )
    add(
        "--report",
        default=True,
        type=bool_flag,
        help="write report.html at the end, for which attention maps are kept over the epochs",
    )


def parse_args(argv=None):
    """The flags of a command line, over those of its --preset, over the defaults."""
    parser = Parser(
        prog="main_dino.py",
        parents=[get_args_parser()],
        description="Train DINO on images without labels.",
    )
    return over_preset(parser.parse_args(argv))


def over_preset(args):
    """What a Parser returned: the flags that were given, over those of --preset, over defaults."""
    given = vars(args).pop("given")
    if args.preset:
        flags = PRESETS[args.preset].flags
        vars(args).update({name: value for name, value in flags.items() if name not in given})
    if args.preset in DECIDED:
        if "hours" in given and "epochs" in given:
            raise UserError("--hours and --epochs exclude each other: leave one out.")
        args.given = sorted(given)
    return args


def complete(args):
    """`args`, which may be the official parser's, with our defaults for flags that it lacks."""
    return argparse.Namespace(**{**vars(get_args_parser().parse_args([])), **vars(args)})
