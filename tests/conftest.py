# SPDX-License-Identifier: Apache-2.0
"""What the tests share: real photographs, small folders of them, and real processes."""

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from dino.backbones import build_backbone
from dino.data.levels import set_white
from dino.networks import MultiCropWrapper
from dino.weights.files import backbone_payload, write_atomically
from vision_transformer import DINOHead

ROOT = Path(__file__).parent.parent
PHOTOGRAPHS = Path(skimage.__file__).parent / "data"

# The tests run in as many processes as there are cores: more threads would wait for each other.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Without -n: a process per core, where pytest-xdist is there; a file's tests share theirs."""
    if "PYTEST_XDIST_WORKER" in os.environ or not config.pluginmanager.hasplugin("xdist"):
        return
    several = len(config.args) != 1 or not config.args[0].partition("::")[0].endswith(".py")
    if config.option.numprocesses is None and several:
        config.option.numprocesses = len(os.sched_getaffinity(0))
        config.option.dist = "loadfile"
        config.option.loadscopereorder = False  # but as pytest_collection_modifyitems does


def pytest_collection_modifyitems(items):
    """The room whose files take longest comes first, so that the processes end together."""
    items.sort(key=lambda item: item.path.parent.name != "training")


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def photograph(name="astronaut.png"):
    return Image.open(PHOTOGRAPHS / name).convert("RGB")


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """The addresses that were asked for, where nothing is downloaded yet and no network answers."""
    addresses = []

    def no_network(request, **_):
        addresses.append(request.full_url)
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    return addresses


@pytest.fixture
def white_is_reset():
    """After a test that sets --white for its process."""
    yield
    set_white(0.0)


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory):
    """train/ and val/ of three classes, 8 and 4 tiles of 48 pixels each, cut from photographs."""
    root = tmp_path_factory.mktemp("tiles")
    for name in ("astronaut", "coffee", "chelsea"):
        image, rng = photograph(f"{name}.png"), np.random.default_rng(0)
        for part, count in (("train", 8), ("val", 4)):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                left, top = rng.integers(0, 250, 2)
                image.crop((left, top, left + 48, top + 48)).save(folder / f"{i}.png")
    return root


def save_backbone(path, model, **description):
    """A backbone.pth of `model`, a MultiCropWrapper."""
    write_atomically(backbone_payload(model, **description), path)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A backbone.pth of an untrained ViT for images of 32 pixels, normalised in its own way."""
    path = tmp_path_factory.mktemp("checkpoint") / "backbone.pth"
    torch.manual_seed(0)
    backbone, embed_dim = build_backbone("vit_nano", 8, img_size=32)
    head = DINOHead(embed_dim, 8, hidden_dim=8, bottleneck_dim=8)
    save_backbone(
        path,
        MultiCropWrapper(backbone, head),
        arch="vit_nano",
        patch_size=8,
        image_size=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
    )
    return path


def request_for(command, cwd, environ):
    """What zygote.py is sent."""
    return {
        "command": [str(part) for part in command],
        "cwd": str(cwd),
        "environ": {**os.environ, "OMP_NUM_THREADS": "1", **environ},
    }


def run_script(*command, timeout=300, cwd=ROOT, **environ):
    """`python command ...`, by default in the project's folder, as a user would; see zygote.py."""
    request = request_for(command, cwd, environ)
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        connection, replies = zygote()
        files = [stdout.fileno(), stderr.fileno()]
        socket.send_fds(connection, [json.dumps(request).encode()], files)
        pid = json.loads(replies.readline())["pid"]
        killed = []

        def kill():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                killed.append(os.kill(pid, signal.SIGKILL))

        killer = threading.Timer(timeout, kill)
        killer.start()
        returncode = json.loads(replies.readline())["returncode"]
        killer.cancel()
        texts = [read_from_start(file) for file in (stdout, stderr)]
    if killed:
        raise subprocess.TimeoutExpired(command, timeout, *texts)
    return subprocess.CompletedProcess(command, returncode, *texts)


