# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole on disk or not at all, official ones read, code in them never run."""

import argparse
import pickle
import resource

import numpy as np
import pytest
import torch
from conftest import ROOT, save_backbone
from helpers import network, training_objects

import utils
from dino.backbones import build_backbone
from dino.errors import UserError, exit_on_user_error
from dino.randomness import random_state
from dino.training.checkpoint import restore_training, training_payload
from dino.weights.files import backbone_payload, read, write_atomically
from dino.weights.pretrained import backbone_weights, describe, open_backbone
from vision_transformer import vit_nano, vit_tiny


def save(objects, path, epoch=3):
    args = dict(arch="vit_nano", patch_size=8, global_crop_size=32)
    write_atomically(training_payload(objects, {"epoch": epoch}, args, [random_state()]), path)


def restore(objects, path):
    checkpoint = read(path, "resume from")
    restore_training(checkpoint, path, objects)
    return checkpoint["epoch"]


def official_checkpoint(objects, path):
    """A file as the official script writes it: wrapped names, parsed flags, numbers of numpy."""
    optimizer = objects["optimizer"].state_dict()
    for group in optimizer["param_groups"]:
        group["lr"] = np.float64(0.02)
    student = {f"module.{name}": value for name, value in objects["student"].state_dict().items()}
    torch.save(
        {
            "student": student,
            "teacher": objects["teacher"].state_dict(),
            "optimizer": optimizer,
            "epoch": 7,
            "args": argparse.Namespace(arch="deit_tiny", patch_size=8, lr=0.0005),
            "dino_loss": objects["dino_loss"].state_dict(),
            "fp16_scaler": {"scale": 65536.0, "growth_tracker": 3},
        },
        path,
    )


def states(objects):
    tensors = {}
    for name in ("student", "teacher", "dino_loss"):
        for key, value in objects[name].state_dict().items():
            tensors[f"{name}.{key}"] = value
    for number, state in objects["optimizer"].state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"optimizer.{number}.{key}"] = value
    return tensors


def test_what_is_saved_is_restored_bit_for_bit_with_the_random_state(tmp_path):
    saved = training_objects(seed=0)
    save(saved, tmp_path / "checkpoint.pth")
    drawn = torch.rand(3)
    restored = training_objects(seed=1)
    assert restore(restored, tmp_path / "checkpoint.pth") == 3
    assert torch.equal(torch.rand(3), drawn)
    expected, found = states(saved), states(restored)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_entries_and_keys_are_the_official_ones_and_plain_values(tmp_path):
    for use_bn, teacher_prefix in ((False, ""), (True, "module.")):
        save(training_objects(use_bn=use_bn), tmp_path / "checkpoint.pth")
        checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
        official = {"student", "teacher", "optimizer", "epoch", "args", "dino_loss"}
        assert official <= set(checkpoint)
        assert checkpoint["args"]["arch"] == "vit_nano"
        assert "module.head.last_layer.weight_v" in checkpoint["student"]
        assert f"{teacher_prefix}backbone.blocks.0.attn.qkv.weight" in checkpoint["teacher"]
        assert list(checkpoint["dino_loss"]) == ["center"]


def test_an_official_training_checkpoint_is_resumed(tmp_path):
    saved, restored = training_objects(seed=0), training_objects(seed=1)
    official_checkpoint(saved, tmp_path / "checkpoint.pth")
    assert restore(restored, tmp_path / "checkpoint.pth") == 7
    assert restored["optimizer"].param_groups[0]["lr"] == 0.02
    expected, found = states(saved), states(restored)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    run_variables = {"epoch": 0}
    utils.restart_from_checkpoint(
        tmp_path / "checkpoint.pth", run_variables, student=restored["student"], fp16_scaler=None
    )
    assert run_variables == {"epoch": 7}


def weights_flags(path, key="teacher", arch="vit_small", patch_size=16):
    return argparse.Namespace(
        pretrained_weights=str(path), checkpoint_key=key, arch=arch, patch_size=patch_size
    )


@pytest.mark.parametrize("key", ["teacher", "student"])
def test_a_backbone_is_found_in_every_layout(tmp_path, key):
    objects = training_objects()
    expected = objects[key].backbone.state_dict()
    save(objects, tmp_path / "ours.pth")
    torch.save(expected, tmp_path / "bare.pth")
    for name in ("ours.pth", "bare.pth"):
        flags = weights_flags(tmp_path / name, key, "vit_nano", 8)
        pretrained = open_backbone(flags)
        assert (pretrained.arch, pretrained.patch_size) == ("vit_nano", 8)
        found = pretrained.backbone.state_dict()
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
        assert not pretrained.backbone.training


