# SPDX-License-Identifier: Apache-2.0
"""A request to stop is heard from the first line of main on, and costs at most one step."""

import contextlib
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from conftest import SMALL_RUN, Started, free_port, run_script, start_forkserver

from dino.errors import UserError
from dino.signals import STOPPING, StopRequested, signals_blocked
from dino.weights.files import read, write_atomically


def told_main(connection, output, environ, command):
    """main_dino.py, which tells when a probe, a step or the search for a checkpoint begins.

    It waits there to be told to go on: no test needs to guess a moment.
    """
    with open(output, "w", 1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environ)
    sys.argv = command
    import main_dino
    from dino.evaluation.knn import KnnProbe
    from dino.training.recorder import Recorder

    def tell(owner, name, word):
        original = getattr(owner, name)

        def wrapped(*args, **options):
            connection.send(word)
            connection.recv()
            return original(*args, **options)

        setattr(owner, name, wrapped)

    if connection is not None:
        tell(KnnProbe, "accuracies", "probe")
        tell(Recorder, "add", "step")
        tell(main_dino, "find_checkpoint", "start")
    main_dino.main()


class Told:
    """Ranks of a run, of which rank `tells` stops at every word of told_main."""

    def __init__(self, data, folder, *flags, ranks=1, tells=0, port=29_999):
        start_forkserver()
        context = multiprocessing.get_context("forkserver")
        self.connection, theirs = context.Pipe()
        command = ["main_dino.py", *SMALL_RUN, "--data_path", data / "train", *flags]
        command = [str(part) for part in (*command, "--output_dir", folder, "--log_freq", 100)]
        self.outputs = [folder.with_name(f"said{rank}") for rank in range(ranks)]
        self.processes = []
        for rank in range(ranks):
            environ = {"OMP_NUM_THREADS": "1"}
            if ranks > 1:
                environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
                environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            ours = theirs if rank == tells else None
            args = (ours, self.outputs[rank], environ, command)
            self.processes.append(context.Process(target=told_main, args=args, daemon=True))
            self.processes[-1].start()
        theirs.close()
        self.teller = self.processes[tells]

    def until(self, word, times=1):
        """Go on to the `times`-th beginning of `word`."""
        while True:
            try:
                times -= self.connection.recv() == word
            except EOFError:
                pytest.fail(self.said())
            if times == 0:
                return
            self.connection.send("go on")

    def said(self):
        return "".join(output.read_text() for output in self.outputs if output.exists())

    def ends(self):
        """(exit codes, all that was said); nothing is waited for any more."""
        with contextlib.suppress(OSError):  # it has ended
            for _ in range(1000):
                self.connection.send("go on")
        for process in self.processes:
            process.join(timeout=240)
        return [process.exitcode for process in self.processes], self.said()


def test_a_signal_between_two_logged_steps_saves_that_step(class_folders, tmp_path):
    run = Told(class_folders, tmp_path / "run")
    run.until("step", 4)
    os.kill(run.teller.pid, signal.SIGTERM)
    codes, said = run.ends()
    assert codes == [75], said
    assert "Stopped by SIGTERM: 4 iterations are done and saved" in said
    assert read(tmp_path / "run" / "checkpoint.pth")["iteration"] == 4


def test_a_signal_before_training_ends_at_once_with_its_code(class_folders, tmp_path):
    run = Told(class_folders, tmp_path / "run")
    run.until("start")
    os.kill(run.teller.pid, signal.SIGINT)
    codes, said = run.ends()
    assert codes == [130], said
    assert "stopped by SIGINT before training began" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists(), "nothing is left behind, not even a lock"