class Started:
    """run_script without its wait, for a test that interferes: as subprocess.Popen, what it uses.

    The process leads a group of its own. stderr goes to stdout, which is `output`, if given.
    """

    def __init__(self, *command, cwd=ROOT, output=None, **environ):
        self.connection, theirs = socket.socketpair()
        connection, replies = zygote()
        with theirs:  # to a fork of the zygote that serves this process alone
            socket.send_fds(connection, [b"another"], [theirs.fileno()])
            replies.readline()
        self.output, self.returncode = output or tempfile.TemporaryFile(), None  # noqa: SIM115
        request = request_for(command, cwd, environ) | {"own_group": True}
        files = [self.output.fileno()] * 2
        socket.send_fds(self.connection, [json.dumps(request).encode()], files)
        self.replies = self.connection.makefile("rb", 0)  # no line may wait in a buffer
        self.pid = json.loads(self.replies.readline())["pid"]

    def poll(self):
        """The exit code, or None while it runs."""
        if self.returncode is None and select.select([self.connection], [], [], 0)[0]:
            self.returncode = json.loads(self.replies.readline())["returncode"]
            self.connection.close()
        return self.returncode

    def wait(self, timeout=300):
        if self.returncode is None and not select.select([self.connection], [], [], timeout)[0]:
            self.kill()
            raise subprocess.TimeoutExpired("", timeout, read_from_start(self.output))
        return self.poll()

    def communicate(self, timeout=300):
        """(all that it said, None), once it has ended."""
        self.wait(timeout)
        return read_from_start(self.output), None

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


@functools.cache
def zygote():
    """(socket to it, its replies); it ends with this process."""
    ours, theirs = socket.socketpair()
    path = str(Path(__file__).with_name("zygote.py"))
    subprocess.Popen(
        [sys.executable, path, str(theirs.fileno())],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    return ours, ours.makefile()


def read_from_start(file):
    file.seek(0)
    return file.read().decode(errors="replace")


def run_python(*command, timeout=300, cwd=ROOT, **environ):
    """`python command ...` as a new interpreter, for what run_script cannot: options, modules."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(count, *command):
    """The processes that torchrun starts, without its own: the exit code, what rank 0 printed."""
    shared = dict(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    ranks = [Started(*command, RANK=str(i), LOCAL_RANK=str(i), **shared) for i in range(count)]
    printed = [rank.communicate()[0] for rank in ranks]
    return max(rank.returncode for rank in ranks), printed[0]


def start_under_slurm(*command):
    """[Started] of two processes, with the variables that Slurm sets."""
    slurm = {"SLURM_NTASKS": "2", "SLURM_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid())}
    return [
        Started(*command, **slurm, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in ("0", "1")
    ]


def run_torchrun(processes, *command, **options):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes)
    return run_python(*launcher, *command, **options)


def run_processes(function, world_size, folder, *args):
    """Results of `function(*args)` in each of `world_size` gloo processes, by rank."""
    start_forkserver()
    Path(folder).mkdir(exist_ok=True)  # in a folder that is not there FileStore waits for ever
    args = (function, world_size, str(folder), args)
    mp.start_processes(_run_rank, args, nprocs=world_size, start_method="forkserver")
    return [
        torch.load(Path(folder) / f"result{rank}.pth", weights_only=False)
        for rank in range(world_size)
    ]


@functools.cache
def start_forkserver():
    """What forks the processes has imported everything already, which would take the most time."""
    mp.get_context("forkserver").set_forkserver_preload(["conftest", "main_dino", "eval_linear"])
    with pytest.MonkeyPatch.context() as patch:  # Python 3.11 does not pass its path on
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        forkserver.ensure_running()


def _run_rank(rank, function, world_size, folder, args):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    torch.save(function(*args), f"{folder}/result{rank}.pth")
    dist.destroy_process_group()


def run_launched(function, world_size, *args):
    """`function(*args)` in each of `world_size` processes, with the variables of torchrun."""
    start_forkserver()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = (function, world_size, port, args)
    mp.start_processes(_run_launched, args, nprocs=world_size, start_method="forkserver")


def _run_launched(rank, function, world_size, port, args):
    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    function(*args)


# A network and views that train in a second on one core.
SMALL_RUN = (
    *("--arch", "vit_nano", "--patch_size", 8, "--global_crop_size", 32, "--local_crop_size", 16),
    *("--local_crops_number", 2, "--out_dim", 64, "--head_hidden_dim", 32),
    *("--head_bottleneck_dim", 16, "--batch_size_per_gpu", 4, "--num_workers", 0),
    *("--epochs", 2, "--warmup_epochs", 1, "--device", "cpu", "--report", "false"),
)
