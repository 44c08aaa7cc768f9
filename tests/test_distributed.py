# SPDX-License-Identifier: Apache-2.0
"""Several processes take the steps of one: real gloo processes, and real launchers."""

import datetime
import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from conftest import (
    ROOT,
    SMALL_RUN,
    free_port,
    run_processes,
    run_python,
    run_script,
    run_torchrun,
    start_under_slurm,
)
from torch import nn

from dino import distributed
from dino.distributed import (
    agree_on_store,
    choose_device,
    gather_interleaved,
    get_rank,
    get_world_size,
)
from dino.errors import UserError
from dino.launch import Launch, read_launch, slurm_rendezvous
from dino.sync_batchnorm import sync_batchnorms


def batchnorm_step(images, amp_dtype=torch.float32):
    """Output, gradient and running statistics of a batch norm, of this rank's share of `images`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    if get_world_size() > 1:
        model = sync_batchnorms(model, images.device)
    share = images[get_rank() :: get_world_size()].clone().requires_grad_()
    with torch.autocast("cpu", dtype=amp_dtype, enabled=amp_dtype != torch.float32):
        output = model(share)
    output.float().pow(3).sum().backward()
    return output.detach(), share.grad, model[1].running_mean, model[1].running_var


def batchnorm_steps(images):
    return {dtype: batchnorm_step(images, dtype) for dtype in (torch.float32, torch.bfloat16)}


IMAGES = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def batchnorm_ranks(tmp_path_factory):
    """The steps of two processes, which have 3 and 2 images."""
    return run_processes(batchnorm_steps, 2, tmp_path_factory.mktemp("ranks"), IMAGES)


@pytest.mark.parametrize("amp_dtype", [torch.float32, torch.bfloat16])
def test_synchronised_batch_norm_on_cpus_equals_batch_norm_of_the_whole_batch(
    batchnorm_ranks, amp_dtype
):
    output, grad, mean, variance = batchnorm_step(IMAGES, amp_dtype)
    assert output.dtype == amp_dtype
    # one unit in the last place: 2^-23 and 2^-8, and ten of them in the gradient
    unit = torch.finfo(amp_dtype).eps
    for rank, found in enumerate(batchnorm_ranks):
        rank_output, rank_grad, rank_mean, rank_variance = found[amp_dtype]
        assert rank_output.dtype == amp_dtype
        torch.testing.assert_close(rank_output, output[rank::2], rtol=4 * unit, atol=4 * unit)
        torch.testing.assert_close(rank_grad, grad[rank::2], rtol=40 * unit, atol=40 * unit)
        torch.testing.assert_close(rank_mean, mean)
        torch.testing.assert_close(rank_variance, variance)


def gathered(totals):
    results = []
    for total in totals:
        rows = torch.arange(total)[get_rank() :: get_world_size()]
        rows = torch.stack([rows, -rows], dim=1) if len(rows) else None
        results.append(gather_interleaved(rows, total))
    return results


def test_rows_of_unequal_shares_come_back_in_order(tmp_path):
    """Of one row, of which three ranks have nothing, and of seven."""
    for results in run_processes(gathered, 4, tmp_path, (1, 7)):
        for rows, total in zip(results, (1, 7), strict=True):
            expected = torch.stack([torch.arange(total), -torch.arange(total)], dim=1)
            assert torch.equal(rows, expected)


# Without stochastic depth, which each rank draws for itself. With SGD, since AdamW divides by
# gradients that may be as small as the rounding.
EQUAL_RUN = (*SMALL_RUN, "--drop_path_rate", 0, "--optimizer", "sgd", "--lr", 2)


def weights_in(path):
    checkpoint = torch.load(path, weights_only=True)
    weights = {f"student.{name}": value for name, value in checkpoint["student"].items()}
    for name, value in checkpoint["teacher"].items():
        weights[f"teacher.{name.removeprefix('module.')}"] = value
    return weights | checkpoint["dino_loss"]


def test_two_processes_of_batch_2_take_the_steps_of_one_of_batch_4(class_folders, tmp_path):
    """As torchrun starts them; test_distributed_truth.py looks closer, and at more of them."""
    flags = (*EQUAL_RUN, "--data_path", class_folders / "train", "--use_bn_in_head", "true")
    one = run_script(
        "main_dino.py", *flags, "--batch_size_per_gpu", 4, "--output_dir", tmp_path / "one"
    )
    assert one.returncode == 0, one.stderr
    two = run_torchrun(
        2, "main_dino.py", *flags, "--batch_size_per_gpu", 2, "--output_dir", tmp_path / "two"
    )
    assert two.returncode == 0, two.stderr
    expected = weights_in(tmp_path / "one" / "checkpoint.pth")
    found = weights_in(tmp_path / "two" / "checkpoint.pth")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        # sums in another order, over 12 steps; batch norms of 4 images amplify their rounding
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)
    before = weights_in(tmp_path / "one" / "checkpoint0000.pth")
    name = "student.module.head.mlp.0.weight"
    assert (expected[name] - before[name]).abs().max() > 1e-2, "the steps moved far more than that"


def test_launchers_are_recognised_by_their_variables():
    assert read_launch({}) == Launch("python")
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_PROCID": "0"}
    assert read_launch(torchrun) == Launch("torchrun", 3, 8, 1)
    slurm = {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"}
    assert read_launch(slurm) == Launch("slurm", 9, 16, 1)
    assert read_launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) == Launch("python")


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu[003-005,9],cpu1", "gpu003"),
        ("n-1,n-2", "n-1"),
        ("a[12]", "a12"),
        ("login.cluster.org,b[1-2]", "login.cluster.org"),
    ],
)
def test_slurm_processes_meet_on_the_first_host_of_the_list(hosts, first):
    address, port = slurm_rendezvous({"SLURM_NODELIST": hosts, "SLURM_JOB_ID": "123456789"})
    assert address == first
    assert 20000 <= port < 40000
    assert port == slurm_rendezvous({"SLURM_NODELIST": hosts, "SLURM_JOB_ID": "123456789"})[1]


def test_slurm_variables_alone_start_a_run(class_folders, tmp_path):
    command = ["main_dino.py", *SMALL_RUN, "--epochs", 1]
    command += ["--data_path", class_folders / "train", "--output_dir", tmp_path]
    processes = start_under_slurm(*command)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "2 processes by slurm" in outputs[0]
    assert outputs[1].strip() == "", "rank 1 has nothing to say"


def connect(server, seconds=20.0):
    timeout = datetime.timedelta(seconds=seconds)
    return dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timeout)


@pytest.mark.parametrize("killed", [[1], [0], [1, 2, 0, 1]])
def test_processes_of_an_attempt_never_meet_those_of_one_before(monkeypatch, killed):
    """In the one store that torchrun keeps; those `killed` came, and did not get far."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True)
    for attempt in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "TIMEOUT", datetime.timedelta(seconds=0.02))
            for rank in killed:
                with pytest.raises(RuntimeError):
                    agree_on_store(connect(server, seconds=0.02), rank, 3)
        stores = {}

        def agree(rank, stores=stores):
            stores[rank] = agree_on_store(connect(server), rank, 3)

        threads = [threading.Thread(target=agree, args=(rank,)) for rank in (2, 0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not any(store.check(["address"]) for store in stores.values()), "none of before"
        stores[1].set("address", str(attempt))
        assert [int(stores[rank].get("address")) for rank in (0, 1, 2)] == [attempt] * 3


def test_a_process_that_waits_for_absent_ones_says_where(tmp_path):
    port = free_port()
    meet = "from dino import distributed; distributed.SILENT_SECONDS = 1;"
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with subprocess.Popen(
        [sys.executable, "-c", f"{meet} distributed.init_distributed('cpu')"],
        cwd=ROOT,
        env={**os.environ, **ranks},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        said = next(line for line in process.stderr if line.startswith("Process"))
        process.kill()
    where = f"127.0.0.1:{port}"
    assert said.startswith(f"Process 1 of 2 has waited for the others at {where} for 1 s")
    assert "gives up after 0:10:00" in said


def test_torch_distributed_launch_with_its_own_flag(class_folders, tmp_path):
    launcher = (
        "-m",
        "torch.distributed.launch",
        "--nproc_per_node",
        1,
        "--master_port",
        free_port(),
    )
    result = run_python(
        *(*launcher, "main_dino.py", *SMALL_RUN, "--epochs", 1),
        *("--data_path", class_folders / "train", "--output_dir", tmp_path),
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "checkpoint.pth").exists()


def test_a_device_that_is_not_there_is_an_error():
    if torch.cuda.is_available():
        with pytest.raises(UserError, match="has no GPU: there are"):
            choose_device("cuda", Launch("torchrun", 99, 100, 99))
    else:
        with pytest.raises(UserError, match=r"--device cuda: .* sees no CUDA device"):
            choose_device("cuda")
