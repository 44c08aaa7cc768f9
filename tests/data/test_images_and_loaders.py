# SPDX-License-Identifier: Apache-2.0
"""Images on disk: which are found, how they are served, what a wrong --data_path is told."""

import multiprocessing
import os
import time

import pytest
import torch
from conftest import photograph, run_script
from torch.utils.data._utils.pin_memory import pin_memory
from torchvision.datasets import ImageFolder

import eval_knn
import main_dino
from dino.data import image_loader
from dino.data.augmentations import DataAugmentationDINO
from dino.data.image_loader import EpochSampler, ImageLoader, is_death
from dino.data.images import (
    ImageFiles,
    UnreadableImage,
    list_labelled_images,
    list_training_images,
    read_image,
)
from dino.data.items import LabelledImages, Replaced, TrainingImages, collate_readable
from dino.data.loaders import training_loader
from dino.errors import UserError
from dino.signals import leave_signals_to_parent


def test_class_folders_are_listed_in_the_order_of_image_folder(class_folders):
    expected = ImageFolder(class_folders / "train")
    assert list_training_images(class_folders / "train") == [path for path, _ in expected.samples]
    paths, labels, classes = list_labelled_images(class_folders, "train")
    assert list(zip(paths, labels.tolist(), strict=True)) == expected.samples
    assert classes == expected.classes


def test_flat_and_nested_folders_need_no_classes(tmp_path):
    for name in ("b.jpg", "a.PNG", "deep/er/c.webp", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("not an image")
        else:
            photograph().resize((8, 8)).save(path)
    names = [os.path.relpath(path, tmp_path) for path in list_training_images(tmp_path)]
    assert names == ["a.PNG", "b.jpg", "deep/er/c.webp"]


def test_links_are_followed_once_even_in_a_circle(tmp_path):
    photograph().resize((8, 8)).save(tmp_path / "a.png")
    (tmp_path / "circle").symlink_to(tmp_path)
    elsewhere = tmp_path.parent / f"{tmp_path.name}_elsewhere"
    elsewhere.mkdir()
    photograph().resize((8, 8)).save(elsewhere / "b.png")
    (tmp_path / "linked").symlink_to(elsewhere)
    names = [os.path.basename(path) for path in list_training_images(tmp_path)]
    assert names == ["a.png", "b.png"]


def test_a_list_of_paths_is_read_relative_to_its_own_folder(tmp_path):
    for name in ("a b.png", "c.png"):
        photograph().resize((8, 8)).save(tmp_path / name)
    listing = tmp_path / "images.txt"
    listing.write_text(f"a b.png\n\n{tmp_path / 'c.png'}\n")
    found = list_training_images(listing)
    assert found == [str(tmp_path / "a b.png"), str(tmp_path / "c.png")]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such folder or file"),
        (lambda path: path.mkdir(), "no image in this folder"),
        (lambda path: path.write_text("\n"), "this list of images is empty"),
        (lambda path: path.write_text("nowhere.png\n"), "line 1 names .*nowhere.png"),
        (lambda path: photograph().save(path, "png"), "this file is not text"),
    ],
)
def test_a_wrong_data_path_is_named_with_what_to_give_instead(tmp_path, make, message):
    path = tmp_path / "given"
    make(path)
    with pytest.raises(UserError, match=message) as error:
        list_training_images(path)
    assert f"--data_path {path}" in str(error.value)


def test_a_data_path_that_was_not_given_is_called_missing_not_by_its_official_default():
    for flags in (main_dino.get_args_parser(), eval_knn.get_args_parser()):
        with pytest.raises(UserError, match=r"^--data_path is missing: give"):
            list_training_images(flags.get_default("data_path"))


def test_labels_agree_between_train_and_val_when_val_lacks_a_class(tmp_path):
    for folder in ("train/a", "train/b", "train/c", "val/a", "val/c"):
        (tmp_path / folder).mkdir(parents=True)
        photograph().resize((8, 8)).save(tmp_path / folder / "0.png")
    _, _, classes = list_labelled_images(tmp_path, "train")
    assert list_labelled_images(tmp_path, "val", classes)[1].tolist() == [0, 2]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ([], "no folder train/ in it"),
        (["train"], "no class folders"),
        (["train/a"], "hold no image"),
    ],
)
def test_a_wrong_labelled_folder_is_told_what_it_must_hold(tmp_path, folders, message):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        list_labelled_images(tmp_path, "train")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("file", ["b/0.jp2", "b/0.npy", None])
def test_a_class_without_an_image_is_not_left_out_in_silence(tmp_path, split, file):
    for folder in ("a", "b"):
        (tmp_path / split / folder).mkdir(parents=True)
    photograph().resize((8, 8)).save(tmp_path / split / "a/0.png")
    if file:
        (tmp_path / split / file).touch()
    with pytest.raises(UserError, match=f"class folder 'b' of {split}/ holds no image .*\\.png"):
        list_labelled_images(tmp_path, split, ["a", "b"])


