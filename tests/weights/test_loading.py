# SPDX-License-Identifier: Apache-2.0
"""Values of a checkpoint are loaded where they can be this run's own, and refused by name."""

import copy

import pytest
import torch
from conftest import SMALL_RUN, run_script
from helpers import network, training_objects

from dino.errors import UserError
from dino.evaluation.linear_files import check_head_description, load_head
from dino.evaluation.linear_run import (
    HeadsProgress,
    build_heads,
    load_training,
    resume_training,
    save_training,
)
from dino.optim import build_optimizer, get_params_groups
from dino.printable import brief
from dino.randomness import random_state
from dino.training.checkpoint import (
    Progress,
    check_same_run,
    restore_progress,
    restore_training,
    training_payload,
)
from dino.weights.files import read, write_atomically
from dino.weights.loading import load_exactly, restore
from dino.weights.pretrained import check_description
from dino.weights.starting import initialise_from


@pytest.fixture
def payload():
    progress = vars(
        Progress(epoch=1, iteration=8, iterations_per_epoch=6, global_batch=4, images=8)
    )
    return copy.deepcopy(training_payload(training_objects(), progress, {}, [random_state()]))


def refused(payload, match):
    with pytest.raises(UserError, match=match):
        restore_training(payload, "run/checkpoint.pth", training_objects(seed=1))


# ---- the optimizer ----


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("maximize", True), ("betas", (0.9, float("nan"))), ("betas", [0.9, 0.9]), ("eps", 1.0)],
        *[("amsgrad", True), ("differentiable", True), ("betas", "x"), ("eps", torch.ones(2))],
    ],
)
def test_a_group_value_that_is_not_the_runs_own_is_refused(payload, name, value):
    payload["optimizer"]["param_groups"][0][name] = value
    refused(payload, rf"optimizer: {name} is .*, and .* in this run")


@pytest.mark.parametrize(
    "value", [-1.0, float("nan"), "x", None, [1.0], 10**400, 10**5000], ids=brief
)
def test_a_learning_rate_that_cannot_be_one_is_refused(payload, value):
    payload["optimizer"]["param_groups"][1]["lr"] = value
    refused(payload, "optimizer: lr is .*, not a number of at least 0")


WRONG_MOMENTS = {
    "does not fit its parameter": ("exp_avg", torch.ones(())),
    "has negative values": ("exp_avg_sq", "negative"),
    "has values that are not finite": ("exp_avg", "infinite in float32"),
    "the moments are not those of AdamW": ("max_exp_avg_sq", "added"),
    "step has values that are not finite numbers": ("step", torch.tensor(1 + 2j)),
    "step has negative values": ("step", torch.tensor(-1.0)),
}


@pytest.mark.parametrize("said", WRONG_MOMENTS)
def test_moments_that_this_optimizer_cannot_have_are_refused(payload, said):
    name, value = WRONG_MOMENTS[said]
    moments = payload["optimizer"]["state"][0]
    if value == "negative":
        moments[name] -= 1
    elif value == "infinite in float32":
        moments[name] = torch.full_like(moments[name], 1e300, dtype=torch.float64)
    elif value == "added":
        moments[name] = moments["exp_avg"]
    else:
        moments[name] = value
    refused(payload, said)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_each_optimizers_own_state_is_restored_before_and_after_a_step(name):
    torch.manual_seed(0)
    model = network()
    optimizer = build_optimizer(name, get_params_groups(model))
    for _ in range(2):
        found = build_optimizer(name, get_params_groups(network()))
        state = {"optimizer": copy.deepcopy(optimizer.state_dict()), "epoch": 0}
        restore(state, "here", optimizer=found)
        for key, moments in optimizer.state_dict()["state"].items():
            for moment, value in moments.items():
                assert torch.equal(found.state_dict()["state"][key][moment], value)
        model([torch.randn(2, 3, 32, 32)]).sum().backward()
        optimizer.step()


def to_half(payload):
    for moments in payload["optimizer"]["state"].values():
        moments["exp_avg"] = moments["exp_avg"].half()


