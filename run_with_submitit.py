# SPDX-License-Identifier: Apache-2.0
"""Train DINO as a Slurm job that submitit submits, and that requeues itself at its time limit.

    pip install submitit
    python run_with_submitit.py --nodes 2 --ngpus 8 --partition gpu --preset boost \\
        --data_path imagenet/train --output_dir runs/boost/%j

Takes every flag of main_dino.py. The folder --output_dir, in which %j is the job's number, must be
one that all nodes see; the job's own logs go there too. docs/slurm.md has a script for sbatch that
does the same without submitit.
"""

import argparse
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from dino.command_line import Parser, number
from dino.errors import UserError, exit_on_user_error
from dino.printable import printable
from dino.training.flag_checks import check_training_flags
from dino.training.flags import get_args_parser as training_parser
from dino.training.flags import over_preset

MEMORY_PER_GPU = 40  # GB of the host
# Seconds before the end of the job's time at which it is asked to stop. Slurm may ask up to a
# minute earlier.
SIGNAL_DELAY = 120
MAX_TIMEOUTS = 30  # after so many time limits a job is not requeued again


def get_args_parser():
    parser = Parser(
        prog="run_with_submitit.py",
        empty=("partition",),
        parents=[training_parser()],
        description="Train DINO as a Slurm job.",
    )
    add = parser.add_argument_group("job").add_argument
    add("--ngpus", default=8, type=number(int, 1), help="GPUs, and processes, per node")
    add("--nodes", default=2, type=number(int, 1), help="nodes")
    add(
        "--timeout",
        default=2800,
        type=number(int, 1),
        help="minutes after which the job saves, is requeued, and resumes",
    )
    add(
        "--partition",
        default="learnfair",
        help="where to submit: sinfo lists the partitions, '' is the cluster's default; the default"
        " here is that of the official script",
    )
    add("--account", default="", help="Slurm account to charge, where the cluster requires one")
    add("--qos", default="", help="quality of service, where the cluster has several")
    add("--constraint", default="", help="features that the nodes must have, such as a100")
    add("--use_volta32", action="store_true", help="short for --constraint volta32gb")
    add("--comment", default="", help="a text for the scheduler")
    add(
        "--mem_gb",
        default=None,
        type=number(float, 0),
        help=f"memory of each node in GB; by default {MEMORY_PER_GPU} for each of its GPUs; 0 for"
        " all that the node has",
    )
    add("--cpus_per_task", default=10, type=number(int, 1), help="cores for each process")
    add(
        "--cluster",
        default="slurm",
        choices=["slurm", "local"],
        help="local runs the job on this machine, to try it",
    )
    return parser


def executor_parameters(args):
    """What submitit is told about the job; `slurm_*` are for Slurm alone."""
    parameters = dict(
        name="dino",
        nodes=args.nodes,
        tasks_per_node=args.ngpus,
        gpus_per_node=0 if args.device == "cpu" else args.ngpus,
        cpus_per_task=args.cpus_per_task,
        mem_gb=MEMORY_PER_GPU * args.ngpus if args.mem_gb is None else args.mem_gb,
        timeout_min=args.timeout,
        slurm_max_num_timeout=MAX_TIMEOUTS,
        slurm_signal_delay_s=SIGNAL_DELAY,
        slurm_additional_parameters={"requeue": True},  # some clusters do not allow it by default
    )
    wanted = dict(
        slurm_partition=args.partition,
        slurm_account=args.account,
        slurm_qos=args.qos,
        slurm_constraint="volta32gb" if args.use_volta32 else args.constraint,
        slurm_comment=args.comment,
    )
    return parameters | {name: value for name, value in wanted.items() if value}


