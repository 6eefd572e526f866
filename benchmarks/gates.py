"""How often the gates after training fail a sound export, and which faults they find: both error rates.

    python benchmarks/gates.py                                 every training below, a process each
    python benchmarks/gates.py qwen3-50 starter-arithmetic-50  those only
    python benchmarks/gates.py --rows NAME=FILE                also the starter on rows of your own

Each training is exported as f16, q8_0, q5_k_m and q4_k_m, and judged on all conversations of its reference and on DRAWS
of 4, 8 and 32 of them, drawn with replacement: a sound export should fail at most once in 500. Then those of
WITH_FAULTS are exported with one fault at a time, judged on about as many tokens as a large model is. What is there
already in the result (benchmarks/results/gates.json) is not made again.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]
RESULT = PROJECT / "benchmarks" / "results" / "gates.json"
FORMATS = ["f16", "q8_0", "q5_k_m", "q4_k_m"]
DRAWS, DRAWN = 200, (4, 8, 32)
COMMON: dict[str, Any] = {
    "local_files_only": True, "test_size": 32, "max_seq_length": 512, "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1, "use_gradient_checkpointing": False, "max_new_tokens": 32, "metric": "none",
    "save_strategy": "no", "gguf": FORMATS}
STARTER = {"model_name": "starter", "learning_rate": 1e-3}
TINY: dict[str, Any] = {"learning_rate": 1e-2, "r": 32, "lora_alpha": 64, "test_size": 8,
                        "per_device_train_batch_size": 8}


def arithmetic(number: int) -> tuple[str, str]:
    random_ = random.Random(number)
    a, b, word = random_.randint(2, 99), random_.randint(2, 99), random_.choice(["plus", "times", "minus"])
    result = {"plus": a + b, "times": a * b, "minus": a - b}[word]
    return f"What is {a} {word} {b}? Show the sum.", f"{a} {word} {b} makes {result}. So the answer is {result}."


def one_word(number: int) -> tuple[str, str]:
    return f"Is {number} even or odd?", "even" if number % 2 == 0 else "odd"


def code(number: int) -> tuple[str, str]:
    name = ["total", "largest", "count", "mean"][number % 4]
    body = {"total": "sum(values)", "largest": "max(values)", "count": "len(values)",
            "mean": "sum(values) / len(values)"}[name]
    return (f"Write a Python function {name}_{number} of a list of numbers.",
            f"def {name}_{number}(values):\n    \"\"\"The {name} of the values.\"\"\"\n    return {body}\n")


def chinese(number: int) -> tuple[str, str]:
    goods = ["手机", "书", "衣服", "鞋子"][number % 4]
    return (f"订单{1000 + number}里的{goods}什么时候到？",
            f"您好，{goods}已经发出，预计{number % 5 + 1}天内送到，请您耐心等待。")


def long_answer(number: int) -> tuple[str, str]:
    steps = [f"{i}. Take number {number + i}, double it, and write down {2 * (number + i)}." for i in range(1, 16)]
    return f"Explain in fifteen steps how to double the numbers after {number}.", "\n".join(steps)


ROWS: dict[str, Callable[[int], tuple[str, str]]] = {
    "arithmetic": arithmetic, "one-word": one_word, "code": code, "chinese": chinese, "long": long_answer}
TRAININGS: dict[str, dict[str, Any]] = {
    **{f"starter-{rows}-{steps}": {**STARTER, "rows": rows, "max_steps": steps}
       for steps in (5, 50) for rows in ROWS},
    "starter-tickets-5": {**STARTER, "dataset": "starter", "max_steps": 5},
    "starter-tickets-50": {**STARTER, "dataset": "starter", "max_steps": 50},
    "starter-4bit-50": {**STARTER, "rows": "arithmetic", "max_steps": 50, "load_in_4bit": True},
    "starter-full-50": {**STARTER, "rows": "arithmetic", "max_steps": 50, "full_finetuning": True,
                        "learning_rate": 1e-4},
    **{f"{family}-{steps}": {**TINY, "family": family, "max_steps": steps}
       for family in ("qwen2", "qwen3", "llama") for steps in (5, 50)},
    # Its tiny vocabulary takes a token for nearly every letter.
    **{f"gemma-{steps}": {**TINY, "family": "gemma", "max_steps": steps, "max_seq_length": 1024}
       for steps in (5, 50)},
    "starter-arithmetic-500": {**STARTER, "rows": "arithmetic", "max_steps": 500},
    "starter-tickets-500": {**STARTER, "dataset": "starter", "max_steps": 500},
    "qwen3-500": {**TINY, "family": "qwen3", "max_steps": 500},
    "starter-one-word-50-of-4": {**STARTER, "rows": "one-word", "max_steps": 50, "test_size": 4},
    "starter-one-word-50-of-300": {**STARTER, "rows": "one-word", "max_steps": 50, "test_size": 300}}
# Faults take most of the time: a training of each kind shows them.
WITH_FAULTS = {"starter-arithmetic-50", "starter-chinese-50", "starter-long-50", "starter-4bit-50", "starter-full-50",
               "starter-tickets-5", "qwen2-50", "qwen3-50", "llama-5", "gemma-50"}


def trained(fields: dict[str, Any], folder: Path) -> Any:
    """A run of these fields up to its exports, without data check and rehearsal."""
    import kit
    from kit import Recipe, Run
    from support.tiny_runs import talks, taught_model, write_rows

    recipe = {**COMMON, "output_dir": str(folder), "run_name": "bench", **fields}
    if rows := recipe.pop("rows", None):
        path = Path(rows)
        if rows in ROWS:
            path = folder / "rows.jsonl"
            path.write_text("".join(json.dumps(dict(zip(("instruction", "output"), ROWS[rows](number), strict=True)))
                                    + "\n" for number in range(400)), encoding="utf-8")
        recipe["dataset"] = str(path)
    if family := recipe.pop("family", None):
        (folder / "model").mkdir()
        recipe |= {"model_name": str(taught_model(family, folder / "model")),
                   "dataset": str(write_rows(folder / "rows.jsonl", talks()))}
    chosen = Recipe.load(recipe)
    run = Run.start(chosen)
    model, tokenizer = kit.load_model(chosen)
    run.manifest(chosen, tokenizer, [])
    model = kit.add_lora(model, chosen)
    data = kit.load_data(chosen, tokenizer)
    kit.train(kit.make_trainer(model, tokenizer, data, chosen), chosen)
    replies = kit.answer(model, tokenizer, data["test"]["prompt"][:32], chosen)
    saved = kit.save_adapter(model, tokenizer, run)
    kit.record(model, tokenizer, data, replies, chosen, run)
    del model
    kit.free_memory()
    merged = kit.merge(saved, run, chosen)
    kit.export_gguf(merged, run.gguf, FORMATS, "bench", kit.about(run))
    kit.seal(run)
    run.finish()
    return run


def predictions_of(path: Path, reference: Any) -> list[Any]:
    from kit.gguf.child import LlamaChild
    from kit.verifying.parity import gguf_predictions

    with LlamaChild(path, n_ctx=max(len(row.ids) for row in reference.rows) + 16, logits=True) as child:
        return list(gguf_predictions(child, reference))


def only(evidence: Any, places: list[int]) -> Any:
    """The evidence with those of its compared rows."""
    from dataclasses import replace

    def pick(items: list[Any]) -> list[Any]:
        return [items[place] for place in places]

    reference = evidence.reference._replace(rows=pick(evidence.reference.rows),
                                            predictions=pick(evidence.reference.predictions))
    return replace(evidence, reference=reference, base=evidence.base and pick(evidence.base))


def first_tokens(evidence: Any) -> list[int]:
    """The first compared rows, of LEAST_COMPARED tokens or more and FEWEST conversations."""
    from kit.verifying.reference import FEWEST, LEAST_COMPARED

    rows, tokens = evidence.reference.rows, 0
    for place, row in enumerate(rows):
        tokens += len(row.ids)
        if tokens >= LEAST_COMPARED and len({row.number for row in rows[:place + 1]}) >= FEWEST:
            return list(range(place + 1))
    return list(range(len(rows)))


def judged(evidence: Any, header: Any, name: str, predictions: list[Any], numbers: list[int] | None = None) -> Any:
    """The gates of a GGUF on all compared rows, or on those of the held-out rows `numbers`; and its figures."""
    from kit.runs.gates import Gates
    from kit.verifying.answers import Shipped, check_ends
    from kit.verifying.parity import compare, judge_gguf

    if numbers is not None:
        places = [place for number in numbers for place, row in enumerate(evidence.reference.rows)
                  if row.number == number]
        evidence, predictions = only(evidence, places), [predictions[place] for place in places]
    gates = Gates(name)
    figures = compare(evidence.reference, predictions)
    allowed = judge_gguf(gates, name, header, figures, predictions, evidence)
    check_ends(gates, evidence, {name: Shipped(figures, allowed, {})})
    return gates, figures, allowed


def faults(run: Any, evidence: Any) -> Iterator[tuple[str, Callable[[dict[str, Any]], None]]]:
    """Each fault as a change of the merged model's tensors."""
    import torch

    from kit.export.adapter import LowRank, changes_of
    from kit.models.fetch import base_folder
    from kit.verifying.contents import _tensors

    base = _tensors(base_folder(evidence.recipe))
    changes = changes_of(run.adapter) if run.adapter.is_dir() else {}
    low_rank = [name for name, change in changes.items() if isinstance(change, LowRank)]

    def scaled(share: float, part: str = "") -> Callable[[dict[str, Any]], None]:
        def change(tensors: dict[str, Any]) -> None:
            for name in low_rank:
                if part in name:
                    original = base[name](name).float()
                    full = changes[name].applied(original)
                    tensors[name] = (original + share * (full - original)).to(tensors[name].dtype)
        return change

    def noisy(share: float) -> Callable[[dict[str, Any]], None]:
        def change(tensors: dict[str, Any]) -> None:
            name = next(name for name in tensors if "layers.1." in name and "up_proj" in name)
            weight = tensors[name].float()
            tensors[name] = (weight + share * weight.pow(2).mean().sqrt() * torch.randn_like(weight)).to(
                tensors[name].dtype)
        return change

    if low_rank:
        yield from ((f"adapter at {share:.0%}", scaled(share)) for share in (0.0, 0.5, 0.8, 0.9, 2.0))
        yield "one layer's adapter missing", scaled(0.0, "layers.1.")
    # Rounding to 2 bits is off by about a third of a weight; the others show where it begins to be seen.
    yield from ((f"one matrix off by {share:.0%}", noisy(share)) for share in (0.1, 0.33, 1.0))


