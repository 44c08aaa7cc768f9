# SPDX-License-Identifier: Apache-2.0
"""A rank that gives no sign of life is named, and ends the others, whatever they wait for."""

import multiprocessing
import os
import signal
import sys
import time

import torch.distributed as dist
from conftest import start_forkserver

from dino import pulse


def rank_of_three(rank, port, output):
    """Rank 2 leaves, rank 1 stands still with its connections open, rank 0 waits for a device."""
    sys.stderr = open(output, "w")  # noqa: SIM115
    pulse.BEAT, pulse.LOOK, pulse.SILENCE = 0.05, 0.1, 1.0
    pulse.start(dist.TCPStore("127.0.0.1", port, is_master=False), rank, 3)
    if rank == 2:
        pulse.stop()
    elif rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        time.sleep(300)


def test_a_rank_that_stands_still_ends_the_others_and_one_that_has_left_does_not(tmp_path):
    start_forkserver()
    context = multiprocessing.get_context("forkserver")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = []
    for rank in (2, 1, 0):
        arguments = (rank, store.port, tmp_path / f"said{rank}")
        ranks.append(context.Process(target=rank_of_three, args=arguments, daemon=True))
        ranks[-1].start()
        if rank == 2:
            ranks[-1].join()
        elif rank == 1:
            store.get(pulse.key(1))  # its first sign
    ranks[-1].join(timeout=60)
    codes = [process.exitcode for process in ranks]
    ranks[1].kill()
    assert codes == [0, None, 1]
    said = (tmp_path / "said0").read_text()
    assert said.startswith("No sign of life from rank 1 for 1 s; stopping.")
    assert "rank 2" not in said


def rank_of_two(rank, port):
    pulse.BEAT, pulse.LOOK, pulse.SILENCE = 0.05, 0.2, 3  # a rank may get no core for a second
    pulse.start(dist.TCPStore("127.0.0.1", port, is_master=False), rank, 2)
    time.sleep(300)


def test_ranks_that_were_stopped_together_go_on_together():
    """As by `scontrol suspend`, or Ctrl-Z: who wakes first finds no sign of the other."""
    start_forkserver()
    context = multiprocessing.get_context("forkserver")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        context.Process(target=rank_of_two, args=(rank, store.port), daemon=True)
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for rank in range(2):
        store.get(pulse.key(rank))
    for process in reversed(ranks):
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.5)  # rank 0 looks, and finds no newer sign of rank 1
    time.sleep(2.5)
    for process in ranks:
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.3)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [None, None]
