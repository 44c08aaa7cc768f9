# SPDX-License-Identifier: Apache-2.0
"""--preset auto: what it decides for which data, that given flags stand, that a run keeps all."""

import json
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import photograph
from PIL import Image

import main_dino
from dino.data.augmentations import MultiCrop, View
from dino.data.survey import Survey, share_of_places, survey
from dino.errors import UserError
from dino.randomness import fix_random_seeds
from dino.training.auto import fit_data, fit_hours, fit_length, soften_views
from dino.training.budget import seconds_per_step
from dino.training.correlation import view_correlation
from dino.training.flags import complete, parse_args
from dino.training.settings import DECIDABLE, REASONS, Settings
from dino.weights.pretrained import check_description


def decide(images, side, *, given="", device="cpu", epochs=100, least=None, channels=3, **measured):
    measured = dict(grey=0.1, mean=(0.5,) * channels, std=(0.2,) * channels) | measured
    seen = Survey(images, 256, (least or side, side, side), **measured)
    args = parse_args(["--preset", "auto", "--epochs", str(epochs), *given.split()])
    settings = Settings(vars(args), args.given)
    fit_data(settings, seen, device, 1)
    fit_length(settings, images // settings["batch_size_per_gpu"])
    return settings


def train(*flags, images=None, augmentation=None):
    usual = ("--preset", "auto", "--num_workers", 0, "--device", "cpu", "--report", "false")
    args = parse_args([str(flag) for flag in (*usual, *flags)])
    main_dino.train_dino(args, images, augmentation)


def pictures(*sizes, grey=False):
    image = photograph()
    return [image.resize(size).convert("L" if grey else "RGB") for size in sizes]


# ---- a look at the data ----


def test_the_survey_measures_what_numpy_measures_over_all_pixels():
    images = [photograph(name).resize((40, 30)) for name in ("astronaut.png", "coffee.png")]
    seen = survey([(image, 0) for image in images])  # as a torchvision dataset gives them
    pixels = np.concatenate([np.asarray(image).reshape(-1, 3) for image in images]) / 255
    np.testing.assert_allclose(seen.mean, pixels.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(seen.std, pixels.std(axis=0), atol=1e-4)
    assert (seen.images, seen.sides, seen.is_grey) == (2, (30, 30, 30), False)


def test_images_of_one_colour_have_a_deviation_that_can_be_divided_by():
    """Their mean square less their squared mean is below 0 by rounding."""
    images = [Image.new("RGB", (40, 40), (7, 7, 7))] * 40
    seen = survey(images)
    assert seen.std == (0.001,) * 3
    check_description({"mean": seen.mean, "std": seen.std}, "backbone.pth of a run on them")


def test_grey_images_are_seen_as_grey_however_they_are_stored():
    images = pictures((20, 20), (24, 20), grey=True)
    assert survey(images).is_grey
    assert survey([image.convert("RGB") for image in images]).is_grey
    assert not survey([*images, *pictures((20, 20), (20, 20))]).is_grey


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3])
def test_the_layout_is_the_share_of_the_variance_that_belongs_to_the_place(share):
    """Of images that are the sum of one pattern and of noise that knows no place."""
    rng = np.random.default_rng(0)
    pattern = np.resize([1.0, -1.0, -1.0, 1.0, 1.0, -1.0], 64)
    noise = rng.standard_normal((400, 64))
    found = share_of_places(share**0.5 * pattern + (1 - share) ** 0.5 * noise)
    assert found == pytest.approx(share, abs=0.004)


def test_tiles_cut_at_random_have_no_layout_and_portraits_of_one_thing_have():
    rng = np.random.default_rng(0)
    image = photograph("astronaut.png")

    def cut(left, top, side):
        return image.crop((left, top, left + side, top + side)).resize((32, 32))

    tiles = [cut(*rng.integers(0, 480, 2), 32) for _ in range(256)]
    portraits = [cut(*rng.integers(80, 120, 2), 250) for _ in range(256)]
    assert not survey(tiles).has_layout
    assert survey(portraits).has_layout
    assert survey(portraits[:1]).layout == 0


