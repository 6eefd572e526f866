"""Progress of a command whose output is a file or a program's input."""

from __future__ import annotations

import subprocess
import sys

from support.command import PROJECT

CODE = """
import time
from kit.common import progress, show
progress.LINE_SECONDS = 0.05
with show.bar(100, "answering", "row") as bar:
    for _ in range(100):
        time.sleep(0.002)
        bar.update()
with show.bar(100, "quick", "row") as bar:
    bar.update(100)
print("the answer")
"""


def test_a_file_gets_a_few_lines_and_the_output_stays_clean() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "the answer\n", done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert 1 <= len(lines) <= 11 and "\r" not in done.stderr, lines
    assert all(line.startswith("answering: ") for line in lines), "what takes no time says nothing"
    assert "100/100" in lines[-1]