def test_a_class_that_only_val_has_is_an_error(class_folders, tmp_path):
    (tmp_path / "val" / "zebra").mkdir(parents=True)
    with pytest.raises(UserError, match="zebra"):
        list_labelled_images(tmp_path, "val", ["horse"])


def test_an_unreadable_image_is_named_in_the_error_and_in_the_batch(tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    photograph().resize((64, 64)).save(good)
    bad.write_bytes(good.read_bytes()[:200])
    with pytest.raises(UnreadableImage, match=r"bad\.png.*Repair or remove it"):
        read_image(bad)
    augmentation = DataAugmentationDINO((0.4, 1), (0.1, 0.4), 0, 16)
    images = ImageFiles([str(good), str(bad)])
    loader = training_loader(
        images, augmentation, batch_size=2, num_workers=1, seed=0, pin_memory=False
    )
    with pytest.raises(UnreadableImage, match=r"bad\.png"):
        next(iter(loader))
    assert isinstance(LabelledImages([str(bad)], [0], None)[0], UnreadableImage)


class Slow(torch.utils.data.Dataset):
    """The second item comes after more than a second."""

    def __len__(self):
        return 3

    def __getitem__(self, number):
        time.sleep(1.1 * (number == 1))
        return number


@pytest.mark.parametrize("pin_memory", [False, pytest.param(True, marks=pytest.mark.cuda)])
def test_images_that_do_not_come_are_waited_for_with_one_word_for_each_wait(
    monkeypatch, capsys, pin_memory
):
    monkeypatch.setattr(image_loader, "LOOK", 0.1)
    monkeypatch.setattr(image_loader, "LATE", 0.3)
    batches = list(ImageLoader(Slow(), batch_size=1, num_workers=1, pin_memory=pin_memory))
    assert torch.cat(batches).tolist() == [0, 1, 2]
    said = capsys.readouterr().out
    # at each of eight looks without the rule; busy cores may delay the other two batches, too
    assert 1 <= said.count("the loader processes have given no images for 0 s") <= 3


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1"])
def test_every_mode_of_pillow_becomes_three_channels(tmp_path, mode):
    suffix = ".tif" if mode == "CMYK" else ".png"
    source = photograph().resize((16, 16))
    image = source.convert("I").convert("I;16") if mode == "I;16" else source.convert(mode)
    image.save(tmp_path / f"image{suffix}")
    assert read_image(tmp_path / f"image{suffix}").mode == "RGB"


def loader_of(paths, workers, images=None, pin_memory=False):
    augmentation = DataAugmentationDINO((0.4, 1), (0.1, 0.4), 1, 16, 8)
    options = dict(batch_size=5, num_workers=workers, seed=3, pin_memory=pin_memory)
    return training_loader(images or ImageFiles(paths), augmentation, **options)


def batches(paths, workers, epoch):
    loader = loader_of(paths, workers)
    loader.sampler.set_epoch(epoch)
    return list(loader)


def assert_same_batches(found, expected):
    for batch, same in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, same, strict=True))


def test_views_do_not_depend_on_the_number_of_workers_or_on_what_ran_before(class_folders):
    paths = list_training_images(class_folders / "train")
    alone, other_epoch = batches(paths, 0, epoch=4), batches(paths, 0, epoch=5)
    with_workers = batches(paths, 2, epoch=4)
    assert len(alone) == 24 // 5
    assert [tuple(view.shape) for view in alone[0]] == [(5, 3, 16, 16)] * 2 + [(5, 3, 8, 8)]
    for batch, same, other in zip(alone, with_workers, other_epoch, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, same, strict=True))
        assert not torch.equal(batch[0], other[0])


