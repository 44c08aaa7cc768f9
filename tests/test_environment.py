# SPDX-License-Identifier: Apache-2.0
"""Variables of a launcher that hold anything, and limits: one paragraph that somebody prints."""

import re
import tempfile
import time

import pytest
from conftest import ROOT, SMALL_RUN, run_python, run_script

from dino import distributed, launch
from dino.command_line import loader_workers
from dino.errors import UserError

WRONG = {
    "RANK=''": {"RANK": "", "WORLD_SIZE": ""},
    "WORLD_SIZE='two'": {"RANK": "0", "WORLD_SIZE": "two"},
    "RANK='99999": {"RANK": "9" * 5000, "WORLD_SIZE": "9" * 5000},
    "RANK=3 and WORLD_SIZE=2": {"RANK": "3", "WORLD_SIZE": "2"},
    "RANK='٣'": {"RANK": "٣", "WORLD_SIZE": "4"},
    "LOCAL_WORLD_SIZE='x'": {"LOCAL_WORLD_SIZE": "x"},
    "SLURM_NTASKS='x'": {"SLURM_PROCID": "0", "SLURM_NTASKS": "x"},
    "SLURM_NODELIST='[[['": {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_NODELIST": "[[["},
    "MASTER_ADDR is not set": {"RANK": "0", "WORLD_SIZE": "2"},
    "MASTER_PORT='x'": {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "x"},
    "MASTER_PORT='70000'": {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "70000"},
}


@pytest.mark.parametrize("said", WRONG)
def test_a_variable_of_a_launcher_that_cannot_be_is_named(said, class_folders, tmp_path):
    command = ("main_dino.py", *SMALL_RUN, "--data_path", class_folders / "train")
    result = run_script(*command, "--output_dir", tmp_path / "run", **WRONG[said])
    assert result.returncode == 2, result.stdout
    assert result.stderr.startswith("main_dino.py: error: environment variable")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_host_that_nobody_knows_is_named(monkeypatch):
    """Else PyTorch asks for it for ten minutes, and hears no signal meanwhile."""
    monkeypatch.setattr(launch, "SECONDS_FOR_A_NAME", 0)
    with pytest.raises(UserError, match=r"MASTER_ADDR=.gpu01\.invalid.: no such host"):
        launch.check_host("gpu01.invalid")
    with pytest.raises(UserError, match="no such host"):
        launch.check_host("x" * 5000)
    launch.check_host("localhost")
    for name, value in {"PROCID": "0", "NTASKS": "2", "NODELIST": "gpu01.invalid"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(UserError, match=r"SLURM_NODELIST=.gpu01\.invalid.: no such host"):
        distributed.init_distributed("cpu")


def test_a_script_of_sbatch_without_srun_is_told_who_starts_the_others(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "SILENT_SECONDS", 0)
    with distributed.wait_announced(launch.Launch("slurm", 0, 4), "gpu01:20005"):
        time.sleep(0.1)
    assert "SLURM_NTASKS=4 says how many they are: start all with srun" in capsys.readouterr().err


def test_a_single_process_needs_no_address(class_folders, tmp_path):
    command = ("main_dino.py", *SMALL_RUN, "--epochs", 1, "--data_path", class_folders / "train")
    result = run_script(*command, "--output_dir", tmp_path / "run", RANK="0", WORLD_SIZE="1")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "url", ["env://?x", "tcp://", "http://x", "file:///nowhere/x", "file:///dev/null"]
)
def test_an_address_that_cannot_be_is_named(url, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match=re.escape(f"--dist_url {url}")):
        distributed.init_distributed("cpu", url)


NO_MORE_THREADS = """
import os, resource, sys
import main_dino
if os.getuid() == 0:
    os.setuid(65534)  # the limit does not hold for root
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
main_dino.main()
"""


def test_a_limit_on_threads_is_a_paragraph(tmp_path):
    result = run_script("-c", NO_MORE_THREADS, "--data_path", tmp_path)
    assert result.returncode == 2, result.stderr
    assert "no thread can be started" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_temporary_folder_in_which_loaders_cannot_make_sockets_is_named(tmp_path, monkeypatch):
    """Python's limit on a socket's path; the first batch never came."""
    loader_workers(1)
    folder = tmp_path / ("t" * 100)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)  # found anew
    monkeypatch.setenv("TMPDIR", str(folder))
    with pytest.raises(UserError, match=r"TMPDIR=.*ttt \(AF_UNIX path too long\)"):
        loader_workers(1)
    assert loader_workers(0) == 0
    assert not any(folder.iterdir())


def test_pictures_in_files_need_no_backend_of_the_environments():
    """MPLBACKEND of a notebook or a typing error was a traceback of every script that draws."""
    result = run_python("-c", "import dino.figures", MPLBACKEND="nonsense")
    assert result.returncode == 0, result.stderr
    paths = [*ROOT.glob("*.py"), *ROOT.glob("dino/**/*.py")]
    alone = [path.name for path in paths if re.search("import matplotlib", path.read_text())]
    assert alone == ["figures.py"], "all others get it there"
