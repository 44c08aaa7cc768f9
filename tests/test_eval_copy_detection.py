# SPDX-License-Identifier: Apache-2.0
"""eval_copy_detection.py on copies of photographs: what it prints, writes and refuses."""

import json
import re
import shlex
import shutil

import pytest
from conftest import ROOT, run_script
from helpers import refusal, save_random_backbone
from PIL import Image

from benchmarks.made_sets import write_copydays
from eval_copy_detection import eval_copy_detection, get_args_parser

BLOCKS = ["original", "strong", "jpegqual/75", "crops/10", "crops/80"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """8 originals of two photographs, 16 strong copies of them, 8 in the other blocks."""
    root = tmp_path_factory.mktemp("made")
    write_copydays(root, ("coffee.png", "chelsea.png"), BLOCKS)
    return root


def flags(made, checkpoint, *more):
    fixed = ("--device", "cpu", "--num_workers", 0, "--imsize", 32)
    return ["--data_path", made / "copydays", "--pretrained_weights", checkpoint, *fixed, *more]


def run(*command):
    return eval_copy_detection(get_args_parser().parse_args([str(part) for part in command]))


def test_the_command_of_the_official_readme_parses():
    args = get_args_parser().parse_args(
        shlex.split("--data_path d --whitening_path w --distractors_path x")
    )
    assert (args.arch, args.patch_size, args.imsize) == ("vit_base", 8, 320)
    assert (args.batch_size_per_gpu, args.checkpoint_key) == (16, "teacher")


def test_it_prints_the_official_lines_and_writes_every_block(made, checkpoint, tmp_path):
    others = ("--distractors_path", made / "distractors", "--whitening_path", made / "whitening")
    command = flags(made, checkpoint, *others, "--output", "new/scores.json")
    result = run_script(ROOT / "eval_copy_detection.py", *command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "new" / "scores.json").read_text())
    assert (written["distractors"], written["images_for_whitening"]) == (40, 80)
    lines = [line for line in result.stdout.splitlines() if line.startswith("eval on ")]
    assert lines == [
        f"eval on {block} mAP={written['blocks'][block]['mAP']:.3f}" for block in BLOCKS
    ]
    assert lines[0] == "eval on original mAP=1.000"
    strong, copies = written["blocks"]["strong"], written["blocks"]["copies"]
    assert (
        "micro-AP (ours, not in the official script):"
        f" strong {strong['micro-AP']:.3f}, all 40 copies {copies['micro-AP']:.3f}"
    ) in result.stdout
    assert [written["blocks"][block]["images"] for block in BLOCKS] == [8, 16, 8, 8, 8]
    assert written["blocks"]["jpegqual/75"]["mAP"] > 0.9 > strong["mAP"]


def test_distractors_whitening_and_image_size_change_the_scores(made, checkpoint):
    plain = run(*flags(made, checkpoint))["strong"]["mAP"]
    distracted = run(*flags(made, checkpoint, "--distractors_path", made / "distractors"))
    whitened = run(*flags(made, checkpoint, "--whitening_path", made / "whitening"))
    larger = run(*flags(made, checkpoint, "--imsize", 64))
    assert distracted["strong"]["mAP"] <= plain
    assert len({plain, whitened["strong"]["mAP"], larger["strong"]["mAP"]}) == 3


def test_batches_do_not_change_the_scores(made, checkpoint):
    one, many = (run(*flags(made, checkpoint, "--batch_size_per_gpu", n)) for n in (1, 7))
    for block in one:
        assert one[block] == pytest.approx(many[block])


def test_the_made_copies_are_what_their_blocks_say(made):
    folder = made / "copydays"
    originals = {path.name: Image.open(path) for path in (folder / "original").iterdir()}
    assert len(originals) == 8
    for path in (folder / "crops" / "80").iterdir():
        crop, original = Image.open(path), originals[path.name]
        share = crop.width * crop.height / (original.width * original.height)
        assert share == pytest.approx(0.2, abs=0.02)
    for path in (folder / "jpegqual" / "75").iterdir():
        assert Image.open(path).size == originals[path.name].size
    names = {path.name for path in (folder / "strong").iterdir()}
    assert names == {f"{name[:4]}0{i}.jpg" for name in originals for i in (1, 2)}


# ---- mistakes ----


