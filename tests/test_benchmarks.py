# SPDX-License-Identifier: Apache-2.0
"""The benchmarks at sizes that take seconds: the fields of their JSON lines, and the FLOPs."""

import importlib.util
import json
import sys

import pytest
import torch
from conftest import ROOT

from vision_transformer import ARCHITECTURES

MACHINE = {
    "benchmark",
    "device",
    "cpu",
    "cores",
    "threads",
    "python",
    "torch",
    "torchvision",
    "cuda",
}


def load(name):
    """benchmarks/NAME.py as a module, though the project may have one of the same name."""
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", f"{folder}/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, capsys, *flags):
    """The JSON line that the benchmark prints."""
    load(name).main([str(flag) for flag in flags])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


SMALL_STEP = ("--arch", "vit_nano", "--patch_size", 8, "--global_crop_size", 32)
SMALL_STEP += ("--local_crop_size", 16, "--local", 2, "--out_dim", 64, "--batch", 4)
SMALL_STEP += ("--steps", 2, "--warmup", 1, "--device", "cpu")


def test_train_step_reports_time_by_part_memory_and_flops(capsys):
    result = run("train_step", capsys, *SMALL_STEP, "--monitor")
    assert result.keys() > MACHINE
    assert (result["device"], result["precision"], result["mfu"]) == ("CPU", "float32", None)
    assert result["images_per_s"] == pytest.approx(4000 / result["ms_per_step"], rel=0.01)
    parts = result["ms_by_part"]
    assert list(parts) == [
        *("rest", "teacher_forward", "student_forward", "loss", "backward"),
        *("clip_and_optimizer", "ema"),
    ]
    assert all(milliseconds > 0 for milliseconds in parts.values())
    assert parts["backward"] > parts["teacher_forward"] > parts["ema"]
    assert 0.1 < result["peak_memory_gib"] < 64
    assert result["monitor"]["percent_at_log_freq"] < result["monitor"]["percent_of_a_logged_step"]


@pytest.mark.parametrize(
    ("flags", "choice"),
    [((), "false"), (("--compile",), "true"), (("--compile=auto", "--lr", "1"), "auto")],
)
def test_a_step_is_timed_as_it_is_unless_compiling_is_asked_for(flags, choice):
    """On a GPU training compiles by default, for longer than a check of ten minutes has."""
    assert load("train_step").parse_args(flags)[1].compile == choice


def test_parts_of_a_step_with_accumulated_gradients_add_up(capsys):
    result = run("train_step", capsys, *SMALL_STEP, "--accum_steps", 2, "--amp_dtype", "bfloat16")
    assert (result["accum_steps"], result["precision"]) == (2, "bfloat16")
    parts = result["ms_by_part"]
    assert parts["rest"] < parts["backward"], "the first part's backward pass is not in the rest"


def test_knn_reports_neighbours_that_are_those_of_float32(capsys):
    flags = ("--train", 14000, "--test", 50, "--dim", 16, "--classes", 20, "--ks", 5, 20)
    result = run("knn", capsys, *flags, "--repeats", 1, "--device", "cpu")
    assert result.keys() > MACHINE
    assert result["plain"]["other_neighbours"] == 0
    assert result["plain"]["largest_difference"] < 1e-6
    assert result["seconds_by_part"].keys() == {"search", "votes"}
    assert 5 < result["top1"]["20"] < 100


def vit_gflops(arch, patch_size, out_dim, crop_sizes):
    """By hand, a multiplication and an addition as two: forward, and twice as much backward, save
    the gradient of the pixels. Of the last block only what [CLS] needs.
    """
    D, depth, h = (ARCHITECTURES[arch][name] for name in ("embed_dim", "depth", "num_heads"))

    def forward(size):
        patches = (size // patch_size) ** 2
        N = patches + 1
        block = 2 * N * D * (3 * D + D + 4 * D + 4 * D) + 4 * N * N * D  # linear layers, attention
        last = 2 * D * (4 * D + 4 * D + 4 * D) + 4 * h * N * D  # q, W_k^T q, W_v, output; MLP
        head = 2 * (D * 2048 + 2048 * 2048 + 2048 * 256 + 256 * out_dim)
        embed = 2 * patches * D * 3 * patch_size**2
        return (depth - 1) * block + last + head, embed

    sizes = {size: forward(size) for size in crop_sizes}
    student = sum(3 * rest + 2 * embed for rest, embed in map(sizes.get, crop_sizes))
    teacher = sum(rest + embed for rest, embed in map(sizes.get, crop_sizes[:2]))
    return (student + teacher) / 1e9


def test_flops_of_a_step_are_those_counted_by_hand():
    load("common")
    flops = load("flops")
    crops = [224, 224] + 8 * [96]
    for arch in ("vit_small", "vit_base"):
        counted = flops.training_flops(arch, 16, 65536, crops) / 1e9
        assert counted == pytest.approx(vit_gflops(arch, 16, 65536, crops), rel=1e-6)


def test_a_mistaken_checkout_is_one_paragraph(capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        load("knn").main(["--against", str(tmp_path), "--device", "cpu"])
    assert "there is no main_dino.py" in capsys.readouterr().err


def test_flops_of_a_resnet_are_about_its_published_four_gmacs():
    load("common")
    flops = load("flops")
    with_teacher = flops.training_flops("resnet50", 16, 64, [224, 224])
    assert with_teacher / 2 / 4 / 2 == pytest.approx(4.1e9, rel=0.03)


def test_a_peak_is_known_for_the_gpus_in_the_table_only():
    load("common")
    flops = load("flops")
    assert flops.peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989e12
    assert flops.peak_flops("NVIDIA H100 PCIe", torch.float16) == 756e12
    assert flops.peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
    assert flops.peak_flops("CPU", torch.float32) is None
