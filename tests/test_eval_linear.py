# SPDX-License-Identifier: Apache-2.0
"""eval_linear.py as a user runs it: what it writes, how it resumes, what it refuses."""

import json
import math
import shutil
import urllib.request

import pytest
import torch
from conftest import ROOT, run_ranks, run_script
from helpers import assert_equal_states

import eval_linear as script
from dino.backbones import build_backbone
from dino.errors import Diverged, UserError
from dino.evaluation import linear_files
from dino.evaluation.linear_run import build_heads
from dino.weights import published as released
from eval_linear import eval_linear, get_args_parser


@pytest.fixture(scope="module")
def labelled(class_folders, tmp_path_factory):
    """24 training and 11 validation images: two processes validate unequal shares."""
    root = tmp_path_factory.mktemp("labelled")
    shutil.copytree(class_folders, root, dirs_exist_ok=True)
    (root / "val" / "coffee" / "0.png").unlink()
    return root


SMALL_RUN = ("--batch_size_per_gpu", 5, "--epochs", 4, "--num_workers", 0, "--device", "cpu")


def run(*flags):
    """eval_linear with a command line, in this process; the best top-1."""
    parser, argv = get_args_parser(), [str(flag) for flag in (*SMALL_RUN, *flags)]
    return eval_linear(parser.parse_args(argv))


