# SPDX-License-Identifier: Apache-2.0
"""Bad flags and bad files, for every script: exit code 2, one paragraph, nothing left behind."""

import importlib
import itertools
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL_RUN, run_script
from wrong_inputs import write_inputs

from dino.errors import exit_on_user_error

pytestmark = pytest.mark.usefixtures("inputs")

# What makes each script run, if nothing else is wrong; the flag under test comes after it and wins.
WEIGHTS = "--pretrained_weights backbone.pth"
RIGHT = {
    "main_dino": " ".join(map(str, SMALL_RUN)) + " --data_path images --output_dir run",
    "eval_knn": f"--device cpu --num_workers 0 --data_path labelled {WEIGHTS}",
    "eval_linear": f"--device cpu --num_workers 0 --data_path labelled {WEIGHTS} --output_dir run",
    "visualize_attention": f"--device cpu {WEIGHTS} --image_path images/0.png --output_dir run",
    "eval_attention": f"--device cpu {WEIGHTS} --data_path pairs --output run/figures.json",
    "compare_runs": "--output run.png",
    "check_data": "",
}
READERS = ("eval_knn", "eval_linear", "visualize_attention", "eval_attention")


@pytest.fixture(scope="module")
def written_inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    write_inputs(root)
    return root


@pytest.fixture
def inputs(written_inputs, monkeypatch):
    """Being in a folder of right inputs and wrong ones, which no case below may change."""
    monkeypatch.chdir(written_inputs)


def tree():
    """{path: (size, time of its last change)} of everything below the present folder.

    A folder has neither: a lock comes and goes in it.
    """
    return {
        str(path): None if path.is_dir() else (path.stat().st_size, path.stat().st_mtime_ns)
        for path in Path().rglob("*")
    }


def refused(monkeypatch, capsys, script, flags):
    """What `script` says about `flags`, after the checks that hold for every mistake."""
    program = f"{script}.py"
    monkeypatch.setattr(sys, "argv", [program, *shlex.split(f"{RIGHT[script]} {flags}")])
    before = tree()
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script).main()
    message = capsys.readouterr().err
    assert stopped.value.code == 2, message
    assert tree() == before, "something was left behind, or changed"
    assert message.startswith(f"{program}: error: ")
    assert len(message.strip().splitlines()) == 1, message
    assert "Traceback" not in message
    return message


# ---- numbers: each flag of each script beyond its range, and no number at all ----

RANGES = {  # values outside of the range of these flags
    "0 -3 1e3": {
        "main_dino": "max_image_pixels patch_size epochs batch_size_per_gpu accum_steps"
        " head_hidden_dim head_bottleneck_dim global_crop_size local_crop_size log_freq knn_freq"
        " resume_freq"
        " in_chans",
        "eval_knn": "max_image_pixels nb_knn image_size batch_size_per_gpu patch_size",
        "eval_linear": "max_image_pixels n_last_blocks image_size epochs batch_size_per_gpu"
        " num_labels val_freq patch_size",
        "visualize_attention": "max_image_pixels patch_size",
        "eval_attention": "max_image_pixels patch_size",
        "check_data": "max_image_pixels global_crop_size batch_size_per_gpu num_workers in_chans",
    },
    "-1 2.5 many": {
        "main_dino": "warmup_teacher_temp_epochs warmup_epochs freeze_last_layer num_workers"
        " freeze_backbone"
        " local_crops_number saveckp_freq saveckp_iters keep_checkpoints min_crop_pixels"
        " shrink_images"
        " sinkhorn_iterations",
        "eval_knn": "num_workers",
        "eval_linear": "num_workers",
        "visualize_attention": "image_size",
        "eval_attention": "image_size",
    },
    "-1 99999999999999999999 x": {"main_dino": "seed", "eval_linear": "seed"},
    "first": {"main_dino": "local_rank", "eval_knn": "local_rank", "eval_linear": "local_rank"},
    "1 0.5": {"main_dino": "out_dim"},
    "1000000000 23456789012345678901234": {
        "main_dino": "local_crops_number global_crop_size local_crop_size out_dim epochs",
        "eval_knn": "image_size",
        "eval_linear": "image_size",
        "visualize_attention": "image_size",
        "eval_attention": "image_size",
    },
    "-0.1 nan inf": {
        "main_dino": "lr min_lr weight_decay weight_decay_end clip_grad saveckp_minutes blur_radius"
        " white"
    },
    "0 nan inf": {"main_dino": "warmup_teacher_temp teacher_temp hours std", "eval_linear": "lr"},
    "58.4 0.0009 1e-320": {"main_dino": "std"},
    "123.7 -0.1 nan": {"main_dino": "mean"},
    "1e39 1e-320": {
        "main_dino": "lr min_lr weight_decay weight_decay_end",
        "eval_linear": "lr",
    },
    "1e-40": {"main_dino": "warmup_teacher_temp teacher_temp"},
    "0.011 nan inf": {"eval_knn": "temperature"},
    "-0.1 1.1 nan": {
        "main_dino": "global_crops_scale local_crops_scale momentum_teacher drop_path_rate"
        " momentum_teacher_end flip_p vflip_p turn_p jitter grayscale_p solarize_p"
        " center_momentum"
    },
    "0 1.5 nan": {"visualize_attention": "threshold", "eval_attention": "threshold"},
}
NUMBER_CASES = [
    (script, flag, value)
    for values, scripts in RANGES.items()
    for script, flags in scripts.items()
    for flag in flags.split()
    for value in values.split()
]


