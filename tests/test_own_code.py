# SPDX-License-Identifier: Apache-2.0
"""A user's own code, named on the command line."""

import json

import pytest
import torch
from conftest import ROOT, SMALL_RUN, run_script
from PIL import Image

from dino.data.augmentations import MultiCrop, View
from dino.data.augmentations_on_device import colours_on_device
from dino.errors import UserError
from dino.networks import build_student_and_teacher
from dino.own_code import call_by_path
from dino.training.flags import parse_args
from dino.training.own_views import check_augmentation
from main_dino import build_loader, train_dino

OWN_VIEWS = """
from dino.data.augmentations import MultiCrop, View

def build():
    views = [View(32, (0.5, 1.0))] * 2 + [View(16, (0.2, 0.5))]
    return MultiCrop(views, mean=(0.5,) * 3, std=(0.25,) * 3)

def wrong():
    return [View(32, (0.5, 1.0))]
"""


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("views", "give MODULE:NAME"),
        (":build", "give MODULE:NAME"),
        (".views:build", "give MODULE:NAME"),  # relative to what?
        ("no_such_module:build", "no module 'no_such_module'"),
        ("json:no_such_name", "json has no function or class 'no_such_name'"),
        ("json:__doc__", "has no function or class"),
        ("os:system", "without arguments: missing a required argument: 'command'"),
    ],
)
def test_a_path_that_names_no_function_without_arguments_says_why(path, why):
    with pytest.raises(UserError, match=why):
        call_by_path(path, "--augmentation")


def test_a_module_with_a_mistake_of_its_own_shows_it(tmp_path, monkeypatch):
    (tmp_path / "needs_another.py").write_text("import no_such_library\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        call_by_path("needs_another:build", "--augmentation")


@pytest.mark.parametrize("code", ["raise SystemExit\n", "def build():\n    raise SystemExit(0)\n"])
def test_code_of_ones_own_that_exits_does_not_end_the_run_as_if_it_were_done(
    tmp_path, monkeypatch, code
):
    name = f"exits_{len(code)}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^--dataset {name}:build: this code calls sys\.exit"):
        call_by_path(f"{name}:build", "--dataset")


