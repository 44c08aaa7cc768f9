# SPDX-License-Identifier: Apache-2.0
"""finetune.py: layer-wise rates, what a run leaves and resumes to, what it refuses."""

import contextlib
import json
import os
import shutil
import signal

import pytest
import torch
from conftest import ROOT, photograph, run_ranks, run_script
from helpers import assert_equal_states, parse, refusal, save_random_backbone

import eval_knn
from dino.backbones import build_backbone
from dino.errors import Diverged, UserError
from dino.training.finetuning import (
    FineTuned,
    Regularisation,
    build_finetuning,
    build_rand_augment,
)
from dino.training.finetuning_run import check_optimizer
from dino.weights.pretrained import open_backbone
from finetune import finetune, get_args_parser

SMALL_RUN = (
    *("--batch_size_per_gpu", 6, "--epochs", 3, "--warmup_epochs", 1, "--num_workers", 0),
    *("--rand_augment", "rand-m9-mstd0.5-inc1", "--device", "cpu"),
    # everything that draws random numbers: a run that resumes must draw the same
    *("--mixup", 0.2, "--cutmix", 0.5, "--erasing", 0.1, "--crop_scale", 0.35, 1),
)


def flags_of(checkpoint, data, folder):
    files = ("--pretrained_weights", checkpoint, "--data_path", data, "--output_dir", folder)
    return [str(flag) for flag in (*SMALL_RUN, *files)]


def run(*flags):
    return finetune(get_args_parser().parse_args([str(flag) for flag in flags]))