def name_twice(payload):
    payload["teacher"] |= {f"module.{name}": v * 0 for name, v in payload["teacher"].items()}


def rename_parameters(payload):
    group = payload["optimizer"]["param_groups"][0]
    group["params"] = [number + 100 for number in group["params"]]


CHANGED = {
    "has moments of torch.float16": to_half,
    "has moments of .* parameters that its groups do not list": rename_parameters,
    "names differ by 'module.' alone": name_twice,
    "holds torch.float16": lambda p: p["student"].update(
        {name: value.half() for name, value in p["student"].items()}
    ),
    "rng is a Tensor": lambda p: p.update(rng=torch.ones(3)),
    "optimizer decays biases": lambda p: p["optimizer"]["param_groups"][1].update(weight_decay=0.5),
}


@pytest.mark.parametrize("said", CHANGED)
def test_a_checkpoint_from_which_a_run_would_end_elsewhere_is_refused(payload, said):
    CHANGED[said](payload)
    refused(payload, said)


ABSENT = {
    "no moments of 1 of ": lambda p: p["optimizer"]["state"].pop(3),
    "random states of 0 processes": lambda p: p.pop("rng"),
    "random states of 2 processes": lambda p: p["rng"].append(p["rng"][0]),
}


@pytest.mark.parametrize("said", ABSENT)
def test_what_a_resumed_run_begins_anew_is_told(payload, said, capsys):
    restore_training(payload, "run/checkpoint.pth", training_objects(seed=1))
    assert capsys.readouterr().out == ""
    ABSENT[said](payload)
    restore_training(payload, "run/checkpoint.pth", training_objects(seed=1))
    assert said in capsys.readouterr().out


def test_an_epoch_whose_sums_are_lost_is_told(payload, capsys):
    own = Progress(iterations_per_epoch=6, global_batch=4)
    restore_progress(own, payload, "run/checkpoint.pth", 24)
    assert "has no 'sums'" in capsys.readouterr().out


# ---- weights ----


WRONG_WEIGHTS = {
    "holds torch.complex64": torch.ones(1, 1, 96, dtype=torch.complex64),
    "holds torch.int64": torch.ones(1, 1, 96, dtype=torch.int64),
    "holds torch.float8_e4m3fn": torch.ones(1, 1, 96).to(torch.float8_e4m3fn),
    "not finite in torch.float32": torch.full((1, 1, 96), 1e300, dtype=torch.float64),
    "is a list, not a tensor": [1.0],
    r"is \(1, 1, 97\), expected": torch.ones(1, 1, 97),
}


@pytest.mark.parametrize("said", WRONG_WEIGHTS)
def test_weights_that_cannot_take_a_parameters_place_are_refused(said):
    backbone = network().backbone
    weights = {**backbone.state_dict(), "cls_token": WRONG_WEIGHTS[said]}
    with pytest.raises(UserError, match=f"cls_token {said}|cls_token .*{said}"):
        load_exactly(backbone, weights, "here")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_loaded(dtype):
    backbone = network().backbone
    weights = {name: torch.full_like(v, 0.5).to(dtype) for name, v in backbone.state_dict().items()}
    load_exactly(backbone, weights, "here")
    assert all((value == 0.5).all() for value in backbone.state_dict().values())


@pytest.mark.parametrize(
    "positions",
    [torch.ones(0), torch.ones(1, 4, 96), torch.ones(3), torch.ones(1, 1, 96), "text"],
)
def test_position_embeddings_that_are_not_a_grid_are_refused(positions):
    weights = {**network().backbone.state_dict(), "pos_embed": positions}
    objects = training_objects()
    networks = objects["student"], objects["teacher"], objects["dino_loss"]
    with pytest.raises(UserError, match=r"does not fit this network: .*pos_embed"):
        initialise_from({"teacher": weights}, "other.pth", *networks)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn, torch.complex64])
