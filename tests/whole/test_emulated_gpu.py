"""Unsloth's GPU path, and the kit's, on emulated cards (support/cuda_emulation.py): what was found without one.

Triton's interpreter takes about 100 ms for a token of a training step, so the models have one layer and the rows are
short.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from support.command import PROJECT, kit
from support.cuda_emulation import PROFILES, card_environment
from support.tiny_runs import TOPICS, turns, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                                                   reason="no triton: make engines installs it")]
SHAPE = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
FIELDS: dict[str, Any] = {
    "local_files_only": True, "test_size": 2, "max_seq_length": 128, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1, "max_steps": 2, "learning_rate": 1e-2, "r": 8, "lora_alpha": 16,
    "max_new_tokens": 6, "metric": "none", "enable_thinking": False, "gguf": [], "save_strategy": "no",
    "use_gradient_checkpointing": False}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`base("qwen3")` is a model of one layer that knows some words, in a folder with rows.jsonl."""
    from support.tiny_runs import taught_model

    folder = tmp_path_factory.mktemp("emulated")
    short = list(TOPICS)[1:4:2]
    write_rows(folder / "rows.jsonl", [turns(topic.format(1024 + n), TOPICS[topic]) for n in range(8) for topic in short])
    return cache(lambda family: taught_model(family, folder / family, short=True, **SHAPE))


def recipe_of(model: Path, folder: Path, **fields: Any) -> dict[str, Any]:
    return {**FIELDS, "model_name": str(model), "dataset": str(model.parent / "rows.jsonl"), "output_dir": str(folder),
            "run_name": "run", **fields}


def on_card(profile: str, code: str, *arguments: str, **environment: str) -> Any:
    """What `code` prints as its last line, as JSON, in a process that sees this card."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=PROJECT, text=True, capture_output=True,
                          timeout=600, env=card_environment(profile, **environment))
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("profile, family, fields, noted", [
    ("T4", "qwen3", {"eval_strategy": "steps", "eval_steps": 2}, "float16: compute capability 7.5 has no bfloat16"),
    ("A100", "llama", {"load_in_4bit": True, "packing": True, "use_gradient_checkpointing": "unsloth"},
     "bfloat16: compute capability 8.0 has bfloat16")])
def test_the_main_notebook(profile: str, family: str, fields: dict[str, Any], noted: str,
                           base: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_of(base(family), tmp_path, **fields)), encoding="utf-8")
    done = kit("run", str(recipe), **card_environment(profile))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result, manifest = (json.loads((tmp_path / "run" / f"{name}.json").read_text(encoding="utf-8"))
                        for name in ("result", "manifest"))
    assert result["status"] == "finished" and "gates passed" in result["verdict"]
    assert manifest["machine"]["device"] == "cuda" and manifest["machine"]["device_name"] == PROFILES[profile].name
    text = json.dumps(manifest)
    assert noted in text and "attention: PyTorch's SDPA" in text
    gates = {gate["name"]: gate for stage in result["gates"].values() for gate in stage}
    assert gates["settings"]["passed"] is True, gates["settings"]
    verify = json.loads((tmp_path / "run" / "verify.json").read_text(encoding="utf-8"))
    memory = next(gate for gate in verify["gates"] if gate["name"] == "in memory")
    assert f"in {'float16' if profile == 'T4' else 'bfloat16'}" in memory["figure"]
