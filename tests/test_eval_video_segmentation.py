# SPDX-License-Identifier: Apache-2.0
"""eval_video_segmentation.py as a user runs it."""

import csv
import json
import re
import shlex

import numpy as np
import pytest
from conftest import photograph, run_script
from helpers import parse, save_random_backbone
from PIL import Image

import eval_video_segmentation
from dino.data import demo_videos
from dino.data.davis import find_videos, palette, read_labels, save_mask
from dino.errors import UserError
from dino.evaluation.video_results import Results
from dino.weights.exports import FORMATS
from dino.weights.pretrained import open_backbone

SCRIPT = "eval_video_segmentation.py"


@pytest.fixture
def davis(tmp_path):
    """Two videos that stand still, of 64 x 128 pixels; their masks are whole patches of 8."""
    root = tmp_path / "DAVIS"
    for number, name in enumerate(("dog", "two-kites")):
        frames, masks = (root / part / "480p" / name for part in ("JPEGImages", "Annotations"))
        frames.mkdir(parents=True)
        masks.mkdir(parents=True)
        for i in range(1, 5):
            left = 100 + 100 * number
            photograph().crop((left, 50, left + 128, 114)).save(frames / f"{i:05}.png")
            save_mask(masks / f"{i:05}.png", labels_of(number + 1))
    names = root / "ImageSets" / "2017" / "val.txt"
    names.parent.mkdir(parents=True)
    names.write_text("dog\ntwo-kites\n")
    return root


def labels_of(objects):
    labels = np.zeros((64, 128), np.uint8)
    labels[:, 16:48] = 1  # without corners, which interpolation rounds
    if objects > 1:
        labels[:, 72:112] = 2
    return labels


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    return save_random_backbone(tmp_path_factory.mktemp("weights") / "backbone.pth", "vit_nano")


def flags(davis, weights, output, *more):
    return (
        *("--data_path", davis, "--pretrained_weights", weights, "--output_dir", output),
        *("--image_size", 64, "--topk", 1, *more),
    )


def segment(*args):
    """What the script returns, in this process."""
    return eval_video_segmentation.eval_video_segmentation(
        parse(eval_video_segmentation, *flags(*args))
    )


def test_videos_that_stand_still_keep_their_masks_and_the_scores_are_perfect(
    davis, weights, tmp_path
):
    output = tmp_path / "new" / "results"
    more = ("--device", "cpu", "--save_overlays", "--output", tmp_path / "scores" / "all.json")
    result = run_script(SCRIPT, *flags(davis, weights, output, *more))
    assert result.returncode == 0, result.stderr
    for name, objects in (("dog", 1), ("two-kites", 2)):
        assert {path.name for path in (output / name).iterdir()} == {
            f"{i:05}.png" for i in range(1, 5)
        }
        for path in (output / name).iterdir():
            np.testing.assert_array_equal(read_labels(path), labels_of(objects))
            assert Image.open(path).getpalette()[:9] == palette()[:3].flatten().tolist()
        assert Image.open(output / "overlays" / f"{name}.png").width > 500
    lines = [line.split() for line in result.stdout.splitlines()]
    perfect = ["100.0", "100.0", "100.0", "0.0", "100.0", "100.0", "0.0"]
    for name in (["dog_1"], ["two-kites_1"], ["two-kites_2"], ["all", "objects"]):
        assert [*name, *perfect] in lines
    content = json.loads((tmp_path / "scores" / "all.json").read_text())
    assert content["total"]["J&F-Mean"] == 1
    assert list(content["objects"]) == ["dog_1", "two-kites_1", "two-kites_2"]
    assert content["topk"] == 1
    with open(output / "per-sequence_results-val.csv", newline="") as file:
        assert [row[0] for row in csv.reader(file)][1:] == list(content["objects"])


def test_finished_videos_are_kept_and_unfinished_ones_are_segmented(
    davis, weights, tmp_path, capsys
):
    output = tmp_path / "results"
    segment(davis, weights, output)
    marked = np.full((64, 128), 1, np.uint8)
    for name in ("dog", "two-kites"):
        save_mask(output / name / "00002.png", marked)  # known again if it is kept
    (output / "two-kites" / "00003.png").unlink()
    capsys.readouterr()
    segment(davis, weights, output)
    shown = capsys.readouterr().out
    assert "2 videos, of which 1 were finished before" in shown
    assert "[1/1] two-kites: 4 frames" in shown
    np.testing.assert_array_equal(read_labels(output / "dog" / "00002.png"), marked)
    np.testing.assert_array_equal(read_labels(output / "two-kites" / "00002.png"), labels_of(2))
    # another first mask is another task
    save_mask(davis / "Annotations" / "480p" / "dog" / "00001.png", np.roll(labels_of(1), 8))
    segment(davis, weights, output)
    assert "[1/1] dog: 4 frames" in capsys.readouterr().out
    # nothing to do, and no network needed
    segment(davis, weights, output)
    shown = capsys.readouterr().out
    assert "2 videos, of which 2 were finished before" in shown
    assert "Loaded" not in shown
    assert "all objects" in shown
    segment(davis, weights, output, "--resume", "never")
    assert "[2/2]" in capsys.readouterr().out


