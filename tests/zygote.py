# SPDX-License-Identifier: Apache-2.0
"""A process that has imported everything, and forks one for each command that it is sent.

`python script.py ...`, or `python -c code ...`, spends five seconds on importing torch and
torchvision. What is forked here is as real a process, with its own memory, files, signals and exit
code, and begins at once.

Over the socket whose number is the first argument come JSON requests with two files, for stdout and
stderr; back go {"pid": ...} when the process begins and {"returncode": ...} when it has ended.
`another` in place of a request makes a fork of this process serve the socket that comes with it.
"""

import atexit
import functools
import json
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import compare_runs  # noqa: F401
import eval_attention  # noqa: F401
import eval_knn  # noqa: F401
import eval_linear  # noqa: F401
import main_dino  # noqa: F401
import visualize_attention  # noqa: F401


def serve(connection):
    while True:
        request, files, _, _ = socket.recv_fds(connection, 2**20, 2)
        if not request:
            return
        if request == b"another":
            pid = os.fork()
            if pid == 0:
                connection.close()
                connection = socket.socket(fileno=files[0])
            else:
                os.close(files[0])
                send(connection, {"pid": pid})
            continue
        pid = os.fork()
        if pid == 0:
            connection.close()
            become(json.loads(request), *files)
        for file in files:
            os.close(file)
        send(connection, {"pid": pid})
        send(connection, {"returncode": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])})


def send(connection, message):
    connection.sendall(json.dumps(message).encode() + b"\n")


def become(request, stdout, stderr):
    """Be `python command`, in its folder and environment, and end."""
    if request.get("own_group"):
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environ"])
    for file, number in ((stdout, 1), (stderr, 2)):
        os.dup2(file, number)
    sys.argv = request["command"]
    if sys.argv[0] == "-c":
        sys.path[0] = ""
        run = functools.partial(exec, sys.argv.pop(1), {"__name__": "__main__"})
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
        run = functools.partial(runpy.run_path, sys.argv[0], run_name="__main__")
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os._exit(exit_code_of(run))


def exit_code_of(run):
    """Call `run` as the interpreter runs a script: to the end of threads and exit functions."""
    code = 0
    try:
        run()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
