"""A stopped training goes on as if it had not been stopped: losses and weights equal the uninterrupted ones'.

One process here, two in tests/training/test_processes.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from support.train_runs import BASE, drive, in_three

pytestmark = pytest.mark.slow

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
    assert re.search(r"DiskError: .*checkpoint-4 .*written: .+\n.*checkpoint_dir", done.stderr), done.stderr[-3000:]
    [resumed], done = drive(recipe("parts"), tmp_path)
    assert resumed["resumed_from"] == 2
    assert "checkpoint-4 is skipped" in done.stdout
    assert (resumed["losses"], resumed["weights"]) == (whole["losses"], whole["weights"])
