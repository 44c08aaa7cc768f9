# SPDX-License-Identifier: Apache-2.0
"""Invalid values and combinations of main_dino.py's flags, refused before anything is opened."""

from pathlib import Path

from dino.backbones import canonical_name, check_arch
from dino.data.augmentations import MOST_HUE
from dino.data.images import PICTURES_OF_A_RUN, SIGN_OF_A_RUN
from dino.errors import UserError
from dino.json_files import parse
from dino.output_checks import check_output_folder
from dino.training.presets import CONTINUE, DECIDED
from dino.training.saver import NEWEST, own_checkpoints
from dino.wandb_log import require_wandb
from dino.weights.results import check_no_results
from vision_transformer import ARCHITECTURES

TEXTS_OF_A_RUN = (SIGN_OF_A_RUN, "versions.json", "metrics.jsonl", "log.txt", "report.html")


def check_training_flags(args, own_views=False):
    """Raise UserError for the first mistake. `own_views`: the flags of the crops are not used."""
    check_arch(args.arch, args.stem)
    check_places(args)
    check_hours(args)
    if args.download and not args.dataset:
        raise UserError("--download: only the files of a --dataset can be downloaded.")
    check_lengths(args)
    if not own_views:
        check_views(args)
    check_step(args)


def check_places(args):
    """Where the run writes, and what it starts from."""
    check_output_folder(args.output_dir)
    if args.wandb:
        require_wandb()
    if (Path(args.output_dir) / "checkpoint.pth.tar").exists():
        raise UserError(
            f"--output_dir {args.output_dir}: holds a run of eval_linear.py, whose log.txt would be"
            " lost. Give another folder."
        )
    folder = args.output_dir
    if not own_checkpoints(folder):
        check_no_results(folder, ("backbone.pth", "checkpoint_best_*.pth"), NEWEST)
        if not is_of_a_run(folder):
            check_no_results(folder, (*TEXTS_OF_A_RUN, *sorted(PICTURES_OF_A_RUN)), NEWEST)
    if args.preset == CONTINUE and not args.init_from:
        raise UserError("--preset continue: name the weights to start from with --init_from FILE.")
    if args.init_from and args.resume not in ("auto", "never"):
        raise UserError(
            f"--init_from {args.init_from} and --resume {args.resume} exclude each other: the one"
            " starts a run, the other resumes one."
        )


def is_of_a_run(folder):
    """Whether args.json in `folder` has a run's flags: what one without a checkpoint has left there
    may be replaced.
    """
    path = Path(folder) / SIGN_OF_A_RUN
    flags = parse(path.read_text(errors="replace")) if path.is_file() else None
    return isinstance(flags, dict) and "momentum_teacher" in flags


def check_hours(args):
    """Only --preset auto takes a length in hours."""
    if args.hours is not None and args.preset not in DECIDED:
        raise UserError(
            f"--hours {args.hours}: only --preset auto and continue measure how many epochs"
            " fit. Give --epochs, or one of these."
        )


def check_lengths(args):
    """Warm-ups must not be longer than the run; freezing may be, as in the official code."""
    for name in ("warmup_epochs", "warmup_teacher_temp_epochs"):
        epochs = getattr(args, name)
        if epochs > args.epochs:
            raise UserError(
                f"--{name} {epochs} is longer than the run, --epochs {args.epochs}: lower the"
                " one or raise the other."
            )


MOST_ITERATIONS = 10**8  # of a run, whose schedules take 24 bytes each


def check_iterations(args, iterations_per_epoch):
    """Raise UserError for a run longer than any computer would live."""
    if args.epochs * iterations_per_epoch > MOST_ITERATIONS:
        raise UserError(
            f"--epochs {args.epochs}: with {iterations_per_epoch} iterations each, more than"
            f" {MOST_ITERATIONS} in all. Lower it."
        )


def check_strengths(args):
    """Scales of the crops and strengths of the augmentation, which need nothing but the flags."""
    for name in ("global_crops_scale", "local_crops_scale"):
        scale = getattr(args, name)
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise UserError(
                f"--{name} {' '.join(map(str, scale))}: give two shares of the image, above 0,"
                " the smaller first."
            )
    radii = args.blur_radius
    if len(radii) != 2 or radii[0] > radii[1]:
        raise UserError(
            f"--blur_radius {' '.join(map(str, radii))}: give two, the smaller one first."
        )
    if len(args.jitter) != 4:
        raise UserError(
            f"--jitter {' '.join(map(str, args.jitter))}: give four, for brightness, contrast,"
            " saturation and hue."
        )
    if args.jitter[3] > MOST_HUE:
        raise UserError(
            f"--jitter {' '.join(map(str, args.jitter))}: the last, of the hue, is at most"
            f" {MOST_HUE}, which reaches every hue."
        )


def check_views(args):
    """Crops, augmentation and normalisation."""
    check_strengths(args)
    for name in ("mean", "std"):
        if len(getattr(args, name)) != args.in_chans:
            raise UserError(
                f"--{name} {' '.join(map(str, getattr(args, name)))}: give one number for each of"
                f" --in_chans {args.in_chans} channels. python check_data.py --stats PATH measures"
                " them."
            )
    if canonical_name(args.arch) not in ARCHITECTURES:
        return  # build_student_and_teacher tries the sizes
    for name in ("global_crop_size", "local_crop_size"):
        size = getattr(args, name)
        if size % args.patch_size and (name == "global_crop_size" or args.local_crops_number):
            raise UserError(
                f"--{name} {size} is not a multiple of --patch_size {args.patch_size}: take"
                f" {max(1, round(size / args.patch_size)) * args.patch_size}."
            )


def check_step(args):
    """The parts of a batch, and the precision."""
    if args.batch_size_per_gpu % args.accum_steps:
        raise UserError(
            f"--accum_steps {args.accum_steps} does not divide --batch_size_per_gpu"
            f" {args.batch_size_per_gpu}: the parts must be equal."
        )
    if not args.use_fp16 and args.amp_dtype not in ("auto", "float32"):
        raise UserError(
            f"--use_fp16 false and --amp_dtype {args.amp_dtype} exclude each other: leave one out."
        )
