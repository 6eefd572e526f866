"""The benchmark of reading and checking runs, and what it measures grows as it should."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from support.command import PROJECT

pytestmark = pytest.mark.slow


def measured(*arguments: str) -> list[tuple[float, float, float]]:
    """(rows, seconds, peak memory in GB) of each line the benchmark prints."""
    done = subprocess.run([sys.executable, "benchmarks/data_speed.py", *arguments], cwd=PROJECT, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.findall(r"([\d,]+) rows.* in ([\d.]+) s: .* ([\d.]+) GB", done.stdout)
    return [(float(rows.replace(",", "")), float(seconds), float(memory)) for rows, seconds, memory in found]


def test_rows_are_formatted() -> None:
    [(rows, seconds, _)] = measured("--rows", "4000")
    assert rows == 4000
    assert rows / seconds > 500  # a tenth of what two free cores do: only a change for the worse by far fails here


def test_the_cost_of_the_check_is_linear_and_its_memory_bounded() -> None:
    (few, short, small), (many, long, large) = measured("--lint", "4000", "40000")
    assert (few, many) == (4000, 40000)
    assert long / short < 30, "ten times the rows may cost ten times the time"
    assert (large - small) * 1e9 / (many - few) < 2000, "bytes a row"