def test_a_first_layer_of_another_type_is_refused_before_it_is_fitted_to_channels(dtype):
    weights = {**network().backbone.state_dict()}
    weights["patch_embed.proj.weight"] = torch.ones(96, 4, 8, 8).to(dtype)
    objects = training_objects()
    networks = objects["student"], objects["teacher"], objects["dino_loss"]
    with pytest.raises(UserError, match=rf"patch_embed\.proj\.weight holds {dtype}, expected"):
        initialise_from({"teacher": weights}, "other.pth", *networks)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("std", (0.5, 0.5, 1e-30)), ("std", (0.5, 0.5, 10**5000)), ("mean", (0, 0, -(10**400)))],
        *[("mean", (True, 0, 0)), ("patch_size", 10**30), ("image_size", True), ("arch", 5)],
        *[("mean", (123.7, 116.3, 103.5)), ("std", (58.4, 57.1, 57.4))],  # for levels of 0 to 255
    ],
    ids=brief,
)
def test_a_description_that_cannot_be_is_refused(name, value):
    with pytest.raises(UserError, match=f"has an invalid {name}: "):
        check_description({name: value}, "here")


# ---- how far a run is ----


@pytest.mark.parametrize(
    "wrong",
    [
        *[{"epoch": 10**18}, {"epoch": 10**6}, {"epoch": True}, {"iteration": 5}, {"sums": 3}],
        *[{"iteration": 10**15}, {"sums": {"loss": [1.0, 0]}}, {"iterations_per_epoch": 0}],
        *[{"best_knn": float("nan")}, {"images": -4}, {"unlogged": {1: 2}}],
        *[{"unlogged": {"loss": 1.0}}, {"images": 10**9, "iteration": 8, "epoch": 1}],
        # of a run that took 2 steps of 4 images: resumed, it would step beyond its schedules
        *[{"images": 0}, {"images": 17}, {"iteration": 7}, {"iteration": 12}],
        *[{"sums": {"loss": 1.0}}, {"sums": {"loss": [1.0, 0.5]}}, {"unlogged": {"epoch": 1}}],
        {"unlogged": {"epoch": 0, "train_loss": [1, 2]}},
    ],
)
def test_progress_that_cannot_be_is_refused(payload, wrong):
    with pytest.raises(UserError, match=r"invalid value|claims|is not of epoch"):
        own = Progress(iterations_per_epoch=6, global_batch=4)
        restore_progress(own, {**payload, **wrong}, "run/checkpoint.pth", 24)


def test_a_run_of_fewer_epochs_than_are_done_is_refused_and_not_a_success(class_folders, tmp_path):
    command = ("main_dino.py", *SMALL_RUN, "--data_path", class_folders / "train")
    command += ("--output_dir", tmp_path, "--epochs")
    assert run_script(*command, 2).returncode == 0
    fewer = run_script(*command, 1)
    assert fewer.returncode == 2
    assert "--epochs 1: " in fewer.stderr
    assert "has done 2. Give at least as many" in fewer.stderr


@pytest.mark.parametrize(
    ("resume", "advice"),
    [("auto", "or another --output_dir"), ("runs/a/checkpoint.pth", "or no --resume")],
)
def test_a_run_that_cannot_resume_is_told_what_begins_another(resume, advice):
    """With --resume FILE another --output_dir resumes the same file."""
    with pytest.raises(UserError, match=f"Give that one, {advice}"):
        check_same_run("checkpoint.pth", {"out_dim": 8}, {"out_dim": 9, "resume": resume})


@pytest.mark.parametrize(
    "value",
    [[torch.ones(2), 1.0], {"a": 1}, "x" * 10**6, 10**5000, [[[]]], torch.ones(5)],
    ids=brief,
)
def test_any_value_of_a_flag_in_a_checkpoint_is_compared_and_shown_in_a_line(capsys, value):
    check_same_run("a.pth", {"global_crops_scale": value}, {"global_crops_scale": [0.4, 1.0]})
    said = capsys.readouterr().out
    assert said.startswith("--global_crops_scale was ")
    assert len(said) < 250


def test_a_value_of_any_size_is_shown_in_60_characters():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    for value in (10**5000, nested, "x" * 10**6, list(range(10**5)), torch.ones(100, 100), None):
        assert 0 < len(brief(value)) <= 60
    assert brief("vit_small") == "vit_small"
    assert brief(0.04) == "0.04"


