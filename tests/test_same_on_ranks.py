# SPDX-License-Identifier: Apache-2.0
"""Ranks that were started differently are refused at once: they would wait, or train two runs."""

import os
from argparse import Namespace

import pytest
import torch
from conftest import SMALL_RUN, run_launched, run_processes

from dino.distributed import gather_interleaved, get_rank
from dino.errors import UserError
from dino.evaluation.linear_run import resume_training
from dino.same_on_ranks import check_same_flags
from dino.training.saver import NEWEST, find_checkpoint
from dino.weights.files import write_atomically
from main_dino import parse_args, train_dino


def refusals(folder):
    """{claim: what this rank was told}, "" for nothing."""
    rank = get_rank()
    flags = dict(lr=0.1, data_path="a", num_workers=2, local_rank=0)
    one = flags | dict(data_path=f"b{rank}", num_workers=rank, local_rank=rank)
    own_folder = folder / str(rank)
    cases = {
        "flag": lambda: check_same_flags(Namespace(**flags | dict(lr=0.1 + rank))),
        "place": lambda: check_same_flags(Namespace(**one)),
        "checkpoint": lambda: find_checkpoint("auto", own_folder),
        "head": lambda: resume_training(own_folder / NEWEST, None, None, {}),
        "images": lambda: gather_interleaved(torch.zeros(2, 3), 4 - rank),
    }
    told = {}
    for name, case in cases.items():
        try:
            case()
            told[name] = ""
        except UserError as error:
            told[name] = str(error)
    return told


def test_ranks_that_differ_in_a_flag_a_checkpoint_or_images_are_all_told(tmp_path):
    (tmp_path / "0").mkdir()
    write_atomically({"epoch": 3, "iteration": 18}, tmp_path / "0" / NEWEST)
    first, second = run_processes(refusals, 2, tmp_path / "ranks", tmp_path)
    assert first == second
    assert first["flag"].startswith("--lr: 1.1 on rank 1 and 0.1 on rank 0. ")
    assert not first["place"], "each node may have its own folders"
    here = "none on rank 1 and one of epoch 3, iteration 18 on rank 0."
    assert here in first["checkpoint"] and here in first["head"]
    assert "different numbers of images: [4, 3]" in first["images"]


def train_on_other_images(folder):
    images = [None] * (24 - int(os.environ["RANK"]))
    args = parse_args([*map(str, SMALL_RUN), "--output_dir", str(folder)])
    with pytest.raises(UserError, match="--data_path: 23 images on rank 1 and 24 images on rank 0"):
        train_dino(args, images=images)


def test_a_run_whose_ranks_see_other_images_is_refused_before_training(tmp_path):
    run_launched(train_on_other_images, 2, tmp_path)
