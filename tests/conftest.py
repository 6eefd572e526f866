"""Fixtures shared by the tests: the starter model's folder, and one real run of the notebook."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many workers as cores: threads of their own would only wait

PROJECT = Path(__file__).resolve().parent.parent
# Few steps: enough for every stage to do its real work, short enough to wait for.
FEW_STEPS = ["max_steps=6", "max_eval_samples=8", "max_new_tokens=48"]


def kit(*arguments: str, timeout: float = 900, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a user types it, from the project's folder."""
    return subprocess.run([sys.executable, "-m", "kit", *arguments], cwd=PROJECT, capture_output=True, text=True,
                          timeout=timeout, env={**os.environ, **environment})


@pytest.fixture(scope="session")
def starter() -> Path:
    from kit.starter import starter_model

    return starter_model()


@pytest.fixture(scope="session")
def tokenizer(starter: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(starter)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`kit run recipes/quickstart.yaml` with few steps; the folder of the finished run."""
    folder = tmp_path_factory.mktemp("runs")
    done = kit("run", "recipes/quickstart.yaml", f"output_dir={folder}", "gguf=[f16, q8_0]", *FEW_STEPS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (folder / "quickstart" / "terminal.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    return folder / "quickstart"