@pytest.mark.parametrize(("build", "patch_size"), [(vit_nano, 8), (vit_tiny, 16)])
def test_the_shapes_of_a_bare_vit_say_what_it_is(tmp_path, build, patch_size):
    torch.save(build(patch_size).state_dict(), tmp_path / "bare.pth")
    pretrained = open_backbone(weights_flags(tmp_path / "bare.pth", patch_size=4))
    assert (pretrained.arch, pretrained.patch_size) == (build.__name__, patch_size)


@pytest.mark.parametrize("content", [torch.ones(3), [1, 2], {"teacher": 3}, {}, {"teacher": {}}])
def test_a_file_with_something_else_in_it_is_an_error(tmp_path, content):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"--pretrained_weights .*odd\.pth"):
        open_backbone(weights_flags(tmp_path / "odd.pth"))


@pytest.mark.parametrize("prefixes", [("", "backbone."), ("module.", ""), ("module.", "backbone.")])
def test_two_networks_that_one_entry_holds_are_refused_by_name(tmp_path, prefixes):
    """Under prefixes that are taken off: which of them was loaded depended on their order."""
    entry = {}
    for prefix in prefixes:
        weights = vit_nano(8, img_size=32).state_dict()
        entry |= {prefix + name: value for name, value in weights.items()}
    entry |= {f"{prefix}head.weight": torch.ones(2) for prefix in prefixes}  # of no network
    torch.save({"teacher": entry}, tmp_path / "two.pth")
    said = rf"two\.pth holds two networks: {prefixes[0]}cls_token and {prefixes[1]}cls_token"
    with pytest.raises(UserError, match=said):
        open_backbone(weights_flags(tmp_path / "two.pth"))


@pytest.mark.parametrize(
    ("stated", "said"),
    [({"arch": "vit_nanoo"}, "vit_nanoo.* vit_nano"), ({"stem": "small"}, "only ResNets")],
)
def test_an_unknown_network_is_told_with_the_file_that_names_it(tmp_path, stated, said):
    weights = vit_nano(8, img_size=32).state_dict()
    torch.save({"teacher": weights, **stated}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=rf"a\.pth names a network .*{said}"):
        open_backbone(weights_flags(tmp_path / "a.pth"))


def test_an_official_checkpoint_says_its_architecture_by_its_old_name(tmp_path):
    official_checkpoint(training_objects(), tmp_path / "checkpoint.pth")
    described = describe(read(tmp_path / "checkpoint.pth"))
    assert described == {"arch": "vit_tiny", "patch_size": 8}


def test_backbone_file_alone_says_how_to_build_and_feed_it(tmp_path):
    model = network()
    save_backbone(
        tmp_path / "backbone.pth",
        model,
        arch="vit_nano",
        patch_size=8,
        image_size=32,
        mean=(0.1, 0.2, 0.3),
        std=(1.0, 1.0, 1.0),
    )
    pretrained = open_backbone(weights_flags(tmp_path / "backbone.pth"))
    assert pretrained.image_size == 32
    assert tuple(pretrained.mean) == (0.1, 0.2, 0.3)
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(pretrained.backbone(image), model.eval().backbone(image))


def test_official_xcit_weights_load_into_timms_network():
    """timm splits the class attention's qkv and renames the positions; the function is the same."""
    backbone, _ = build_backbone("xcit_nano_12_p16")
    official = {}
    for name, value in backbone.state_dict().items():
        name = name.replace("pos_embed.", "pos_embeder.")
        if ".attn.q." in name and "cls_attn" in name:
            parts = [name.replace(".q.", f".{letter}.") for letter in "qkv"]
            own = backbone.state_dict()
            official[name.replace(".q.", ".qkv.")] = torch.cat([own[part] for part in parts])
        elif not ("cls_attn" in name and (".attn.k." in name or ".attn.v." in name)):
            official[name] = value
    fresh, _ = build_backbone("xcit_nano_12_p16")
    from dino.weights.pretrained import fit_weights

    fit_weights(fresh, official, "xcit_nano_12_p16", "a test")
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(fresh.eval()(image), backbone.eval()(image))