@pytest.mark.parametrize(("script", "flag", "value"), NUMBER_CASES)
def test_a_number_beyond_its_range_is_refused_by_name_and_value(
    monkeypatch, capsys, script, flag, value
):
    message = refused(monkeypatch, capsys, script, f"--{flag} {value}")
    assert f"--{flag}" in message
    assert re.search(rf"(?<![\w.]){re.escape(value)}(?![\w.])", message)


@pytest.mark.parametrize("script", ["main_dino", *READERS, "check_data"])
def test_every_flag_that_takes_a_number_is_among_these_cases(script):
    tested = {flag for name, flag, _ in NUMBER_CASES if name == script}
    for action in importlib.import_module(script).get_args_parser()._actions:
        takes_number = action.type is int or "number" in getattr(action.type, "__qualname__", "")
        if takes_number:
            assert action.dest in tested


# ---- everything else: the flag and its value are read off the case, the rest is the message ----

BAD_WEIGHTS = {
    "nowhere.pth": "no such file",
    "folder.pth": "is a folder",
    "text.pth": "damaged, or not a checkpoint",
    "zero.pth": "damaged, or not a checkpoint",
    "cut.pth": "damaged, or not a checkpoint",
    "list.pth": "holds a list, not the weights",
    "tensor.pth": "holds a Tensor, not the weights",
    "short.pth": r"norm\.bias is missing",
    "shape.pth": r"cls_token is \(1, 1, 95\), expected \(1, 1, 96\)",
    "nan.pth": "cls_token has values that are not finite",
}
CASES = [
    *[
        (script, f"--pretrained_weights {file}", message)
        for script in READERS
        for file, message in BAD_WEIGHTS.items()
    ],
    *[("main_dino", f"--init_from {file}", message) for file, message in BAD_WEIGHTS.items()],
    *[(script, "--checkpoint_key ema", "has no entry 'ema'; it has teacher") for script in READERS],
    *[(script, "--arch vit_tiny", "holds a backbone with arch vit_nano") for script in READERS],
    *[(script, "--patch_size 16", "holds a backbone with patch_size 8") for script in READERS],
    *[(script, "--no_such_flag 1", "unrecognized arguments") for script in ("main_dino", *READERS)],
    *[(script, "--device tpu", "invalid choice") for script in ("main_dino", *READERS)],
    # main_dino.py
    ("main_dino", "--epochs 2 --warmup_epochs 3", "--warmup_epochs 3 is longer than the run"),
    ("main_dino", "--warmup_teacher_temp_epochs 3", "is longer than the run, --epochs 2"),
    ("main_dino", "--accum_steps 3", "does not divide --batch_size_per_gpu 4"),
    ("main_dino", "--batch_size_per_gpu 7", "6 images are fewer than one batch of 7"),
    ("main_dino", "--global_crop_size 36", "not a multiple of --patch_size 8: take 32"),
    ("main_dino", "--local_crop_size 20", "not a multiple of --patch_size 8: take 16"),
    ("main_dino", "--global_crops_scale 1.0 0.4", "the smaller first"),
    ("main_dino", "--local_crops_scale 0.1", "give two"),
    ("main_dino", "--jitter 0.4 0.4 0.2 0.6", "of the hue, is at most 0.5"),
    ("main_dino", "--local_crops_scale 0.1 0.2 0.3", "give two"),
    ("main_dino", "--local_crops_scale 0.0 0.2", "above 0"),
    ("main_dino", "--use_fp16 maybe", "neither true"),
    ("main_dino", "--use_fp16 false --amp_dtype bfloat16", "exclude each other"),
    ("main_dino", "--amp_dtype int8", "invalid choice"),
    ("main_dino", "--optimizer adam", "invalid choice"),
    ("main_dino", "--on_bad_image ignore", "invalid choice"),
    ("main_dino", "--preset fast", "invalid choice"),
    ("main_dino", "--arch vit_smal", "Close to it: vit_small"),
    ("main_dino", "--arch vit_b_16", "takes one image size only"),
    ("main_dino", "--arch timm:vit_smal", "unknown to timm"),
    ("main_dino", "--arch inception_v3", "does not take crops of 32 pixels"),
    ("main_dino", "--data_path nowhere", "no such folder or file"),
    ("main_dino", "--data_path ''", "is empty"),
    ("main_dino", "--data_path empty", "no image in this folder"),
    ("main_dino", "--data_path empty.txt", "this list of images is empty"),
    ("main_dino", "--data_path binary.txt", "this file is not text"),
    ("main_dino", "--data_path missing.txt", r"line 2 names .*nowhere\.png"),
    ("main_dino", "--data_path folder.txt", "line 1 names ./images, which is not a file"),
    ("main_dino", "--knn_data_path nowhere", "no folder train/ in it"),
    ("main_dino", "--knn_data_path images", "no folder train/ in it"),
    ("main_dino", "--knn_data_path zebra", "'zebra' of val/ has no counterpart"),
    ("main_dino", "--output_dir file", "is not a folder that can be written to"),
    ("main_dino", "--output_dir file/run", "is not a folder that can be written to"),
    ("main_dino", "--output_dir ''", "is empty"),
    ("main_dino", "--output_dir finished --out_dim 32", "is of a run with 64"),
    ("main_dino", "--output_dir finished --arch vit_tiny", "is of a run with vit_nano"),
    ("main_dino", "--output_dir finished --resume never", "belongs to another run"),
    ("main_dino", "--output_dir damaged", "none of its 1 checkpoints can be read"),
    ("main_dino", "--output_dir supervised", "not a training checkpoint"),
    ("main_dino", "--output_dir supervised --tensorboard", "not a training checkpoint"),
    ("main_dino", "--output_dir listed", "not a training checkpoint"),
    ("main_dino", "--output_dir infinite", r"infinite.*cls_token has values that are not finite"),
    ("main_dino", "--output_dir linear", r"eval_linear\.py"),
    ("main_dino", "--resume nowhere.pth", "no such file"),
    ("main_dino", "--resume text.pth", "damaged, or not a checkpoint"),
    ("main_dino", "--output_dir .", "--output_dir .: holds backbone.pth, which would be lost"),
    ("main_dino", "--resume backbone.pth", "not a training checkpoint"),
    ("main_dino", "--resume training.pth --init_from backbone.pth", "exclude each other"),
    ("main_dino", "--data_path demo:// --batch_size_per_gpu 5000", "2800 images are fewer"),
    # eval_knn.py
    ("eval_knn", "--data_path nowhere", "no folder train/ in it"),
    ("eval_knn", "--data_path ''", "is empty"),
    ("eval_knn", "--data_path images", "no folder train/ in it"),
    ("eval_knn", "--data_path bare", "no folder val/ in it"),
    ("eval_knn", "--data_path zebra", "'zebra' of val/ has no counterpart"),
    ("eval_knn", "--use_cuda maybe", "neither true"),
    ("eval_knn", "--image_size 30", "does not take crops of 30 pixels"),
    ("eval_knn", "--arch vit_smal --pretrained_weights ''", "Close to it: vit_small"),
    ("eval_knn", "--arch vit_nano --pretrained_weights ''", "no published weights"),
    ("eval_knn", "--dump_features file", "is not a folder that can be written to"),
    ("eval_knn", "--load_features nowhere", "no such file"),
    ("eval_knn", "--load_features part", r"trainlabels\.pth: no such file"),
    ("eval_knn", "--load_features unequal", r"trainfeat\.pth does not have one row per label"),
    ("eval_knn", "--load_features narrow", "8 numbers in a row of trainfeat.pth and 5"),
    ("eval_knn", "--load_features notfinite", r"trainfeat\.pth has values that are not finite"),
    ("eval_knn", "--load_features unlabelled", r"trainlabels\.pth is not a 1-D tensor"),
    ("eval_knn", "--load_features negative", r"trainlabels\.pth has negative class numbers"),
    ("eval_knn", "--load_features nothing", r"trainfeat\.pth does not have one row per label"),
    ("eval_knn", "--dump_features run --load_features part", "exclude each other"),
    # eval_linear.py
    ("eval_linear", "--data_path nowhere", "no folder train/ in it"),
    ("eval_linear", "--data_path images --evaluate", "no folder val/ in it"),
    ("eval_linear", "--data_path zebra", "'zebra' of val/ has no counterpart"),
    ("eval_linear", "--num_labels 5", "there are 2 class folders"),
    ("eval_linear", "--n_last_blocks 7", "this backbone has 6 blocks"),
    ("eval_linear", "--avgpool_patchtokens true", "exclude each other"),
    ("eval_linear", "--avgpool_patchtokens 2", "neither true"),
    ("eval_linear", "--image_size 30", "does not take crops of 30 pixels"),
    ("eval_linear", "--lr 0.1 0.10", "give each rate once"),
    ("eval_linear", "--amp_dtype int8", "invalid choice"),
    ("eval_linear", "--output_dir file", "is not a folder that can be written to"),
    ("eval_linear", "--output_dir dino", r"log\.txt there is of a run of main_dino\.py"),
    ("eval_linear", "--output_dir linear", "damaged, or not a checkpoint"),
    ("eval_linear", "--classifier backbone.pth", "is for --evaluate"),
    ("eval_linear", "--evaluate --classifier nowhere.pth", "no such file"),
    ("eval_linear", "--evaluate --classifier zero.pth", "damaged, or not a checkpoint"),
    ("eval_linear", "--evaluate --classifier list.pth", "does not hold a linear classifier"),
    ("eval_linear", "--evaluate --classifier backbone.pth", "does not hold a linear classifier"),
    # visualize_attention.py
    ("visualize_attention", "--image_path nowhere.jpg", "no such file or folder"),
    ("visualize_attention", "--image_path empty", "no image in this folder"),
    ("visualize_attention", "--image_path broken.jpg", "cannot be read as an image"),
    ("visualize_attention", "--image_path images --output_dir images/maps", "is in --image_path"),
    ("visualize_attention", "--image_size 1 2 3", "give height and width"),
    ("visualize_attention", "--image_size 0 5", "give height and width"),
    ("visualize_attention", "--image_size 5", "do not hold a patch of 8 x 8"),
    ("visualize_attention", "--output_dir file", "is not a folder that can be written to"),
    (
        "visualize_attention",
        "--output_dir album",
        r"album: overlay\.png there would be overwritten",
    ),
    ("visualize_attention", "--output_dir sheets", r"sheets: sheets/attention\.png exists and was"),
    ("visualize_attention", "--arch resnet50 --pretrained_weights ''", "has no class token"),
    # eval_attention.py
    ("eval_attention", "--data_path nowhere", r"neither VOC2012's folder"),
    ("eval_attention", "--data_path images", r"neither VOC2012's folder"),
    ("eval_attention", "--data_path lonely", "no counterpart in"),
    ("eval_attention", "--ground_truth objects", "does not tell objects apart"),
    ("eval_attention", "--ground_truth pixels", "invalid choice"),
    ("eval_attention", "--image_size 5", "do not hold a patch of 8 x 8"),
    ("eval_attention", "--output empty", "is a folder"),
    ("eval_attention", "--output file/figures.json", "is not a folder that can be written to"),
    # compare_runs.py
    ("compare_runs", "nowhere", "no such folder"),
    ("compare_runs", "images", "no metrics.jsonl with steps in it"),
    ("compare_runs", "argless", r"args\.json"),
    ("compare_runs", "halfway", r"args\.json"),
    ("compare_runs", "measured --output empty", "is a folder"),
    (
        "compare_runs",
        "measured --output file/comparison.png",
        "is not a folder that can be written to",
    ),
    ("compare_runs", "measured --no_such_flag 1", "unrecognized arguments"),
    # check_data.py
    ("check_data", "nowhere", "no such folder or file"),
    ("check_data", "empty", "no image in this folder"),
    ("check_data", "empty.txt", "this list of images is empty"),
    ("check_data", "binary.txt", "this file is not text"),
    ("check_data", "missing.txt", r"line 2 names .*nowhere\.png"),
    ("check_data", "''", "is empty"),
]


