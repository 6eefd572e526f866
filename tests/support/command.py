"""The project's folder, and the command as a user types it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from support import zygote

PROJECT = Path(__file__).resolve().parents[2]
# Few steps: enough for every stage to do its real work, short enough to wait for.
FEW_STEPS = ["max_steps=6", "max_eval_samples=8", "max_new_tokens=48"]


def kit(*arguments: str, timeout: float = 900, **environment: str) -> subprocess.CompletedProcess[str]:
    """`kit …` from the project's folder, as a process of its own."""
    if not environment and (done := zygote.run(arguments, PROJECT, timeout)):
        return done
    return subprocess.run([sys.executable, "-m", "kit", *arguments], cwd=PROJECT, capture_output=True, text=True,
                          timeout=timeout, env={**os.environ, **environment})


def stopped(command: list[str], run: Path, by: signal.Signals | int, times: int = 1) -> tuple[int, str]:
    """Start the command; when the fourth step is logged, send the signal, or let no file grow beyond so many bytes.

    Returns its exit code and what it printed.
    """
    log = run / "log.jsonl"
    with subprocess.Popen([sys.executable, "-m", *command], cwd=PROJECT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, start_new_session=True) as process:
        deadline = time.monotonic() + 300
        while not log.is_file() or len(log.read_text(encoding="utf-8").splitlines()) < 4:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-3000:]
            time.sleep(0.05)
        for _ in range(times if isinstance(by, signal.Signals) else 0):
            os.kill(process.pid, by)
            time.sleep(0.3)  # two at the same time would be one
        if not isinstance(by, signal.Signals):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (by, by))
        said, _ = process.communicate(timeout=300)
    return process.returncode, said


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def refused(folder: Path, *arguments: str, words: str, **environment: str) -> None:
    """`kit …` exits with 2, says `words` without a traceback, and makes no run folder."""
    before = sorted(folder.rglob("*"))
    done = kit(*arguments, timeout=120, **environment)
    text = done.stdout + done.stderr
    assert done.returncode == 2, text[-2000:]
    assert words in text and "→" in text, text[-2000:]
    assert "Traceback" not in text
    assert sorted(folder.rglob("*")) == before