def test_a_run_takes_the_views_of_ones_own_module(tmp_path, class_folders):
    (tmp_path / "my_views.py").write_text(OWN_VIEWS)
    flags = (
        *SMALL_RUN,
        "--epochs",
        1,
        "--warmup_epochs",
        0,
        "--data_path",
        class_folders / "train",
    )
    flags = (*flags, "--output_dir", tmp_path / "run")
    script = ROOT / "main_dino.py"
    done = run_script(script, *flags, "--augmentation", "my_views:build", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    args = json.loads((tmp_path / "run/args.json").read_text())
    assert (args["mean"], args["std"]) == ([0.5] * 3, [0.25] * 3)
    wrong = run_script(script, *flags, "--augmentation", "my_views:wrong", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "--augmentation my_views:wrong: what it returned is a list" in wrong.stderr


VIEW = View(32, (0.5, 1.0))
WRONG_VIEWS = [  # what the error says, the arguments of MultiCrop
    ("at least two Views", dict(views=[VIEW])),
    (r"views are \[None, None\]", dict(views=[None, None])),
    ("have 32 and 48 pixels", dict(views=[VIEW, View(48, (0.5, 1.0))])),
    ("mean is .0.5,. and std", dict(views=[VIEW] * 2, mean=(0.5,))),
    ("std .0, 0, 0.*std above 0", dict(views=[VIEW] * 2, std=(0, 0, 0))),
    (r"views\[1\] has size 32.0: give", dict(views=[VIEW, View(32.0, (0.5, 1.0))])),
    ("size 0: give pixels", dict(views=[View(0, (0.5, 1.0))] * 2)),
    ("scale .*smaller first", dict(views=[View(32, (1.0, 0.5))] * 2)),
    ("scale .nan", dict(views=[View(32, (float("nan"), 1.0))] * 2)),
    ("jitter .*hue, to 0.5", dict(views=[View(32, (0.5, 1.0), jitter=(0.4, 0.4, 0.2, 0.9))] * 2)),
    ("blur_radius", dict(views=[View(32, (0.5, 1.0), blur_radius=(-3.0, -1.0))] * 2)),
    ("1 channels, which have no hue", dict(views=[VIEW] * 2, mean=(0.5,), std=(0.5,))),
    ("flip_p 2.0: give a probability", dict(views=[View(32, (0.5, 1.0), flip_p=2.0)] * 2)),
]


@pytest.mark.parametrize(("said", "arguments"), WRONG_VIEWS)
def test_views_of_ones_own_that_cannot_be_trained_on_are_refused(said, arguments):
    with pytest.raises(UserError, match=rf"^--augmentation a:b: .*{said}"):
        check_augmentation(MultiCrop(**arguments), "--augmentation a:b")


class Returned(MultiCrop):
    """`change` of the views."""

    def __call__(self, image, key=None):
        return self.change(super().__call__(image, key))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda views: None, "view 0 of an image is NoneType, .* must be .3, 32, 32."),
        (lambda views: views[:2], "view 2 of an image is None, .* must be .3, 16, 16."),
        (lambda views: [*views, views[0]], "view 3 of an image is .3, 32, 32., .* must be None"),
        (lambda views: views[::-1], "view 0 of an image is .3, 16, 16., .* must be .3, 32, 32."),
        (lambda views: [view[0] for view in views], "view 0 of an image is .32, 32., "),
    ],
)
@pytest.mark.parametrize("preset", [[], ["--preset", "auto"]])
def test_views_that_are_not_as_they_say_are_refused_before_the_run(tmp_path, change, said, preset):
    own = Returned([VIEW] * 2 + [View(16, (0.2, 0.5))])
    own.change = change
    args = parse_args([*map(str, SMALL_RUN), *preset, "--output_dir", str(tmp_path / "run")])
    with pytest.raises(UserError, match=rf"^augmentation: {said}"):
        train_dino(args, [Image.new("RGB", (32, 32))] * 8, own)
    assert not (tmp_path / "run").exists()


def test_what_python_code_passes_as_augmentation_is_checked_too(tmp_path):
    args = parse_args([*map(str, SMALL_RUN), "--device", "cpu", "--output_dir", str(tmp_path)])
    with pytest.raises(UserError, match="augmentation is a list"):
        train_dino(args, [Image.new("RGB", (32, 32))] * 8, [View(32, (0.5, 1.0))] * 2)


def test_views_that_the_patches_do_not_divide_are_refused():
    options = dict(patch_size=8, drop_path_rate=0, out_dim=8, use_bn_in_head=False)
    options |= dict(norm_last_layer=True, hidden_dim=8, bottleneck_dim=8, crop_sizes=[32, 20])
    with pytest.raises(UserError, match=r"does not take crops of 20 pixels: .* 8 x 8; 16 x 16"):
        build_student_and_teacher("vit_nano", torch.device("cpu"), **options)


class Dark(MultiCrop):
    """Views with an operation of their own."""

    def apply(self, image, number, parameters):
        return torch.zeros_like(super().apply(image, number, parameters))


def test_an_operation_of_ones_own_is_not_left_out_by_the_device():
    own = Dark([View(32, (0.5, 1.0))] * 2)
    on_gpu = torch.device("cuda")
    assert not colours_on_device("auto", own, on_gpu)
    assert colours_on_device("auto", MultiCrop(own.views), on_gpu)
    images, device = [Image.new("RGB", (40, 40), "white")] * 4, torch.device("cpu")
    args = parse_args([*map(str, SMALL_RUN), "--augment", "auto"])
    args.in_chans = 3
    views = next(iter(build_loader(args, images, own, 0, device)))
    assert not any(view.any() for view in views)
    args.augment = "device"
    with pytest.raises(UserError, match="--augment device: Dark has operations of its own"):
        build_loader(args, images, own, 0, device)
