"""Stopping a run from outside reaches its training; the same command goes on, and nothing else does silently."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PROJECT, kit
from tiny_runs import taught, write_recipe

from kit.recipe import Recipe
from kit.runs import read_result

pytestmark = pytest.mark.slow

__all__ = ["taught"]  # a fixture


def stopped(command: list[str], run: Path, number: signal.Signals, times: int = 1) -> tuple[int, str]:
    """Start the command, send the signal when the fourth step is logged; its exit code and what it printed."""
    log = run / "log.jsonl"
    with subprocess.Popen([sys.executable, "-m", *command], cwd=PROJECT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, start_new_session=True) as process:
        deadline = time.monotonic() + 300
        while not log.is_file() or len(log.read_text(encoding="utf-8").splitlines()) < 4:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-3000:]
            time.sleep(0.05)
        for _ in range(times):
            os.kill(process.pid, number)
            time.sleep(0.3)  # two at the same time would be one
        said, _ = process.communicate(timeout=300)
    return process.returncode, said


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_kit_run_reaches_the_kernel_and_goes_on(taught: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, taught("qwen2"), name="stop", gguf=[])
    run = tmp_path / "runs" / "stop"
    code, said = stopped(["kit", "run", str(recipe)], run, signal.SIGTERM)
    result = read_result(run)
    assert code == 75, said[-3000:]
    assert (result["status"], result["stage"]) == ("stopped", "train")
    [saved] = (run / "checkpoints").glob("checkpoint-*")
    assert "the same command goes on" in said and saved.name in result["reason"]

    # Another learning rate would be another training: refused, and the checkpoint stays.
    other = kit("train", str(recipe), "learning_rate=1e-5")
    assert other.returncode == 2, other.stdout[-2000:] + other.stderr[-2000:]
    assert "learning_rate: 0.01 → 1e-05" in other.stderr and "--overwrite" in other.stderr
    assert saved.is_dir()

    # So would other rows.
    rows = Path(str(Recipe.load(recipe).dataset))
    kept = rows.read_text(encoding="utf-8")
    rows.write_text(kept.replace("two days", "ten days"), encoding="utf-8")
    other = kit("train", str(recipe))
    assert other.returncode == 2 and "the training rows changed" in other.stderr, other.stderr[-2000:]
    rows.write_text(kept, encoding="utf-8")

    again = kit("run", str(recipe))
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert f"goes on from {saved.name}" in again.stdout
    result = read_result(run)
    assert f"checkpoint-{result['train']['resumed_from']}" == saved.name
    assert steps_of(run) == list(range(1, result["train"]["steps"] + 1))
    assert len(result["train"]["losses"]) == result["train"]["steps"]


def test_twice_stops_at_once(taught: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, taught("qwen2"), name="twice", gguf=[], per_device_train_batch_size=1,
                          gradient_accumulation_steps=64)
    run = tmp_path / "runs" / "twice"
    code, said = stopped(["kit", "train", str(recipe)], run, signal.SIGINT, times=2)
    assert code == 130, said[-3000:]
    assert read_result(run)["status"] == "stopped"
    assert not list((run / "checkpoints").glob("checkpoint-*"))
