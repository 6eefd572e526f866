"""A stopped training goes on as if it had not been stopped: losses and weights equal the uninterrupted ones'.

One process here, two in tests/test_processes.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT
from tiny_models import tiny_starter

pytestmark = pytest.mark.slow

__all__ = ["tiny_starter"]  # a fixture
BASE: dict[str, Any] = {
    "dataset": "starter", "max_train_samples": 23, "test_size": 5, "max_seq_length": 256, "max_steps": 6,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.01, "warmup_steps": 2,
    "use_gradient_checkpointing": False, "save_strategy": "steps", "save_steps": 2, "save_minutes": None,
    "local_files_only": True}
# What each adds to BASE. 23 rows in steps of 4: the sixth step ends the first epoch with less than the others.
WAYS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16", "lora_dropout": 0.2},
    "logged in threes": {"dtype": "float32", "logging_steps": 3, "max_steps": 7},
    "epochs and evaluations": {"dtype": "float32", "max_steps": None, "num_train_epochs": 2, "eval_strategy": "epoch",
                               "save_strategy": "epoch", "neftune_noise_alpha": 5,
                               "train_sampling_strategy": "group_by_length", "lr_scheduler_type": "cosine"},
    "4-bit": {"load_in_4bit": True, "lora_dropout": 0.1},
    "8-bit": {"load_in_8bit": True},
    "full": {"full_finetuning": True, "learning_rate": 1e-3},
    "full bfloat16": {"dtype": "bfloat16", "full_finetuning": True, "learning_rate": 1e-3},
    "float32": {"dtype": "float32", "lora_dropout": 0.2, "eval_strategy": "steps", "eval_steps": 2},
}


def drive(recipes: list[dict[str, Any]], folder: Path, processes: int = 1, stop: int = 0, **environment: str
          ) -> tuple[list[dict[str, Any]], subprocess.CompletedProcess[str]]:
    """What tests/train_driver.py wrote of these recipes; [] when it was killed."""
    (folder / "recipes.json").write_text(json.dumps(recipes), encoding="utf-8")
    out = folder / "out.json"
    out.unlink(missing_ok=True)
    start = [sys.executable] if processes == 1 else \
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    done = subprocess.run([*start, str(PROJECT / "tests" / "train_driver.py"), str(folder / "recipes.json"), str(out)],
                          capture_output=True, text=True, timeout=900, cwd=PROJECT,
                          env={**os.environ, "STOP": str(stop), **environment})
    return (json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []), done


def in_three(ways: dict[str, dict[str, Any]], model: Path, folder: Path, processes: int = 1, stop: int = 3,
             **environment: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train the ways uninterrupted; stopped in step 3, the last one killed; and on from there."""
    def recipes(name: str) -> list[dict[str, Any]]:
        return [{**BASE, "model_name": str(model), "output_dir": str(folder / name), "run_name": f"way{number}", **way}
                for number, way in enumerate(ways.values())]

    whole, done = drive(recipes("whole"), folder, processes, **environment)
    assert whole, done.stderr[-3000:]
    stopped, done = drive(recipes("parts"), folder, processes, stop, **environment)
    assert not stopped and done.returncode != 0, done.stderr[-3000:]
    for number in range(len(ways) - 1):
        there = sorted(path.name for path in (folder / "parts" / f"way{number}" / "checkpoints").glob("checkpoint-*"))
        assert f"checkpoint-{stop}" in there, (list(ways)[number], there, done.stderr[-3000:])
    resumed, done = drive(recipes("parts"), folder, processes, **environment)
    assert resumed, done.stderr[-3000:]
    return whole, resumed


def test_every_way_goes_on_exactly(tiny_starter: Path, tmp_path: Path) -> None:
    whole, resumed = in_three(WAYS, tiny_starter, tmp_path)
    for name, before, after in zip(WAYS, whole, resumed, strict=True):
        # The last one was killed in step 3, before anything was written of it.
        assert after["resumed_from"] == (2 if name == "float32" else 3), name
        for figure in ("losses", "evaluations", "weights", "logged", "tokens"):
            assert after[figure] == before[figure], (name, figure)
    assert len({run["weights"] for run in whole}) == len(WAYS)


def test_a_full_disk_loses_nothing_that_was_saved(tiny_starter: Path, tmp_path: Path) -> None:
    def recipe(name: str) -> list[dict[str, Any]]:
        return [{**BASE, "model_name": str(tiny_starter), "output_dir": str(tmp_path / name), **WAYS["float32"]}]

    [whole], _ = drive(recipe("whole"), tmp_path)
    found, done = drive(recipe("parts"), tmp_path, FULL="3")
    assert not found and done.returncode != 0
    assert re.search(r"checkpoint-4 could not be written: .+\n.*checkpoint_dir", done.stderr), done.stderr[-3000:]
    [resumed], done = drive(recipe("parts"), tmp_path)
    assert resumed["resumed_from"] == 2
    assert "checkpoint-4 is skipped" in done.stdout
    assert (resumed["losses"], resumed["weights"]) == (whole["losses"], whole["weights"])
