"""Two real processes over gloo: each engine trains as one process does, and goes on exactly after a stop and a kill."""

from __future__ import annotations

import importlib.util
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from kit.common.errors import KitError
from kit.common.files import cache_dir
from kit.runs.run import read_result
from kit.training.checkpoints import problem
from support.command import PROJECT, kit, steps_of, stopped
from support.tiny_runs import write_recipe
from support.train_runs import BASE as ONE_PROCESS
from support.train_runs import drive, in_three

pytestmark = pytest.mark.slow

# 24 rows make six whole steps: with a rest, two processes fill the last batch up with rows from the beginning.
BASE = {**ONE_PROCESS, "max_train_samples": 24}
# Without dropout, whose dice each process throws for itself; full finetuning starts from the same weights in any case.
WAYS: dict[str, dict[str, Any]] = {
    "LoRA bfloat16": {"dtype": "bfloat16"},
    "full bfloat16": {"dtype": "bfloat16", "full_finetuning": True, "learning_rate": 1e-3},
    "full float32": {"dtype": "float32", "full_finetuning": True, "learning_rate": 1e-3},
    "LoRA float32": {"dtype": "float32", "eval_strategy": "steps", "eval_steps": 2, "lora_dropout": 0.0},
}
ENGINES: dict[str, dict[str, Any]] = {
    "DDP": {},
    "FSDP2": {"fsdp": True},
    "ZeRO-2": {"deepspeed": "recipes/deepspeed/zero2.json"},
    "ZeRO-3": {"deepspeed": "recipes/deepspeed/zero3.json"},
}
# Each engine with a format and a method, so that every pair of the three is met; the product is for `make test-all`.
PAIRS = {"DDP": ["full bfloat16", "LoRA float32"], "FSDP2": ["full float32", "LoRA bfloat16"],
         "ZeRO-2": ["LoRA bfloat16", "full float32"], "ZeRO-3": ["LoRA float32", "full bfloat16"]}
# What the trainer really wrapped the model in.
WRAPPERS = {"DDP": "DistributedDataParallel", "FSDP2": "FSDP", "ZeRO-2": "DeepSpeedEngine 2",
            "ZeRO-3": "DeepSpeedEngine 3"}
# How far a loss may be from the one of one process with twice the accumulation: sums are rounded in another order.
TOLERANCE = {"bfloat16": 2e-3, "float32": 1e-5}


def needs(engine: str) -> None:
    package = {"FSDP2": "triton", "ZeRO-2": "deepspeed", "ZeRO-3": "deepspeed"}.get(engine)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{engine} on a CPU needs the package {package}: make engines")
    if package == "deepspeed" and " " in sys.prefix:
        pytest.skip(f"{engine} on a CPU needs an environment in a path without a space")


def a_killed_build(folder: Path) -> None:
    """What PyTorch leaves of a build that was killed, and waits for: nobody would ever take it away."""
    (folder / "deepspeed_shm_comm").mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "kit.lock"):
        (folder / "deepspeed_shm_comm" / "lock").touch()


