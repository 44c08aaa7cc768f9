# SPDX-License-Identifier: Apache-2.0
"""The paper's ablations: the runs of one figure or table, then a table and a picture of them.

    python ablations.py collapse --demo                        # no data, no GPU: Fig. 7 in minutes
    python ablations.py teacher --demo --seeds 0 1
    python ablations.py small-data --data_path photos/train --knn_data_path photos --seeds 0 1 2
    python ablations.py multicrop --data_path imagenet/train --knn_data_path imagenet
    python ablations.py components --print_commands torchrun --data_path imagenet/train ...

Runs are folders of main_dino.py in --output_dir/STUDY; flags that are not this script's go to all
of them. Run the same command again to resume an interrupted study.
"""

import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import torch.distributed.run

import main_dino
from dino.command_line import Parser, number
from dino.data.demo import write_demo_images
from dino.errors import Diverged, UserError, exit_on_user_error
from dino.output_checks import check_output_folder
from dino.printable import printable
from dino.run_lock import owned
from dino.run_log import RunLog
from dino.signals import StopRequested, listen
from dino.training.checkpoint import INDIFFERENT, same
from dino.training.flag_checks import check_training_flags
from dino.training.flags import get_args_parser as get_training_parser
from dino.training.flags import parse_args as parse_training_flags
from dino.training.logged_run import LoggedRun
from dino.training.presets import DECIDED
from dino.training.saver import NEWEST
from dino.training.settings import REASONS
from dino.training.studies import STUDIES
from dino.training.study_plots import draw_study
from dino.training.study_report import check_tables, measure, summarise, write_tables
from dino.weights.files import DamagedFile, read

LAUNCHERS = {
    "torchrun": "torchrun --standalone --nproc_per_node={n} main_dino.py",
    "srun": "srun --ntasks-per-node={n} --gpus-per-node={n} --signal=USR1@120 python main_dino.py",
}
DIVERGED = ("error: the loss is", "error: a weight is no longer finite")  # main_dino.py's last line
OWN = ("output_dir", "seed", "resume", "help")  # flags of main_dino.py that this script sets


@dataclass(frozen=True)
class Plan:
    """One run of a study: its row, its seed, its folder, and main_dino.py's flags as texts."""

    name: str
    seed: int
    folder: Path
    flags: list
    args: object  # the flags, parsed


def get_args_parser():
    parser = Parser(
        prog="ablations.py",
        description="Repeat one figure or table of the paper, or a study of --preset auto. Other"
        " flags are main_dino.py's.",
    )
    add = parser.add_argument
    add("study", choices=list(STUDIES), help="Fig. 6, Fig. 7, Tables 7 to 9; ours")
    add("--demo", action="store_true", help="on the embedded photographs, in minutes on a CPU")
    add("--output_dir", default="runs/ablations", help="for runs, tables and pictures")
    add(
        "--seeds",
        default=[0],
        nargs="+",
        type=number(int, 0),
        help="a run for each; the table gives their mean and range",
    )
    add(
        "--runs",
        default=None,
        nargs="+",
        metavar="RUN",
        help="train only these runs of the study, by their names in the table",
    )
    add(
        "--nproc_per_node",
        default=1,
        type=number(int, 1, 1024),
        help="processes of each run, one a GPU, among which the study's batch is divided",
    )
    add(
        "--print_commands",
        default=None,
        choices=list(LAUNCHERS),
        help="print a command for each run, as a job of a cluster, and run nothing",
    )
    add(
        "--report_only",
        action="store_true",
        help="write the table and the picture of what the runs have logged so far, and run nothing",
    )
    return parser


def parse_args(argv=None):
    """The script's own flags; those for main_dino.py are in `training`, as texts."""
    args, training = get_args_parser().parse_known_args(argv)
    args.training = training
    return args


def ablations(args):
    """Run what is unfinished of a study, then write its table and its picture."""
    check_output_folder(args.output_dir)
    if args.print_commands and args.report_only:
        raise UserError(
            f"--print_commands {args.print_commands} and --report_only exclude each other: leave"
            " one out."
        )
    if len(set(args.seeds)) < len(args.seeds):  # the mean would count a run twice
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: give each seed once.")
    study = STUDIES[args.study]
    check_tables(args.output_dir, args.study, study.title)
    plans = plan_runs(args, study)
    wanted = [plan for plan in plans if not args.runs or plan.name in args.runs]
    if args.demo and not args.report_only:
        write_shared_images(args.output_dir)
    if args.print_commands:
        for plan in wanted:
            launcher = LAUNCHERS[args.print_commands].format(n=args.nproc_per_node)
            print(f"{launcher} {shlex.join(plan.flags)}")
        return
    for plan in plans:
        check_same_flags(plan)
    if not args.report_only:
        with owned(Path(args.output_dir) / args.study):
            run_plans(args, wanted)
    report(args, study, plans)