def test_masks_of_another_network_protocol_or_program_are_not_taken_for_ones_own(
    davis, weights, tmp_path
):
    output = tmp_path / "results"
    segment(davis, weights, output)
    other = save_random_backbone(tmp_path / "other.pth", "vit_tiny")
    with pytest.raises(UserError, match=r"made with weights sha256 .* --resume never"):
        segment(davis, other, output)
    with pytest.raises(UserError, match="made with n_last_frames 7, not 3"):
        segment(davis, weights, output, "--n_last_frames", 3)
    segment(davis, other, output, "--resume", "never")
    (output / "segmentation.json").unlink()
    with pytest.raises(UserError, match=r"dog has masks, but no segmentation\.json") as refusal:
        segment(davis, other, output)
    assert "--resume never" not in str(refusal.value), "they may be somebody's own"
    with pytest.raises(UserError, match=r"dog has masks, but no segmentation\.json"):
        segment(davis, other, output, "--resume", "never")
    assert read_labels(output / "dog" / "00003.png").shape == (64, 128)


def test_a_folder_of_timm_is_segmented_with_and_told_from_another(davis, weights, tmp_path, capsys):
    folder, output = tmp_path / "timm", tmp_path / "results"
    pretrained = open_backbone(parse(eval_video_segmentation, "--pretrained_weights", weights))
    FORMATS["timm"].write(pretrained, folder)
    segment(davis, folder, output)
    segment(davis, folder, output)
    assert "2 videos, of which 2 were finished before" in capsys.readouterr().out
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"made with weights sha256"):
        segment(davis, folder, output)


def test_tables_of_another_program_are_not_replaced(davis, weights, tmp_path):
    table = tmp_path / "results" / "per-sequence_results-val.csv"
    table.parent.mkdir()
    table.write_text("mine")
    with pytest.raises(UserError, match=f"{table.name} would be replaced"):
        segment(davis, weights, table.parent)
    assert table.read_text() == "mine"


def test_masks_of_before_are_not_taken_for_new_ones_after_a_run_that_replaced_them_was_cut_off(
    davis, weights, tmp_path, capsys
):
    output = tmp_path / "results"
    segment(davis, weights, output)
    again = parse(eval_video_segmentation, *flags(davis, weights, output, "--topk", 2))
    protocol = eval_video_segmentation.describe_protocol(again)
    Results(output, protocol).begin(find_videos(davis))  # and no further
    capsys.readouterr()
    segment(davis, weights, output, "--topk", 2)
    assert "2 videos, of which 0 were finished before" in capsys.readouterr().out


