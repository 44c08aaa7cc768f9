# SPDX-License-Identifier: Apache-2.0
"""A user's own code, named on the command line."""

import json

import pytest
from conftest import ROOT, SMALL_RUN, run_script

from dino.errors import UserError
from dino.own_code import call_by_path

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
    assert "--augmentation my_views:wrong: returned a list" in wrong.stderr