# ---- plan ----


def plan_runs(args, study):
    """A Plan for each run and seed. UserError for flags that main_dino.py refuses, or we set."""
    shared = study.demo if args.demo else study.paper
    data = demo_data(args.output_dir) if args.demo else {}
    parser = Parser(prog="ablations.py", parents=[get_training_parser()])
    training = parser.parse_args(args.training)
    given = training.given
    epochs = training.epochs if "epochs" in given else shared.get("epochs")
    for name in given:
        if name in OWN or name in study.varied:
            raise UserError(f"--{name}: the study {args.study} sets this itself. Leave it out.")
    if not args.demo and "data_path" not in given:
        raise UserError(
            "--data_path is missing: a folder of images, such as imagenet/train, and"
            " --knn_data_path for the accuracies. Or add --demo."
        )
    batch = {"global_batch": None} if "batch_size_per_gpu" in given else {}
    base = to_texts(data | resolve(shared | batch, args.nproc_per_node, epochs))
    variants = study.runs(args.demo)
    for name in args.runs or ():
        if name not in variants:
            raise UserError(f"--runs {name!r}: {args.study} has {', '.join(map(repr, variants))}.")
    plans = []
    for name in variants:
        for seed in args.seeds:
            folder = Path(args.output_dir) / args.study / f"{name.replace(' ', '_')}-seed{seed}"
            own = resolve(variants[name].flags, args.nproc_per_node, epochs)
            own |= {"seed": seed, "output_dir": folder}
            flags = [*base, *args.training, *to_texts(own)]
            plans.append(Plan(name, seed, folder, flags, parse_training_flags(flags)))
            if plans[-1].args.preset not in DECIDED:  # the others decide what is missing
                check_training_flags(plans[-1].args)
    return plans


def demo_data(output_dir):
    """All runs read the same tiles."""
    folder = Path(output_dir) / "demo_images"
    return {"data_path": folder / "images", "knn_data_path": folder}


def write_shared_images(output_dir):
    """Write them once, all or nothing: another study may begin at the same time."""
    folder = demo_data(output_dir)["knn_data_path"]
    if folder.exists():
        return
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    write_demo_images(temporary)
    try:
        temporary.rename(folder)
    except OSError:  # the other study was first
        shutil.rmtree(temporary)


def resolve(flags, processes, epochs):
    """`flags` with each process's share of a `global_batch`, and an `epochs_share` of `epochs`."""
    flags = dict(flags)
    if share := flags.pop("epochs_share", None):
        flags["epochs"] = max(1, round(share * epochs))
    if batch := flags.pop("global_batch", None):
        if batch % processes:
            raise UserError(f"--nproc_per_node {processes} does not divide the batch of {batch}.")
        flags["batch_size_per_gpu"] = batch // processes
    return flags


def to_texts(flags):
    """{"local_crops_number": 2} -> ["--local_crops_number=2"]."""
    texts = []
    for name, value in flags.items():
        if value is None:
            continue
        if isinstance(value, tuple):
            texts += [f"--{name}", *map(str, value)]
        else:
            texts += [f"--{name}={value}"]  # which may begin with a hyphen
    return texts


def check_same_flags(plan):
    """Raise UserError if the folder holds a run with other flags, which must not mix with these."""
    if not (plan.folder / "args.json").exists():
        return
    saved = RunLog(plan.folder).flags()
    reasons = saved.get(REASONS)
    decided = set(reasons) if isinstance(reasons, dict) else set()  # when that run began
    free = INDIFFERENT | decided - set(getattr(plan.args, "given", ()))
    for name, value in vars(plan.args).items():
        if name in saved and name not in free and not same(name, saved[name], value):
            raise UserError(
                f"--output_dir: {plan.folder} holds a run with --{name} {saved[name]!r:.60}, not"
                f" {value!r:.60}. Give another folder."
            )


# ---- run ----


