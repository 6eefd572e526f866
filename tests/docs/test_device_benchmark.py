"""benchmarks/device.py on this machine: what it writes of a way that ends well, and of one that does not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kit.common.files import write_json
from support.command import PROJECT

sys.path.insert(0, str(PROJECT / "benchmarks"))

import device


def test_speed_leaves_out_the_warm_up() -> None:
    # 100 s for the first step, then 10 tokens in each second.
    log = [{"step": step, "seconds": 99 + step, "tokens": 10 * step, "loss": 1.0} for step in range(1, 21)]
    log[0] |= {"seconds": 100, "tokens": 10}
    assert device.warm_speed(log) == 10.0
    assert device.warm_speed(log[: device.WARM_UP]) is None


def test_a_way_that_ended_early_says_where_and_names_no_path(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "4bit"
    assert device.found_in(run) == {"error": "the process ended before it began", "stage": "start"}
    run.mkdir(parents=True)
    write_json(run / "result.json", {"status": "failed", "stage": "train", "pid": 1,
                                     "reason": f"GateError: {tmp_path}/runs/4bit/checkpoints is torn"})
    found = device.found_in(run)
    assert found == {"error": "GateError: runs/4bit/checkpoints is torn", "stage": "train"}
    shown = str(device.table({"device": {"name": "GPU"}, "size": "mid", "no_gguf": "no llama.cpp",
                              "ways": {"4bit": found}}))
    assert "stopped at train" in shown and "no llama.cpp" in shown


def test_without_llama_cpp_no_gguf_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.recipe_fields("tiny", "full", tmp_path)["gguf"] == ["f16", "q8_0"]
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    fields = device.recipe_fields("tiny", "full", tmp_path)
    assert fields["gguf"] == [] and "not installed" in device.no_gguf()
    assert fields["full_finetuning"] and fields["learning_rate"] == device.FULL_RATES["tiny"]


@pytest.mark.slow
@pytest.mark.long
def test_one_way_and_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick: dict[str, Any] = {"max_steps": 8, "gguf": ["f16"], "test_size": 4, "max_new_tokens": 24}
    monkeypatch.setitem(device.SIZES, "tiny", quick)
    monkeypatch.setitem(device.WAYS, "8bit", {"target_modules": ["no_such_layer"]})
    device.benchmark("tiny", ["8bit", "16bit"], tmp_path)
    [path] = tmp_path.glob("*-tiny.json")
    text = path.read_text(encoding="utf-8")
    found = json.loads(text)
    assert str(PROJECT) not in text and "kit-device-" not in text
    assert found["size"] == "tiny" and found["device"]["cores"] > 0 and "torch" in found["versions"]
    wrong, good = found["ways"]["8bit"], found["ways"]["16bit"]
    assert wrong["stage"] == "load" and "no_such_layer" in wrong["error"]
    assert len(good["losses"]) == 8 and good["tokens"] > 0 and good["tokens_per_second_warm"] > 0
    assert 0 < good["peak_memory_gb_training"] <= good["peak_memory_gb"]
    assert {"load", "format", "train", "answer", "save", "merge", "gguf", "verify"} <= set(good["seconds"])
    gates = {gate["name"]: gate for gate in good["gates"]}
    for name in ("precision", "gradients", "merge", "parity merged", "parity f16", "template f16"):
        assert gates[name]["passed"] is True, gates[name]
    assert "KL" in gates["parity f16"]["figure"] and "logits" in gates["parity f16"]["tolerance"]
