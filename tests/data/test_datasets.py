# SPDX-License-Identifier: Apache-2.0
"""--dataset: torchvision's by name, one's own by import path."""

import bz2
import pickle
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image

from dino.data.augmentations import DataAugmentationDINO, MultiCrop, View
from dino.data.datasets import open_dataset
from dino.data.images import UnreadableImage
from dino.data.items import TrainingImages
from dino.data.loaders import training_loader
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
        ("VisionDataset", "no length or no items"),
        ("builtins:object", "no length or no items"),
        ("EMNIST", "Unknown value 'train' .* --dataset my_module:build"),
        ("LSUN", "unpickles a cache in its folder, which can run code"),
    ],
)
def test_what_is_no_data_set_says_why(name, why, tmp_path):
    with pytest.raises(UserError, match=why):
        open_dataset(name, tmp_path)


def test_a_folder_that_is_missing_is_not_made(tmp_path):
    """torchvision's Caltech101 would make it before it looks for its files."""
    with pytest.raises(UserError, match=r"--data_path .*missing: no such folder"):
        open_dataset("Caltech101", tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "path", "content"),
    [
        ("MNIST", "MNIST/raw/{}-images-idx3-ubyte", b"neither a header nor an image"),  # assertion
        ("USPS", "usps.bz2", bz2.compress(b"1 1:0.5")[:-8]),  # EOFError
        ("Food101", "food-101/meta/{}.json", b"[1]"),  # AttributeError
        ("ImageNet", "meta.bin", b"junk"),  # struct.error
    ],
    ids=["MNIST", "USPS", "Food101", "ImageNet"],
)
def test_damaged_files_of_a_data_set_are_named_with_its_folder(name, path, content, tmp_path):
    for split in ("train", "test", "t10k"):
        file = tmp_path / path.format(split)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        if name == "MNIST":
            file.with_name(f"{split}-labels-idx1-ubyte").write_bytes(content)
    (tmp_path / "food-101" / "images").mkdir(parents=True)
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(content)
    with pytest.raises(UserError, match=f"--dataset {name} --data_path {tmp_path}: .+"):
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


@pytest.fixture
def one_broken(tmp_path):
    """A folder of two images in one class, the first of which is none."""
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "0.png").write_bytes(b"not an image")
    Image.new("RGB", (40, 40)).save(tmp_path / "class" / "1.png")
    return tmp_path


def test_an_image_of_torchvisions_that_cannot_be_read_is_named_or_skipped(one_broken):
    items = open_dataset("ImageFolder", one_broken)
    augmentation = DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 0, 32, 16)
    said = r"images\[0\]: cannot be read as an image \(cannot identify image file .*0.png"
    assert re.match(said, str(TrainingImages(items, augmentation)[0, 0]))
    replaced = TrainingImages(items, augmentation, skip_bad=True)[0, 0]
    assert re.match(said, str(replaced.bad[0]))


def test_a_file_that_ones_own_data_set_misses_is_not_taken_for_a_lack_of_memory(
    tmp_path, monkeypatch
):
    (tmp_path / "my_files.py").write_text(
        "from PIL import Image\n"
        "class Photos:\n"
        "    def __len__(self): return 8\n"
        "    def __getitem__(self, i): return Image.open('/nowhere/a')\n"
    )
    monkeypatch.chdir(tmp_path)
    images = open_dataset("my_files:Photos", None)
    augmentation = DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 0, 32, 16)
    options = dict(batch_size=4, seed=0, pin_memory=False)
    with pytest.raises(UnreadableImage, match="No such file or directory: '/nowhere/a'"):
        next(iter(training_loader(images, augmentation, num_workers=1, **options)))


class Stream:
    """Images from an iterator that ends too early."""

    def __init__(self):
        self.left = iter([Image.new("RGB", (40, 40))] * 5)

    def __len__(self):
        return 12

    def __getitem__(self, number):
        return next(self.left)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_that_end_too_early_cut_no_epoch_short(num_workers):
    augmentation = DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 0, 32, 16)
    options = dict(batch_size=4, seed=0, pin_memory=False, num_workers=num_workers)
    with pytest.raises(RuntimeError, match="raised StopIteration"):
        list(training_loader(Stream(), augmentation, **options))


class NoTexture(MultiCrop):
    def __call__(self, image, key=None):
        raise FileNotFoundError(2, "No such file or directory", "texture")


@pytest.mark.parametrize(
    ("num_workers", "error"), [(0, FileNotFoundError), (1, RuntimeError)], ids=["here", "worker"]
)
def test_a_file_that_ones_own_views_miss_is_raised_at_once(num_workers, error):
    images = [Image.new("RGB", (40, 40))] * 4
    options = dict(batch_size=4, seed=0, pin_memory=False, num_workers=num_workers)
    with pytest.raises(error, match="texture"):
        next(iter(training_loader(images, NoTexture([View(32, (0.4, 1.0))] * 2), **options)))
