# SPDX-License-Identifier: Apache-2.0
"""Several processes take the steps of one: real gloo processes, and real launchers."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL_RUN, run_processes, run_script, run_torchrun
from torch import nn

from dino import DINOLoss
from distributed import (
    Launch,
    choose_device,
    gather_interleaved,
    get_rank,
    get_world_size,
    read_launch,
    slurm_rendezvous,
    sync_batchnorms,
)
from errors import UserError


def center_after_three_batches(batches):
    loss = DINOLoss(8, 2, 0.04, 0.04, 0, 1)
    for batch in batches:
        teacher_output = batch[get_rank() :: get_world_size()]
        loss(torch.zeros_like(teacher_output), teacher_output, 0)
    return loss.center


def test_center_is_the_mean_over_all_processes_on_each_of_them(tmp_path):
    batches = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    alone = center_after_three_batches(batches)
    first, second = run_processes(center_after_three_batches, 2, tmp_path, batches)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone)


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


@pytest.mark.parametrize("amp_dtype", [torch.float32, torch.bfloat16])
def test_synchronised_batch_norm_on_cpus_equals_batch_norm_of_the_whole_batch(tmp_path, amp_dtype):
    images = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    output, grad, mean, variance = batchnorm_step(images, amp_dtype)
    assert output.dtype == amp_dtype
    ranks = run_processes(batchnorm_step, 2, tmp_path, images, amp_dtype)  # 3 and 2 images
    # one unit in the last place: 2^-23 and 2^-8, and ten of them in the gradient
    unit = torch.finfo(amp_dtype).eps
    for rank, (rank_output, rank_grad, rank_mean, rank_variance) in enumerate(ranks):
        assert rank_output.dtype == amp_dtype
        torch.testing.assert_close(rank_output, output[rank::2], rtol=4 * unit, atol=4 * unit)
        torch.testing.assert_close(rank_grad, grad[rank::2], rtol=40 * unit, atol=40 * unit)
        torch.testing.assert_close(rank_mean, mean)
        torch.testing.assert_close(rank_variance, variance)


def gathered(total):
    rows = torch.arange(total)[get_rank() :: get_world_size()]
    return gather_interleaved(torch.stack([rows, -rows], dim=1) if len(rows) else None, total)


@pytest.mark.parametrize("total", [1, 7])
def test_rows_of_unequal_shares_come_back_in_order(tmp_path, total):
    expected = torch.stack([torch.arange(total), -torch.arange(total)], dim=1)
    for rows in run_processes(gathered, 4, tmp_path, total):
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


@pytest.mark.parametrize("use_bn", [False, True])
def test_two_processes_of_batch_2_take_the_steps_of_one_of_batch_4(class_folders, tmp_path, use_bn):
    flags = (*EQUAL_RUN, "--data_path", class_folders / "train", "--use_bn_in_head", use_bn)
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
    command = [sys.executable, "main_dino.py", *SMALL_RUN, "--epochs", 1]
    command += ["--data_path", class_folders / "train", "--output_dir", tmp_path]
    slurm = {"SLURM_NTASKS": "2", "SLURM_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid())}
    processes = [
        subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env={**os.environ, **slurm, "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "2 processes by slurm" in outputs[0]
    assert outputs[1].strip() == "", "rank 1 has nothing to say"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_torch_distributed_launch_with_its_own_flag(class_folders, tmp_path):
    launcher = (
        "-m",
        "torch.distributed.launch",
        "--nproc_per_node",
        1,
        "--master_port",
        free_port(),
    )
    result = run_script(
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
            choose_device("cuda", Launch("python"))