class Trainer:
    """The job: the callable that submitit runs in each process, and from which it requeues.

    It travels to the nodes as a pickle, which must not need this project to be opened: its methods
    import what they need.
    """

    def __init__(self, args):
        self.args = args
        self.root = str(Path(__file__).resolve().parent)

    def __call__(self):
        """Train to the end, or until a signal; then requeue the job, unless it was cancelled.

        submitit's own handler would requeue at once, in the middle of a step; and it ignores
        SIGTERM, the signal of preemption.
        """
        import submitit

        sys.path.insert(0, self.root)
        import main_dino
        from dino.signals import REQUEUE, listen

        job = submitit.JobEnvironment()
        if job.cluster != "slurm":  # whose own variables say enough
            rendezvous = submitit.helpers.TorchDistributedEnvironment()
            rendezvous.export(set_cuda_visible_devices=False, overwrite=True)
        args = vars(self.args) | {"output_dir": self.args.output_dir.replace("%j", job.job_id)}
        asked_by = getattr(signal, f"SIG{job.USR_SIG}")
        requeue = signal.getsignal(asked_by)
        try:
            main_dino.main(argparse.Namespace(**args))
        except SystemExit as stop:
            if stop.code == REQUEUE and job.global_rank > 0:
                sys.exit(0)  # rank 0 decides; another code could end the job before it has
            if stop.code == REQUEUE and (listen().number == asked_by or is_preempted(job)):
                requeue(asked_by, None)  # and ends this process
            raise

    def checkpoint(self):
        """What the requeued job runs: the same, which resumes."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def is_preempted(job):
    """Whether Slurm has sent SIGTERM because it wants the nodes for another job.

    Slurm itself requeues only a job that is still there at the end of its grace time.
    """
    if job.cluster != "slurm":
        return False
    found = subprocess.run(
        ["scontrol", "show", "job", job.job_id], capture_output=True, text=True, check=True
    )
    fields = dict(field.partition("=")[::2] for field in found.stdout.split())
    return fields["JobState"] == "RUNNING" and fields.get("PreemptTime", "None") != "None"


def submit(args):
    """Submit the job, and say where it is."""
    check(args)
    try:
        import submitit
    except ImportError:
        raise UserError(
            "submitit is not installed: pip install submitit. Without it, sbatch runs main_dino.py:"
            " see docs/slurm.md."
        ) from None
    parameters = executor_parameters(args)
    timeouts = parameters.pop("slurm_max_num_timeout")
    try:
        executor = submitit.AutoExecutor(
            args.output_dir, cluster=args.cluster, slurm_max_num_timeout=timeouts
        )
        executor.update_parameters(**parameters)
        job = executor.submit(Trainer(training_flags(args)))
    except (submitit.core.utils.FailedJobError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"sbatch refused the job ({reason}). The flags that say what the cluster has are"
            " --partition, --account, --qos, --constraint, --ngpus, --nodes, --mem_gb and"
            " --cpus_per_task."
        ) from None
    print(f"Submitted job {job.job_id}. Its log: {printable(job.paths.stdout)}")


def training_flags(args):
    """Those of `args` that are main_dino.py's."""
    names = vars(training_parser().parse_args([]))
    return argparse.Namespace(**{name: getattr(args, name) for name in names})


def check(args):
    """Raise UserError for what can be known to be wrong before there is a job."""
    check_training_flags(args)
    if args.use_volta32 and args.constraint:
        raise UserError(
            f"--use_volta32 and --constraint {args.constraint} exclude each other: leave one out."
        )
    if args.cluster == "local" and args.nodes > 1:
        raise UserError(
            f"--cluster local runs on this machine alone: --nodes {args.nodes} must be 1."
        )
    if args.cluster == "slurm" and shutil.which("srun") is None:
        raise UserError(
            "--cluster slurm: there is no srun here. Submit from a machine of the cluster, or try"
            " the job on this one with --cluster local --nodes 1."
        )


def main():
    with exit_on_user_error("run_with_submitit.py"):
        submit(over_preset(get_args_parser().parse_args()))


if __name__ == "__main__":
    main()