def link_video_folder(davis, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dog").symlink_to(davis / "Annotations" / "480p" / "two-kites")
    return tmp_path / "out"


def link_masks_to_results(davis, tmp_path):
    masks = davis / "Annotations" / "480p" / "dog"
    masks.rename(tmp_path / "dog")
    masks.mkdir()
    for path in (tmp_path / "dog").iterdir():
        (masks / path.name).symlink_to(path)
    return tmp_path


def link_data_set(davis, tmp_path):
    (tmp_path / "link").symlink_to(davis)
    return tmp_path / "link" / "JPEGImages" / "480p"


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize(
    "output_of",
    [
        lambda davis, _: davis / "Annotations" / "480p",
        lambda davis, _: davis / "JPEGImages" / "480p",
        lambda davis, _: davis / "JPEGImages" / "480p" / "dog" / "new",
        link_data_set,
        link_video_folder,
        link_masks_to_results,
    ],
)
def test_masks_are_not_written_among_the_files_of_the_data_set(
    output_of, resume, davis, weights, tmp_path
):
    output = output_of(davis, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    with pytest.raises(UserError, match="among the frames or masks of --data_path"):
        segment(davis, weights, output, "--resume", resume)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == {
        **before,
        davis / "ImageSets" / "2017" / "val.txt": b"dog\ntwo-kites\n",
    }


def test_results_may_lie_beside_the_folders_of_the_data_set(davis, weights):
    assert segment(davis, weights, davis)["J&F-Mean"] == 1
    assert segment(davis, weights, davis, "--resume", "never")["J&F-Mean"] == 1


def test_videos_without_true_masks_are_segmented_and_not_scored(davis, weights, tmp_path, capsys):
    (davis / "Annotations" / "480p" / "dog" / "00003.png").unlink()
    assert set(segment(davis, weights, tmp_path / "a")) >= {"J&F-Mean", "J-Mean"}
    assert "1 of 2 videos are not scored" in capsys.readouterr().out
    (davis / "Annotations" / "480p" / "two-kites" / "00003.png").unlink()
    assert segment(davis, weights, tmp_path / "b") is None
    assert (tmp_path / "b" / "dog" / "00004.png").exists()
    assert not (tmp_path / "b" / "global_results-val.csv").exists()


def test_an_object_that_no_patch_gets_is_named(davis, weights, tmp_path, capsys):
    labels = labels_of(2)
    labels[1, 1] = 3
    save_mask(davis / "Annotations" / "480p" / "two-kites" / "00001.png", labels)
    segment(davis, weights, tmp_path / "results")
    shown = capsys.readouterr().out
    assert "two-kites: object 3 is too small for the grid of patches and is lost" in shown
    assert "two-kites_3" in shown  # and scored, as davis2017-evaluation does


def test_the_demo_compares_the_backbone_with_raw_pixels_and_an_untrained_one(
    weights, tmp_path, monkeypatch, capsys
):
    def write_two_small_videos(folder):
        monkeypatch.setattr(demo_videos, "SCENES", dict(list(demo_videos.SCENES.items())[:2]))
        demo_videos.write_demo_videos(folder, frames=4, height=64)

    monkeypatch.setattr(eval_video_segmentation, "write_demo_videos", write_two_small_videos)
    total = segment("demo://", weights, tmp_path)
    assert 0 < total["J&F-Mean"] < 1
    shown = {line.rsplit(maxsplit=1)[0].strip() for line in capsys.readouterr().out.splitlines()}
    assert shown >= {"raw pixels", "untrained backbone", "this backbone", "J&F on the 2 videos of"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--data_path nowhere", r"--data_path nowhere: there is no .*val\.txt"),
        ("--split test-dev", r"test-dev\.txt for --split test-dev"),
        ("--data_path ''", "--data_path '' is empty"),
        ("--arch resnet50 --pretrained_weights ''", "patch tokens of a ViT"),
        ("--arch xcit_small_12_p16 --pretrained_weights ''", "patch tokens of a ViT"),
        ("--pretrained_weights missing.pth", r"--pretrained_weights missing\.pth: no such file"),
        ("--image_size 68", "multiples of the backbone's patch size, 8"),
        ("--image_size 63", "--image_size"),
        ("--image_size 1000000000", "--image_size"),
        ("--image_size 8192 --max_image_pixels 9000", "more than --max_image_pixels"),
        ("--topk 0", "--topk"),
        ("--n_last_frames -1", "--n_last_frames"),
        ("--size_mask_neighborhood -1", "--size_mask_neighborhood"),
        ("--resume maybe", "--resume"),
        ("--output .", r"--output \. is a folder"),
        ("--output_dir ''", "--output_dir '' is empty"),
    ],
)
def test_a_wrong_flag_is_one_paragraph_and_leaves_nothing_behind(
    more, message, davis, weights, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "results"
    command = [SCRIPT, *map(str, flags(davis, weights, output)), *shlex.split(more)]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # which a flag changes
    with pytest.raises(SystemExit) as stopped:
        eval_video_segmentation.main()
    shown = capsys.readouterr().err
    assert stopped.value.code == 2
    assert re.search(message, shown), shown
    assert len(shown.strip().splitlines()) == 1
    assert not output.exists()


def test_help_is_shown(capsys):
    with pytest.raises(SystemExit) as stopped:
        eval_video_segmentation.get_args_parser().parse_args(["--help"])
    assert stopped.value.code == 0
    assert "--size_mask_neighborhood" in capsys.readouterr().out


def test_defaults_are_the_official_ones():
    args = eval_video_segmentation.get_args_parser().parse_args([])
    official = dict(arch="vit_small", patch_size=16, checkpoint_key="teacher", output_dir=".")
    official |= dict(n_last_frames=7, size_mask_neighborhood=12, topk=5, bs=6)
    official |= dict(pretrained_weights="", data_path="/path/to/davis/")
    assert {name: getattr(args, name) for name in official} == official