def test_auto_warns_of_images_that_use_few_of_the_levels(tmp_path, capsys):
    dark = [image.point(lambda level: level // 8) for image in pictures(*[(24, 24)] * 8)]
    assert survey(dark).brightest == max(most for image in dark for _, most in image.getextrema())
    flags = ("--epochs", 1, "--output_dir", tmp_path / "run")
    train(*flags, images=dark)
    assert "Warning: no value of the images is above" in capsys.readouterr().out
    train(*flags[:3], tmp_path / "sound", *flags[4:], images=pictures(*[(24, 24)] * 8))
    assert "Warning: no value" not in capsys.readouterr().out


def test_the_sample_is_drawn_by_the_seed():
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(600)]
    assert survey(images, seed=1) == survey(images, seed=1)
    assert survey(images, seed=1).mean != survey(images, seed=2).mean


# ---- what is decided ----


def test_the_blur_is_in_proportion_to_the_crop_and_no_local_crop_is_enlarged_by_more_than_a_third():
    for side in (16, 24, 32, 64, 96):
        settings = decide(3000, side)
        size, local = settings["global_crop_size"], settings["local_crop_size"]
        assert settings["blur_radius"][1] == pytest.approx(2 * size / 224, abs=1e-3)
        share = settings["local_crops_scale"][0]
        assert share == 0.5 or share**0.5 * side >= 0.74 * local
        assert settings["min_crop_pixels"] <= share**0.5 * side + 1


def test_images_larger_than_the_crops_that_keep_their_layout_are_shrunk_to_these():
    for side, shrunk in ((24, 0), (32, 0), (128, 32)):
        settings = decide(3000, side, layout=0.03)
        assert settings["shrink_images"] == shrunk
    assert settings["min_crop_pixels"] == decide(3000, 32, layout=0.03)["min_crop_pixels"]
    assert decide(3000, 128)["shrink_images"] == 0, "not measured where position says nothing"
    assert decide(3000, 128, layout=0.03, device="cuda")["shrink_images"] == 0


def test_grey_data_gets_no_operation_on_colours():
    settings = decide(3000, 32, grey=1.0)
    assert settings["jitter"][2:] == (0.0, 0.0)
    assert settings["grayscale_p"] == 0.0
    assert "jitter" not in decide(3000, 32, grey=0.5).reasons


def test_where_the_place_matters_a_cpu_keeps_quarters_apart_and_crops_large():
    usual, kept = decide(3000, 32), decide(3000, 32, layout=0.04)
    assert (usual["arch"], kept["arch"]) == ("resnet_nano", "resnet_nano_2x2")
    assert (usual["global_crops_scale"][0], kept["global_crops_scale"][0]) == (0.4, 0.6)
    assert kept["local_crops_scale"] == (0.25, 0.6)
    assert kept["jitter"] == usual["jitter"]
    assert kept["grayscale_p"] > usual["grayscale_p"]
    assert decide(3000, 128)["global_crop_size"] == 96
    assert decide(3000, 128, layout=0.04)["global_crop_size"] == 32
    grey = decide(3000, 32, layout=0.04, grey=1.0)
    assert (grey["jitter"], grey["grayscale_p"]) == ((0.4, 0.4, 0.0, 0.0), 0)
    assert decide(3000, 32, grey=1.0)["jitter"][0] == 0.2
    assert decide(3000, 32, layout=0.04, channels=5)["grayscale_p"] == kept["grayscale_p"]
    on_gpu = decide(3000, 32, layout=0.04, device="cuda")
    assert on_gpu.flags == decide(3000, 32, device="cuda").flags


def test_what_was_given_stands_and_what_follows_from_it_follows():
    settings = decide(3000, 32, given="--arch vit_nano --out_dim 4096")
    assert settings["arch"] == "vit_nano"
    assert settings["patch_size"] == 4
    assert settings["out_dim"] == 4096
    assert settings["lr"] == 0.004
    assert not {"arch", "out_dim", "stem"} & set(settings.reasons)


@pytest.mark.parametrize("given", ["", "--arch vit_small"])
def test_the_learning_rate_of_a_step_is_about_as_high_in_large_batches_as_in_small(given):
    """AdamW's steps are no longer for a longer gradient."""
    rates = []
    for device in ("cpu", "cuda"):
        settings = decide(3000, 32, device=device, given=given)
        rates.append(settings["lr"] * settings["batch_size_per_gpu"] / 256)
    assert rates[1] == pytest.approx(rates[0], rel=0.5)


def test_a_short_run_has_a_fast_teacher_and_a_long_one_the_official():
    short, long = decide(3000, 32, epochs=10), decide(1_300_000, 256, device="cuda")
    assert short["momentum_teacher"] < 0.97
    assert short["momentum_teacher_end"] < 1
    assert long["momentum_teacher"] == 0.996
    assert long["momentum_teacher_end"] == 1.0


def test_the_reason_for_the_fastest_teacher_is_not_a_share_above_the_whole_run():
    tiny = decide(960, 32, epochs=1).reasons["momentum_teacher"]
    assert tiny == "an average over 25 steps, the fewest that it takes, of 15"
    assert decide(3200, 32, epochs=50).reasons["momentum_teacher"].endswith("2.0% of 2500")


def test_data_like_imagenet_on_a_gpu_get_the_official_networks_and_crops():
    settings = decide(1_281_167, 375, device="cuda")
    official = dict(
        arch="vit_small",
        patch_size=16,
        out_dim=65536,
        use_bn_in_head=False,
        global_crop_size=224,
        local_crop_size=96,
        local_crops_number=8,
        head_hidden_dim=2048,
        lr=0.0005,
    )
    assert {name: settings[name] for name in official} == official
    assert settings["blur_radius"] == (0.1, 2.0)


@pytest.mark.parametrize("images", [1, 5, 50, 300, 40_000])
def test_an_epoch_has_batches_whatever_the_number_of_images(images):
    settings = decide(images, 24)
    assert 1 <= settings["batch_size_per_gpu"] <= 64
    assert images < 8 or images // settings["batch_size_per_gpu"] >= 2


@pytest.mark.parametrize("images", [5, 40, 300])
def test_the_reason_for_a_small_batch_counts_the_batches_right(images):
    settings = decide(images, 24)
    whole = images // settings["batch_size_per_gpu"]
    assert settings.reasons["batch_size_per_gpu"].startswith("at least 8") == (whole >= 8)


def test_a_gpu_is_called_so_and_not_by_the_name_that_torch_has_for_it():
    reasons = decide(3000, 400, device="cuda").reasons
    assert reasons["global_crop_size"] == "what a GPU can afford of the images' 400 pixels"
    assert not [why for why in reasons.values() if "CUDA" in why]


def test_views_are_softened_until_they_have_something_in_common():
    args = parse_args(["--preset", "auto", "--flip_p", "0"])
    found = iter([0.0, 0.01, 0.3])
    settings = Settings(vars(args), args.given)
    soften_views(settings, lambda: next(found))
    assert settings["jitter"] == pytest.approx((0.1, 0.1, 0.05, 0.025))
    assert settings["global_crops_scale"] == (0.85, 1.0)
    assert settings["solarize_p"] == 0.0
    strong = Settings(vars(args), args.given)
    soften_views(strong, lambda: 0.2)
    assert strong.reasons == {}


def test_the_correlation_of_views_is_1_for_equal_ones_and_0_for_ones_without_relation():
    """And against numpy's, whose two series are the outputs for two views, less their means."""
    torch.manual_seed(0)

    class Batches(list):
        sampler = SimpleNamespace(set_position=lambda epoch: None)

    def student(views):
        return torch.cat(views).flatten(1)

    one, other = torch.randn(2, 400, 3, 4, 4)
    mixed = one + 0.5 * other
    assert view_correlation(student, Batches([[one, one, one + 7]])) == pytest.approx(1)
    assert view_correlation(student, Batches([[one, other]])) == pytest.approx(0, abs=0.03)
    a, b = ((view - view.mean(0)).flatten().numpy() for view in (one, mixed))
    expected = np.corrcoef(a, b)[0, 1]
    assert view_correlation(student, Batches([[one, mixed]])) == pytest.approx(expected, abs=1e-4)


def test_hours_hold_as_many_epochs_as_fit_and_at_least_one():
    args = parse_args(["--preset", "auto", "--hours", "1"])
    for seconds, epochs in [(0.1, 334), (1000.0, 1)]:
        settings = Settings(vars(args), args.given)
        fit_hours(settings, seconds, 100)
        assert settings["epochs"] == epochs
    assert "minimum: one takes" in settings.reasons["epochs"]


def test_short_epochs_are_not_saved_each_and_do_not_fill_the_disk():
    """12,000 epochs of 11 iterations are an hour of a GPU on 3,000 images."""
    settings = decide(3000, 32, device="cuda", epochs=12_000)
    assert settings["batch_size_per_gpu"] == 256
    assert settings["resume_freq"] * 11 >= 200
    assert settings["epochs"] / settings["saveckp_freq"] <= 10
    assert settings["warmup_epochs"] * 11 == pytest.approx(1000, abs=11)
    usual = decide(50_000, 32, device="cuda", epochs=100)
    assert (usual["resume_freq"], usual["saveckp_freq"], usual["warmup_epochs"]) == (2, 20, 10)


class Clockwork:
    """A loader of batches that are there at once, but for the first of each epoch."""

    def __init__(self, batches, seconds):
        self.batches, self.seconds, self.sampler = batches, seconds, self

    def set_position(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.batches

    def __iter__(self):
        time.sleep(self.seconds)
        return iter(range(self.batches))


def test_what_the_beginning_of_an_epoch_costs_counts_where_epochs_are_short():
    """Of 4 steps each waits for a fourth of it; more on a busy machine."""
    seconds = seconds_per_step(lambda batch: None, Clockwork(4, 0.4), torch.device("cpu"))
    assert seconds >= 0.1


def test_hours_without_auto_or_with_epochs_are_refused(tmp_path):
    with pytest.raises(UserError, match="--hours and --epochs exclude each other"):
        parse_args(["--preset", "auto", "--hours", "1", "--epochs", "3"])
    with pytest.raises(UserError, match="measure how many epochs fit"):
        main_dino.train_dino(parse_args(["--hours", "1", "--output_dir", str(tmp_path)]))


@pytest.mark.parametrize(
    "flags", ["--local_crops_scale 1", "--jitter 0.1 0.1", "--blur_radius 2 1"]
)
def test_strengths_that_cannot_be_are_refused_before_the_images_are_surveyed(tmp_path, flags):
    alike = pictures(*[(32, 32)] * 20)  # a data set with a layout
    with pytest.raises(UserError, match=f"^{flags.split()[0]} .*: give "):
        train(*flags.split(), "--epochs", 1, "--output_dir", tmp_path, images=alike)


# ---- whole runs ----


def test_a_folder_of_one_image_in_many_sizes_trains_unattended(tmp_path, capsys):
    images = pictures(*[(8 + 9 * i, 10 + 7 * i) for i in range(16)], grey=True)
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number:02}.png")
    train("--data_path", tmp_path, "--hours", 0.0001, "--output_dir", tmp_path / "run")
    output = capsys.readouterr().out
    assert "16 images, shorter side 8 to 115 pixels, median 62, 100% grey" in output
    assert "grey images cannot lose their colours" in output
    assert (tmp_path / "run/backbone.pth").exists()


def test_a_step_is_timed_on_the_views_of_ones_own_augmentation(tmp_path, capsys, monkeypatch):
    """And these are not softened."""
    timed = []

    def watched(step, loader, device):
        timed.append([view.shape[-1] for view in next(iter(loader))])
        return seconds_per_step(step, loader, device)

    monkeypatch.setattr(main_dino, "seconds_per_step", watched)
    own = MultiCrop([View(28, (0.5, 1.0))] * 3, mean=(0.5,) * 3, std=(0.25,) * 3)
    flags = ("--hours", 1e-6, "--output_dir", tmp_path)
    train(*flags, images=pictures(*[(40, 40)] * 16), augmentation=own)
    assert timed == [[28, 28, 28]]
    assert "Views of an image correlate by" not in capsys.readouterr().out


@pytest.mark.cuda
def test_a_gpu_gets_a_resnet18_and_trains_unattended(tmp_path):
    flags = ("--device", "cuda", "--compile", "false", "--hours", 1e-6, "--output_dir", tmp_path)
    train(*flags, images=pictures(*[(72, 72)] * 24))
    decided = json.loads((tmp_path / "args.json").read_text())
    assert {"arch", "augment", "epochs", "lr"} <= decided["auto"].keys()
    assert (decided["arch"], decided["augment"], decided["epochs"]) == ("resnet18", "device", 1)
    assert (tmp_path / "backbone.pth").exists()


def test_the_initial_weights_do_not_depend_on_how_many_steps_were_timed(tmp_path):
    """A ViT draws the paths that it drops in each."""
    flags = ("--preset", "auto", "--arch", "vit_nano", "--hours", "1e-6", "--device", "cpu")
    args = parse_args([*flags, "--num_workers", "0", "--output_dir", str(tmp_path)])
    images = pictures(*[(24, 24)] * 16)
    main_dino.settle(complete(args), images, None, torch.device("cpu"), None)
    found = torch.rand(8)
    fix_random_seeds(args.seed)
    assert torch.equal(found, torch.rand(8))


def test_a_resumed_run_keeps_its_settings_and_says_so(tmp_path, capsys):
    folder = tmp_path / "run"
    train("--epochs", 2, "--output_dir", folder, images=pictures(*[(20, 20)] * 12))
    begun = json.loads((folder / "args.json").read_text())
    assert begun["auto"]["momentum_teacher"].startswith("an average over")
    assert "given" not in begun
    capsys.readouterr()
    others = pictures(*[(64, 64)] * 12, grey=True)
    train("--epochs", 2, "--output_dir", folder, images=others)
    output = capsys.readouterr().out
    assert "decided when that run began" in output
    assert "2 of 2 epochs are done" in output
    assert json.loads((folder / "args.json").read_text()) == begun


def test_other_hours_for_a_run_that_is_resumed_are_answered_with_what_changes_its_length(
    tmp_path, capsys
):
    flags = ("--output_dir", tmp_path / "run")
    images = pictures(*[(20, 20)] * 12)
    train("--hours", 1e-6, *flags, images=images)
    capsys.readouterr()
    train("--hours", 1e-6, *flags, images=images)
    assert "Warning: --hours" not in capsys.readouterr().out
    train("--hours", 2, *flags, images=images)
    assert (
        "Warning: --hours 2 does not change this run, whose --epochs 1 was"
        in capsys.readouterr().out
    )


def test_a_resumed_run_keeps_the_epochs_that_were_given_when_it_began(tmp_path, capsys):
    folder, images = ("--output_dir", tmp_path / "run"), pictures(*[(20, 20)] * 12)
    train("--epochs", 1, *folder, images=images)
    for flags in ((), ("--hours", 1e-6)):
        capsys.readouterr()
        train(*flags, *folder, images=images)
        said = capsys.readouterr().out
        assert "1 of 1 epochs are done" in said
        assert "--epochs was" not in said
        assert ("does not change this run, whose --epochs 1" in said) == bool(flags)


def test_backbone_pth_is_the_network_that_measured_better(class_folders, tmp_path, capsys):
    train(
        *("--data_path", class_folders / "train", "--knn_data_path", class_folders),
        *("--epochs", 2, "--lr", 0.05, "--momentum_teacher", 0.9999, "--out_dim", 64),
        *("--output_dir", tmp_path),
    )
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    last = [line for line in lines if "knn_teacher" in line][-1]
    better = "student" if last["knn_student"] > last["knn_teacher"] else "teacher"
    file, checkpoint = (
        torch.load(tmp_path / name, weights_only=True)
        for name in ("backbone.pth", "checkpoint.pth")
    )
    assert file["network"] == better
    assert f"(the {better}'s, in backbone.pth)" in capsys.readouterr().out
    found = file["teacher"]["conv1.weight"]
    keys = {"student": "module.backbone.conv1.weight", "teacher": "module.backbone.conv1.weight"}
    assert torch.equal(found, checkpoint[better][keys[better]])


def test_a_checkpoint_cannot_have_its_own_code_imported(tmp_path, monkeypatch):
    """By stating that --preset auto decided --augmentation, which names a function."""
    train("--epochs", 2, "--output_dir", tmp_path / "run", images=pictures(*[(20, 20)] * 12))
    path = tmp_path / "run/checkpoint.pth"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["args"] |= {"augmentation": "dino_evil:build", "warmup_epochs": 0}
    checkpoint["args"][REASONS]["augmentation"] = "found to be best"
    torch.save(checkpoint, path)
    (tmp_path / "dino_evil.py").write_text("raise SystemExit('code of a checkpoint runs')")
    monkeypatch.syspath_prepend(tmp_path)
    flags = ("--epochs", 3, "--output_dir", tmp_path / "run")
    with pytest.raises(UserError, match=r"checkpoint.pth: says that --augmentation was decided"):
        train(*flags, images=pictures(*[(20, 20)] * 12))
    assert "dino_evil" not in sys.modules


ODD = [
    *[("epochs", None), ("epochs", True), ("epochs", "5"), ("epochs", 10**5000), ("arch", 7)],
    *[("global_crops_scale", 5), ("batch_size_per_gpu", [1]), ("use_bn_in_head", "true")],
    *[("jitter", [0.1, "--wandb"]), ("lr", float("nan")), ("amp_dtype", "int8"), ("mean", {})],
    *[("output_dir", "elsewhere"), ("wandb", True), ("data_path", "/"), ("nothing", 1)],
]


@pytest.mark.parametrize(("name", "value"), ODD, ids=range(len(ODD)))
def test_what_no_command_line_could_give_is_not_adopted_from_a_checkpoint(name, value):
    args = parse_args(["--preset", "auto"])
    settings = Settings(vars(args), args.given)
    with pytest.raises(UserError, match=f"checkpoint.pth: says that --{name} was decided"):
        settings.adopt({name: value, REASONS: {name: "why"}}, "checkpoint.pth")


def test_all_that_a_preset_may_decide_is_adopted():
    args = parse_args(["--preset", "auto"])
    saved = {name: getattr(args, name) for name in DECIDABLE}
    settings = Settings(vars(args), args.given)
    settings.adopt(saved | {REASONS: dict.fromkeys(saved, "why")}, "checkpoint.pth")
    assert settings.reasons == dict.fromkeys(saved, "why")
    assert {name: settings[name] for name in saved} == saved
