# SPDX-License-Identifier: Apache-2.0
"""--dataset: torchvision's by name, one's own by import path."""

import pickle

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image

from dino.data.datasets import open_dataset
from dino.errors import UserError
from dino.training.flags import parse_args
from main_dino import train_dino


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A folder with CIFAR-10's files of a few random images, as its authors packed them."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    for name in names:
        entry = {"data": rng.integers(0, 256, (4, 3072), np.uint8), "labels": [0, 1, 2, 3]}
        (folder / name).write_bytes(pickle.dumps(entry))
    meta = {"label_names": list("abcdefghij")}
    (folder / CIFAR10.meta["filename"]).write_bytes(pickle.dumps(meta))
    # not the authors' bytes
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    return tmp_path


def test_a_data_set_of_torchvision_is_opened_by_name_with_its_images_to_train_on(cifar):
    dataset = open_dataset("CIFAR10", cifar)
    assert len(dataset) == 20
    assert dataset[0][0].size == (32, 32)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("CIFAR10", "--download fetches its files"),
        ("cifar10", "not in torchvision.datasets"),
        ("vision", "not in torchvision.datasets"),
        ("json:loads", "without arguments: missing a required argument: 's'"),
        ("fractions:Fraction", "no length or no items"),
        ("collections:OrderedDict", "it is empty"),
    ],
)
def test_what_is_no_data_set_says_why(name, why, tmp_path):
    with pytest.raises(UserError, match=why):
        open_dataset(name, tmp_path)


def test_nothing_is_downloaded_unless_asked(tmp_path):
    with pytest.raises(UserError):
        open_dataset("MNIST", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_takes_ones_own_data_set(tmp_path):
    (tmp_path / "my_data.py").write_text(
        "from torchvision.datasets import FakeData\n"
        "def build():\n"
        "    return FakeData(size=16, image_size=(3, 24, 24))\n"
    )
    flags = ("--preset", "auto", "--dataset", "my_data:build", "--epochs", 1, "--num_workers", 0)
    script = ROOT / "main_dino.py"
    done = run_script(script, *flags, "--output_dir", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "16 images, shorter side 24 pixels" in done.stdout


@pytest.mark.parametrize(
    "item",
    [torch.zeros(3, 40, 40), np.zeros((40, 40, 3)), {"image": 1}, None, (), Image.new("L", (0, 4))],
)
def test_an_item_that_is_no_image_is_a_mistake_and_not_a_traceback(item, tmp_path):
    """A tensor comes of a transform that was left in the data set."""
    flags = ["--preset", "demo", "--num_workers", "0", "--device", "cpu", "--output_dir"]
    said = "images\\[.*(not a PIL image|no pixels)"
    with pytest.raises(UserError, match=said):
        train_dino(parse_args([*flags, str(tmp_path)]), images=[item] * 64)