def run_plans(args, plans):
    """One after another; a run that diverges is reported, and the others follow."""
    for i, plan in enumerate(plans, start=1):
        where = f"{args.study}, run {i} of {len(plans)}: {plan.name}, seed {plan.seed}"
        if is_finished(plan):
            print(f"{where}: finished", flush=True)
            continue
        log = plan.folder.with_suffix(".log")
        print(printable(f"{where}; its output goes to {log}"), flush=True)
        code = run_one(plan.flags, args.nproc_per_node, log)
        if code == 0:
            continue
        last = printable("".join(log.read_text(errors="replace").splitlines()[-1:]))
        if code != Diverged.exit_code or not any(text in last for text in DIVERGED):
            raise UserError(f"{where}: ended with code {code}. {last}")
        print(f"{where}: diverged. {last}", flush=True)


def is_finished(plan):
    """Whether the newest checkpoint is that of the end, with all of it logged."""
    path = plan.folder / NEWEST
    if not path.exists():
        return False
    try:
        checkpoint = read(path, "--output_dir")
    except DamagedFile:
        return False  # main_dino.py looks for an older one
    return checkpoint.get("epoch") == plan.args.epochs and not checkpoint.get("unlogged")


def run_one(flags, processes, log):
    """The exit code of main_dino.py in a process of its own, whose output goes to file `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # a fork has imported torch already; macOS's own libraries do not work in one
    context = multiprocessing.get_context("spawn" if sys.platform == "darwin" else "fork")
    process = context.Process(target=train, args=(flags, processes, log))
    try:
        process.start()
        process.join()
    except StopRequested:
        if process.is_alive():
            process.terminate()
            process.join()
        raise
    return process.exitcode


def train(flags, processes, log):
    """main_dino.py with its flags. A terminal's Ctrl-C reaches it through its parent alone.

    When the parent is gone, however that came, it stops as after a SIGTERM: it finishes its step
    and saves.
    """
    os.setsid()
    listen.cache_clear()  # a fork would hear signals through its parent's socket
    listen()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    threading.Thread(target=stop_with_parent, daemon=True).start()
    if processes == 1:
        sys.argv = ["main_dino.py", *flags]
        main_dino.main()
    else:
        script = str(Path(__file__).with_name("main_dino.py"))
        launch = ["--standalone", f"--nproc_per_node={processes}", script, *flags]
        torch.distributed.run.main(launch)


def stop_with_parent():
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


# ---- report ----


def report(args, study, plans):
    """Write STUDY.md, STUDY.json and STUDY.png into --output_dir, and print the table."""
    logged = [(plan, run) for plan in plans if (run := LoggedRun(plan.folder)).steps]
    if not logged:
        raise UserError(
            f"--output_dir {args.output_dir}: no run of {args.study} has logged a step yet."
        )
    for _, run in logged:
        run.warn_of_odd_lines()
    rows = []
    for name, variant in (study.runs(args.demo) | study.variants).items():
        figures = {
            plan.seed: measure(run, args.nproc_per_node)
            for plan, run in logged
            if plan.name == name
        }
        rows.append((name, variant.theirs, figures))
    summary = summarise(study.title, study.source, rows, describe(args, logged))
    runs = {}
    for plan, run in logged:
        runs.setdefault(plan.name, []).append(run)
    folder = Path(args.output_dir)
    print(write_tables(folder, args.study, summary))
    draw_study(folder / f"{args.study}.png", args.study, summary, runs)
    print(printable(f"Table and picture: {folder / args.study}.md, .json and .png"))


def describe(args, logged):
    """What was trained on what, in a sentence."""
    archs, epochs = (
        " or ".join(unique(run.flags.get(name) for _, run in logged)) for name in ("arch", "epochs")
    )
    data = "the embedded photographs (--demo)" if args.demo else logged[0][0].args.data_path
    seeds = "seed" if len(args.seeds) == 1 else "seeds"
    return printable(
        f"{archs}, {epochs} epochs of {data}, {seeds} {', '.join(map(str, args.seeds))}"
    )


def unique(values):
    """As texts, in the order in which they come."""
    return dict.fromkeys(map(str, values))


def main():
    interruption = listen()
    with exit_on_user_error("ablations.py"):
        try:
            ablations(parse_args())
        except StopRequested as stop:
            print(f"ablations.py: stopped by {stop}. Run the same command to resume.", flush=True)
            sys.exit(interruption.exit_code)


if __name__ == "__main__":
    main()
