"""The fixtures of all tests, as one plugin. What takes long to make is made once for all workers of a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from support.command import FEW_STEPS, kit
from support.tiny_models import small_starter, tiny_model
from support.tiny_runs import learn_surely, taught_model


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` that `make` filled, whichever worker came first; the others wait for it.

    Nobody may change what lies in it: a test that has to takes a copy.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once" / name
    folder.mkdir(parents=True, exist_ok=True)
    done = Path(f"{folder}.done")
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starter model's folder, in the cache."""
    from kit.models.starter import starter_model

    return starter_model()


@pytest.fixture(scope="session")
def tokenizer(starter: Path) -> Any:
    """The starter's tokenizer, as it lies there: without kit.load_tokenizer's settling of template and pad token."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(starter)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny("qwen3")` is the folder of a random model of that family, two layers small.

    With `short=True` its vocabulary has 2,300 tokens: it loads a hundred times as fast, and makes no GGUF.
    """
    return cache(lambda family, short=False: once(
        tmp_path_factory, f"tiny-{family}" + "-short" * short, lambda folder: tiny_model(family, folder, short)))


@pytest.fixture(scope="session")
def tiny_starter(starter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the starter model's tokenizer and architecture, two layers small: the fastest to train."""
    return once(tmp_path_factory, "tiny-starter", lambda folder: small_starter(starter, folder))


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`taught("qwen3")` is the folder of a tiny model that knows the words of `talks`; `short` as of `tiny`."""
    return cache(lambda family, short=False: once(
        tmp_path_factory, "taught" + "-short" * short + f"/tiny-{family}",
        lambda folder: taught_model(family, folder, short=short)))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`kit run recipes/quickstart.yaml` with few steps; the folder of the finished run."""
    def run(folder: Path) -> None:
        done = kit("run", "recipes/quickstart.yaml", f"output_dir={folder}", "gguf=[f16, q8_0]", *FEW_STEPS)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        (folder / "quickstart" / "terminal.txt").write_text(done.stdout + done.stderr, encoding="utf-8")

    return once(tmp_path_factory, "runs", run) / "quickstart"


@pytest.fixture(scope="session")
def sure_run(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the command on a tiny Qwen3 that is sure of its answers."""
    return once(tmp_path_factory, "sure", lambda folder: learn_surely(tiny("qwen3"), folder)) / "runs" / "tiny"