@pytest.fixture(scope="module")
def wrong_sets(made, tmp_path_factory):
    """Folders in each of which one thing is wrong."""
    root = tmp_path_factory.mktemp("wrong")
    originals = made / "copydays" / "original"
    (root / "copies" / "strong").mkdir(parents=True)
    shutil.copytree(originals, root / "alone" / "original")
    shutil.copytree(originals, root / "orphan" / "original")
    shutil.copytree(originals, root / "orphan" / "strong")
    (root / "orphan" / "strong" / "200000.jpg").rename(root / "orphan" / "strong" / "299900.jpg")
    shutil.copytree(originals, root / "lacking" / "original")
    shutil.copytree(originals, root / "lacking" / "crops" / "10")
    (root / "lacking" / "original" / "200300.jpg").unlink()
    shutil.copytree(originals, root / "broken" / "original")
    shutil.copytree(originals, root / "broken" / "strong")
    (root / "broken" / "strong" / "200000.jpg").write_text("a page of a proxy")
    shutil.copytree(originals, root / "hollow" / "original")
    (root / "hollow" / "strong").mkdir()
    for part in ("whole", "twins"):
        shutil.copytree(originals, root / part / "original")
        shutil.copytree(originals, root / part / "crops" / "10")
    (root / "twins" / "original" / "more").mkdir()
    shutil.copy(originals / "200000.jpg", root / "twins" / "original" / "more")
    (root / "empty").mkdir()
    (root / "file").write_text("")
    return root


MISTAKES = [
    ("--data_path nowhere", "--data_path nowhere: no folder original/ in it"),
    ("--data_path ''", "--data_path '' is empty"),
    ("--data_path copies", "--data_path copies: no folder original/ in it"),
    ("--data_path alone", "--data_path alone: .* no block of copies"),
    ("--data_path hollow", "--data_path: no image in hollow/strong"),
    ("--data_path orphan", r"strong/299900\.jpg: no image in original/ has the same first 4"),
    ("--data_path lacking", r"crops/10/200300\.jpg: no image in original/ has the same name"),
    ("--data_path broken", r"broken/strong/200000\.jpg: cannot be read as an image"),
    ("--data_path twins", "original/ holds 2 images of the name 200000"),
    (
        "--data_path whole --distractors_path whole",
        r"whole: whole/crops/10/200000\.jpg is an image of --data_path, and as a distractor",
    ),
    (
        "--data_path whole --whitening_path whole/original",
        r"--whitening_path whole/original: whole/original/200000\.jpg is an image that is scored",
    ),
    ("--imsize 8192", "--imsize 8192: .* 1048576 patches, more than 65536"),
    ("--distractors_path nowhere", "--distractors_path nowhere: no such folder"),
    ("--distractors_path empty", "--distractors_path: no image in empty"),
    ("--whitening_path nowhere", "--whitening_path nowhere: no such folder"),
    ("--imsize 7", "--imsize 7: an image must hold at least one patch of 8 x 8"),
    ("--imsize 0", "--imsize: 0 is out of range"),
    ("--batch_size_per_gpu 0", "--batch_size_per_gpu: 0 is out of range"),
    ("--use_cuda perhaps", "--use_cuda: 'perhaps' is neither true"),
    ("--use_cuda false --device cuda", "--use_cuda false and --device cuda contradict"),
    ("--output .", "--output . is a folder"),
    ("--output file/scores.json", "--output file/scores.json: file is not a folder"),
    ("--pretrained_weights nowhere.pth", "--pretrained_weights nowhere.pth: no such file"),
    ("--pretrained_weights resnet.pth", r"resnet.pth \(resnet18\): .* tokens of a ViT"),
    ("--pretrained_weights '' --arch resnet50", "--arch resnet50: .* tokens of a ViT"),
    ("--pretrained_weights '' --arch vit_tiny", "no published weights for --arch vit_tiny"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES)
def test_a_mistake_is_one_paragraph(
    made, wrong_sets, checkpoint, monkeypatch, capsys, mistake, message
):
    monkeypatch.chdir(wrong_sets)
    if "resnet.pth" in mistake:
        save_random_backbone("resnet.pth", "resnet18")
    command = " ".join(map(str, flags(made, checkpoint)))
    said = refusal(monkeypatch, capsys, "eval_copy_detection", f"{command} {mistake}")
    assert re.search(message, said.err), said.err
    assert "eval on" not in said.out
