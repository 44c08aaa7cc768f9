# SPDX-License-Identifier: Apache-2.0
"""Command lines: official defaults, presets, help without a network, refusals in a paragraph."""

import argparse
import json
import os

import pytest
from conftest import ROOT, photograph, run_python

import eval_linear
import main_dino
from dino.command_line import Parser, tell_idle
from dino.errors import UserError
from dino.output_checks import check_output_file
from dino.training import plots
from dino.training.flag_checks import check_training_flags
from dino.training.flags import parse_args
from dino.training.idle_flags import idle_flags
from dino.training.presets import CONTINUE, PRESETS

OFFICIAL_DEFAULTS = dict(
    arch="vit_small",
    patch_size=16,
    out_dim=65536,
    norm_last_layer=True,
    momentum_teacher=0.996,
    use_bn_in_head=False,
    warmup_teacher_temp=0.04,
    teacher_temp=0.04,
    warmup_teacher_temp_epochs=0,
    use_fp16=True,
    weight_decay=0.04,
    weight_decay_end=0.4,
    clip_grad=3.0,
    batch_size_per_gpu=64,
    epochs=100,
    freeze_last_layer=1,
    lr=0.0005,
    warmup_epochs=10,
    min_lr=1e-6,
    optimizer="adamw",
    drop_path_rate=0.1,
    global_crops_scale=(0.4, 1.0),
    local_crops_number=8,
    local_crops_scale=(0.05, 0.4),
    data_path="/path/to/imagenet/train/",
    output_dir=".",
    saveckp_freq=20,
    seed=0,
    num_workers=10,
    dist_url="env://",
    local_rank=0,
)


def test_official_flags_have_their_official_defaults():
    parser = argparse.ArgumentParser("DINO", parents=[main_dino.get_args_parser()])
    args = vars(parser.parse_args([]))
    assert {name: args[name] for name in OFFICIAL_DEFAULTS} == OFFICIAL_DEFAULTS


def test_a_preset_sets_defaults_and_a_given_flag_wins_even_at_its_default():
    args = parse_args(["--preset", "vitb16", "--epochs", "100"])
    assert args.epochs == 100
    assert args.arch == "vit_base"
    assert args.global_crops_scale == (0.25, 1.0)
    assert args.momentum_teacher == 0.996


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_consists_of_flags_that_go_together_and_says_its_source(name):
    needed = ["--init_from", "backbone.pth"] if name == CONTINUE else []
    args = parse_args(["--preset", name, *needed])
    check_training_flags(args)
    preset = PRESETS[name]
    assert set(preset.flags) <= set(vars(args))
    assert preset.source
    assert preset.reported


def test_given_flags_are_those_on_the_command_line_only():
    parser = Parser(parents=[main_dino.get_args_parser()])
    assert parser.parse_args(["--lr", "0.0005", "--seed", "3"]).given == {"lr": 0.0005, "seed": 3}


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        ("--batch_size 32", "--batch_size 32 (did you mean --batch_size_per_gpu? see"),
        ("--presett=auto --epoch 3", "(did you mean --preset, --epochs? see"),
        ("--nothing_like_it 1", "--nothing_like_it 1 (see"),
        ("a.jpg -x", "a.jpg -x (see"),
        ("--epochs 2 --patch_size 1 2", "2 (--patch_size takes one value; see"),
        ("--jitter 1 1 1 .5 --wandb true", "true (--wandb takes no value; see"),
    ],
)
def test_an_unknown_flag_is_answered_with_the_known_one_that_it_resembles(flags, hint, capsys):
    with pytest.raises(SystemExit):
        parse_args(flags.split())
    assert hint in capsys.readouterr().err


def test_the_last_layer_may_stay_frozen_for_longer_than_the_run_as_in_the_official_code():
    flags = "--epochs 2 --warmup_epochs 0 --freeze_last_layer 3"
    check_training_flags(parse_args(flags.split()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epochs 5", "--warmup_epochs 10 is longer than the run, --epochs 5"),
        (
            "--epochs 10 --warmup_teacher_temp_epochs 30",
            "--warmup_teacher_temp_epochs 30 is longer than the run, --epochs 10",
        ),
        ("--global_crops_scale 1 0.4", "--global_crops_scale 1.0 0.4: .* the smaller first"),
        ("--local_crops_scale 0.1", "--local_crops_scale 0.1: give two"),
        ("--global_crop_size 100", "--global_crop_size 100 is not a multiple .* take 96"),
        ("--local_crop_size 90 --patch_size 8", "--local_crop_size 90 .* take 88"),
        ("--use_fp16 false --amp_dtype float16", "exclude each other"),
    ],
)
def test_flags_that_cannot_go_together_are_refused_with_their_values(flags, message):
    with pytest.raises(UserError, match=message):
        check_training_flags(parse_args(flags.split()))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--warmup_teacher_temp 0.01", "0.01 has no effect with --warmup_teacher_temp_epochs 0."),
        ("--augmentation a:b --flip_p 0", "--flip_p 0.0 has no effect with --augmentation a:b."),
        ("--augmentation a:b --mean 0 0 0", "--mean 0.0 0.0 0.0 has no effect with"),
        ("--dataset a:b --data_path x", "--data_path x has no effect with --dataset a:b."),
        ("--dataset a:b --download", "--download True has no effect with --dataset a:b."),
        ("--arch resnet18 --patch_size 8", "--patch_size 8 has no effect with --arch resnet18."),
        ("--arch resnet50 --drop_path_rate 0.3", "0.3 has no effect with --arch resnet50."),
        ("--in_chans 1 --grayscale_p 1", "--grayscale_p 1.0 has no effect with --in_chans 1."),
        ("--teacher_update student --momentum_teacher 0.9", "--momentum_teacher 0.9 has no effect"),
        ("--sinkhorn_iterations 3 --center_momentum 0.5", "--center_momentum 0.5 has no effect"),
        (
            "--preset no_multicrop --local_crop_size 64",
            "64 has no effect with --local_crops_number",
        ),
    ],
)
def test_a_flag_that_another_one_makes_idle_is_named(flags, said):
    (sentence,) = idle_flags(parse_args(flags.split()))
    assert said in sentence


