# SPDX-License-Identifier: Apache-2.0
"""ablations.py: the commands it plans, what it refuses, its tables, and what a kill costs."""

import contextlib
import json
import math
import multiprocessing
import os
import shlex
import signal
import sys
import time

import pytest
from conftest import SMALL_RUN, run_script
from helpers import assert_equal_states, final_state

import ablations
import main_dino
from dino.errors import UserError
from dino.signals import REQUEUE, listen
from dino.training.flags import parse_args
from dino.training.logged_run import LoggedRun
from dino.training.studies import STUDIES
from dino.training.study_plots import draw_study
from dino.training.study_report import markdown, summarise

DATA = ("--data_path", "photos")


def commands(capsys, *flags):
    """The flags of each command that --print_commands prints, as main_dino.py parses them."""
    ablations.ablations(ablations.parse_args([*flags, "--print_commands", "torchrun"]))
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert all(line[:2] == ["torchrun", "--standalone"] for line in lines)
    return [parse_args(line[line.index("main_dino.py") + 1 :]) for line in lines]


# ---- plans ----


@pytest.mark.parametrize("ending", [".md", ".json", ".png"])
def test_a_table_that_no_study_wrote_is_not_replaced(tmp_path, ending):
    path = tmp_path / f"collapse{ending}"
    path.write_text("# My notes\n")
    args = ablations.parse_args(["collapse", *DATA, "--output_dir", str(tmp_path)])
    with pytest.raises(UserError, match=f"--output_dir.*{path} exists and was not written by"):
        ablations.ablations(args)
    assert path.read_text() == "# My notes\n"


def test_the_teachers_are_those_of_fig_6_and_nothing_else_differs(capsys, tmp_path):
    runs = commands(capsys, "teacher", *DATA, "--output_dir", str(tmp_path), "--seeds", "0", "7")
    assert [(run.teacher_update, run.seed) for run in runs] == [
        (update, seed)
        for update in ("ema", "previous_epoch", "previous_iteration", "student")
        for seed in (0, 7)
    ]
    for run in runs:
        varied = ("teacher_update", "seed", "output_dir")
        flags = {name: value for name, value in vars(run).items() if name not in varied}
        assert flags == {name: value for name, value in vars(runs[0]).items() if name in flags}
    assert len({run.output_dir for run in runs}) == 8
    assert (runs[0].arch, runs[0].epochs) == ("vit_small", 300)


def test_collapse_takes_centering_and_sharpening_away(capsys, tmp_path):
    runs = commands(capsys, "collapse", *DATA, "--output_dir", str(tmp_path))
    found = [(run.center_momentum < 1, run.teacher_temp < 0.1) for run in runs]
    assert found == [(True, True), (False, True), (True, False), (False, False)]


def test_components_multicrop_and_batches_are_those_of_the_tables(capsys, tmp_path):
    folder = ("--output_dir", str(tmp_path))
    runs = commands(capsys, "components", *DATA, *folder)
    parser = main_dino.get_args_parser()
    changed = ("teacher_update", "sinkhorn_iterations", "loss", "predictor")
    found = [{n for n in changed if getattr(run, n) != parser.get_default(n)} for run in runs]
    assert found == [
        set(),
        {"teacher_update"},
        {"sinkhorn_iterations"},
        set(),
        {"loss"},
        {"predictor"},
    ]
    assert [run.local_crops_number for run in runs] == [10, 10, 10, 0, 10, 10]
    runs = commands(capsys, "multicrop", *DATA, *folder)
    assert [run.local_crops_number for run in runs] == [0, 2, 6, 10]
    runs = commands(capsys, "batch-size", *DATA, *folder, "--nproc_per_node", "8")
    assert [8 * run.batch_size_per_gpu for run in runs] == [128, 256, 512, 1024]
    assert {run.local_crops_number for run in runs} == {0}


