# SPDX-License-Identifier: Apache-2.0
"""README's examples run as they stand, and its table of files is true."""

import os
import re
import shutil

import pytest
from conftest import ROOT, run_script

TEXT = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
WRITTEN = {"own_data", "own_views", "own_backbone"}


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs_as_it_stands(example, class_folders, checkpoint, tmp_path):
    shutil.copytree(class_folders, tmp_path / "runs" / "demo" / "demo_images")
    shutil.copy(checkpoint, tmp_path / "runs" / "demo" / "backbone.pth")
    (tmp_path / "example.py").write_text(example)
    found = run_script("example.py", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert found.returncode == 0, found.stderr
    for name in WRITTEN:
        if f"runs/{name}" in example:
            assert (tmp_path / "runs" / name / "backbone.pth").exists()
            assert "k-NN accuracy" not in found.stdout or name != "own_data"


def test_each_seam_has_an_example():
    assert len(EXAMPLES) == 4
    assert {name for name in WRITTEN if f"runs/{name}" in TEXT} == WRITTEN


def test_the_tree_names_every_script_and_room():
    tree = TEXT[TEXT.index("## Files") :]
    for name in os.listdir(ROOT):
        if name.endswith(".py"):
            assert re.search(rf"^{re.escape(name)}  ", tree, re.MULTILINE), name
    for room in (ROOT / "dino").iterdir():
        if (room / "__init__.py").exists():
            assert f"  {room.name}/" in tree, room


def test_commands_in_the_readme_name_scripts_that_exist():
    for script in re.findall(r"python (\w+\.py)", TEXT):
        assert (ROOT / script).exists(), script