class Unpicklable:
    def __reduce__(self):
        raise RuntimeError("in the middle of writing")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "checkpoint.pth"
    write_atomically({"value": torch.ones(3)}, path)
    with pytest.raises(RuntimeError, match="in the middle"):
        write_atomically({"large": torch.ones(10000), "bad": Unpicklable()}, path)
    assert torch.equal(read(path)["value"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    proof = tmp_path / "proof"
    for name, write in (("zip.pth", torch.save), ("pickle.pth", plain_pickle)):
        write({"teacher": Malicious(proof)}, tmp_path / name)
        with pytest.raises(UserError, match=rf"{name}: contains pickled code \(\S+open\)"):
            read(tmp_path / name)
        assert not proof.exists()


def plain_pickle(payload, path):
    with open(path, "wb") as file:
        pickle.dump(payload, file, protocol=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", "damaged"), (b"hello, world\n" * 9, "not a checkpoint")],
)
def test_a_file_that_is_no_checkpoint_is_named_with_its_flag(tmp_path, content, message):
    path = tmp_path / "weights.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read(path)
    assert f"--pretrained_weights {path}" in str(error.value)


def test_a_truncated_checkpoint_is_damaged(tmp_path):
    torch.save({"teacher": torch.ones(1000)}, tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"half\.pth: damaged"):
        read(tmp_path / "half.pth")


def test_a_misfit_names_the_first_keys_and_shapes(tmp_path):
    save(training_objects(), tmp_path / "checkpoint.pth")
    larger = training_objects() | {"student": network(out_dim=32)}
    message = r"student does not fit .*last_layer\.weight_g is \(16, 1\), expected \(32, 1\)"
    with pytest.raises(UserError, match=message):
        restore(larger, tmp_path / "checkpoint.pth")
    weights = vit_tiny(8).state_dict()
    for name in list(weights)[-6:]:
        weights[f"other.{name}"] = weights.pop(name)
    torch.save(weights, tmp_path / "tiny.pth")
    with pytest.raises(UserError, match=r"--arch vit_tiny.*fc1\.bias is missing.* and 9 more"):
        open_backbone(weights_flags(tmp_path / "tiny.pth"))


def test_a_weight_that_is_not_finite_is_an_error(tmp_path):
    broken = training_objects()
    with torch.no_grad():
        broken["teacher"].backbone.cls_token[0, 0, 3] = torch.nan
    save(broken, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=r"cls_token has values that are not finite"):
        open_backbone(weights_flags(tmp_path / "checkpoint.pth"))


def test_a_wrong_key_names_those_that_there_are(tmp_path):
    save(training_objects(), tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=r"no entry 'ema'; it has student, teacher"):
        backbone_weights(read(tmp_path / "checkpoint.pth"), "ema", "checkpoint.pth")


def test_an_entry_without_weights_is_told_by_what_the_script_can_do():
    """main_dino.py has no --checkpoint_key."""
    content = {"model": {"cls_token": torch.zeros(1)}, "epoch": 3}
    with pytest.raises(UserError, match=r"holds 3 as entry 'epoch'; .* with --checkpoint_key"):
        backbone_weights(content, "epoch", "mae.pth")
    with pytest.raises(UserError, match=r"no entry 'teacher'; it has model.* file of their own"):
        backbone_weights(content, "teacher", "mae.pth", flag="--init_from")


def test_a_mistyped_path_never_becomes_other_weights(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        utils.load_pretrained_weights(
            vit_nano(8), str(tmp_path / "no.pth"), "teacher", "vit_nano", 8
        )


def test_no_published_weights_for_a_network_is_an_error():
    with pytest.raises(UserError, match="no published weights for --arch vit_tiny --patch_size 4"):
        open_backbone(weights_flags("", arch="vit_tiny", patch_size=4))


def test_a_network_that_a_file_names_is_compared_before_it_takes_memory(tmp_path):
    """This one has 7 billion weights."""
    backbone = {"arch": "timm:vit_7b_patch16_dinov3", "teacher": {"norm.weight": torch.zeros(1)}}
    torch.save(backbone, tmp_path / "small.pth")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"vit_7b_patch16_dinov3, does not fit this network: cls_t"):
        open_backbone(weights_flags(tmp_path / "small.pth"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + 2**20  # KiB


def test_an_image_size_of_too_many_patches_is_refused_with_its_file(tmp_path):
    described = dict(
        arch="vit_nano", patch_size=8, image_size=8192, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    torch.save(backbone_payload(network(), **described), tmp_path / "large.pth")
    with pytest.raises(UserError, match=r"large\.pth: image_size 8192: .* 1048576 patches, more"):
        open_backbone(weights_flags(tmp_path / "large.pth"))
    pretrained = open_backbone(weights_flags(tmp_path / "large.pth"), image_size=2048)
    assert pretrained.image_size == 2048


@pytest.mark.parametrize("wrong", ["arch", "name"])
def test_an_error_about_a_value_of_any_length_is_short_and_keeps_its_end(tmp_path, capsys, wrong):
    arch = "y" * 10**6 if wrong == "arch" else "vit_nano"
    weights = {"x" * 10**6: torch.zeros(1)} if wrong == "name" else {}
    torch.save({"arch": arch, "patch_size": 8, "teacher": weights}, tmp_path / "long.pth")
    with pytest.raises(SystemExit, match="2"), exit_on_user_error("a.py"):
        open_backbone(weights_flags(tmp_path / "long.pth"))
    said = capsys.readouterr().err
    assert len(said) < 2100
    assert said.count("\n") == 1
    assert said.startswith("a.py: error: --")
    assert said.endswith("timm:NAME.\n" if wrong == "arch" else "more.\n")


def test_nothing_in_the_project_unpickles_code():
    for path in ROOT.glob("*.py"):
        assert "weights_only=False" not in path.read_text(), path