@pytest.fixture(scope="module")
def finished(checkpoint, labelled, tmp_path_factory):
    """The flags of a run with three learning rates, its folder, and the best accuracy."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    flags = ("--pretrained_weights", checkpoint, "--data_path", labelled, "--lr", 0.1, 0.5, 2)
    return flags, folder, run(*flags, "--output_dir", folder)


def content(path):
    return torch.load(path, weights_only=True)


def test_a_run_leaves_the_official_entries_and_two_heads_that_say_all(finished, checkpoint):
    _, folder, best = finished
    saved = content(folder / "checkpoint.pth.tar")
    assert {"epoch", "state_dict", "optimizer", "scheduler", "best_acc"} <= set(saved)
    assert list(saved["state_dict"]) == ["module.linear.weight", "module.linear.bias"]
    assert (saved["epoch"], saved["best_acc"]) == (4, best)
    for name in ("best_linear.pth", "last_linear.pth"):
        head = content(folder / name)
        assert head["classes"] == ["astronaut", "chelsea", "coffee"]
        assert (head["arch"], head["patch_size"], head["image_size"]) == ("vit_nano", 8, 32)
        assert (head["n_last_blocks"], head["avgpool_patchtokens"]) == (4, False)
        assert head["pretrained_weights"] == str(checkpoint)
        assert head["state_dict"]["linear.weight"].shape == (3, 4 * 96)
    assert content(folder / "best_linear.pth")["accuracy"] == best


def test_log_has_the_official_keys_first_and_then_every_rate(finished):
    _, folder, best = finished
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    for epoch, line in enumerate(lines):
        official = ["train_loss", "train_lr", "epoch", "test_loss", "test_acc1"]
        assert list(line)[:5] == official
        assert "test_acc5" not in line  # three classes
        assert line["epoch"] == epoch
        factor = (1 + math.cos(math.pi * epoch / 4)) / 2
        assert line["train_lr"] == pytest.approx(line["lr"] * 5 / 256 * factor)
        assert line["train_loss"] == line["train_loss_by_lr"][str(line["lr"])]
        assert list(line["test_acc1_by_lr"]) == ["0.1", "0.5", "2.0"]
    assert max(max(line["test_acc1_by_lr"].values()) for line in lines) == best
    assert len({line["train_loss_by_lr"]["2.0"] for line in lines}) == 4
    assert best > 40, "33 is chance: something is learnt"


def test_rates_trained_together_give_the_heads_of_separate_runs_bit_for_bit(finished, tmp_path):
    flags, folder, best = finished
    together = content(folder / "checkpoint.pth.tar")
    accuracies = []
    for i, lr in enumerate((0.1, 0.5, 2)):
        accuracies.append(run(*flags[:-4], "--lr", lr, "--output_dir", tmp_path / str(i)))
        alone = content(tmp_path / str(i) / "checkpoint.pth.tar")
        for name in ("linear.weight", "linear.bias"):
            assert torch.equal(alone["heads"][f"0.{name}"], together["heads"][f"{i}.{name}"])
    assert best == max(accuracies)
    assert [accuracy for accuracy, _ in together["head_bests"]] == accuracies
    rates = together["heads"]["0.linear.weight"], together["heads"]["2.linear.weight"]
    assert not torch.equal(*rates)


def test_resumed_run_equals_the_unbroken_one_bit_for_bit(finished, tmp_path, monkeypatch, capsys):
    """Interrupted between log.txt and the checkpoint of its third epoch; then with a worker."""
    flags, folder, best = finished
    save, calls = script.save_training, []

    def save_twice(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        save(*args)

    monkeypatch.setattr(script, "save_training", save_twice)
    with pytest.raises(KeyboardInterrupt):
        run(*flags, "--output_dir", tmp_path)
    monkeypatch.undo()
    assert run(*flags, "--output_dir", tmp_path, "--num_workers", 1) == best
    assert "2 of 4 epochs are done" in capsys.readouterr().out
    assert (tmp_path / "log.txt").read_text() == (folder / "log.txt").read_text()
    for name in ("checkpoint.pth.tar", "best_linear.pth", "last_linear.pth"):
        assert_equal_states(content(folder / name), content(tmp_path / name))


def test_a_finished_run_says_its_table_again_and_changes_nothing(finished, capsys):
    flags, folder, best = finished
    before = (folder / "checkpoint.pth.tar").read_bytes()
    assert run(*flags, "--output_dir", folder) == best
    output = capsys.readouterr().out
    assert "4 of 4 epochs are done" in output
    assert f"Top-1 test accuracy: {best:.1f}" in output
    assert "The lines of an epoch are of the best classifier so far" in output
    table = output[output.index("      --lr  ") :].splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["0.1", "0.5", "2"]
    assert sum("best_linear.pth" in line for line in table) == 1
    assert (folder / "checkpoint.pth.tar").read_bytes() == before


def test_a_saved_head_needs_its_backbone_and_the_images_only(finished, checkpoint, labelled):
    _, folder, _ = finished
    needed = ("--pretrained_weights", checkpoint, "--data_path", labelled)
    launch = ("--num_workers", 0, "--device", "cpu")
    for name in ("best_linear.pth", "last_linear.pth"):
        accuracy = content(folder / name)["accuracy"]
        assert run(*needed, "--evaluate", "--classifier", folder / name) == accuracy
    result = run_script(
        *("eval_linear.py", *needed, *launch, "--evaluate", "--classifier", folder / name)
    )
    assert result.returncode == 0, result.stderr
    assert f"* Acc@1 {accuracy:.3f} loss " in result.stdout
    expected = f"Accuracy of the network on the 11 test images: {accuracy:.1f}%"
    assert expected in result.stdout.splitlines()


def test_classes_are_matched_by_name_where_val_lacks_one(finished, labelled, tmp_path):
    flags, folder, _ = finished
    head = folder / "best_linear.pth"
    correct = 0
    for name in ("astronaut", "chelsea", "coffee"):
        shutil.copytree(labelled / "val" / name, tmp_path / name / "val" / name)
        images = len(list((tmp_path / name / "val" / name).iterdir()))
        accuracy = run(
            *(*flags[:2], "--data_path", tmp_path / name, "--evaluate", "--classifier", head)
        )
        correct += accuracy * images / 100
    assert 100 * correct / 11 == pytest.approx(content(head)["accuracy"])


def test_two_processes_take_the_steps_of_one_and_count_every_image_once(
    finished, labelled, tmp_path
):
    flags, _, _ = finished
    flags = (*flags, "--epochs", 2, "--num_workers", 0, "--device", "cpu")
    one = run(*flags, "--batch_size_per_gpu", 10, "--output_dir", tmp_path / "one")
    code, said = run_ranks(
        *(2, "eval_linear.py", *flags),
        *("--batch_size_per_gpu", 5, "--output_dir", tmp_path / "two"),
    )
    assert code == 0, said
    assert f"Max accuracy so far: {one:.2f}%" in said
    assert "on the 11 test images" in said
    expected, found = (content(tmp_path / name / "checkpoint.pth.tar") for name in ("one", "two"))
    start = build_heads_again(expected)
    for name, value in expected["heads"].items():
        # the same sums in another order, over six steps of which the last of each epoch is smaller
        torch.testing.assert_close(found["heads"][name], value, rtol=1e-4, atol=1e-5, msg=name)
        if name.startswith("2.linear.weight"):
            assert (value - start).abs().max() > 1e-2, "the steps moved far more than that"
    lines = [
        [json.loads(line) for line in (tmp_path / name / "log.txt").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for expected, found in zip(*lines, strict=True):
        assert found.pop("train_loss_by_lr") == pytest.approx(expected.pop("train_loss_by_lr"))
        assert found.pop("test_acc1_by_lr") == pytest.approx(expected.pop("test_acc1_by_lr"))
        assert found == pytest.approx(expected, rel=1e-4)


def build_heads_again(saved):
    torch.manual_seed(saved["seed"])
    return build_heads(4 * 96, 3, [1.0], 1, torch.device("cpu")).heads[0].linear.weight.detach()


@pytest.fixture
def published(monkeypatch, tmp_path, checkpoint):
    """vit_nano with patches of 8 as if its backbone had been released, in torch.hub's folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(content(checkpoint)["teacher"], folder / "nano.pth")
    monkeypatch.setitem(released.PUBLISHED_BACKBONES, ("vit_nano", 8), "nano")
    return folder


