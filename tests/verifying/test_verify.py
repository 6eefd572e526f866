"""Untouched runs pass: whole runs of tiny models of several families and settings, each verified to green.

Each has a real vocabulary, chat template and architecture, and goes the notebook's whole way.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.batch import run_cells
from kit.runs.gates import Gates
from kit.runs.run import read_result
from kit.verifying.parity import compare
from kit.verifying.reference import Reference
from support.tiny_runs import SYSTEM, talks, turns, write_recipe, write_rows

pytestmark = pytest.mark.slow

# Qwen3's template puts an empty thought before an answer unless told not to: the answer is scored with it.
PLAIN: dict[str, dict[str, Any]] = {"qwen3": {"enable_thinking": False}}
EVERY = ["f16", "q8_0", "q4_k_m"]


def gates_of(run: Path) -> dict[str, dict[str, Any]]:
    verdict = json.loads((run / "verify.json").read_text(encoding="utf-8"))
    failed = {gate["name"]: (gate["figure"], gate["detail"]) for gate in verdict["gates"] if gate["passed"] is False}
    assert verdict["passed"] and not failed, failed
    for gate in verdict["gates"]:
        if gate["name"].startswith(("parity", "control")):
            print(f"{run.name:24} {gate['name']:26} {gate['figure']:60} {gate['tolerance']}")
    return {gate["name"]: gate for gate in verdict["gates"]}


@pytest.fixture
def whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Run the notebook's cells in this process; returns the run folder and its gates by name, all of them passed.

    The rehearsal is left out here: it takes as long as the run, and has tests of its own.
    """
    def run(model: Path, rows: list[Any] | None = None, **fields: Any) -> tuple[Path, dict[str, Any]]:
        monkeypatch.setattr("kit.rehearse", lambda recipe: Gates("export rehearsal"))
        recipe = write_recipe(tmp_path, model, rows, **fields)
        assert run_cells(str(recipe), {}, overwrite=False) == 0
        folder = tmp_path / "runs" / recipe.stem
        return folder, gates_of(folder)

    return run


def test_qwen3(taught: Callable[..., Path], whole_run: Callable[..., Any]) -> None:
    """With enable_thinking off, three quantisations, and the page that says so."""
    run, gates = whole_run(taught("qwen3"), name="qwen3", gguf=EVERY, **PLAIN["qwen3"])
    assert {f"{gate} {name}" for gate in ("origin", "tokenizer", "shape", "template", "parity") for name in EVERY} \
        | {"sha256", "secrets", "labels", "stop token", "merged config", "merge", "parity adapter", "parity merged",
           "control: the base differs", "template Modelfile", "stops by itself", "held-out score"} <= set(gates)
    assert "VERIFIED" in (run / "report.html").read_text(encoding="utf-8")
    assert read_result(run)["status"] == "finished"
    check_figures(run, gates)


def check_figures(run: Path, gates: dict[str, dict[str, Any]]) -> None:
    # What was learnt is sure enough that near-ties don't decide, and the figures are far from what is allowed.
    scores = json.loads((run / "verify.json").read_text(encoding="utf-8"))["scores"]
    assert scores["adapter"]["exact"] == scores["f16"]["exact"] == scores["q8_0"]["exact"] >= 0.75
    assert kl(gates["parity f16"]) < 1e-4
    assert kl(gates["parity q8_0"]) < 2e-3


# Each with a seed of its own: sound runs pass whatever their seed. How many answers are right does hang on it, and on
# the CPU's rounding: with 3 all are, with 1 six or five of eight.
def test_llama(taught: Callable[..., Path], whole_run: Callable[..., Any]) -> None:
    check_figures(*whole_run(taught("llama"), name="llama", gguf=["f16", "q8_0"], random_state=3, seed=3))


@pytest.mark.long
def test_gemma(taught: Callable[..., Path], whole_run: Callable[..., Any]) -> None:
    # Its template opens an answer with an empty thought unless it is to think, and rows have none.
    run, gates = whole_run(taught("gemma"), name="gemma", gguf=["f16", "q8_0"], enable_thinking=True, max_steps=25,
                           random_state=2, seed=2)
    check_figures(run, gates)


def kl(gate: dict[str, Any]) -> float:
    return float(gate["figure"].removeprefix("KL ").split()[0])


@pytest.mark.long
@pytest.mark.parametrize("family, seed", [("qwen2", 3), ("qwen3", 1), ("qwen3", 2)])
def test_other_seeds(family: str, seed: int, taught: Callable[..., Path], whole_run: Callable[..., Any]) -> None:
    check_figures(*whole_run(taught(family), name=f"{family}-{seed}", gguf=["f16", "q8_0"], random_state=seed,
                             seed=seed, **PLAIN.get(family, {})))


