"""Stopping a run from outside reaches its training; the same command goes on, and nothing else does silently."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from kit.recipe.recipe import Recipe
from kit.runs.run import read_result
from support.command import kit, steps_of, stopped
from support.tiny_runs import write_recipe

pytestmark = pytest.mark.slow







def test_kit_run_reaches_the_kernel_and_goes_on(taught: Callable[..., Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, taught("qwen2", short=True), name="stop", gguf=[])
    run = tmp_path / "runs" / "stop"
    code, said = stopped(["kit", "run", str(recipe)], run, signal.SIGTERM)
    result = read_result(run)
    assert code == 75, said[-3000:]
    assert (result["status"], result["stage"]) == ("stopped", "train")
    [saved] = (run / "checkpoints").glob("checkpoint-*")
    assert saved.name in result["reason"]

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
    assert saved.name in again.stdout
    result = read_result(run)
    assert f"checkpoint-{result['train']['resumed_from']}" == saved.name
    assert steps_of(run) == list(range(1, result["train"]["steps"] + 1))
    assert len(result["train"]["losses"]) == result["train"]["steps"]


def test_twice_stops_at_once(taught: Callable[..., Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, taught("qwen2", short=True), name="twice", gguf=[], per_device_train_batch_size=1,
                          gradient_accumulation_steps=64)
    run = tmp_path / "runs" / "twice"
    code, said = stopped(["kit", "train", str(recipe)], run, signal.SIGINT, times=2)
    assert code == 130, said[-3000:]
    assert read_result(run)["status"] == "stopped"
    assert not list((run / "checkpoints").glob("checkpoint-*"))


@pytest.mark.long
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits another process")
@pytest.mark.parametrize(("limit", "named"), [(20_000, "checkpoint-"), (0, "log.jsonl")])
def test_a_full_disk_ends_a_training_with_exit_code_1(taught: Callable[..., Path], tmp_path: Path, limit: int,
                                                      named: str) -> None:
    """From the fourth step on no file grows beyond the limit, which with 0 is true of result.json and the log, too."""
    recipe = write_recipe(tmp_path, taught("qwen2", short=True), name="full", gguf=[], save_steps=5,
                          save_strategy="steps" if limit else "no")
    run = tmp_path / "runs" / "full"
    code, said = stopped(["kit", "train", str(recipe)], run, limit)
    assert code == 1, said[-3000:]
    assert "Traceback" not in said and named in said and "can't be written" in said and str(run) in said, said[-3000:]
    result = read_result(run)
    assert result["status"] == ("failed" if limit else "stopped") and result["stage"] == "train"