def test_a_released_head_is_evaluated_with_the_flags_that_it_was_trained_with(
    published, labelled, tmp_path, monkeypatch
):
    flags = ("--arch", "vit_nano", "--patch_size", 8, "--image_size", 32, "--data_path", labelled)
    features = ("--n_last_blocks", 1, "--avgpool_patchtokens", "true")
    run(*flags, *features, "--lr", 1, "--output_dir", tmp_path / "run")
    trained = content(tmp_path / "run" / "last_linear.pth")
    head = {f"module.{name}": value for name, value in trained["state_dict"].items()}
    torch.save({"epoch": 4, "state_dict": head, "best_acc": 0.0}, published / "head.pth")
    stated = dict(n_last_blocks=1, avgpool_patchtokens=True)
    entry = ("some_folder/head.pth", stated)
    monkeypatch.setitem(released.PUBLISHED_HEADS, ("vit_nano", 8), entry)
    assert run(*flags, "--evaluate") == trained["accuracy"]
    assert run(*flags, *features, "--evaluate") == trained["accuracy"]
    with pytest.raises(UserError, match=r"--n_last_blocks 4: the published .* with 1\. Leave"):
        run(*flags, "--evaluate", "--n_last_blocks", 4)
    # the same file by hand says nothing of its features
    by_hand = ("--evaluate", "--classifier", published / "head.pth")
    assert run(*flags, *features, *by_hand) == trained["accuracy"]
    with pytest.raises(UserError, match=r"features of 192 numbers, and those of vit_nano have 384"):
        run(*flags, *by_hand)


def test_there_is_an_error_where_no_head_was_published_or_none_can_be_fetched(
    published, labelled, monkeypatch
):
    flags = ("--arch", "vit_nano", "--patch_size", 8, "--image_size", 32, "--data_path", labelled)
    with pytest.raises(UserError, match=r"no published linear head for --arch vit_nano .* 8: give"):
        run(*flags, "--evaluate")

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(UserError, match=r"takes the published head, but https://dl\.\S+/dino_vitb"):
        linear_files.published_head("vit_base", 8)


def test_published_heads_are_of_the_sizes_that_their_flags_give():
    """The authors' protocol: 4 x 384 numbers of a ViT-S, 768 and 768 of a ViT-B."""
    for (arch, _), (file, flags) in released.PUBLISHED_HEADS.items():
        assert file.endswith("_linearweights.pth")
        if arch.startswith("vit_"):
            expected = (4, False) if arch == "vit_small" else (1, True)
            assert (flags["n_last_blocks"], flags["avgpool_patchtokens"]) == expected


def test_another_network_trains_and_its_head_is_found_again(labelled, tmp_path):
    backbone, _ = build_backbone("resnet18")
    torch.save(backbone.state_dict(), tmp_path / "resnet.pth")
    needed = ("--pretrained_weights", tmp_path / "resnet.pth", "--data_path", labelled)
    flags = ("--arch", "resnet18", "--image_size", 32, "--epochs", 1, "--output_dir", tmp_path)
    best = run(*needed, *flags)
    head = tmp_path / "best_linear.pth"
    assert "n_last_blocks" not in content(head)
    assert run(*needed, "--evaluate", "--classifier", head) == best
    with pytest.raises(UserError, match=r"--n_last_blocks 1: resnet18 is not one of our ViTs"):
        run(*needed, *flags, "--n_last_blocks", 1)