@pytest.mark.parametrize("processes", [1, 8])
@pytest.mark.parametrize(
    ("study", "batch"),
    [(("multicrop", *DATA), 1024), (("collapse", *DATA), 1024), (("teacher", "--demo"), 32)],
)
def test_the_processes_of_a_run_share_the_batch_of_the_study(
    study, batch, processes, capsys, tmp_path
):
    flags = (*study, "--output_dir", str(tmp_path), "--nproc_per_node", str(processes))
    runs = commands(capsys, *flags)
    assert {run.batch_size_per_gpu for run in runs} == {batch // processes}
    runs = commands(capsys, *flags, "--batch_size_per_gpu", "5")
    assert {run.batch_size_per_gpu for run in runs} == {5}


def test_flags_of_the_command_line_go_to_all_runs_that_do_not_set_them(capsys, tmp_path):
    flags = ("--epochs", "40", "--local_crops_number", "3", "--runs", "DINO", "no multi-crop")
    runs = commands(capsys, "components", *DATA, "--output_dir", str(tmp_path), *flags)
    assert [(run.epochs, run.local_crops_number) for run in runs] == [(40, 3), (40, 0)]


def test_a_folder_may_begin_with_a_hyphen():
    assert parse_args(ablations.to_texts({"data_path": "-runs/images"})).data_path == "-runs/images"


def test_settings_for_small_data_share_a_budget_of_epochs(capsys, tmp_path):
    flags = ("small-data", *DATA, "--output_dir", str(tmp_path))
    assert [run.epochs for run in commands(capsys, *flags)] == [8, 4, 2]
    runs = commands(capsys, *flags, "--epochs", "30")
    assert [run.epochs for run in runs] == [30, 15, 6]
    assert [run.preset for run in runs] == ["auto", None, None]
    official = parse_args(["--epochs", "1"])
    kept = ("out_dim", "lr", "momentum_teacher", "use_bn_in_head", "blur_radius", "jitter", "mean")
    kept += ("global_crops_scale", "local_crops_scale", "local_crops_number")
    assert all(getattr(runs[2], name) == getattr(official, name) for name in kept)


def test_each_rule_of_auto_is_replaced_alone(capsys, tmp_path):
    auto, *runs = commands(capsys, "auto-rules", *DATA, "--output_dir", str(tmp_path))
    assert auto.preset == "auto"
    for run in runs:
        replaced = set(run.given) - set(auto.given)
        assert replaced
        for name in vars(run).keys() - replaced - {"given", "output_dir"}:
            assert getattr(run, name) == getattr(auto, name)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("collapse", "--data_path is missing"),
        ("teacher --demo --teacher_update ema", "--teacher_update: the study teacher sets"),
        ("batch-size --demo --batch_size_per_gpu 8", "--batch_size_per_gpu: the study"),
        ("teacher --demo --seed 3", "--seed: the study teacher sets this itself"),
        ("teacher --demo --warmup_epochs 9", "--warmup_epochs 9 is longer than the run"),
        ("batch-size --demo --nproc_per_node 3", "--nproc_per_node 3 does not divide"),
        ("teacher --demo --runs copy", "--runs 'copy': teacher has 'momentum', "),
        ("teacher --demo --report_only --print_commands srun", "exclude each other"),
        ("teacher --demo --seeds 1 2 1", "--seeds 1 2 1: give each seed once"),
        ("teacher --demo --report_only", "no run of teacher has logged a step yet"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(flags, said, tmp_path):
    args = ablations.parse_args([*flags.split(), "--output_dir", str(tmp_path / "new")])
    with pytest.raises(UserError, match=said):
        ablations.ablations(args)
    assert not (tmp_path / "new").exists()


def test_an_unknown_flag_is_refused_by_name():
    result = run_script("ablations.py", "teacher", "--demo", "--epoch", 3)
    assert result.returncode == 2
    assert "ablations.py: error: unrecognized arguments: --epoch 3" in result.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("tea --demo", "argument study: invalid choice: 'tea'"),
        ("teacher --seeds x", "argument --seeds: 'x' is not a whole number"),
        ("teacher --runs", "argument --runs: expected at least one argument"),
    ],
)
def test_a_wrong_value_of_a_flag_of_the_study_is_one_line(flags, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        ablations.parse_args(flags.split())
    message = capsys.readouterr().err
    assert message.startswith(f"ablations.py: error: {said}")
    assert message.count("\n") == 1


# ---- runs ----


@pytest.fixture
def study(class_folders, tmp_path, monkeypatch):
    """Flags of a study of one small run, of two epochs of 24 steps."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as run_script has it: threads change the rounding
    data = ("--data_path", class_folders / "train", "--knn_data_path", class_folders)
    flags = (
        *SMALL_RUN,
        "--batch_size_per_gpu",
        1,
        "--log_freq",
        1,
        "--warmup_teacher_temp_epochs",
        0,
        *data,
    )
    command = ("components", "--runs", "MSE", "--output_dir", tmp_path, "--preset", "vanilla")
    return [str(flag) for flag in (*command, *flags)]


def start(flags):
    """ablations.py as a process of its own, forked to spare it the imports."""
    process = multiprocessing.get_context("fork").Process(target=run_main, args=(flags,))
    process.start()
    return process


def run_main(flags):
    listen.cache_clear()  # what this process heard before its fork
    sys.argv = ["ablations.py", *flags]
    ablations.main()


def wait_for(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def logged(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def test_a_study_killed_twice_loses_no_step_and_ends_as_the_unbroken_run(study, tmp_path, capsys):
    folder = tmp_path / "components" / "MSE-seed0"
    ablations.ablations(ablations.parse_args([*study, "--print_commands", "torchrun"]))
    flags = shlex.split(capsys.readouterr().out)[3:]
    unbroken = run_script(*flags, "--output_dir", tmp_path / "unbroken")
    assert unbroken.returncode == 0, unbroken.stderr

    for number, steps in ((signal.SIGKILL, 10), (signal.SIGTERM, 20)):
        process = start(study)
        wait_for(lambda n=steps, run=process: logged(folder) >= n or not run.is_alive())
        before = logged(folder)
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode == (-signal.SIGKILL if number == signal.SIGKILL else REQUEUE)
        wait_for(lambda: not (folder / ".lock").exists())
        checkpoint = final_state(folder)
        assert before <= checkpoint["iteration"] < 48, "every step that was logged is saved"
    process = start(study)
    process.join()
    assert process.exitcode == 0
    assert_equal_states(final_state(tmp_path / "unbroken"), final_state(folder))

    (run,) = [run for run in read_summary(tmp_path)["runs"] if run["seeds"]]
    assert run["name"] == "MSE"
    assert run["theirs"] == {"k-NN": 52.6, "linear": 62.4}
    knn = LoggedRun(tmp_path / "unbroken").knn
    assert run["seeds"]["0"]["knn_teacher"] == knn[-1]["knn_teacher"]
    assert "| MSE |" in (tmp_path / "components.md").read_text()
    assert (tmp_path / "components.png").stat().st_size > 10_000

    log = (tmp_path / "components" / "MSE-seed0.log").read_text()
    ablations.ablations(ablations.parse_args(study))
    assert "MSE, seed 0: finished" in capsys.readouterr().out
    assert (tmp_path / "components" / "MSE-seed0.log").read_text() == log, "nothing ran again"
    with pytest.raises(UserError, match=r"holds a run with --lr 0\.0005, not 0\.1"):
        ablations.ablations(ablations.parse_args([*study, "--lr", "0.1"]))


def test_a_run_whose_settings_were_decided_is_finished_until_a_flag_contradicts(
    class_folders, tmp_path, capsys
):
    data = ("--data_path", str(class_folders / "train"), "--output_dir", str(tmp_path))
    study = ("auto-rules", "--runs", "auto", "--epochs", "1", "--num_workers", "0", *data)
    trained = run_script("ablations.py", *study)
    assert trained.returncode == 0, trained.stderr
    ablations.ablations(ablations.parse_args(study))
    said = capsys.readouterr().out
    assert "auto, seed 0: finished" in said
    assert "Theirs" not in said
    assert read_summary(tmp_path, "auto-rules")["ours"].startswith("resnet_nano")
    with pytest.raises(UserError, match=r"holds a run with --lr 0\.006, not 0\.1"):
        ablations.ablations(ablations.parse_args([*study, "--lr", "0.1"]))

    path = tmp_path / "auto-rules" / "auto-seed0" / "args.json"
    args = json.loads(path.read_text())
    for damaged in ({"auto": 5}, {"batch_size_per_gpu": "many"}, {"arch": None, "epochs": []}):
        path.write_text(json.dumps(args | damaged))
        with contextlib.suppress(UserError):
            ablations.ablations(ablations.parse_args([*study, "--report_only"]))


def read_summary(folder, study="components"):
    return json.loads((folder / f"{study}.json").read_text())


# ---- tables and pictures ----


def figures(knn, **more):
    costs = dict(step_ms=100, images_per_s=640, minutes=1, peak_memory_mb=900)
    return dict(entropy=50, kl=20, knn_teacher=knn, knn_student=knn, verdicts=[], **costs) | more


def test_a_row_has_the_mean_of_its_seeds_their_range_and_the_papers_number():
    seeds = {0: figures(60.0), 1: figures(61.0, verdicts=["uniform collapse"])}
    rows = [("momentum", {"k-NN": 72.8}, seeds), ("not run", {"k-NN": 0.1}, {})]
    text = markdown(summarise("Title", "Fig. 6", rows, "a demo"))
    table = [line.split(" | ") for line in text.splitlines() if line.startswith("|")]
    row = dict(zip(table[0], table[2], strict=True))
    assert row["k-NN %"] == "60.5 (60.0 to 61.0)"
    assert row["h, % of ln K"] == "50.0"
    assert row["the monitor's verdict"] == "uniform collapse (1 of 2 seeds)"
    assert row["theirs: k-NN |"] == "72.8 |"
    assert table[3][-1] == "0.1 |"


def test_every_study_has_a_picture_also_of_runs_that_have_only_begun(tmp_path):
    run = LoggedRun.__new__(LoggedRun)
    run.ln_k, run.name, run.verdicts = math.log(64), "run", []
    run.steps = [dict(epoch=0.5, teacher_entropy=2.0, kl=1.0)]
    run.knn = [dict(epoch=0, knn_teacher=40.0, knn_student=40.0)]
    for name, study in STUDIES.items():
        first = next(iter(study.variants))
        rows = [
            (n, v.theirs, {0: figures(50.0)} if n == first else {})
            for n, v in study.variants.items()
        ]
        path = tmp_path / f"{name}.png"
        draw_study(path, name, summarise(study.title, study.source, rows, "x"), {first: [run]})
        assert path.stat().st_size > 10_000
