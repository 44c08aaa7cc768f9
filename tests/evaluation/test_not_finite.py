# SPDX-License-Identifier: Apache-2.0
"""A backbone whose weights are finite and whose features are not gets no score."""

import pytest
import torch
from conftest import photograph
from helpers import parse
from PIL import Image

import eval_attention
import eval_copy_detection
import eval_image_retrieval
import eval_linear
import eval_video_segmentation
import finetune
from benchmarks.made_sets import write_copydays, write_retrieval_set
from dino.data.davis import save_mask
from dino.errors import UserError
from dino.evaluation.linear_files import LinearClassifier


@pytest.fixture(scope="module")
def overflowing(checkpoint, tmp_path_factory):
    """The backbone with weights of 1e25 times their size, and a head: all numbers are finite."""
    content = torch.load(checkpoint, weights_only=True)
    content["teacher"] = {
        name: value * (1e25 if "blocks" in name and "weight" in name else 1)
        for name, value in content["teacher"].items()
    }
    content |= {"state_dict": LinearClassifier(96, 3).state_dict(), "n_last_blocks": 1}
    path = tmp_path_factory.mktemp("overflowing") / "backbone.pth"
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def davis(tmp_path_factory):
    root = tmp_path_factory.mktemp("davis")
    for part in ("JPEGImages/480p/dog", "Annotations/480p/dog", "ImageSets/2017"):
        (root / part).mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("dog\n")
    for i in range(3):
        photograph().crop((0, 0, 64, 64)).save(root / f"JPEGImages/480p/dog/{i}.png")
        save_mask(root / f"Annotations/480p/dog/{i}.png", torch.eye(64).byte().numpy())
    return root


def test_there_is_no_retrieval_or_copy_score(overflowing, tmp_path):
    weights = ("--pretrained_weights", overflowing, "--num_workers", 0, "--data_path", tmp_path)
    name = write_retrieval_set(tmp_path, ("coffee.png",)) or "photographs"
    flags = (*weights, "--dataset", name, "--imsize", 32)
    with pytest.raises(UserError, match="features of this network are not finite"):
        eval_image_retrieval.eval_image_retrieval(parse(eval_image_retrieval, *flags))
    write_copydays(tmp_path, ("coffee.png",), ["original", "strong"])
    flags = (*weights, "--data_path", tmp_path / "copydays", "--imsize", 32)
    with pytest.raises(UserError, match="features of this network are not finite"):
        eval_copy_detection.eval_copy_detection(parse(eval_copy_detection, *flags))


def test_there_is_no_accuracy(overflowing, class_folders):
    flags = ("--data_path", class_folders, "--num_workers", 0, "--evaluate")
    flags = ("--pretrained_weights", overflowing, *flags)
    with pytest.raises(UserError, match=r"outputs of .* are not finite"):
        finetune.finetune(parse(finetune, *flags))
    with pytest.raises(UserError, match=r"outputs of vit_nano with .* are not finite"):
        eval_linear.eval_linear(parse(eval_linear, *flags, "--classifier", overflowing))


def test_there_is_no_jaccard(overflowing, davis, tmp_path):
    flags = ("--pretrained_weights", overflowing, "--data_path", davis, "--image_size", 64)
    segment = parse(eval_video_segmentation, *flags, "--output_dir", tmp_path / "results")
    with pytest.raises(UserError, match="patch features of this network are not finite"):
        eval_video_segmentation.eval_video_segmentation(segment)
    for folder, color in (("images", "red"), ("masks", "white")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (64, 64), color).save(tmp_path / folder / "a.png")
    flags = (*flags[:2], "--data_path", tmp_path, "--image_size", 64)
    with pytest.raises(UserError, match="attention maps of vit_nano are not finite"):
        eval_attention.eval_attention(parse(eval_attention, *flags))