def test_validation_comes_every_so_many_epochs_and_after_the_last(finished, tmp_path):
    flags, _, _ = finished
    run(*flags, "--val_freq", 2, "--output_dir", tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert ["test_acc1" in line for line in lines] == [True, False, True, True]


def test_best_is_kept_when_accuracy_falls_and_last_is_of_the_same_rate(
    finished, tmp_path, monkeypatch, capsys
):
    flags, _, _ = finished
    accuracies = [(50.0, 20.0), (40.0, 60.0), (55.0, 60.0), (10.0, 30.0)]  # by epoch and rate
    heads_then, epochs_seen = [], []

    def evaluate(features, heads, loader, total):
        heads_then.append([head.linear.weight.detach().clone() for head in heads])
        return [dict(loss=0.5, acc1=accuracy) for accuracy in accuracies[len(heads_then) - 1]]

    def train_heads_one_epoch(features, heads, optimizer, loader, epoch, shown):
        epochs_seen.append(loader.sampler.epoch)
        return train(features, heads, optimizer, loader, epoch, shown)

    train = script.train_heads_one_epoch
    monkeypatch.setattr(script, "evaluate_heads", evaluate)
    monkeypatch.setattr(script, "train_heads_one_epoch", train_heads_one_epoch)
    assert run(*flags[:-3], 0.1, 1, "--output_dir", tmp_path) == 60
    assert epochs_seen == [0, 1, 2, 3]
    for name, epoch, accuracy in (("best_linear.pth", 1, 60.0), ("last_linear.pth", 3, 30.0)):
        head = content(tmp_path / name)
        assert (head["lr"], head["epoch"], head["accuracy"]) == (1.0, epoch, accuracy)
        assert torch.equal(head["state_dict"]["linear.weight"], heads_then[epoch][1])
    saved = content(tmp_path / "checkpoint.pth.tar")
    assert torch.equal(saved["state_dict"]["module.linear.weight"], heads_then[3][1])
    assert saved["head_bests"] == [(55.0, 2), (60.0, 1)]
    assert "1         60.00            1  best_linear.pth" in capsys.readouterr().out


def test_a_rate_that_diverges_leaves_the_others_alone_and_alone_it_is_an_error(finished, tmp_path):
    flags, folder, _ = finished
    run(*flags[:-3], 0.1, 1e38, "--output_dir", tmp_path / "two")
    found = content(tmp_path / "two" / "checkpoint.pth.tar")["heads"]
    assert not found["1.linear.weight"].isfinite().all()
    expected = content(folder / "checkpoint.pth.tar")["heads"]
    assert torch.equal(found["0.linear.weight"], expected["0.linear.weight"])
    bests = content(tmp_path / "two" / "checkpoint.pth.tar")["head_bests"]
    assert bests[1][0] == 0, "outputs of nan had the accuracy of the first class"
    with pytest.raises(Diverged, match=r"the loss is \w+ in epoch \d\. Try a lower --lr"):
        run(*flags[:-3], 1e38, "--output_dir", tmp_path / "one")
    with pytest.raises(Diverged, match="in epoch 0"):  # by its only step
        one_step = ("--epochs", 1, "--batch_size_per_gpu", 64, "--output_dir", tmp_path / "one")
        run(*flags[:-3], 1e38, *one_step)
    assert not (tmp_path / "one" / "best_linear.pth").exists()
    assert run(*flags[:-3], 0.1, "--output_dir", tmp_path / "one") > 0, "as the error advises"


OFFICIAL_DEFAULTS = dict(
    n_last_blocks=4,
    avgpool_patchtokens=False,
    arch="vit_small",
    patch_size=16,
    pretrained_weights="",
    checkpoint_key="teacher",
    epochs=100,
    lr=[0.001],
    batch_size_per_gpu=128,
    dist_url="env://",
    local_rank=0,
    data_path="/path/to/imagenet/",
    num_workers=10,
    val_freq=1,
    output_dir=".",
    num_labels=1000,
    evaluate=False,
)


def test_official_flags_have_their_official_defaults():
    args = vars(get_args_parser().parse_args([]))
    assert {name: args[name] for name in OFFICIAL_DEFAULTS} == OFFICIAL_DEFAULTS


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data_path nowhere", r"--data_path nowhere: no folder train/.* hold train/ and val/"),
        ("--data_path nowhere --evaluate", r"no folder val/ in it\. It must hold train/ and val/"),
        ("--num_labels 10", r"--num_labels 10: there are 3 class folders"),
        ("--n_last_blocks 7", r"--n_last_blocks 7: this backbone has 6 blocks"),
        ("--avgpool_patchtokens true", r"--avgpool_patchtokens true and --n_last_blocks 4 exclude"),
        ("--image_size 30", r"does not take crops of 30 pixels"),
        ("--patch_size 16", r"--patch_size 16: .* holds a backbone with patch_size 8"),
        ("--lr 0.1 0.10", r"--lr 0.1 0.1: give each rate once"),
        ("--output_dir LICENSE", r"--output_dir LICENSE: .*LICENSE is not a folder"),
        ("--output_dir LICENSE/run", r"LICENSE is not a folder that can be written to"),
        ("--classifier best.pth", r"--classifier best.pth is for --evaluate"),
        ("--evaluate --classifier best.pth", r"--classifier best\.pth: no such file"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_written(
    checkpoint, labelled, tmp_path, flags, message
):
    needed = ("--pretrained_weights", checkpoint, "--data_path", labelled)
    with pytest.raises(UserError, match=message):
        run(*needed, "--output_dir", tmp_path / "run", *flags.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", ["--lr 0", "--lr -1 0.1", "--epochs 0", "--val_freq 0"])
def test_numbers_out_of_range_are_refused_by_the_parser(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        get_args_parser().parse_args(flags.split())
    assert f"{flags.split()[1]} is out of range" in capsys.readouterr().err


def test_a_head_is_refused_with_what_it_was_not_trained_for(
    finished, checkpoint, labelled, tmp_path
):
    _, folder, _ = finished
    best = ("--evaluate", "--classifier", folder / "best_linear.pth")
    needed = ("--pretrained_weights", checkpoint, "--data_path", labelled)
    with pytest.raises(UserError, match=r"--n_last_blocks 1: --classifier .* trained with 4"):
        run(*needed, *best, "--n_last_blocks", 1)
    with pytest.raises(UserError, match=r"--num_labels 7: --classifier .* knows 3 classes"):
        run(*needed, *best, "--num_labels", 7)
    with pytest.raises(
        UserError, match=r"does not hold a linear classifier; its entries are teacher,"
    ):
        run(*needed, "--evaluate", "--classifier", checkpoint)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"does not hold a linear classifier; its entries are none"):
        run(*needed, "--evaluate", "--classifier", tmp_path / "list.pth")
    other = content(checkpoint)
    other["teacher"] = {name: 2 * value for name, value in other["teacher"].items()}
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"backbone\.pth, but the weights of .*different"):
        run("--pretrained_weights", tmp_path / "other.pth", *needed[2:], *best)
    torch.save({**content(checkpoint), "mean": (0.5, 0.4, 0.3)}, tmp_path / "darker.pth")
    with pytest.raises(UserError, match=r"trained with mean .*darker\.pth states \(0\.5, 0\.4, 0"):
        run("--pretrained_weights", tmp_path / "darker.pth", *needed[2:], *best)
    shutil.copytree(labelled / "val" / "coffee", tmp_path / "val" / "zebra")
    with pytest.raises(UserError, match=r"knows 3 classes, .*--data_path 'zebra' is none of them"):
        run(*needed[:2], "--data_path", tmp_path, *best)


def test_the_folder_of_another_run_is_refused(finished, tmp_path):
    flags, folder, _ = finished
    message = r"checkpoint\.pth\.tar: that run has lr \[0\.1, 0\.5, 2\.0\], and this one \[0\.1,"
    with pytest.raises(UserError, match=message):
        run(*flags[:-1], 3, "--output_dir", folder)
    with pytest.raises(UserError, match=r"that run has seed 0, and this one 1\. Give another"):
        run(*flags, "--seed", 1, "--output_dir", folder)
    # named before the heads, which are not as many
    with pytest.raises(
        UserError, match=r"that run has lr \[0\.1, 0\.5, 2\.0\], and this one \[1\.0"
    ):
        run(*flags, "--lr", 1, "--output_dir", folder)
    torch.save([1], tmp_path / "checkpoint.pth.tar")
    with pytest.raises(UserError, match="not a training checkpoint"):
        run(*flags, "--output_dir", tmp_path)
    (tmp_path / "log.txt").write_text('{"train_loss": 1, "train_lr": 1, "train_wd": 1, "epoch": 0}')
    with pytest.raises(UserError, match=r"log\.txt there is of a run of main_dino\.py"):
        run(*flags, "--output_dir", tmp_path)


@pytest.mark.parametrize(
    "log",
    [
        {"train_loss": 1, "train_lr": 1, "epoch": 0, "layer_decay": 0.75},  # of finetune.py
        {"train_loss": 1, "epoch": 0, "test_acc1": 3, "n_parameters": 5},  # of MAE's script
        "my notes\nof two lines\n",
    ],
)
def test_the_log_of_another_program_is_not_replaced(log, finished, tmp_path):
    flags, folder, _ = finished
    own = (folder / "log.txt").read_text()
    text = log if isinstance(log, str) else own + json.dumps(log) + "\n"
    (tmp_path / "log.txt").write_text(text)
    with pytest.raises(UserError, match=r"another program than eval_linear\.py, and would be lost"):
        run(*flags, "--output_dir", tmp_path)
    assert (tmp_path / "log.txt").read_text() == text


def test_an_unfinished_line_of_the_log_does_not_stop_a_run_from_resuming(
    finished, tmp_path, capsys
):
    flags, folder, best = finished
    shutil.copytree(folder, tmp_path / "run")
    with open(tmp_path / "run" / "log.txt", "a") as file:
        file.write('{"train_loss": 2.1, "tr')
    assert run(*flags, "--output_dir", tmp_path / "run") == best
    assert "1 damaged lines of log.txt are dropped" in capsys.readouterr().out


@pytest.mark.parametrize("kept", [("best_linear.pth",), ("log.txt",)])
def test_results_without_their_checkpoint_are_not_replaced(kept, finished, tmp_path):
    flags, folder, _ = finished
    for name in kept:
        shutil.copy(folder / name, tmp_path)
    before = (tmp_path / kept[0]).read_bytes()
    with pytest.raises(UserError, match=rf"holds {kept[0]}, which would be lost, and no check"):
        run(*flags, "--output_dir", tmp_path)
    assert (tmp_path / kept[0]).read_bytes() == before


def test_a_run_that_was_killed_before_its_first_checkpoint_of_an_epoch_resumes(
    finished, checkpoint, labelled, tmp_path
):
    _, folder, best = finished
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import os, eval_linear\n"
        "eval_linear.log_line = lambda *_: os._exit(9)\n"  # after best_linear.pth was written
        "eval_linear.main()\n"
    )
    flags = (*SMALL_RUN, "--pretrained_weights", checkpoint, "--data_path", labelled)
    flags = (*flags, "--lr", 0.1, 0.5, 2, "--output_dir", tmp_path / "run")
    assert run_script(broken, *flags, PYTHONPATH=str(ROOT)).returncode == 9
    assert (tmp_path / "run" / "best_linear.pth").exists()
    assert run(*flags) == best
    assert (tmp_path / "run" / "log.txt").read_text() == (folder / "log.txt").read_text()


def test_a_run_without_its_best_head_does_not_name_it_as_its_result(finished, tmp_path):
    flags, folder, _ = finished
    shutil.copy(folder / "checkpoint.pth.tar", tmp_path)
    with pytest.raises(UserError, match=r"best_linear\.pth is not beside it.* Restore it"):
        run(*flags, "--output_dir", tmp_path)


def test_a_finished_run_is_not_taken_for_one_on_other_images(finished, labelled, tmp_path):
    flags, folder, best = finished
    moved = shutil.copytree(labelled, tmp_path / "moved")
    assert run(*flags, "--data_path", moved, "--output_dir", folder) == best
    (moved / "val" / "chelsea" / "1.png").unlink()
    with pytest.raises(UserError, match=r"that run has val_set 11 images, .* this one 10 images"):
        run(*flags, "--data_path", moved, "--output_dir", folder)


def test_a_mistake_is_one_paragraph_and_exit_code_2(labelled):
    result = run_script("eval_linear.py", "--device", "cpu", "--data_path", labelled / "train")
    assert result.returncode == 2
    assert "no folder train/ in it. It must hold train/ and val/" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.cuda
@pytest.mark.parametrize("amp_dtype", ["float32", "auto"])
def test_a_run_on_a_gpu_learns_what_a_run_on_a_cpu_learns(finished, tmp_path, amp_dtype):
    flags, folder, _ = finished
    flags = (*flags, "--device", "cuda", "--amp_dtype", amp_dtype, "--num_workers", 1)
    best = run(*flags, "--output_dir", tmp_path)
    head = ("--evaluate", "--classifier", tmp_path / "best_linear.pth")
    assert run(*flags, *head) == pytest.approx(best)
    lines = [
        json.loads((path / "log.txt").read_text().splitlines()[-1]) for path in (folder, tmp_path)
    ]
    losses = [line["train_loss_by_lr"]["0.1"] for line in lines]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if amp_dtype == "float32" else 0.05)