@pytest.mark.parametrize(("script", "flags", "message"), CASES)
def test_a_wrong_flag_or_file_is_refused_with_what_was_found(
    monkeypatch, capsys, script, flags, message
):
    said = refused(monkeypatch, capsys, script, flags)
    assert re.search(message, said), said
    words = shlex.split(flags)
    pairs = list(itertools.pairwise(words)) or [words]
    assert any(all(word in said for word in pair) for pair in pairs), "no flag with its value"


# ---- as a user runs them ----


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("eval_knn.py --device cpu --data_path images", "--data_path images: no folder train/"),
        ("check_data.py nowhere", "PATH nowhere: no such folder or file"),
    ],
)
def test_the_real_process_says_the_same_and_nothing_else(command, message):
    before = tree()
    script, *flags = command.split()
    result = run_script(ROOT / script, *flags, cwd=".")
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert tree() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("script", ["main_dino", *READERS])
def test_a_device_that_is_not_there_is_refused(monkeypatch, capsys, script):
    said = refused(monkeypatch, capsys, script, "--device cuda")
    assert "--device cuda: " in said
    assert "Try --device cpu" in said


@pytest.mark.parametrize(
    ("script", "flag", "name"),
    [
        *[("main_dino", "--output_dir", "new"), ("eval_linear", "--output_dir", "new")],
        *[("visualize_attention", "--output_dir", "new"), ("eval_knn", "--dump_features", "new")],
        ("eval_attention", "--output", "new.json"),
        ("compare_runs", "measured --output", "new.png"),
    ],
)
def test_a_folder_that_may_not_be_written_to_is_refused(monkeypatch, capsys, script, flag, name):
    Path().chmod(0o755)
    Path("locked").mkdir(mode=0o555, exist_ok=True)
    user = os.geteuid()
    if user == 0:  # to whom every folder is open
        os.seteuid(65534)
    try:
        said = refused(monkeypatch, capsys, script, f"{flag} locked/{name}")
    finally:
        os.seteuid(user)
    assert (
        f"{flag.split()[-1]} locked/{name}: locked is not a folder that can be written to" in said
    )


def test_a_full_device_and_a_full_disk_are_told_without_a_traceback(capsys):
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a")
    for error, message in (
        (full, "CUDA out of memory. Tried to allocate 2.00 GiB. Lower --batch_size_per_gpu"),
        (OSError(28, "No space left on device", "maps/a.png"), "maps/a.png: No space left on dev"),
    ):
        with pytest.raises(SystemExit, match="2"), exit_on_user_error("a.py"):
            raise error
        assert capsys.readouterr().err.startswith(f"a.py: error: {message}")


def test_a_lack_of_memory_on_a_cpu_is_a_sentence(capsys):
    with pytest.raises(SystemExit, match="2"), exit_on_user_error("a.py"):
        torch.empty(2**55)
    assert capsys.readouterr().err.startswith("a.py: error: there is not enough memory")
