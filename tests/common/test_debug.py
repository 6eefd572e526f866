"""--debug: an option of every verb, wherever it stands; the traceback behind an error, and what upstream logs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kit.common import debug
from kit.common.errors import KitError
from support.command import PROJECT, kit


@pytest.mark.parametrize(("typed", "meant"), [
    (["run", "a.yaml", "--debug"], ["--debug", "run", "a.yaml"]),
    (["--debug", "run", "a.yaml"], ["--debug", "run", "a.yaml"]),
    (["ask", "r", "--", "--debug"], ["ask", "r", "--", "--debug"]),
    (["ask", "r", "why --debug?"], ["ask", "r", "why --debug?"]),
    (["ask", "--debug", "r", "--", "--debug"], ["--debug", "ask", "r", "--", "--debug"])])
def test_it_may_stand_anywhere(typed: list[str], meant: list[str]) -> None:
    assert debug.first(typed) == meant


@pytest.mark.parametrize("command", [["--debug", "list", "nowhere"], ["list", "nowhere", "--debug"]])
def test_the_traceback_stands_before_the_two_lines(command: list[str]) -> None:
    done = kit(*command)
    assert done.returncode == 2 and done.stderr.startswith("Traceback (most recent call last):")
    assert 'kit/cli.py", line' in done.stderr and done.stderr.endswith("runs\n") and "kit: there is no" in done.stderr
    assert kit("list", "nowhere").stderr.count("\n") == 2


def test_what_was_raised_before_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> None:
        try:
            raise OSError("the disk is gone")
        except OSError:
            raise KitError("no file", "look") from None

    with pytest.raises(KitError) as error:
        failing()
    monkeypatch.delenv("KIT_DEBUG", raising=False)
    assert error.value._render_traceback_() == ["KitError: no file", "  → look"]
    monkeypatch.setenv("KIT_DEBUG", "1")
    said = "\n".join(error.value._render_traceback_())
    assert "OSError: the disk is gone" in said and "in failing" in said and said.endswith("KitError: no file\n  → look")
    monkeypatch.setenv("KIT_DEBUG", "0")
    assert not debug.debugging()


def test_upstream_speaks_and_the_processes_that_are_started_too() -> None:
    """What a user has set for a library stays."""
    program = ("import os, sys, subprocess, warnings; from kit.common import debug; debug.begin()\n"
               "import huggingface_hub; print(huggingface_hub.logging.get_verbosity(), flush=True)\n"
               "subprocess.run([sys.executable, '-c', 'import os; print(os.environ[\"KIT_DEBUG\"], "
               "os.environ[\"DATASETS_VERBOSITY\"], os.environ[\"TRANSFORMERS_VERBOSITY\"])'])")
    environment = {name: value for name, value in os.environ.items() if name not in ("KIT_DEBUG", *debug.UPSTREAM)}
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=60,
                          env={**environment, "TRANSFORMERS_VERBOSITY": "error"})
    assert done.stdout == "10\n1 info error\n", done
