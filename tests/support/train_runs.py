"""Trainings that are stopped and resumed, by tests/support/train_driver.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.command import PROJECT

BASE: dict[str, Any] = {
    "dataset": "starter", "max_train_samples": 23, "test_size": 5, "max_seq_length": 256, "max_steps": 6,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.01, "warmup_steps": 2,
    "use_gradient_checkpointing": False, "save_strategy": "steps", "save_steps": 2, "save_minutes": None,
    "local_files_only": True}


def drive(recipes: list[dict[str, Any]], folder: Path, processes: int = 1, stop: int = 0, **environment: str
          ) -> tuple[list[dict[str, Any]], subprocess.CompletedProcess[str]]:
    """What tests/support/train_driver.py wrote of these recipes; [] when it was killed."""
    (folder / "recipes.json").write_text(json.dumps(recipes), encoding="utf-8")
    out = folder / "out.json"
    out.unlink(missing_ok=True)
    start = [sys.executable] if processes == 1 else \
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    driver = PROJECT / "tests" / "support" / "train_driver.py"
    done = subprocess.run([*start, str(driver), str(folder / "recipes.json"), str(out)],
                          capture_output=True, text=True, timeout=900, cwd=PROJECT,
                          env={**os.environ, "STOP": str(stop), **environment})
    return (json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []), done


def in_three(ways: dict[str, dict[str, Any]], model: Path, folder: Path, processes: int = 1, stop: int = 3,
             **environment: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train the ways uninterrupted; and stopped in step 3, the last one killed, and on from there."""
    def recipes(name: str) -> list[dict[str, Any]]:
        return [{**BASE, "model_name": str(model), "output_dir": str(folder / name), "run_name": f"way{number}", **way}
                for number, way in enumerate(ways.values())]

    stopped, done = drive(recipes("parts"), folder, processes, stop, **environment)
    assert not stopped and done.returncode != 0, done.stderr[-3000:]
    for number in range(len(ways) - 1):
        there = sorted(path.name for path in (folder / "parts" / f"way{number}" / "checkpoints").glob("checkpoint-*"))
        assert f"checkpoint-{stop}" in there, (list(ways)[number], there, done.stderr[-3000:])
    found, done = drive(recipes("parts") + recipes("whole"), folder, processes, **environment)
    assert found, done.stderr[-3000:]
    return found[len(ways):], found[:len(ways)]