@pytest.mark.parametrize("name", [None, *PRESETS])
def test_neither_defaults_nor_presets_have_idle_flags(name):
    assert not list(idle_flags(parse_args(["--preset", name] if name else [])))


def test_flags_that_another_one_makes_idle_are_named_where_they_were_given(capsys):
    parser = eval_linear.get_args_parser()
    tell_idle(parser.parse_args(["--evaluate", "--lr", "1"]), ("lr", "seed"), "--evaluate")
    assert capsys.readouterr().out == "--evaluate: --lr has no effect.\n"
    tell_idle(parser.parse_args(["--evaluate"]), ("lr", "seed"), "--evaluate")
    assert capsys.readouterr().out == ""


IMPORTED = ("utils", "vision_transformer", "hubconf")  # by users, and not run
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if path.stem not in IMPORTED)

# Every attempt to reach another machine is an error, from the first import on. One interpreter for
# all scripts: their imports take five seconds.
NO_NETWORK = """
import contextlib, io, json, runpy, socket, sys, traceback
def refuse(*args, **kwargs):
    raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = refuse
said = {}
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            runpy.run_path(script, run_name="__main__")
            end = "no exit"
        except SystemExit as stop:
            end = stop.code
        except BaseException:
            end = traceback.format_exc()
    said[script] = [end, text.getvalue()]
print(json.dumps(said))
"""


def test_a_pipe_is_no_output_file_as_writing_to_it_waits_for_a_reader(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"--output .*pipe is a pipe"):
        check_output_file(tmp_path / "pipe")
    check_output_file("/dev/null")


@pytest.fixture(scope="module")
def helps():
    """{script: [exit code, what `--help` prints]}."""
    result = run_python("-c", NO_NETWORK, *SCRIPTS)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_network(helps, script):
    end, text = helps[script]
    assert end == 0, end
    assert text.startswith(f"usage: {script} ")
    assert "(default: " in text


def test_an_empty_value_is_refused_unless_the_official_default_is_empty():
    """`--init_from "$UNSET"` would otherwise train from scratch without a word."""
    with pytest.raises(UserError, match="--init_from '' is empty"):
        parse_args(["--data_path", "photos", "--init_from", ""])
    parser = Parser(empty=("partition",))
    parser.add_argument("--partition", default="learnfair")
    parser.add_argument("--pretrained_weights", default="")
    args = parser.parse_args(["--partition", "", "--pretrained_weights", ""])
    assert args.partition == args.pretrained_weights == ""


def test_negative_numbers_may_have_exponents(capsys):
    """argparse's own pattern takes them for flags."""
    with pytest.raises(SystemExit):
        parse_args(["--mean", "0.5", "-1e-3", "-.5"])
    assert "argument --mean: -1e-3 is out of range" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--arch", "--epochs", "--jitter"])
def test_two_hyphens_are_not_a_value(flag):
    """argparse drops them, and gives [] to a flag of one value."""
    with pytest.raises(UserError, match=f"{flag} '--' is not a value"):
        parse_args([f"{flag}=--"])


@pytest.mark.parametrize("flags", [["--seed", "9" * 400], ["--seed", "9" * 5000], ["--x\n\x1b[2J"]])
def test_an_error_of_the_command_line_is_one_line_of_bounded_length(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args(flags)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.startswith("main_dino.py: error: ")
    assert len(said) < 2500
    assert said.count("\n") == 1
    assert "\x1b" not in said


def test_an_output_never_replaces_a_file_that_these_scripts_did_not_write(tmp_path):
    photograph().save(tmp_path / "photo.png")
    (tmp_path / "backbone.pth").write_bytes(b"weights")
    (tmp_path / "notes.json").write_text("not JSON")
    figure, _ = plots.plt.subplots()
    plots.save(figure, tmp_path / "curves.png")
    (tmp_path / "scores.json").write_text('{"jaccard": 1.0}')
    for name, ending in (("curves.png", ".png"), ("scores.json", ".json"), ("new.json", ".json")):
        check_output_file(tmp_path / name, ending=ending)
    for name, ending, message in (
        ("photo.png", ".png", "was not written by these scripts"),
        ("notes.json", ".json", "was not written by these scripts"),
        ("backbone.pth", ".json", "give a name that ends in .json"),
    ):
        with pytest.raises(UserError, match=f"{name}.*{message}"):
            check_output_file(tmp_path / name, ending=ending)
    check_output_file("/dev/null", ending=".json")
