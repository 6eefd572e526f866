"""A process that has imported everything heavy, and forks for each command: so a test's command costs no imports.

    python -m support.zygote SOCKET

Each command is a process of its own, with its own arguments, folder, streams and exit code, as if it had been started.
What reads the environment while it is imported would not see a change: `support.command.kit` starts those for real.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

STARTED_WITH = "PYTEST_CURRENT_TEST"  # the one variable that pytest itself changes


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != STARTED_WITH}


@cache
def server() -> tuple[str, dict[str, str]]:
    """Start the process, once for each process of pytest; its socket, and the environment it was started in."""
    socket = str(Path(tempfile.mkdtemp(prefix="zygote-")) / "socket")
    tests = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([str(Path(tests).parent), tests, os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen([sys.executable, "-m", "support.zygote", socket], stdout=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": path}, text=True)
    atexit.register(process.kill)
    assert process.stdout and "ready\n" in process.stdout, "it did not start"  # unsloth prints lines of its own before
    return socket, environment()


def run(arguments: tuple[str, ...], folder: Path, timeout: float) -> subprocess.CompletedProcess[str] | None:
    """`kit …` in `folder`; None where the environment is no longer the one the process was started in."""
    socket, started_in = server()
    if environment() != started_in:
        return None
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, Client(socket) as pipe:
        names = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in (out, err)]
        pipe.send((arguments, str(folder), names))
        pid = pipe.recv()
        if not pipe.poll(timeout):
            os.kill(pid, 9)
            raise subprocess.TimeoutExpired(["kit", *arguments], timeout)
        code = pipe.recv()
        out.seek(0), err.seek(0)
        return subprocess.CompletedProcess(["kit", *arguments], code, out.read(), err.read())


def serve(socket: str) -> None:
    """Accept one request after the other; each is forked twice: one process waits for the other's exit code."""
    import kit.answering.in_memory
    import kit.export.adapter
    import kit.readiness.rehearsal
    import kit.training.train
    import kit.verifying.verify  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody has to wait for those that answered
    with Listener(socket) as listener:
        print("ready", flush=True)
        while True:
            with listener.accept() as pipe:
                if os.fork() == 0:
                    answer(pipe)


def answer(pipe: Connection[Any, Any]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    arguments, folder, names = pipe.recv()
    pid = os.fork()
    if pid == 0:
        command(arguments, folder, names)
    pipe.send(pid)
    pipe.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)


def command(arguments: list[str], folder: str, names: list[str]) -> None:
    from kit.cli import main

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, name in enumerate(names, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), stream)
    os.chdir(folder)
    sys.argv = ["kit", *arguments]
    code: Any = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    serve(sys.argv[1])