# ---- linear heads ----


@pytest.mark.parametrize(
    "state_dict",
    [5, [1], {5: 1}, {"linear.weight": 3}, {"linear.weight": torch.ones(3)}, {}, None],
)
def test_a_file_without_a_linear_head_is_told(state_dict):
    with pytest.raises(UserError, match="does not hold a linear classifier"):
        load_head({"state_dict": state_dict}, "here")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("classes", 3), ("classes", [1, 2]), ("arch", -1), ("n_last_blocks", "4")],
        *[("image_size", 10**30), ("avgpool_patchtokens", 1), ("checkpoint_key", None)],
    ],
)
def test_what_a_heads_file_says_of_it_is_checked(name, value):
    with pytest.raises(UserError, match=f"here has an invalid {name}: "):
        check_head_description({name: value}, "here")


def heads(path):
    """The arguments of save_training and load_training for one head."""
    progress = HeadsProgress.of(1)
    progress.add(0, [50.0])
    progress.epoch = 1
    state = build_heads(4, 3, [0.1], 5, torch.device("cpu"))
    return path / "checkpoint.pth.tar", state, progress, {"classes": ["a", "b"], "lr": [0.1]}


@pytest.mark.parametrize(
    "wrong",
    [
        *[{"epoch": 10**18}, {"epoch": -1}, {"epoch": "x"}, {"best_head": 1}, {"best_acc": 101}],
        *[{"head_bests": [1]}, {"head_bests": []}, {"classes": torch.ones(2)}, {"lr": [1, 2]}],
    ],
)
def test_the_progress_of_heads_and_their_flags_are_checked(tmp_path, wrong):
    path, state, progress, description = heads(tmp_path)
    save_training(path, state, progress, description)
    load_training(read(path), "here", state, progress, description)
    assert (progress.epoch, progress.head_bests) == (1, [(50.0, 0)])
    whole = torch.load(path, weights_only=True)
    write_atomically({**whole, **wrong}, path)
    with pytest.raises(UserError, match=r"invalid value|that run has|no entry"):
        load_training(read(path), "here", state, progress, description)


@pytest.mark.parametrize(
    ("entry", "values"),
    [
        *[("scheduler", {"T_max": 7}), ("scheduler", {"eta_min": 0.5}), ("scheduler", None)],
        *[("scheduler", {"last_epoch": 2}), ("scheduler", {"base_lrs": [0.2]}), ("epoch", 3)],
        *[("group", {"lr": 0.5}), ("group", {"weight_decay": 0.5}), ("group", {"initial_lr": 1.0})],
        ("momentum", None),
    ],
)
def test_heads_resume_from_an_optimizer_and_a_scheduler_of_their_run_alone(tmp_path, entry, values):
    path, state, progress, description = heads(tmp_path)
    state.heads[0](torch.ones(2, 4)).sum().backward()
    state.optimizer.step()
    state.scheduler.step()
    save_training(path, state, progress, description)
    (tmp_path / "best_linear.pth").touch()
    whole = torch.load(path, weights_only=True)
    if entry == "group":
        whole["optimizer"]["param_groups"][0] |= values
    elif entry == "momentum":
        whole["optimizer"]["state"] = {}
    elif entry == "scheduler":
        whole["scheduler"] = {**whole["scheduler"], **values} if values else {}
    else:
        whole[entry] = values
    write_atomically(whole, path)
    state = build_heads(4, 3, [0.1], 5, torch.device("cpu"))
    with pytest.raises(UserError, match=f"--output_dir {path}: "):
        resume_training(path, state, HeadsProgress.of(1), description)


def test_a_run_of_a_version_that_did_not_state_its_images_is_resumed(tmp_path):
    path, state, progress, description = heads(tmp_path)
    save_training(path, state, progress, description)
    sets = {"train_set": "3 images, names ab", "val_set": "2 images, names cd"}
    load_training(read(path), "here", state, progress, description | sets)
    save_training(path, state, progress, description | sets)
    with pytest.raises(UserError, match="that run has val_set"):
        load_training(read(path), "here", state, progress, description | sets | {"val_set": "x"})