@pytest.mark.long
def test_function_calls(tiny: Callable[..., Path], whole_run: Callable[..., Any], tmp_path: Path) -> None:
    """Definitions, calls and results, from the rows to each file's own template."""
    definition = {"type": "function", "function": {"name": "find", "parameters": {
        "type": "object", "properties": {"parcel": {"type": "integer"}}}}}
    with (tmp_path / "with-tools.jsonl").open("w", encoding="utf-8") as file:
        for number in range(40):
            call = {"type": "function", "function": {"name": "find", "arguments": {"parcel": number}}}
            talk = [{"role": "user", "content": f"包裹{number}在哪里？"}, {"role": "assistant", "tool_calls": [call]},
                    {"role": "tool", "content": '{"place": "北京"}'}, {"role": "assistant", "content": "在北京。"}]
            file.write(json.dumps({"messages": talk[: 2 + 2 * (number % 2)], "tools": [definition]}) + "\n")
    run, gates = whole_run(tiny("qwen3"), name="calls", dataset=str(tmp_path / "with-tools.jsonl"),
                           gguf=["f16", "q8_0"], learning_rate=2e-2, enable_thinking=False)
    # All eight held-out rows have tools; Ollama's template can't show them.
    counts = {name: int(gates[f"template {name}"]["figure"].split()[0]) for name in ("f16", "Modelfile")}
    assert counts["f16"] >= counts["Modelfile"] + 8
    assert any("<tool_call>" in answer for answer in Reference.load(run / "reference.safetensors").expected)


SELDOM = {"8bit", "rslora", "base-chatml", "alpaca"}  # their training and merge have tests of their own
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qlora": ("qwen2", {"load_in_4bit": True, "save_merged": "4bit", "gguf": ["q8_0"]}),
    "8bit": ("qwen2", {"load_in_8bit": True, "gguf": ["q8_0"]}),
    "full": ("qwen3", {"full_finetuning": True, "learning_rate": 2e-3, "enable_thinking": True, "gguf": ["q8_0"]}),
    "rslora": ("qwen2", {"use_rslora": True, "lora_alpha": 8, "system_prompt": "简短。 Be brief.", "gguf": ["q8_0"]}),
    "base-chatml": ("qwen2-base", {"prompt_style": "chatml", "bias": "all", "gguf": ["q8_0"]}),
    "alpaca": ("qwen2", {"prompt_style": "alpaca", "max_steps": 80, "gguf": ["q8_0"]}),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] if name in SELDOM else [])
                                  for name in VARIANTS])
def test_a_setting(name: str, taught: Callable[..., Path], whole_run: Callable[..., Any]) -> None:
    family, fields = VARIANTS[name]
    _, gates = whole_run(taught(family), name=name, **fields)
    assert {"parity merged", "parity q8_0", "template Modelfile", "stops by itself"} <= set(gates)
    if fields.get("load_in_4bit") or fields.get("load_in_8bit"):
        assert "against merged" in gates["parity q8_0"]["detail"]
    if fields.get("save_merged") == "4bit":
        assert {"parity merged-4bit", "template merged-4bit"} <= set(gates)
    if name == "full":
        assert "parity adapter" not in gates


# Without an export these take seconds: what they change is what is recorded and compared.
UNSHIPPED: dict[str, dict[str, Any]] = {
    "no-held-out": {"test_size": 0},
    "lazy": {"lazy_preprocess": True, "temperature": 2.0},
    "cut": {"max_new_tokens": 3, "metric": "none", "lazy_preprocess": True, "temperature": 2.0},
}


@pytest.mark.parametrize("name", ["cut", pytest.param("no-held-out", marks=pytest.mark.long),
                                  pytest.param("lazy", marks=pytest.mark.long)])
def test_an_adapter_alone(name: str, taught: Callable[..., Path], whole_run: Callable[..., Any]) -> None:
    run, gates = whole_run(taught("qwen3", short=True), name=name, save_merged="none", gguf=[], **UNSHIPPED[name])
    # The answers kept are greedy ones, whatever the recipe samples.
    reference = Reference.load(run / "reference.safetensors")
    kept = compare(reference, reference.predictions).answers
    assert kept and all(kept.values())
    assert "stops by itself" not in gates  # it is about GGUFs
    assert {"parity adapter", "control: the base differs"} <= set(gates)
    assert not [gate for gate in gates if "merge" in gate]


LONG = [SYSTEM, *turns("Where is my parcel 9? " + "It was blue. " * 250, "可以，三天内退回。🙂")]


def test_long_held_out_rows(taught: Callable[..., Path], whole_run: Callable[..., Any], tmp_path: Path) -> None:
    """Of rows longer than the reference takes, those that fit are compared."""
    held_out = write_rows(tmp_path / "held-out.jsonl", [LONG, *talks()[:3], LONG])
    run, _ = whole_run(taught("qwen3", short=True), name="long", save_merged="none", gguf=[], test_size=0,
                       max_seq_length=2048, eval_dataset=str(held_out), eval_overlap="keep", max_steps=20)
    assert {row.number for row in Reference.load(run / "reference.safetensors").rows} == {1, 2, 3}


@pytest.mark.parametrize("overlong", [pytest.param("drop", marks=pytest.mark.long), "truncate_prompt"])
def test_held_out_rows_that_are_left_out_or_shortened(overlong: str, taught: Callable[..., Path],
                                                      whole_run: Callable[..., Any], tmp_path: Path) -> None:
    """The rows are numbered here as in training, so each answer is held against its own row's."""
    held_out = write_rows(tmp_path / "held-out.jsonl", [LONG, *talks()[:6]])
    run, _ = whole_run(taught("qwen3", short=True), name="overlong", save_merged="none", gguf=[], test_size=0,
                       overlong_rows=overlong, eval_dataset=str(held_out), eval_overlap="keep", **PLAIN["qwen3"])
    scores = json.loads((run / "verify.json").read_text(encoding="utf-8"))["scores"]
    assert scores["adapter"] == read_result(run)["score_after"]
    assert scores["adapter"]["exact"] >= 0.8