def measure(name: str, fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One training: what the gates say of it as it is, of draws from it, and of each fault."""
    from safetensors.torch import load_file, save_file

    import kit
    from kit.common.weight_files import weight_files
    from kit.gguf.formats import read_header
    from kit.runs.gates import Gates
    from kit.verifying import noise
    from kit.verifying.parity import check_adapter, check_merged
    from kit.verifying.reference import Evidence

    run = trained(fields, folder)
    verdict = kit.verify(run)
    evidence = Evidence.load(run, run.adapter if run.adapter.is_dir() else run.merged)
    gates = Gates(name)
    if run.adapter.is_dir():
        check_adapter(gates, evidence)
    check_merged(gates, evidence, run.merged)
    numbers = sorted({row.number for row in evidence.reference.rows})
    random_ = random.Random(0)
    result: dict[str, Any] = {"verdict": verdict.verdict, "sensitivity": evidence.sensitivity,
                              "conversations": len(numbers), "sound": {}, "faults": {}}
    for path in evidence.ggufs:
        quantization = path.stem.rpartition("-")[2]
        header, predictions = read_header(path), predictions_of(path, evidence.reference)
        _, figures, allowed = judged(evidence, header, quantization, predictions)
        failed = {str(count): Counter(gate.name for _ in range(DRAWS) for gate in judged(
            evidence, header, quantization, predictions, random_.choices(numbers, k=count))[0].failed)
            for count in DRAWN}
        result["sound"][quantization] = {
            "spread": figures.spread, "allowed": allowed, "mean_kl": figures.mean_kl, "top1": figures.top1,
            "farthest_flip": max(figures.flips, default=0.0), "failed_draws": failed,
            "trained": noise.lost(evidence.reference.predictions, predictions, evidence.base)
            if evidence.base else None}
    evidence = only(evidence, first_tokens(evidence))
    for fault, change in faults(run, evidence) if name in WITH_FAULTS else ():
        broken = folder / "broken"
        shutil.copytree(run.merged, broken)
        for file in weight_files(broken):
            tensors = load_file(file)
            change(tensors)
            file.unlink()
            save_file(tensors, file, metadata={"format": "pt"})
        files = kit.export_gguf(broken, folder / "gguf", ["f16", "q8_0", "q4_k_m"], "bench")
        result["faults"][fault] = {}
        for path in files:
            quantization = path.stem.rpartition("-")[2]
            gates, figures, allowed = judged(evidence, read_header(path), quantization,
                                             predictions_of(path, evidence.reference))
            result["faults"][fault][quantization] = {
                "failed": [gate.name.split()[0] for gate in gates.failed], "spread": figures.spread / allowed,
                "mean_kl": figures.mean_kl, "answers_changed": sum(not same for same in figures.answers.values()),
                "answers": len(figures.answers)}
        shutil.rmtree(broken)
        shutil.rmtree(folder / "gguf")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="trainings; by default all that are not in the result")
    parser.add_argument("--rows", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    trainings = {**TRAININGS, **{f"starter-{name}-{steps}": {**STARTER, "rows": path, "max_steps": steps}
                                 for name, path in (pair.split("=", 1) for pair in options.rows) for steps in (5, 50)}}
    if options.one:
        with tempfile.TemporaryDirectory(prefix="kit-gates-") as folder:
            print("\nRESULT", json.dumps(measure(options.one, trainings[options.one], Path(folder))))
        return
    known = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    results = known.get("trainings", {})
    for name in options.names or [name for name in trainings if name not in results]:
        rows = [part for pair in options.rows for part in ("--rows", pair)]
        done = subprocess.run([sys.executable, __file__, "--one", name, *rows], capture_output=True, text=True)
        line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
        if line is None:
            print(f"{name}: failed\n{done.stderr[-2000:]}", flush=True)
            continue
        results[name] = json.loads(line.removeprefix("RESULT "))
        RESULT.write_text(json.dumps({"machine": platform.processor() or platform.machine(), "draws": DRAWS,
                                      "trainings": results}, indent=1), encoding="utf-8")
        print(f"{name}: {results[name]['verdict']}", flush=True)


if __name__ == "__main__":
    main()