def test_the_next_epoch_is_loaded_ahead_and_is_the_one_that_a_new_loader_gives(
    class_folders, tmp_path
):
    class Watched(ImageFiles):
        def __getitem__(self, index):
            with open(tmp_path / "read", "a") as file:
                file.write(".")
            return super().__getitem__(index)

    paths = list_training_images(class_folders / "train")
    loader = loader_of(paths, workers=1, images=Watched(paths))
    loader.sampler.set_position(0)
    assert len(list(loader)) == 4
    end = time.monotonic() + 60
    while (tmp_path / "read").stat().st_size < 20 + 5:  # of the last 4 images no batch is made
        assert time.monotonic() < end, "nothing is loaded ahead"
        time.sleep(0.01)
    for epoch, used in ((1, 0), (2, 0), (4, 0), (5, 10), (6, 0)):
        loader.sampler.set_position(epoch, used)
        found, alone = list(loader), batches(paths, 0, epoch)[used // 5 :]
        assert_same_batches(found, alone)


def test_an_epoch_that_is_given_up_begins_anew(class_folders):
    paths = list_training_images(class_folders / "train")
    for workers in (0, 2):
        loader = loader_of(paths, workers)
        loader.sampler.set_position(3)
        first = next(iter(loader))
        assert_same_batches(loader, batches(paths, 0, epoch=3))
        assert torch.equal(first[0], batches(paths, 0, epoch=3)[0][0])


def test_a_loader_of_fewer_images_than_a_batch_has_none(class_folders):
    assert list(loader_of(list_training_images(class_folders / "train")[:4], workers=1)) == []


@pytest.mark.parametrize("pin_memory", [False, pytest.param(True, marks=pytest.mark.cuda)])
def test_a_terminated_loader_process_is_replaced_and_memory_is_not_blamed(
    class_folders, capsys, pin_memory
):
    """As by scancel, which signals every process of a job. The thread that pins memory may end by
    an error then, and is replaced, too.
    """
    paths = list_training_images(class_folders / "train")
    loader = loader_of(paths, workers=1, pin_memory=pin_memory)
    found = []
    for batch in loader:
        found.append(batch)
        if len(found) == 1:
            (worker,) = loader.workers
            worker.terminate()
            worker.join()
            loader._iterator._timeout = 0.1  # else the loader looks for the dead after 5 seconds
    assert_same_batches(loader_of(paths, workers=0), found)
    said = capsys.readouterr().out
    assert "A loader process was terminated, and is replaced." in said
    assert "memory" not in said


def wait_to_be_ended(ready):
    """As a worker does: without the handlers of signals that its parent has."""
    leave_signals_to_parent()
    ready.set()
    time.sleep(60)


def test_a_loader_process_that_is_still_dying_is_told_apart_too(class_folders, capsys):
    """It has closed its connection, which is noticed, but has no exit code yet."""
    loader = loader_of(list_training_images(class_folders / "train"), workers=1)
    forks = multiprocessing.get_context("fork")
    ready = forks.Event()
    dying = forks.Process(target=wait_to_be_ended, args=(ready,))
    dying.start()
    assert ready.wait(60)
    loader.workers = [dying]
    dying.terminate()
    loader.after_death(ConnectionResetError("while a tensor was handed over"), deaths=1)
    assert "was terminated, and is replaced" in capsys.readouterr().out


NO_ROOM = """
import resource, sys
from dino.data.images import list_training_images
from dino.data.image_loader import ImageLoader
from dino.data.items import LabelledImages
from dino.errors import exit_on_user_error
from torchvision.transforms import ToTensor
import torch

paths = list_training_images(sys.argv[1])
images = LabelledImages(paths, torch.zeros(len(paths)), ToTensor())
with exit_on_user_error("a.py"):
    loader = ImageLoader(images, batch_size=2, num_workers=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    list(loader)
"""


def test_a_worker_without_room_for_its_batch_is_a_paragraph(class_folders):
    """A limit on files holds for shared memory too, and can be set anywhere."""
    result = run_script("-c", NO_ROOM, class_folders / "train")
    assert result.returncode == 2, result.stderr
    assert "three times in a row (RuntimeError: unable to" in result.stderr
    assert "--shm-size" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert (result.stdout.count("\n"), result.stderr.count("\n")) == (2, 1)


def test_a_worker_that_is_lost_without_a_word_is_named_by_its_error(capsys):
    loader = ImageLoader([0], num_workers=1)
    loader.workers = [multiprocessing.get_context("fork").Process(target=os._exit, args=(1,))]
    loader.workers[0].start()
    loader.after_death(EOFError(), 1)
    assert "died and is replaced (EOFError())" in capsys.readouterr().out
    assert not is_death(RuntimeError())


def fails(image, key):
    raise RuntimeError("a bug in views of one's own")


def test_an_error_in_views_of_ones_own_is_not_taken_for_a_death(class_folders):
    images = ImageFiles(list_training_images(class_folders / "train"))
    loader = training_loader(images, fails, batch_size=2, num_workers=1, seed=0, pin_memory=False)
    with pytest.raises(RuntimeError, match="a bug in views of one's own") as held:
        next(iter(loader))
    (worker,) = loader.workers
    worker.join(timeout=4)
    assert not worker.is_alive(), f"it should not wait until {held} is freed"


def test_a_batch_with_a_replaced_image_is_copied_to_pinned_memory_like_others(monkeypatch):
    """So that its copy to a GPU does not wait. Only the call that needs a GPU is replaced."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor + 1)
    bad = [UnreadableImage("a.png", "a reason")]
    batch = pin_memory(collate_readable([Replaced([torch.zeros(2)], bad), [torch.zeros(2)]]))
    assert batch.bad == bad
    assert batch.item[0].tolist() == [[1, 1], [1, 1]]


def test_ranks_share_the_global_batch_that_one_process_would_see():
    images = TrainingImages([None] * 23, None)
    whole = EpochSampler(images, 1, 0, seed=7)
    ranks = [EpochSampler(images, 2, rank, seed=7) for rank in (0, 1)]
    for sampler in (whole, *ranks):
        sampler.set_epoch(2)
    one = list(whole)
    two = [list(sampler) for sampler in ranks]
    for step in range(5):
        together = {*two[0][2 * step : 2 * step + 2], *two[1][2 * step : 2 * step + 2]}
        assert together == set(one[4 * step : 4 * step + 4])
    assert all(epoch == 2 for epoch, _ in one)
