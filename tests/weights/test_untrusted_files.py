# SPDX-License-Identifier: Apache-2.0
"""Files from somebody else: code in them is never run, and none says where a run writes."""

import functools
import importlib
import itertools
import pickle
import sys

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, photograph
from helpers import training_objects

import eval_knn
from dino.errors import UserError
from dino.randomness import random_state
from dino.training.checkpoint import (
    Progress,
    check_same_run,
    restore_progress,
    restore_training,
    training_payload,
)
from dino.training.saver import find_checkpoint
from dino.weights.files import flags_in, read
from dino.weights.pretrained import open_backbone
from dino.weights.published import PUBLISHED_BACKBONES
from dino.weights.starting import initialise_from

EVALUATION = ("--device", "cpu", "--num_workers", "0", "--data_path", "labelled")
COMMANDS = {
    "main_dino": (*map(str, SMALL_RUN), "--data_path", "labelled/train", "--output_dir", "run"),
    "eval_knn": EVALUATION,
    "eval_linear": (*EVALUATION, "--output_dir", "run"),
    "visualize_attention": ("--device", "cpu", "--output_dir", "run"),
    "eval_attention": ("--device", "cpu", "--data_path", "pairs"),
}


@pytest.fixture
def here(tmp_path, monkeypatch, class_folders, checkpoint):
    """A folder to be in, with a data set, a pair of image and mask, and a good backbone."""
    (tmp_path / "labelled").symlink_to(class_folders)
    (tmp_path / "backbone.pth").symlink_to(checkpoint)
    for folder, mode in (("images", "RGB"), ("masks", "1")):
        (tmp_path / "pairs" / folder).mkdir(parents=True)
        photograph().resize((32, 32)).convert(mode).save(tmp_path / "pairs" / folder / "a.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, script, *flags):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *COMMANDS[script], *map(str, flags)])
    importlib.import_module(script).main()


# ---- code in a file ----


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def plain_pickle(payload, path, protocol=2):
    with open(path, "wb") as file:
        pickle.dump(payload, file, protocol)


def legacy(payload, path):
    torch.save(payload, path, _use_new_zipfile_serialization=False)


WEIGHTS = {"cls_token": torch.zeros(1, 1, 96), "pos_embed": torch.zeros(1, 17, 96)}
KINDS = {
    "a zip": lambda bad, path: torch.save(bad, path),
    "a legacy file": legacy,
    "a bare pickle": plain_pickle,
    "flags beside weights": lambda bad, path: torch.save({"teacher": WEIGHTS, "args": bad}, path),
    "legacy flags": lambda bad, path: legacy({"teacher": WEIGHTS, "args": bad}, path),
    "a tensor by name": lambda bad, path: torch.save({"teacher": {"cls_token": bad}}, path),
    "a key": lambda bad, path: plain_pickle({bad: 1}, path),
    "a pickle of today": lambda bad, path: plain_pickle(bad, path, 4),  # torch reads older ones
}
READERS = [
    *[
        (script, "bad.pth", "--pretrained_weights bad.pth")
        for script in COMMANDS
        if "eval" in script
    ],
    ("visualize_attention", "bad.pth", "--pretrained_weights bad.pth"),
    ("eval_linear", "bad.pth", "--evaluate --classifier bad.pth"),
    ("eval_linear", "run/checkpoint.pth.tar", "--pretrained_weights backbone.pth"),
    ("main_dino", "bad.pth", "--init_from bad.pth"),
    ("main_dino", "bad.pth", "--resume bad.pth"),
    ("main_dino", "run/checkpoint.pth", ""),
    ("main_dino", "run/checkpoint_previous.pth", ""),
    ("main_dino", "run/checkpoint0003.pth", ""),
    *[
        ("eval_knn", f"features/{name}.pth", "--load_features features")
        for name in ("trainfeat", "trainlabels", "testfeat", "testlabels")
    ],
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("script", "file", "flags"), READERS)
def test_code_in_a_file_is_refused_by_name_and_does_not_run(
    here, monkeypatch, capsys, script, file, flags, kind
):
    proof, bad = here / "proof", here / file
    bad.parent.mkdir(exist_ok=True)
    if bad.parent.name == "features":
        for name in ("trainfeat", "trainlabels", "testfeat", "testlabels"):
            torch.save(torch.ones(4, 8 if "feat" in name else 1), bad.parent / f"{name}.pth")
    KINDS[kind](Malicious(proof), bad)
    before = sorted(here.rglob("*"))
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, script, *flags.split())
    said = (
        "damaged, or not a checkpoint" if kind == "a pickle of today" else "contains pickled code"
    )
    assert f"{file}: {said}" in "".join(capsys.readouterr())
    assert not proof.exists()
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("kind", KINDS)
def test_code_in_a_downloaded_file_is_refused_as_well(here, monkeypatch, capsys, kind):
    """It lies where torch.hub keeps what it has downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(here))
    folder = here / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    name = PUBLISHED_BACKBONES["vit_small", 16] + ".pth"
    KINDS[kind](Malicious(here / "proof"), folder / name)
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "eval_knn", "--arch", "vit_small")
    assert f"{name}: " in capsys.readouterr().err
    assert not (here / "proof").exists()


def test_the_same_files_do_run_code_for_who_trusts_them(tmp_path):
    """Otherwise the tests above would prove nothing."""
    for number, (kind, write) in enumerate(KINDS.items()):
        proof = tmp_path / f"proof{number}"
        write(Malicious(proof), tmp_path / "bad.pth")
        try:
            torch.load(tmp_path / "bad.pth", weights_only=False)
        except Exception as error:  # after the deed: an open file is no state dict
            print(kind, error)
        assert proof.exists(), kind


# ---- where a run writes ----


def files_outside(root, folder):
    """{path: time of its last change, of folders 0}."""
    return {
        path: 0 if path.is_dir() else path.stat().st_mtime_ns
        for path in root.rglob("*")
        if path != folder and not path.is_relative_to(folder)
    }


def test_a_list_of_paths_cannot_make_a_run_write_outside_its_folder(here, monkeypatch):
    """Of paths upwards, absolute ones and a link, to good images and to bad ones."""
    elsewhere, project = here / "elsewhere", here / "project"
    elsewhere.mkdir()
    project.mkdir()
    for i in range(130):
        photograph().crop((i, 0, i + 40, 40)).save(elsewhere / f"{i}.png")
    (elsewhere / "bad.png").write_bytes(b"")
    (project / "link.png").symlink_to(elsewhere / "0.png")
    lines = ["link.png", "../elsewhere/bad.png", f"{elsewhere}/1.png"]
    lines += [f"../elsewhere/../elsewhere/{i}.png" for i in range(2, 130)]
    (project / "list.txt").write_text("\n".join(lines))
    before = files_outside(here, project / "run")
    flags = ("--on_bad_image", "skip", "--batch_size_per_gpu", "65", "--epochs", "1")
    run(
        *(monkeypatch, "main_dino", *flags, "--data_path", project / "list.txt"),
        *("--output_dir", project / "run"),
    )
    assert (project / "run" / "checkpoint.pth").exists()
    assert files_outside(here, project / "run") == before


@pytest.mark.parametrize("name", ["a...jpg", "deep/a..jpg", "a b\n.jpg"])
def test_the_name_of_a_photograph_does_not_either(here, monkeypatch, name):
    photographs = here / "photographs"
    (photographs / name).parent.mkdir(parents=True)
    photograph().resize((32, 32)).save(photographs / name, "JPEG")
    before = files_outside(here, here / "run")
    run(
        *(monkeypatch, "visualize_attention", "--image_path", photographs),
        *("--pretrained_weights", "backbone.pth", "--image_size", "32"),
    )
    assert files_outside(here, here / "run") == before
    assert (here / "run" / name.removesuffix(".jpg") / "attn-head0.png").exists()


def test_the_names_in_a_list_of_masks_do_not_either(here, monkeypatch):
    for folder in ("JPEGImages", "SegmentationObject", "ImageSets/Segmentation"):
        (here / "voc" / folder).mkdir(parents=True)
    photograph().resize((32, 32)).save(here / "out.jpg")
    photograph().resize((32, 32)).convert("P").save(here / "out.png")
    (here / "voc/ImageSets/Segmentation/val.txt").write_text("../../out\n")
    before = files_outside(here, here / "run")
    run(
        *(monkeypatch, "eval_attention", "--data_path", "voc", "--output", "run/figures.json"),
        *("--pretrained_weights", "backbone.pth", "--image_size", "32"),
    )
    assert files_outside(here, here / "run") == before


# ---- values of the wrong kind ----

WRONG = [
    *(None, 1, -5, 10**6, "x", b"a", True, float("nan"), [], {}, (1, 2), [{}], {"a": 1}, {1: 2}),
    *(torch.ones(()), torch.ones(3), torch.ones(2, 2, dtype=torch.int64), [{"cpu": torch.ones(3)}]),
]


def with_wrong_values(payload):
    """`payload` with each of its entries missing, and with each wrong value in the place of it, of
    an entry of an entry, and of a name.
    """
    for key, value in payload.items():
        yield {name: other for name, other in payload.items() if name != key}
        inner = list(value)[:1] if isinstance(value, dict) else []
        for wrong in WRONG:
            yield {**payload, key: wrong}
            for name in inner:
                yield {**payload, key: {**value, name: wrong}}
    for wrong in WRONG:
        if wrong.__hash__:
            yield {wrong: 1, **payload}


def mutants(path, count):
    """Bytes of the file at `path` with a few changed: mostly of its first part, the pickle."""
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(rng.integers(1, 5)):
            changed[rng.integers(len(content) if rng.random() < 0.3 else 5000)] = rng.integers(256)
        yield bytes(changed)


def test_weights_of_any_wrong_kind_are_refused_or_loaded_and_nothing_else(here, checkpoint):
    flags = ("--pretrained_weights", "wrong.pth", "--data_path", "labelled", "--device", "cpu")
    args = eval_knn.get_args_parser().parse_args(flags)
    refused = 0
    for payload in with_wrong_values(torch.load(checkpoint, weights_only=True)):
        torch.save(payload, "wrong.pth")
        refused += ends_in_user_error(lambda: open_backbone(args))
    assert refused > 100
    for content in mutants(checkpoint, 60):
        (here / "wrong.pth").write_bytes(content)
        ends_in_user_error(lambda: open_backbone(args))


def test_training_checkpoints_of_any_wrong_kind_likewise(tmp_path):
    progress = vars(Progress(epoch=1, iteration=8, iterations_per_epoch=6, global_batch=4))
    flags = dict(arch="vit_nano", patch_size=8, out_dim=16)
    payload = training_payload(training_objects(), progress, flags, [random_state()])
    state, refused = training_objects(seed=1), [0, 0]
    for wrong in itertools.islice(with_wrong_values(payload), 0, None, 7):  # of 400
        torch.save(wrong, tmp_path / "wrong.pth")
        refused[0] += ends_in_user_error(lambda: resume(tmp_path / "wrong.pth", flags, state))
        networks = state["student"], state["teacher"], state["dino_loss"]
        init = functools.partial(initialise, tmp_path / "wrong.pth", *networks)
        refused[1] += ends_in_user_error(init)
    assert refused[0] > 20
    assert refused[1] > 5


def initialise(path, *networks):
    initialise_from(read(path, "--init_from"), path, *networks)


def resume(path, flags, state):
    path, checkpoint = find_checkpoint(path, path.parent / "run")
    check_same_run(path, flags_in(checkpoint), flags)
    restore_training(checkpoint, path, state)
    restore_progress(Progress(iterations_per_epoch=6, global_batch=4), checkpoint, path, images=24)


def ends_in_user_error(function):
    """Whether it does; whatever else it raises comes through."""
    try:
        function()
    except UserError:
        return True
    return False
