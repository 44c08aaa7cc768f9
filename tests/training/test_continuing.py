# SPDX-License-Identifier: Apache-2.0
"""--preset continue: networks follow from the weights, and the first epochs leave them alone."""

import json

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, photograph

from dino.data.augmentations import IMAGENET_STD
from dino.errors import UserError
from dino.training.flags import parse_args
from dino.weights.files import read
from dino.weights.starting import warn_of_other_images
from main_dino import train_dino

IMAGES = [photograph(name).resize((48, 40)) for name in ("astronaut.png", "coffee.png")] * 8


def train(*flags):
    train_dino(parse_args([str(flag) for flag in (*SMALL_RUN, *flags)]), images=IMAGES)


def continue_from(weights, folder, *flags, images=IMAGES):
    few = ("--num_workers", 0, "--local_crops_number", 2, "--report", "false", "--device", "cpu")
    flags = ("--preset", "continue", "--init_from", weights, "--output_dir", folder, *few, *flags)
    train_dino(parse_args([str(flag) for flag in flags]), images=images)
    return json.loads((folder / "args.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train("--output_dir", folder, "--mean", 0.4, 0.5, 0.6, "--use_bn_in_head", "true")
    return folder


def test_a_backbone_without_a_head_stays_as_it_is_until_its_new_head_has_learned(trained, tmp_path):
    flags = continue_from(trained / "backbone.pth", tmp_path, "--epochs", 2, "--saveckp_freq", 1)
    given = dict(
        arch="vit_nano", patch_size=8, global_crop_size=32, mean=[0.4, 0.5, 0.6], freeze_backbone=1
    )
    assert {name: flags[name] for name in given} == given
    before = torch.load(trained / "backbone.pth", weights_only=True)["teacher"]
    for name, equal in (("checkpoint0000.pth", True), ("checkpoint.pth", False)):
        student = torch.load(tmp_path / name, weights_only=True)["student"]
        same = [torch.equal(student["module.backbone." + key], before[key]) for key in before]
        assert all(same) if equal else not any(same), name
        teacher = torch.load(tmp_path / name, weights_only=True)["teacher"]
        (head,) = (value for key, value in teacher.items() if key.endswith("head.mlp.0.weight"))
        assert not torch.equal(head, student["module.head.mlp.0.weight"]), "the head learns"


@pytest.mark.usefixtures("white_is_reset")
@pytest.mark.parametrize(("stated", "taken"), [(1000.0, 1000.0), (0.0, 4095.0)])
def test_white_is_that_of_the_weights_or_else_that_of_the_files(trained, tmp_path, stated, taken):
    content = torch.load(trained / "backbone.pth", weights_only=True)
    torch.save(content | {"white": stated}, tmp_path / "weights.pth")
    for number, image in enumerate(IMAGES):
        twelve_bits = np.asarray(image, np.uint16) * np.uint16(4095 / 255)
        np.save(tmp_path / f"{number}.npy", twelve_bits)
    flags = ("--data_path", tmp_path, "--epochs", 1)
    flags = continue_from(tmp_path / "weights.pth", tmp_path / "run", *flags, images=None)
    assert flags["white"] == taken


def test_a_checkpoint_with_its_head_is_continued_whole(trained, tmp_path, capsys):
    flags = continue_from(trained / "checkpoint.pth", tmp_path, "--epochs", 1)
    output = capsys.readouterr().out
    head = dict(out_dim=64, head_hidden_dim=32, head_bottleneck_dim=16, use_bn_in_head=True)
    assert {name: flags[name] for name in head} == head
    assert flags["freeze_backbone"] == 0
    everything = (
        "backbone of the student, head of the student, backbone of the teacher, head of the"
    )
    assert everything in output
    assert "starts afresh" not in output


def test_a_head_of_other_widths_starts_afresh_and_learns_alone_first(trained, tmp_path):
    flags = continue_from(trained / "checkpoint.pth", tmp_path, "--epochs", 1, "--out_dim", 32)
    assert flags["freeze_backbone"] == 1


def test_a_run_in_which_the_backbone_never_learns_says_so(trained, tmp_path, capsys):
    """The head that starts afresh has one epoch for itself, and the run no other."""
    continue_from(trained / "backbone.pth", tmp_path / "one", "--epochs", 1)
    said = "Warning: the backbone stays as it is, since --freeze_backbone 1 lasts all of --epochs 1"
    assert said in capsys.readouterr().out
    continue_from(trained / "checkpoint.pth", tmp_path / "whole", "--epochs", 1)
    assert "stays as it is" not in capsys.readouterr().out


def test_a_run_from_scratch_in_which_the_backbone_never_learns_says_so(tmp_path, capsys):
    train("--output_dir", tmp_path, "--epochs", 1, "--freeze_backbone", 1, "--report", "false")
    assert "since --freeze_backbone 1 lasts all of --epochs 1" in capsys.readouterr().out


def test_a_run_that_makes_other_images_than_its_weights_had_says_so(trained, tmp_path, capsys):
    flags = ("--init_from", trained / "backbone.pth", "--epochs", 1, "--warmup_epochs", 0)
    train(*flags, "--output_dir", tmp_path / "other", "--shrink_images", 24)
    said = capsys.readouterr().out
    assert "are of images with --mean 0.4 0.5 0.6 --shrink_images 0, and" in said
    assert "this run has --mean 0.485 0.456 0.406 --shrink_images 24," in said
    same = dict(mean=(0.4, 0.5, 0.6), std=IMAGENET_STD, shrink_images=0, white=0.0)
    warn_of_other_images(read(trained / "backbone.pth"), "backbone.pth", **same)
    assert capsys.readouterr().out == ""


def test_the_accuracy_before_training_is_said_to_be_that_of_the_weights(
    trained, class_folders, tmp_path, capsys
):
    continue_from(
        trained / "backbone.pth", tmp_path, "--epochs", 1, "--knn_data_path", class_folders
    )
    output = capsys.readouterr().out
    assert "--init_from's backbone" in output
    assert "untrained backbone" not in output


def test_a_resumed_run_needs_the_weights_no_more(trained, tmp_path, capsys):
    weights = tmp_path / "weights.pth"
    weights.write_bytes((trained / "backbone.pth").read_bytes())
    begun = continue_from(weights, tmp_path / "run", "--epochs", 1)
    weights.unlink()
    assert continue_from(weights, tmp_path / "run", "--epochs", 1) == begun
    assert "decided when that run began" in capsys.readouterr().out


def test_weights_that_are_missing_or_do_not_say_what_they_are_are_refused(trained, tmp_path):
    with pytest.raises(UserError, match="name the weights to start from with --init_from"):
        train_dino(parse_args(["--preset", "continue", "--output_dir", str(tmp_path)]), IMAGES)
    weights = {"conv1.weight": torch.zeros(64, 3, 7, 7)}
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="does not say which network it holds: give --arch"):
        continue_from(tmp_path / "weights.pth", tmp_path / "run")
