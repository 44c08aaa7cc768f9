# SPDX-License-Identifier: Apache-2.0
"""Attention over the epochs: the maps that a run keeps are those of its checkpoints."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, run_script
from helpers import assert_equal_states, final_state
from PIL import Image

from dino.backbones import build_backbone
from dino.data.augmentations import eval_transform
from dino.training.attention_history import AttentionHistory
from dino.training.backbone_pictures import ATTENTION_EPOCHS

EPOCHS = 8  # of which 0, 1, 3, 4, 5, 7 and 8 are kept


def train(data, folder, *flags):
    command = ("main_dino.py", *SMALL_RUN, "--data_path", data, "--output_dir", folder)
    command += ("--epochs", EPOCHS, "--saveckp_freq", 1, "--knn_freq", EPOCHS, "--report", "true")
    result = run_script(*command, *flags)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def run(class_folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(class_folders / "train", folder)
    return folder


def kept(folder):
    paths = sorted((folder / "attention_history").iterdir())
    return {path.name: path.read_bytes() for path in paths}


def teacher_in(path):
    """The teacher's backbone of a checkpoint."""
    weights = torch.load(path, weights_only=True)["teacher"]
    backbone, _ = build_backbone("vit_nano", 8, img_size=32)
    prefix = "backbone."
    own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    backbone.load_state_dict(own)
    return backbone.eval()


def test_maps_are_kept_seven_times_from_before_training_to_its_end(run):
    assert list(kept(run)) == [f"epoch{epoch:04}.npy" for epoch in (0, 1, 3, 4, 5, 7, 8)]
    assert sum(map(len, kept(run).values())) < 7 * 400


@pytest.mark.parametrize("epoch", [1, 8])
def test_a_map_is_the_mean_attention_of_the_teacher_saved_after_that_epoch(
    run, class_folders, epoch
):
    """Through the checkpoint and `get_last_selfattention`, on images read by other means."""
    flags = json.loads((run / "args.json").read_text())
    backbone = teacher_in(run / f"checkpoint{epoch - 1:04}.pth")
    files = sorted((class_folders / "train").rglob("*.png"), key=lambda path: path.parts)
    transform = eval_transform(32, flags["mean"], flags["std"])
    pixels = torch.stack([transform(Image.open(path)) for path in files[::3]])  # 8 of 24
    with torch.no_grad():
        attention = backbone.get_last_selfattention(pixels)  # (8, h, 1 + 16, 1 + 16)
    expected = attention[:, :, 0, 1:].mean(dim=1).reshape(8, 4, 4)
    found = np.load(run / "attention_history" / f"epoch{epoch:04}.npy")
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_the_picture_has_a_row_for_each_image_and_a_column_for_each_epoch(run):
    picture = np.asarray(Image.open(run / ATTENTION_EPOCHS).convert("RGB"))
    assert picture.shape == (24 + 8 * 132 + 4, (1 + 7) * 132 + 4, 3)
    for row in range(8):
        for column in range(8):
            top, left = 24 + 4 + row * 132, 4 + column * 132
            tile = picture[top : top + 128, left : left + 128].reshape(-1, 3)
            colors = len(np.unique(tile, axis=0))
            assert colors > 16 if column == 0 else 2 <= colors <= 16  # one for each patch
    gaps = picture[24:, np.arange(4) + 132]
    assert (gaps == 255).all()


def test_a_run_that_goes_back_keeps_and_draws_what_the_unbroken_run_does(
    run, class_folders, tmp_path
):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    result = train(class_folders / "train", tmp_path, "--resume", tmp_path / "checkpoint0003.pth")
    assert "Resumed from" in result.stdout
    assert kept(tmp_path) == kept(run)
    assert_equal_states(final_state(run), final_state(tmp_path))
    assert (tmp_path / ATTENTION_EPOCHS).read_bytes() == (run / ATTENTION_EPOCHS).read_bytes()


def test_maps_of_epochs_that_are_done_again_are_dropped(run, tmp_path):
    shutil.copytree(run / "attention_history", tmp_path / "attention_history")
    flags = json.loads((run / "args.json").read_text())
    backbone = teacher_in(run / "checkpoint0001.pth")
    augmentation = type("Augmentation", (), {"mean": flags["mean"]})
    AttentionHistory(tmp_path, None, augmentation, EPOCHS).after_epoch(backbone, 2)
    assert list(kept(tmp_path)) == ["epoch0000.npy", "epoch0001.npy"]


def test_keeping_maps_changes_nothing_in_the_training(run, class_folders, tmp_path):
    train(class_folders / "train", tmp_path, "--report", "false")
    assert not Path(tmp_path / "attention_history").exists()
    assert_equal_states(final_state(run), final_state(tmp_path))


def test_a_run_outlives_maps_that_cannot_be_written(class_folders, tmp_path):
    (tmp_path / "attention_history").write_text("in the way")
    result = train(class_folders / "train", tmp_path, "--epochs", 1)
    assert "Warning: the attention maps of this epoch could not be written" in result.stdout
