# SPDX-License-Identifier: Apache-2.0
"""Official helpers that nothing here uses do what code for the official repository expects."""

import argparse
import builtins
import importlib.util
import os
import subprocess

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, run_launched, run_processes

import utils
from dino import official_helpers
from dino.evaluation.linear_files import LinearClassifier


def reduce(rank_values):
    values = {name: torch.tensor(value[dist.get_rank()]) for name, value in rank_values.items()}
    mean, total = utils.reduce_dict(values), utils.reduce_dict(values, average=False)
    return [{name: value.item() for name, value in found.items()} for found in (mean, total)]


def test_reduced_values_are_the_mean_and_the_sum_over_processes(tmp_path):
    values = {"top5": (4.0, 6.0), "loss": (1.0, 2.0), "acc": (-3.0, 8.0)}
    for mean, total in run_processes(reduce, 2, tmp_path, values):
        assert mean == {name: sum(pair) / 2 for name, pair in values.items()}
        assert total == {name: sum(pair) for name, pair in values.items()}


def test_a_single_process_has_no_group_and_keeps_its_values():
    values = {"loss": torch.tensor(1.0)}
    assert utils.reduce_dict(values) is values
    assert utils.is_dist_avail_and_initialized() is False


def meet(folder):
    args = argparse.Namespace(dist_url="env://")
    utils.init_distributed_mode(args)
    rank = dist.get_rank()
    facts = {"args": vars(args), "group": utils.is_dist_avail_and_initialized()}
    facts["sum"] = utils.reduce_dict({"one": torch.ones(())}, average=False)["one"]
    torch.save(facts, folder / f"facts{rank}.pth")
    utils.save_on_master({"rank": rank}, folder / f"saved{rank}.pth")
    with (folder / f"printed{rank}.txt").open("w") as file:
        print("plain", file=file)
        print("forced", file=file, force=True)


def test_processes_meet_and_rank_0_alone_saves_and_prints(tmp_path):
    run_launched(meet, 2, tmp_path)
    for rank in range(2):
        facts = torch.load(tmp_path / f"facts{rank}.pth")
        expected = {"dist_url": "env://", "rank": rank, "world_size": 2, "gpu": None}
        assert (facts["args"], facts["group"], facts["sum"]) == (expected, True, 2)
    assert [path.name for path in tmp_path.glob("saved*")] == ["saved0.pth"]
    assert torch.load(tmp_path / "saved0.pth") == {"rank": 0}
    assert (tmp_path / "printed0.txt").read_text() == "plain\nforced\n"
    assert (tmp_path / "printed1.txt").read_text() == "forced\n"


def meet_alone(folder):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    meet(folder)
    assert "RANK" not in os.environ


def test_a_single_process_meets_itself_in_a_group(tmp_path):
    run_launched(meet_alone, 1, tmp_path)
    facts = torch.load(tmp_path / "facts0.pth")
    assert facts["args"] == {"dist_url": "env://", "rank": 0, "world_size": 1, "gpu": None}
    assert facts["group"] is True


def test_print_of_other_ranks_is_silent_unless_forced(capsys, monkeypatch):
    monkeypatch.setattr(builtins, "print", builtins.print)  # put back afterwards
    utils.setup_for_distributed(False)
    print("lost")
    print("kept", "too", sep="-", force=True)
    assert capsys.readouterr().out == "kept-too\n"


@pytest.fixture
def checkout(tmp_path):
    """get_sha of a copy in a git repository of its own: (function, git)."""
    source = tmp_path / "official_helpers.py"
    source.write_text((ROOT / "dino" / "official_helpers.py").read_text())
    spec = importlib.util.spec_from_file_location("copy_of_helpers", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def git(*command):
        names = ("-c", "user.name=n", "-c", "user.email=e")
        return subprocess.check_output(["git", *names, *command], cwd=tmp_path, text=True).strip()

    return module.get_sha, git, source


def test_the_line_of_git_names_commit_state_and_branch(checkout):
    get_sha, git, source = checkout
    assert get_sha() == "sha: N/A, status: clean, branch: N/A"
    git("init", "--quiet", "--initial-branch=trunk")
    git("add", source.name)
    git("commit", "--quiet", "--message=one")
    commit = git("rev-parse", "HEAD")
    assert get_sha() == f"sha: {commit}, status: clean, branch: trunk"
    source.write_text("")
    assert get_sha() == f"sha: {commit}, status: has uncommited changes, branch: trunk"


def test_released_linear_weights_go_into_the_classifier(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = {"linear.weight": torch.randn(1000, 1536), "linear.bias": torch.randn(1000)}
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    released = {"state_dict": {f"module.{name}": value for name, value in weights.items()}}
    torch.save(released, folder / "dino_deitsmall16_linearweights.pth")
    classifier = LinearClassifier(1536)
    utils.load_pretrained_linear_weights(classifier, "vit_small", 16)
    assert all(torch.equal(classifier.state_dict()[name], weights[name]) for name in weights)


def test_without_released_linear_weights_they_stay_random(capsys):
    classifier = LinearClassifier(8, 2)
    before = classifier.linear.weight.clone()
    utils.load_pretrained_linear_weights(classifier, "vit_tiny", 16)
    assert torch.equal(classifier.linear.weight, before)
    assert "random" in capsys.readouterr().out


def test_every_helper_is_a_name_of_utils():
    helpers = ("init_distributed_mode", "setup_for_distributed", "save_on_master", "get_sha")
    for name in (*helpers, "reduce_dict"):
        assert getattr(utils, name) is getattr(official_helpers, name)