def content(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def finished(checkpoint, class_folders, tmp_path_factory):
    """The folder of an unbroken run, and its best accuracy."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, run(*flags_of(checkpoint, class_folders, folder))


@pytest.mark.parametrize("text", ["rand-m10-inc1", "rand-m15-mmax20-inc1", "rand-m2"])
def test_no_bit_that_is_kept_by_rand_augment_is_black_and_no_error(text):
    """Pillow refuses it since 13, and DeiT's text asks for it once in 1,000 images."""
    image = photograph().resize((8, 8))
    (operation,) = [op for op in build_rand_augment(text, {}).ops if "Posterize" in op.name]
    operation.prob = 1
    assert operation(image).getextrema() == ((0, 0),) * 3


def test_a_layer_of_a_vit_learns_at_the_rate_of_the_one_above_times_the_decay():
    """Rates as in BEiT: the head at 1, block i of L at decay^(L - i), the embeddings below."""
    backbone, dim = build_backbone("vit_nano", 8, img_size=32)
    model = FineTuned(backbone, dim, 3)
    options = dict(weight_decay=0.05, layer_decay=0.5, ema_decay=0.9, amp_dtype=torch.float32)
    state, _ = build_finetuning(model, torch.device("cpu"), **options)
    scales, decays = {}, {}
    names = {id(param): name for name, param in model.named_parameters()}
    for group in state.optimizer.param_groups:
        for param in group["params"]:
            scales[names[id(param)]] = group["lr_scale"]
            decays[names[id(param)]] = group["weight_decay"]
    assert scales.keys() == set(names.values())
    depth = len(backbone.blocks)
    for name, scale in scales.items():
        below = depth + 1  # layers below the head
        if name.startswith(("head", "backbone.norm")):
            below = 0
        elif name.startswith("backbone.blocks."):
            below = depth - int(name.split(".")[2])
        assert scale == pytest.approx(0.5**below), name
    free = {name for name, value in decays.items() if not value}
    ones = {name for name, param in model.named_parameters() if param.ndim == 1}
    assert free == ones | {"backbone.cls_token", "backbone.pos_embed"}


def test_targets_of_mixed_images_are_their_smoothed_labels_in_the_shares_of_their_pixels():
    torch.manual_seed(0)
    device = torch.device("cpu")
    options = dict(mixup=0.8, cutmix=0.0, smoothing=0.1, erasing=0.0)
    labels = torch.tensor([0, 1, 2, 1])
    images = labels.float().view(4, 1, 1, 1).expand(4, 3, 8, 8).clone()
    mixed, targets = Regularisation(device, 3, **options).batch(images.clone(), labels)
    share = (mixed[0, 0, 0, 0] - images[3, 0, 0, 0]) / (images[0] - images[3])[0, 0, 0]
    smooth = torch.full((4, 3), 0.1 / 3) + 0.9 * torch.eye(3)[labels]
    torch.testing.assert_close(targets, share * smooth + (1 - share) * smooth.flip(0))


def test_a_run_leaves_a_file_that_every_script_takes_and_evaluates_to_what_it_says(
    finished, class_folders, capsys
):
    folder, best = finished
    saved = content(folder / "best_finetuned.pth")
    assert saved["classes"] == ["astronaut", "chelsea", "coffee"]
    assert saved["accuracy"] == best
    files = ("--pretrained_weights", folder / "best_finetuned.pth", "--data_path", class_folders)
    again = run(*files, "--evaluate", "--device", "cpu", "--num_workers", 0)
    assert again == best
    backbone = open_backbone(parse(eval_knn, *files)).backbone
    assert_equal_states(dict(saved["teacher"]), dict(backbone.state_dict()))
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert max(max(line["test_acc1"], line["test_ema_acc1"]) for line in lines) == best
    assert all(line["train_loss"] > 0 for line in lines)


def test_the_backbone_is_trained_and_the_first_layers_move_least(finished, checkpoint):
    folder, _ = finished
    before, after = content(checkpoint)["teacher"], content(folder / "checkpoint.pth")["model"]

    def moved(name):
        return (after[f"backbone.{name}"] - before[name]).abs().mean().item()

    first, last = moved("blocks.0.mlp.fc1.weight"), moved("blocks.5.mlp.fc1.weight")
    assert 0 < first < last


# A run that is killed, or asked to stop, in its third epoch.
BROKEN = """
import os, sys
import dino.training.finetuning_run as module
import finetune

step, calls = module.finetuning_step, []
def finetuning_step(*args, **kwargs):
    calls.append(1)
    if len(calls) == 10:
        os.kill(os.getpid(), int(os.environ["NUMBER"]))
    return step(*args, **kwargs)

module.finetuning_step = finetuning_step
finetune.main()
"""


@pytest.mark.parametrize(
    ("number", "code", "done"),
    [
        (signal.SIGKILL, -9, "of 3 epochs and 0 iterations"),
        (signal.SIGTERM, 75, "2 of 3 epochs and 2 iterations"),
    ],
)
def test_a_broken_run_resumes_to_the_weights_and_log_of_the_unbroken_one(
    number, code, done, finished, checkpoint, class_folders, tmp_path
):
    (tmp_path / "broken.py").write_text(BROKEN)
    flags = flags_of(checkpoint, class_folders, tmp_path / "run")
    environ = dict(PYTHONPATH=str(ROOT), NUMBER=str(int(number)))
    broken = run_script(tmp_path / "broken.py", *flags, **environ)
    assert broken.returncode == code, broken.stderr
    resumed = run_script("finetune.py", *flags)
    assert resumed.returncode == 0, resumed.stderr
    assert done in resumed.stdout
    for name in ("checkpoint.pth", "best_finetuned.pth"):
        assert_equal_states(content(finished[0] / name), content(tmp_path / "run" / name))
    assert (finished[0] / "log.txt").read_text() == (tmp_path / "run" / "log.txt").read_text()


def test_a_run_replaces_no_result_and_claims_none_that_is_gone(
    finished, checkpoint, class_folders, tmp_path
):
    folder, _ = finished
    for name, kept in (("results", "best_finetuned.pth"), ("resumed", "checkpoint.pth")):
        (tmp_path / name).mkdir()
        shutil.copy(folder / kept, tmp_path / name)
    with pytest.raises(UserError, match=r"holds best_finetuned\.pth, which would be lost"):
        run(*flags_of(checkpoint, class_folders, tmp_path / "results"))
    with pytest.raises(UserError, match=r"best_finetuned\.pth is not beside it"):
        run(*flags_of(checkpoint, class_folders, tmp_path / "resumed"))
    other = shutil.copytree(class_folders, tmp_path / "other")
    (other / "val" / "coffee" / "1.png").unlink()
    with pytest.raises(UserError, match=r"that run has val_set 12 images, .* this one 11 images"):
        run(*flags_of(checkpoint, other, folder))


def test_a_run_killed_at_its_first_save_of_a_result_resumes(
    finished, checkpoint, class_folders, tmp_path
):
    (tmp_path / "broken.py").write_text(
        "import os, finetune, dino.training.saver as saver\n"
        "write = saver.write_atomically\n"
        "def write_atomically(payload, path, **options):\n"
        "    write(payload, path, **options)\n"
        "    path.name.startswith('best') and os._exit(9)\n"
        "saver.write_atomically = write_atomically\n"
        "finetune.main()\n"
    )
    flags = flags_of(checkpoint, class_folders, tmp_path / "run")
    broken = run_script(tmp_path / "broken.py", *flags, PYTHONPATH=str(ROOT))
    assert broken.returncode == 9, broken.stderr
    assert (tmp_path / "run" / "best_finetuned.pth").exists()
    assert run(*flags) == finished[1]


def test_a_run_that_diverged_at_once_begins_again_with_a_lower_rate(
    checkpoint, class_folders, tmp_path
):
    flags = (*flags_of(checkpoint, class_folders, tmp_path), "--epochs", 1, "--warmup_epochs", 0)
    with pytest.raises(Diverged, match="Try a lower --lr"):
        run(*flags, "--lr", 1e30)
    assert run(*flags) > 0


def test_two_processes_train_one_network(checkpoint, class_folders, tmp_path):
    flags = flags_of(checkpoint, class_folders, tmp_path)
    code, said = run_ranks(2, "finetune.py", *flags, "--epochs", 1, "--warmup_epochs", 0)
    assert code == 0, said
    assert content(tmp_path / "checkpoint.pth")["global_batch"] == 12
    assert (tmp_path / "best_finetuned.pth").exists()


def test_a_resnet_is_finetuned_from_scratch_too(class_folders, tmp_path):
    weights = save_random_backbone(tmp_path / "backbone.pth", "resnet_nano")
    flags = flags_of(weights, class_folders, tmp_path / "run")
    assert run(*flags, "--epochs", 1, "--warmup_epochs", 0, "--from_scratch") >= 0


def test_from_scratch_needs_no_weights_and_resumes(class_folders, tmp_path):
    folder, network = tmp_path / "run", ("--arch", "vit_nano", "--patch_size", 8)
    scratch = ("--from_scratch", *network, "--image_size", 32)
    flags = flags_of("", class_folders, folder)
    assert run(*flags, *scratch, "--epochs", 1, "--warmup_epochs", 0) >= 0
    found = content(folder / "best_finetuned.pth")
    assert (found["arch"], found["image_size"], found["from_scratch"]) == ("vit_nano", 32, True)
    assert run(*flags, *scratch, "--epochs", 1, "--warmup_epochs", 0) >= 0, "the same run again"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--mixup 0.2 --batch_size_per_gpu 7", "pair the images"),
        ("--crop_scale 0.9 0.2", "--crop_scale 0.9 0.2"),
        ("--epochs 3 --warmup_epochs 4", "--warmup_epochs 4"),
        ("--rand_augment nonsense", "--rand_augment nonsense"),
        ("--cutmix 1e-320", "--cutmix: 1e-320 is too close to 0"),
        ("--weight_decay 1e39", "--weight_decay: 1e39 is out of range"),
        ("--evaluate", "best_finetuned.pth"),
        ("--pretrained_weights {checkpoint} --batch_size_per_gpu 64 --data_path {data}", "has 24"),
        ("--pretrained_weights {checkpoint} --evaluate --data_path {data}", "linear classifier"),
        ("--pretrained_weights {checkpoint} --evaluate --data_path {data}", "a best_finetuned.pth"),
        ("--pretrained_weights {resnet} --layer_decay 0.5 --data_path {data}", "--layer_decay 0.5"),
        ("--pretrained_weights {checkpoint} --data_path {data} --output_dir {other}", "log.txt"),
        ("--pretrained_weights {checkpoint} --data_path {data} --output_dir {run}", "that run has"),
    ],
)
def test_a_wrong_flag_is_refused_in_one_paragraph(
    flags, said, checkpoint, class_folders, finished, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.txt").write_text('{"epoch": 0, "train_wd": 0.04}\n')
    names = dict(checkpoint=checkpoint, data=class_folders, run=finished[0], other="other")
    if "{resnet}" in flags:
        names["resnet"] = save_random_backbone(tmp_path / "resnet.pth", "resnet_nano")
    small = "--device cpu --num_workers 0 --epochs 3 --warmup_epochs 1 --batch_size_per_gpu 4 "
    assert said in refusal(monkeypatch, capsys, "finetune", small + flags.format(**names)).err
    assert os.path.exists(finished[0] / "checkpoint.pth")


@pytest.mark.parametrize(
    ("taken", "decay", "may_skip", "said"),
    [
        *[(5, 0.1, False, None), (4, 0.1, True, None), (4, 0.1, False, "has taken 4 of 5 steps")],
        *[(6, 0.1, True, "has taken 6 of 5"), (0, 0.1, False, "has taken 0 of 5")],
        (5, 0.2, False, "has other weight decays"),
    ],
)
def test_a_run_resumes_from_an_optimizer_of_its_own_steps_alone(taken, decay, may_skip, said):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], weight_decay=decay)
    for _ in range(taken):
        weight.sum().backward()
        optimizer.step()
    refused = pytest.raises(UserError, match=said) if said else contextlib.nullcontext()
    with refused:
        check_optimizer(optimizer, [0.1], 5, may_skip, "run/checkpoint.pth")
