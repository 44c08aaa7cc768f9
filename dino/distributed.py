# SPDX-License-Identifier: Apache-2.0
"""Processes: how they meet (torchrun, Slurm or alone), ranks, devices and collectives.

A single process needs no process group: every function here then answers for a world of one.
"""

import datetime
import os
import re
import time
import uuid
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dino.errors import UserError

# A group on gloo, beside the one for tensors on the device: for heartbeats, since gloo notices a
# dead peer at once, where NCCL waits for it; and for ballots, which must not wait for the device.
_hosts = None

# A rank that waits longer than this for the others raises; gloo's own limit is 30 minutes.
TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class Launch:
    """Which process this is and who started it: "torchrun", "slurm" or "python"."""

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def read_launch(environ=os.environ):
    """The launch that the environment describes: torchrun's, else Slurm's, else one process."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        local_rank = int(environ.get("LOCAL_RANK", 0))
        return Launch("torchrun", int(environ["RANK"]), int(environ["WORLD_SIZE"]), local_rank)
    if "SLURM_PROCID" in environ and int(environ.get("SLURM_NTASKS", 1)) > 1:
        local_rank = int(environ.get("SLURM_LOCALID", 0))
        return Launch(
            "slurm", int(environ["SLURM_PROCID"]), int(environ["SLURM_NTASKS"]), local_rank
        )
    return Launch("python")


def is_restart(environ=os.environ):
    """Whether torchrun restarted these processes, by the same command, after one had failed."""
    return int(environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def slurm_rendezvous(environ=os.environ):
    """(address, port) on which a Slurm job's processes meet: its first host, a port from its id.

    Slurm writes lists of hosts like `gpu[003-005,9],cpu1`.
    """
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST", "127.0.0.1")
    prefix, first_number = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", hosts).groups()
    return prefix + (first_number or ""), 20000 + int(environ.get("SLURM_JOB_ID", 0)) % 20000


def init_distributed(device="auto", dist_url="env://"):
    """Meet the other processes; return this one's Launch and torch.device.

    NCCL carries tensors on CUDA, gloo those on a CPU.
    """
    launch = read_launch()
    device = choose_device(device, launch)
    if launch.launcher == "python":
        return launch, device
    if launch.launcher == "slurm" and dist_url == "env://" and "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"], port = slurm_rendezvous()
        os.environ.setdefault("MASTER_PORT", str(port))
    ranks = dict(rank=launch.rank, world_size=launch.world_size)
    store, _, _ = next(dist.rendezvous(dist_url, timeout=TIMEOUT, **ranks))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=agree_on_store(store, **ranks),
        timeout=TIMEOUT,
        **ranks,
    )
    global _hosts
    _hosts = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return launch, device


def agree_on_store(store, rank, world_size):
    """`store` under a prefix that only the processes of this attempt know.

    torchrun keeps one store through its restarts. Without a prefix it still holds the addresses of
    killed processes, and who looks there before a new one has written its own gets "Connection
    refused" (torch 2.15). Restarts are not counted alike on all nodes, so rank 0 draws the prefix,
    and answers every rank under a name that this rank has drawn.
    """
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"name of {rank}", name)
        attempt = store.get(f"attempt of {name}").decode()  # waits for rank 0
        store.set(f"{rank} is in {attempt}", "")
        return dist.PrefixStore(attempt, store)
    absent, end = set(range(1, world_size)), time.monotonic() + TIMEOUT.total_seconds()
    while absent and time.monotonic() < end:
        for other in absent:
            if store.check([f"name of {other}"]):  # perhaps still that of a killed process
                store.set(f"attempt of {store.get(f'name of {other}').decode()}", name)
        absent = {other for other in absent if not store.check([f"{other} is in {name}"])}
        time.sleep(0.01)
    if absent:
        raise RuntimeError(f"ranks {sorted(absent)} did not come within {TIMEOUT}")
    return dist.PrefixStore(name, store)


def choose_device(name, launch):
    """torch.device for `--device`: auto takes CUDA if there is any, each local rank its own GPU."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise UserError(
            f"--device {name}: PyTorch {torch.__version__} sees no CUDA device. Try --device cpu."
        )
    index = launch.local_rank
    if launch.launcher == "slurm":
        index %= count  # with --gpus-per-task=1 every task sees one GPU, its own, as number 0
    if index >= count:
        raise UserError(
            f"process {launch.local_rank} of this node has no GPU: there are {count}. Start at most"
            f" {count} processes per node (--nproc_per_node), or add --device cpu."
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def shut_down():
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def get_world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def get_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process():
    return get_rank() == 0


def print0(*values, **options):
    """print on rank 0, at once: a log that is read while the job runs must not wait in a buffer."""
    if is_main_process():
        print(*values, flush=True, **options)


def heartbeat():
    """Raise RuntimeError unless all processes come here: before a wait that would have no end."""
    if get_world_size() > 1:
        dist.monitored_barrier(_hosts)


class Ballot:
    """Which of some wishes any rank has, exchanged between hosts without waiting for a device."""

    def __init__(self, wishes):
        self.wishes = torch.tensor(wishes, dtype=torch.float32)
        self.alone = get_world_size() == 1
        if not self.alone:
            options = dict(op=dist.ReduceOp.MAX, group=_hosts, async_op=True)
            self.work = dist.all_reduce(self.wishes, **options)

    def result(self):
        """A bool for each wish, the same on every rank. Waits until all ranks have voted."""
        if not self.alone:
            self.work.wait()
        return self.wishes.bool().tolist()


def leave_note(text):
    """Let every rank's `has_note(text)` be true from now on."""
    if get_world_size() > 1:
        dist.distributed_c10d._get_default_store().set(f"note {text}", "")


def has_note(text):
    """Whether any rank has left this note: one question to the store, about 0.1 ms."""
    return get_world_size() > 1 and dist.distributed_c10d._get_default_store().check(
        [f"note {text}"]
    )


def lost_ranks(seconds=15):
    """The ranks that do not report within some seconds after a collective has failed."""
    store = dist.distributed_c10d._get_default_store()
    lost = list(range(get_world_size()))
    end = time.monotonic() + seconds
    try:
        store.set(f"survivor {get_rank()}", "")
        while lost and time.monotonic() < end:
            lost = [rank for rank in lost if not store.check([f"survivor {rank}"])]
            time.sleep(0.1)
    except RuntimeError:  # the store lives in rank 0
        return [0]
    return lost


def barrier():
    if get_world_size() > 1:
        dist.barrier()


def all_reduce_sum(tensor):
    """Add `tensor` up over all processes, in place."""
    if get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value):
    """The list of every rank's picklable `value`, on every rank."""
    if get_world_size() == 1:
        return [value]
    values = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_interleaved(rows, total):
    """All rows of a set of `total` of which rank r holds numbers r, r + world_size, ...

    (n_r, *) -> (total, *); a rank that holds none gives None.
    """
    world_size = get_world_size()
    if world_size == 1:
        return rows
    kinds = gather_objects(None if rows is None else (rows.shape[1:], rows.dtype, rows.device.type))
    shape, dtype, device = next(kind for kind in kinds if kind is not None)
    padded = torch.zeros(-(-total // world_size), *shape, dtype=dtype, device=device)
    if rows is not None:
        padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]
