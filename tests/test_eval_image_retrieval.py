# SPDX-License-Identifier: Apache-2.0
"""eval_image_retrieval.py on views of photographs: what it prints, writes and refuses."""

import json
import pickle
import re
import shlex
import shutil

import numpy as np
import pytest
from conftest import ROOT, photograph, run_ranks, run_script
from helpers import refusal, save_random_backbone
from PIL import Image

from benchmarks.made_sets import overlap, write_retrieval_set
from dino.spread import spread
from eval_image_retrieval import eval_image_retrieval, get_args_parser

OFFICIAL_COMMANDS = [
    "--imsize 512 --multiscale 1 --data_path d --dataset rparis6k",
    "--imsize 224 --multiscale 0 --data_path d --dataset roxford5k",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two photographs: 8 queries, and for each 3 easy, 5 hard and 2 junk views."""
    root = tmp_path_factory.mktemp("made")
    write_retrieval_set(root, ("coffee.png", "chelsea.png"))
    return root


def flags(made, checkpoint, *more):
    fixed = ("--dataset", "photographs", "--device", "cpu", "--num_workers", 0, "--imsize", 48)
    return ["--data_path", made, "--pretrained_weights", checkpoint, *fixed, *more]


def run(*command):
    return eval_image_retrieval(get_args_parser().parse_args([str(part) for part in command]))


@pytest.mark.parametrize("command", OFFICIAL_COMMANDS)
def test_the_commands_of_the_official_readme_parse(command):
    args = get_args_parser().parse_args(shlex.split(command))
    assert args.multiscale is (args.dataset == "rparis6k")
    assert (args.arch, args.patch_size, args.checkpoint_key) == ("vit_small", 16, "teacher")


def test_it_prints_the_official_lines_and_writes_every_query(made, checkpoint, tmp_path):
    command = flags(made, checkpoint, "--output", "new/scores.json", "--save_pictures", 3)
    result = run_script(ROOT / "eval_image_retrieval.py", *command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "train: 80 imgs / query: 8 imgs" in lines
    written = json.loads((tmp_path / "new" / "scores.json").read_text())
    medium, hard = (round(100 * written[name]["mAP"], 2) for name in ("medium", "hard"))
    assert f">> photographs: mAP M: {medium}, H: {hard}" in lines
    at_k = [
        np.around(100 * np.array([written[name]["mP@k"][k] for k in ("1", "5", "10")]), 2)
        for name in ("medium", "hard")
    ]
    assert f">> photographs: mP@k[ 1  5 10] M: {at_k[0]}, H: {at_k[1]}" in lines
    assert len(written["AP"]) == 8
    for name in ("easy", "medium", "hard"):
        assert np.mean([query[name] for query in written["AP"]]) == pytest.approx(
            written[name]["mAP"]
        )
        assert 0.1 < written[name]["mAP"] <= 1
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["query000.png", "query002.png", "query005.png"]
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            assert len(image.convert("RGB").getcolors(2**20)) > 1000  # photographs are in it


def test_two_processes_and_other_batches_give_the_same_scores(made, checkpoint, tmp_path):
    alone, shared = tmp_path / "alone.json", tmp_path / "shared.json"
    command = flags(made, checkpoint, "--multiscale", "true")
    run(*command, "--batch_size_per_gpu", 1, "--output", alone)
    code, said = run_ranks(2, "eval_image_retrieval.py", *command, "--output", shared)
    assert code == 0, said
    assert said.count("mAP M") == 1
    assert json.loads(alone.read_text()) == json.loads(shared.read_text())


def test_multi_scale_and_larger_images_change_the_scores(made, checkpoint):
    first = run(*flags(made, checkpoint))
    several = run(*flags(made, checkpoint, "--multiscale", "true"))
    larger = run(*flags(made, checkpoint, "--imsize", 64))
    assert len({scores["medium"][0] for scores in (first, several, larger)}) == 3


def test_any_backbone_is_evaluated_not_only_vits(made, tmp_path):
    """The official script gives a ResNet no features at all."""
    scores = run(*flags(made, save_random_backbone(tmp_path / "resnet.pth", "resnet18")))
    assert scores["easy"][0] > 0.1


def test_the_made_set_has_the_overlaps_that_its_labels_say(tmp_path):
    """Views are found again in the photograph, from which they were cut without a change."""
    write_retrieval_set(tmp_path, ("coffee.png",))
    folder = tmp_path / "photographs"
    content = pickle.loads((folder / "gnd_photographs.pkl").read_bytes())
    image = np.asarray(photograph("coffee.png"), dtype=np.float32)
    rows, columns = 100, 150  # of the blocks

    def box_of(name):
        view = np.asarray(Image.open(folder / "jpg" / f"{name}.jpg"), dtype=np.float32)
        height, width = view.shape[:2]
        block = int(name.split("_")[1])
        row, column = block, (2 * block + block // 2) % 4
        area = image[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]
        windows = np.lib.stride_tricks.sliding_window_view(area, view.shape[:2], axis=(0, 1))
        thumb = windows[..., ::7, ::7] - view[::7, ::7].transpose(2, 0, 1)
        differences = np.abs(thumb).mean(axis=(2, 3, 4))
        y, x = np.unravel_index(differences.argmin(), differences.shape)
        return x, y, x + width, y + height

    bounds = {"easy": (0.5, 1), "hard": (0.2, 0.5), "junk": (0, 0.2)}
    for query, entry in zip(content["qimlist"], content["gnd"], strict=True):
        query_box = box_of(query)
        assert [len(entry[label]) for label in bounds] == [3, 5, 2]
        for label, (low, high) in bounds.items():
            for index in entry[label][:3]:  # the last two hard ones are edited
                found = overlap(box_of(content["imlist"][index]), query_box)
                assert low <= found < high, (query, content["imlist"][index])


def test_pictures_are_of_queries_from_all_over_the_set():
    assert spread(70, 3) == [0, 23, 46]
    assert spread(3, 5) == [0, 1, 2]
    assert spread(3, 0) == []


# ---- mistakes ----


@pytest.fixture
def wrong(made, checkpoint, tmp_path, monkeypatch):
    """Being in a folder of wrong sets."""
    monkeypatch.chdir(tmp_path)
    for name in ("code", "bare", "gone"):
        (tmp_path / name).mkdir()
    content = pickle.loads((made / "photographs" / "gnd_photographs.pkl").read_bytes())
    (tmp_path / "code" / "gnd_code.pkl").write_bytes(b"cos\nmkdir\n(S'it_ran'\ntR.")
    (tmp_path / "bare" / "gnd_bare.pkl").write_bytes(pickle.dumps(content))
    (tmp_path / "gone" / "gnd_gone.pkl").write_bytes(pickle.dumps(content))
    (tmp_path / "gone" / "jpg").mkdir()
    (tmp_path / "file").write_text("")
    shutil.copy(next((made / "photographs" / "jpg").iterdir()), tmp_path / "query004.png")
    save_random_backbone(tmp_path / "resnet.pth", "resnet_nano")
    return " ".join(map(str, flags(made, checkpoint)))


MISTAKES = [
    ("--data_path nowhere", r"--data_path nowhere --dataset photographs: no file"),
    ("--data_path ''", "--data_path '' is empty"),
    ("--dataset roxford5k", r"--dataset roxford5k: no file .*gnd_roxford5k\.pkl"),
    ("--data_path . --dataset code", r"holds more than plain values \(GLOBAL 'os mkdir'\)"),
    ("--data_path . --dataset bare", r"--dataset bare: no folder bare/jpg"),
    ("--data_path . --dataset gone", "88 of the 88 images that gnd_gone.pkl names are not there"),
    ("--imsize 15 --multiscale 1", "do not hold a patch of 8 x 8 at --imsize 15"),
    ("--imsize 1 --multiscale 1 --pretrained_weights resnet.pth", "of 1 x 1 at --imsize 1"),
    ("--imsize 0", "--imsize: 0 is out of range"),
    ("--multiscale perhaps", "--multiscale: 'perhaps' is neither true"),
    ("--use_cuda perhaps", "--use_cuda: 'perhaps' is neither true"),
    ("--use_cuda false --device cuda", "--use_cuda false and --device cuda contradict"),
    ("--batch_size_per_gpu 0", "--batch_size_per_gpu: 0 is out of range"),
    ("--save_pictures -1", "--save_pictures: -1 is out of range"),
    (
        "--max_image_pixels 2000",
        "60 x 45 pixels, more than --max_image_pixels 2000, which may be raised",
    ),
    ("--output .", "--output . is a folder"),
    ("--output file/scores.json", "--output file/scores.json: file is not a folder"),
    ("--save_pictures 1 --output_dir file", "--output_dir file: file is not a folder"),
    ("--save_pictures 2", r"--output_dir \.: query004\.png exists and was not written by these"),
    ("--pretrained_weights nowhere.pth", "--pretrained_weights nowhere.pth: no such file"),
    (
        "--pretrained_weights '' --arch resnet50",
        "--arch resnet50 .* ViT-S/16 only.* ImageNet is https://.*/dino_resnet50_pretrain.pth",
    ),
    ("--pretrained_weights '' --patch_size 8", "--patch_size 8: .*dino_deitsmall8_pretrain"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES)
def test_a_mistake_is_one_paragraph_before_any_feature_is_computed(
    wrong, monkeypatch, capsys, tmp_path, mistake, message
):
    said = refusal(monkeypatch, capsys, "eval_image_retrieval", f"{wrong} {mistake}")
    assert re.search(message, said.err), said.err
    assert ">>" not in said.out
    assert not (tmp_path / "it_ran").exists()
