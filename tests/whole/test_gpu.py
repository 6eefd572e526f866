"""Unsloth's CUDA path end to end: the benchmark of this device, and what only a GPU does. `make test-gpu` runs it.

The figures go to benchmarks/results. Nothing is downloaded: the models are random ones with Qwen3's vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from support.command import PROJECT
from support.train_runs import drive, in_three

sys.path.insert(0, str(PROJECT / "benchmarks"))

import device

pytestmark = pytest.mark.gpu

# What holds for any model. Whether answers stop by themselves, and how good they are, a random one can't promise.
GATES = {"precision", "LoRA modules", "labels", "gradients", "first loss", "sha256", "secrets", "stop token",
         "merged config", "merge", "parity adapter", "control: the base differs", "parity merged", "template merged"}
GATES_FULL = GATES - {"LoRA modules", "merged config", "merge", "parity adapter", "control: the base differs"} | {
    "trainable"}
GGUF_GATES = {f"{gate} {name}" for gate in ("origin", "tokenizer", "shape", "template", "parity")
              for name in ("f16", "q8_0")}


@pytest.fixture(scope="session", autouse=True)
def cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        why = f"built for CUDA {torch.version.cuda}, sees none" if torch.version.cuda else "is built without CUDA"
        pytest.skip(f"no CUDA device: torch {torch.__version__} {why}")


@pytest.fixture(scope="session")
def measured(cuda: None) -> Callable[[str], dict[str, Any]]:
    """`measured("mid")["4bit"]` is what the benchmark found; all ways of a size are run once, and written."""
    return cache(lambda size: device.benchmark(size, list(device.WAYS))["ways"])


@pytest.fixture(scope="session")
def base(cuda: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the benchmark's tiny model and its rows."""
    folder = tmp_path_factory.mktemp("base")
    said = device.in_a_process(["--base", "tiny", str(folder)])
    assert not said, said
    return folder


def trained(base: Path, folder: Path, *fields: dict[str, Any]) -> list[dict[str, Any]]:
    """What each training of the tiny model found, all in one process."""
    recipes = [{**device.recipe_fields("tiny", "16bit", base), "output_dir": str(folder), "run_name": f"run{number}",
                "save_strategy": "epoch", **own} for number, own in enumerate(fields)]
    found, done = drive(recipes, folder)
    assert found, done.stderr[-3000:]
    return found


def passed(found: dict[str, Any], names: set[str]) -> None:
    gates = [gate for gate in found.get("gates", []) if gate["name"] in names]
    assert {gate["name"] for gate in gates} == names
    assert [gate for gate in gates if gate["passed"] is not True] == []


@pytest.mark.parametrize("way", device.WAYS)
@pytest.mark.parametrize("size", device.SIZES)
def test_a_way_from_the_base_to_the_merged_model(size: str, way: str, measured: Callable[[str], Any]) -> None:
    found = measured(size)[way]
    assert "error" not in found, (found["stage"], found["error"])
    losses = found["losses"]
    third = len(losses) // 3
    assert len(losses) >= 30 and all(map(math.isfinite, losses))
    assert mean(losses[-third:]) < mean(losses[:third])
    passed(found, GATES_FULL if way == "full" else GATES)
    layers = next(gate["figure"] for gate in found["gates"] if gate["name"] == "precision")
    assert way == "full" or f"{way.removesuffix('bit')}-bit linear layers" in layers
    assert found["tokens_per_second_warm"] > 0 and found["peak_memory_gb_training"] > 0


@pytest.mark.parametrize("way", device.WAYS)
@pytest.mark.parametrize("size", device.SIZES)
def test_its_gguf(size: str, way: str, measured: Callable[[str], Any]) -> None:
    if reason := device.no_gguf():
        pytest.skip(reason)
    passed(measured(size)[way], GGUF_GATES)


def test_packed_rows_do_not_see_each_other(base: Path, tmp_path: Path) -> None:
    """One step over all rows: joined to full length they have the loss, and the tokens, they have side by side."""
    one = {"max_steps": 1, "per_device_train_batch_size": 24, "save_strategy": "steps", "save_steps": 1}
    apart, packed = trained(base, tmp_path, one, {**one, "packing": True})
    assert packed["tokens"] == apart["tokens"] > 0
    assert packed["losses"][0][1] == pytest.approx(apart["losses"][0][1], abs=0.02)


def test_packed_rows_are_learnt(base: Path, tmp_path: Path) -> None:
    epochs = {"max_steps": None, "num_train_epochs": 10, "per_device_train_batch_size": 1}
    [found] = trained(base, tmp_path, {**epochs, "packing": True})
    losses = [loss for _, loss in found["losses"]]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    assert len(losses) < 24 * 10, "24 rows an epoch would be as many steps: nothing was joined"


def test_recomputed_activations_change_no_loss(base: Path, tmp_path: Path) -> None:
    six = {"max_steps": 6, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 6}
    kept, recomputed, offloaded = trained(base, tmp_path, *(
        {**six, "use_gradient_checkpointing": how} for how in (False, True, "unsloth")))
    for other in (recomputed, offloaded):
        assert other["losses"] == [[step, pytest.approx(loss, abs=5e-3)] for step, loss in kept["losses"]]


def test_a_stopped_training_goes_on(base: Path, tmp_path: Path) -> None:
    # A rate that does not magnify what a GPU adds up in another order each time.
    own = {"dataset": str(base / "rows.jsonl"), "enable_thinking": False, "learning_rate": 1e-3}
    ways = {way: {**own, **fields} for way, fields in device.WAYS.items()} | {"killed": own}
    whole, resumed = in_three(ways, base / "Qwen3-tiny", tmp_path)
    for name, before, after in zip(ways, whole, resumed, strict=True):
        assert after["resumed_from"] == (2 if name == "killed" else 3), name
        assert after["tokens"] == before["tokens"], name
        assert after["losses"] == [[step, pytest.approx(loss, abs=1e-3)] for step, loss in before["losses"]], name