def test_a_signal_to_one_of_two_ranks_in_the_probe_keeps_the_epoch(class_folders, tmp_path):
    """The probe after every epoch."""
    flags = ("--knn_data_path", class_folders, "--knn_freq", 1)
    run = Told(class_folders, tmp_path / "run", *flags, ranks=2, tells=1, port=free_port())
    run.until("probe", 2)  # before training, then after the first epoch
    os.kill(run.teller.pid, signal.SIGTERM)
    codes, said = run.ends()
    assert codes == [75, 75], said
    assert "contact with rank" not in said
    saved = read(tmp_path / "run" / "checkpoint.pth")
    assert (saved["epoch"], saved["iteration"]) == (1, 3)
    assert saved["unlogged"], "the epoch will be measured after all"


def test_a_signal_is_heard_while_the_processes_wait_for_each_other(class_folders, tmp_path):
    """PyTorch waits for rank 0 for ten minutes, in which no handler of Python's runs."""
    with socket.create_server(("127.0.0.1", 0)) as rank_0:  # accepts, and never answers
        run = Started(
            *("main_dino.py", *SMALL_RUN, "--data_path", class_folders / "train"),
            *("--output_dir", tmp_path / "run"),
            RANK="1",
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(rank_0.getsockname()[1]),
        )
        connection, _ = rank_0.accept()
        with connection:
            run.send_signal(signal.SIGTERM)
            said, _ = run.communicate(timeout=60)
    assert run.returncode == 75, said
    assert said == "Stopped by SIGTERM before training began.\n"


CHILDREN_HEAR_SIGNALS = """
import os, signal, time
from dino.signals import listen
listen()
for _ in range(3):
    if (child := os.fork()) == 0:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
time.sleep(0.2)
print("alive")
"""


def test_signals_that_a_forked_child_hears_are_not_its_parents():
    """As loader workers, in the moment before they have handlers of their own."""
    result = run_script("-c", CHILDREN_HEAR_SIGNALS)
    assert (result.returncode, result.stdout) == (0, "alive\n"), result.stderr


DROPPED = """
import os, signal, time
os.register_at_fork(before=lambda: os.kill(os.getpid(), signal.SIGTERM))  # after listen's own
from dino.signals import listen
listen()
if os.fork() == 0:
    os._exit(0)
time.sleep(20)
"""


def test_a_signal_during_a_fork_ends_what_has_nothing_to_save_and_shows_no_traceback():
    """Python prints and drops what hooks of fork raise, as it does with destructors."""
    ended = run_script("-c", DROPPED)
    assert ended.returncode == 75
    assert ended.stderr == "Stopped by SIGTERM before training began.\n"


def test_a_second_signal_ends_a_run_that_does_not_reach_the_end_of_its_step(
    class_folders, tmp_path
):
    run = Told(class_folders, tmp_path / "run")
    run.until("step", 2)  # where it waits to be told
    os.kill(run.teller.pid, signal.SIGUSR1)
    os.kill(run.teller.pid, signal.SIGTERM)
    run.teller.join(timeout=60)
    assert run.teller.exitcode == 75


def test_a_signal_while_a_checkpoint_is_read_is_not_taken_for_damage(tmp_path):
    """The run would go back to the checkpoint before, and lose what came after it."""
    write_atomically({"epoch": 1, "weights": list(range(20_000))}, tmp_path / "checkpoint.pth")

    def ask(number, frame):
        raise StopRequested("SIGALRM")

    before = signal.signal(signal.SIGALRM, ask)
    try:
        for _ in range(5):
            with pytest.raises(StopRequested):
                signal.setitimer(signal.ITIMER_REAL, 0.01)
                while True:
                    read(tmp_path / "checkpoint.pth")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not issubclass(StopRequested, UserError)


def test_a_compiler_does_not_die_of_the_signals_that_a_whole_job_gets():
    """Its processes, which start while signals are blocked, inherit that."""
    with signals_blocked():
        status = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True)
    mask = int(re.search(r"SigBlk:\s*(\w+)", status.stdout)[1], 16)
    assert all(mask >> (number - 1) & 1 for number in STOPPING)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOPPING)
