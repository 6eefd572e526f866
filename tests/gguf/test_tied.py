"""A child ends with the process that started it, whatever ends that."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from support.command import PROJECT

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-m", "kit.gguf.tied", sys.argv[1], "a", "b"], text=True,
                         stdout=subprocess.PIPE)
print(child.pid, child.stdout.readline().strip(), flush=True)
time.sleep(60)
"""


def test_a_script_gets_its_arguments_and_dies_with_a_killed_parent(tmp_path: Path) -> None:
    script, beside = tmp_path / "script.py", tmp_path / "beside.py"
    beside.write_text("WORD = 'found'")
    script.write_text("import sys, time, beside\nprint(beside.WORD, *sys.argv[1:], flush=True)\ntime.sleep(60)\n")
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(script)], cwd=PROJECT, text=True,
                              stdout=subprocess.PIPE)
    assert parent.stdout
    pid, *said = parent.stdout.readline().split()
    assert said == ["found", "a", "b"]
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    deadline = time.monotonic() + 20
    while psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child goes on"
        time.sleep(0.1)


@pytest.mark.parametrize("code, line", [(3, "import sys; sys.exit(3)"), (1, "raise ValueError('x')"), (0, "pass")])
def test_its_exit_code_is_the_scripts(tmp_path: Path, code: int, line: str) -> None:
    (tmp_path / "s.py").write_text(line)
    done = subprocess.run([sys.executable, "-m", "kit.gguf.tied", str(tmp_path / "s.py")], cwd=PROJECT, check=False,
                          capture_output=True, text=True)
    assert done.returncode == code and (code != 1 or "ValueError: x" in done.stderr)