@pytest.fixture(scope="module")
def one_process(tiny_starter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("one-process")
    common = {**BASE, "model_name": str(tiny_starter), "output_dir": str(folder)}
    found, done = drive([{**common, "run_name": f"way{i}", **way} for i, way in enumerate(WAYS.values())], folder)
    assert found, done.stderr[-3000:]
    return dict(zip(WAYS, found, strict=True))


@pytest.mark.parametrize("engine, names", [
    *(pytest.param(engine, names, id=engine, marks=[pytest.mark.long] if "ZeRO" in engine else [])
      for engine, names in PAIRS.items()),
    *(pytest.param(engine, list(WAYS), id=f"{engine}-every", marks=pytest.mark.long) for engine in ENGINES)])
def test_an_engine(engine: str, names: list[str], one_process: dict[str, dict[str, Any]], tiny_starter: Path,
                   tmp_path: Path) -> None:
    needs(engine)
    # Two processes: half the accumulation makes the same effective batch.
    ways = {name: {**BASE, **WAYS[name], **ENGINES[engine], "gradient_accumulation_steps": 1} for name in names}
    whole, resumed = in_three(ways, tiny_starter, tmp_path, processes=2)
    for name, before, after in zip(names, whole, resumed, strict=True):
        # All are sent SIGTERM in step 3 and save it, but the last, which is killed there.
        assert after["resumed_from"] == (2 if name == names[-1] else 3), name
        for figure in ("losses", "evaluations", "weights", "logged", "tokens"):
            assert after[figure] == before[figure], (name, figure)
        assert before["wrapper"].startswith(WRAPPERS[engine]), before["wrapper"]
        shares = engine in ("FSDP2", "ZeRO-3")  # the norms are in each process
        assert before["held_share"] < 0.6 if shares else before["held_share"] == 1
        alone = one_process[name]
        off = max(abs(a - b) for (_, a), (_, b) in zip(before["losses"], alone["losses"], strict=True))
        print(f"{engine} {name}: at most {off:.2g} from one process")
        assert off <= TOLERANCE[WAYS[name]["dtype"]], (name, before["losses"], alone["losses"])
        assert before["tokens"] == alone["tokens"]
    falls = whole[-1]["losses"]
    assert falls[-1][1] < falls[0][1]


def test_two_nodes_meet_through_torchruns_rendezvous(one_process: dict[str, dict[str, Any]], tiny_starter: Path,
                                                     tmp_path: Path) -> None:
    """Two torchruns with a process each, as on two machines with a disk in common."""
    recipe = {**BASE, **WAYS["LoRA float32"], "model_name": str(tiny_starter), "output_dir": str(tmp_path),
              "gradient_accumulation_steps": 1}
    given, out = tmp_path / "recipes.json", tmp_path / "out.json"
    given.write_text(json.dumps([recipe]), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
               "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}", "--rdzv_id", "kit",
               "tests/support/train_driver.py", str(given), str(out)]
    nodes = [subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
             for _ in range(2)]
    said = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    [found] = json.loads(out.read_text(encoding="utf-8"))
    assert found["losses"] == one_process["LoRA float32"]["losses"]


@pytest.mark.parametrize("engine", [
    pytest.param(engine, marks=[] if engine == "FSDP2" else [pytest.mark.long]) for engine in ENGINES])
def test_torchrun_is_stopped_and_goes_on_to_a_verified_run(engine: str, taught: Callable[..., Path],
                                                           tmp_path: Path) -> None:
    needs(engine)
    recipe = write_recipe(tmp_path, taught("qwen2", short=True), name="two", per_device_train_batch_size=4, gguf=[],
                          **ENGINES[engine])
    run = tmp_path / "runs" / "two"
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "kit", "train", str(recipe)]
    code, said = stopped(command, run, signal.SIGTERM)
    assert code != 0 and read_result(run)["status"] == "stopped", said[-3000:]
    [saved] = (run / "checkpoints").glob("checkpoint-*")
    assert problem(saved) == ""

    alone = kit("train", str(recipe), "fsdp=false", "deepspeed=null")
    changes = f"processes: 2 → 1; engine: {engine} → one process"
    assert alone.returncode == 2 and changes in alone.stderr, alone.stderr[-3000:]

    done = subprocess.run([sys.executable, "-m", *command], cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert saved.name in done.stdout
    # Only the main process speaks.
    assert done.stdout.count("── 10. Train ──") == 1 and done.stdout.count("finished: ") == 1
    result = read_result(run)
    assert result["status"] == "finished" and steps_of(run) == list(range(1, result["train"]["steps"] + 1))


def test_one_process_is_told_what_needs_several(tmp_path: Path) -> None:
    zero2 = "deepspeed=recipes/deepspeed/zero2.json"
    for verb, field in (("train", "fsdp=true"), ("run", "fsdp=true"), ("run", zero2)):
        done = kit(verb, "recipes/quickstart.yaml", f"output_dir={tmp_path}", field)
        assert done.returncode == 2 and "torchrun --nproc_per_node 2 -m kit train" in done.stderr, done.stderr
        assert not (tmp_path / "quickstart").exists()
    done = kit("run", "recipes/quickstart.yaml", f"output_dir={tmp_path}", WORLD_SIZE="2", RANK="0")
    assert done.returncode == 2 and "torchrun" in done.stderr


def test_deepspeed_with_one_process_keeps_the_optimiser_on_the_cpu(taught: Callable[..., Path], tmp_path: Path) -> None:
    needs("ZeRO-2")
    a_killed_build(cache_dir() / "torch_extensions")
    recipe = write_recipe(tmp_path, taught("qwen2", short=True), name="one", gguf=[], max_steps=3,
                          deepspeed="recipes/deepspeed/zero2-offload.json")
    done = kit("train", str(recipe))
    result = read_result(tmp_path / "runs" / "one")
    assert done.returncode == 0 and result["status"] == "finished", done.stderr[-3000:]
    assert "1 process: ZeRO-2" in done.stdout and result["train"]["steps"] == 3


def test_a_path_that_the_linker_would_split_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from kit.training.trainer import load_deepspeed_operator

    monkeypatch.setattr(torch, "__file__", "/my work/torch/__init__.py")
    with pytest.raises(KitError, match="/my work/torch"):
        load_deepspeed_operator()
