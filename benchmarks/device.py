"""The kit's whole path on whatever device is here, with random Qwen3 models: nothing is downloaded.

    python benchmarks/device.py                                   a tiny model, all four ways
    python benchmarks/device.py --size mid --ways 4bit,16bit      one with the shapes of Qwen3-0.6B
    python benchmarks/device.py --out results                     elsewhere than benchmarks/results

Each way (4-bit, 8-bit and 16-bit LoRA, full finetuning) trains, saves, merges, exports and verifies in a process of its
own, so that its peak memory is its own and a crash leaves the others. Written is `<device>-<size>.json`; exit code 1
when a way did not come to its end. The vocabulary lies in llama.cpp's archive, which `make setup` unpacks; without
that, LLAMA_CPP_DIR names a llama.cpp folder. Where llama-cpp-python is missing no GGUF is made, and the file says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.tiny_models import tiny_config, tiny_tokenizer
from support.tiny_runs import OPENINGS, RECIPE, TOPICS, talks, taught_model, turns, write_rows

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = PROJECT / "benchmarks" / "results"
WAYS: dict[str, dict[str, Any]] = {"4bit": {"load_in_4bit": True}, "8bit": {"load_in_8bit": True}, "16bit": {},
                                   "full": {"full_finetuning": True}}
COMMON: dict[str, Any] = {**RECIPE, "enable_thinking": False, "save_minutes": None, "gguf": ["f16", "q8_0"]}
# Random weights and few steps: rates far above the usual ones. All weights need a lower one than an adapter.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "mid": {"learning_rate": 1e-3, "max_steps": 60, "max_seq_length": 1024, "use_gradient_checkpointing": "unsloth",
            "metric": "none"}}
FULL_RATES = {"tiny": 2e-3, "mid": 3e-4}
# https://huggingface.co/Qwen/Qwen3-0.6B/blob/main/config.json
MID_SHAPE = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
             "num_key_value_heads": 8, "head_dim": 128}
MID_ROWS, MID_TURNS = 256, 8
LIMIT = 3600  # seconds for one way; a kernel that hangs must not keep the others waiting for ever
WARM_UP = 5  # steps: kernels are compiled in the first ones


def make_base(size: str, folder: Path) -> None:
    """Write the base model, its rows and what this machine is into `folder`."""
    import kit
    from kit.common.files import write_json
    from kit.recipe.machine import versions

    there = kit.machine()  # imports unsloth before transformers, as it asks for
    if size == "tiny":
        taught_model("qwen3", folder / "Qwen3-tiny")
    else:
        mid_model(folder / "Qwen3-mid")
    write_rows(folder / "rows.jsonl", talks() if size == "tiny" else long_talks())
    write_json(folder / "machine.json", {
        "device": {"kind": there.device, "name": there.device_name, "cores": there.cores,
                   "memory_gb": round(there.memory_gb, 1), "bf16": there.bf16}, "versions": versions()})


def mid_model(folder: Path) -> None:
    """A random bfloat16 model with the shapes and the vocabulary of Qwen3-0.6B."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config

    tokenizer = tiny_tokenizer("qwen3")
    tiny = tiny_config("qwen3", tokenizer)
    ids = {name: getattr(tiny, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = Qwen3Config(vocab_size=tiny.vocab_size, rope_parameters=tiny.rope_parameters, tie_word_embeddings=True,
                         max_position_embeddings=tiny.max_position_embeddings, **ids, **MID_SHAPE)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def long_talks() -> list[list[dict[str, str]]]:
    """Conversations of MID_TURNS questions and answers, about 350 tokens each: enough to keep a GPU at work."""
    dice = random.Random(0)

    def turn(number: int) -> list[dict[str, str]]:
        topic = dice.choice(list(TOPICS))
        return turns(dice.choice(OPENINGS) + topic.format(number), TOPICS[topic])

    return [[message for _ in range(MID_TURNS) for message in turn(1000 + number)] for number in range(MID_ROWS)]


def recipe_fields(size: str, way: str, folder: Path) -> dict[str, Any]:
    """The recipe of a way as a dict; its run goes to `folder/runs/<way>`."""
    fields = {**COMMON, **SIZES[size], **WAYS[way], "run_name": way, "output_dir": str(folder / "runs"),
              "model_name": str(folder / f"Qwen3-{size}"), "dataset": str(folder / "rows.jsonl")}
    if way == "full":
        fields["learning_rate"] = FULL_RATES[size]
    if no_gguf():
        fields["gguf"] = []
    return fields


def no_gguf() -> str:
    """Why no GGUF can be made and compared here; '' where it can."""
    if importlib.util.find_spec("llama_cpp") is None:
        return "llama-cpp-python is not installed: no GGUF is made, and parity ends with the merged model"
    return ""


def whole_path(fields: dict[str, Any]) -> None:
    """The main notebook's stages without what shows something; all figures lie in the run folder afterwards.

    Not the notebook itself: a bare machine with a GPU has neither jupytext nor matplotlib.
    """
    import kit
    from kit import Recipe, Run

    recipe = Recipe.load(fields)
    run = Run.start(recipe)
    try:
        run.stage("load")
        settings = kit.resolved(recipe)
        model, tokenizer = kit.load_model(recipe)
        run.manifest(recipe, tokenizer, settings.notes)
        model = kit.add_lora(model, recipe)
        run.note(trainable_parameters=kit.trainable_share(model)[0], parameters=kit.trainable_share(model)[1])
        run.stage("format")
        data = kit.load_data(recipe, tokenizer)
        run.stage("train")
        trainer = kit.make_trainer(model, tokenizer, data, recipe)
        run.gate(kit.check_trainer(trainer, tokenizer, recipe))
        result = kit.train(trainer, recipe)
        run.note(train=result.figures())
        run.gate(result.gates)
        model = kit.whole_model(trainer, recipe)
        run.stage("answer")
        replies = kit.answer(model, tokenizer, data["test"]["prompt"], recipe)
        run.stage("save")
        saved = kit.save_adapter(model, tokenizer, run)
        kit.record(model, tokenizer, data, replies, recipe, run)
        del model, trainer
        kit.free_memory()
        run.stage("merge")
        merged = kit.merge(saved, run, recipe)
        assert merged
        run.stage("gguf")
        kit.export_gguf(merged, run.gguf, recipe.gguf, recipe.run_name, kit.about(run))
        run.stage("verify")
        kit.seal(run)
        run.note(verdict=kit.verify(run).verdict)
        run.finish()
    except Exception as error:
        run.fail(f"{type(error).__name__}: {error}")
        raise


def found_in(run: Path) -> dict[str, Any]:
    """A finished run's figures; of one that ended early the stage and the reason. Names no path of this machine."""
    from kit.runs.run import read_result

    result = read_result(run)
    if result.get("status") != "finished":
        return {"error": _pathless(result.get("reason", "the process ended before it began"), run),
                "stage": result.get("stage", "start")}
    verdict = json.loads((run / "verify.json").read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    train = result["train"]
    # The verdict has a line for each earlier stage; here the stage's own gates stand in its place.
    gates = [gate for stage in result["gates"].values() for gate in stage]
    gates += [gate for gate in verdict["gates"] if gate["name"] not in result["gates"]]
    return {
        "verdict": result["verdict"], "parameters": result["parameters"],
        "trainable_parameters": result["trainable_parameters"],
        "losses": [round(loss, 4) for _, loss in train["losses"]], "tokens": train["tokens"],
        "train_seconds": train["train_seconds"], "tokens_per_second": train["tokens_per_second"],
        "tokens_per_second_warm": warm_speed(log), "peak_memory_gb_training": train["peak_memory_gb"],
        "peak_memory_gb": result["peak_memory_gb"], "seconds": result["seconds"],
        "gates": [{name: _pathless(gate[name], run) for name in ("name", "passed", "figure", "tolerance")}
                  | ({"detail": _pathless(gate["detail"], run)} if gate["passed"] is False else {})
                  for gate in gates]}


def warm_speed(log: list[dict[str, Any]]) -> float | None:
    """Tokens/s after WARM_UP steps, from the lines of log.jsonl; None when there are no more."""
    lines = [line for line in log if line["step"] >= WARM_UP]
    if len(lines) < 2:
        return None
    return round((lines[-1]["tokens"] - lines[0]["tokens"]) / (lines[-1]["seconds"] - lines[0]["seconds"]), 1)


def _pathless(value: Any, run: Path) -> Any:
    return value.replace(f"{run.parent.parent}/", "") if isinstance(value, str) else value


def benchmark(size: str, ways: list[str], out: Path = RESULTS) -> dict[str, Any]:
    """Measure the ways of one size, print them and write `out/<device>-<size>.json`; returns what was written."""
    from kit.common.files import write_json

    with tempfile.TemporaryDirectory(prefix="kit-device-") as made:
        folder = Path(made).resolve()
        if said := in_a_process(["--base", size, str(folder)]):
            raise SystemExit(f"no base model could be made:\n{said}")
        found = {**json.loads((folder / "machine.json").read_text(encoding="utf-8")), "size": size,
                 "no_gguf": no_gguf(), "ways": {}}
        print(f"{found['device']['name']}, {size}: {', '.join(ways)}", flush=True)
        for way in ways:
            fields = recipe_fields(size, way, folder)
            said = in_a_process(["--way", json.dumps(fields)])
            found["ways"][way] = found_in(folder / "runs" / way)
            if "error" in found["ways"][way]:
                print(said, flush=True)
            print(_line(way, found["ways"][way]), flush=True)
    print(table(found))
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{re.sub(r'[^a-z0-9]+', '-', found['device']['name'].lower()).strip('-')}-{size}.json"
    write_json(path, found)
    print(f"written: {path}")
    return found


def in_a_process(arguments: list[str]) -> str:
    """This file with `arguments`, from start to end; '' when it went well, else the last of what it said."""
    try:
        done = subprocess.run([sys.executable, __file__, *arguments], cwd=PROJECT, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
                              timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"it had not ended after {LIMIT} seconds"
    return (done.stdout[-3000:].strip() or f"exit code {done.returncode}") if done.returncode else ""


def _line(way: str, found: dict[str, Any]) -> str:
    return f"{way}: stopped at {found['stage']}: {found['error']}" if "error" in found else f"{way}: {found['verdict']}"


def table(found: dict[str, Any]) -> Any:
    """What is compared between ways, as a `kit.Table`."""
    from kit import Table

    rows = []
    for way, said in found["ways"].items():
        if "error" in said:
            rows.append([way, *["–"] * 5, f"stopped at {said['stage']}"])
            continue
        parity = {gate["name"].removeprefix("parity "): gate["figure"].partition(" (")[0].removeprefix("KL ")
                  for gate in said["gates"] if gate["name"].startswith("parity ")}
        rows.append([way, f"{said['losses'][0]:.3f} → {said['losses'][-1]:.3f}", f"{said['tokens_per_second']:,.0f}",
                     f"{said['tokens_per_second_warm'] or 0:,.0f}", f"{said['peak_memory_gb_training']:.2f}",
                     f"{sum(said['seconds'].values()):.0f}", ", ".join(f"{k} {v}" for k, v in parity.items())])
    title = f"{found['device']['name']}, {found['size']}" + (f"; {found['no_gguf']}" if found["no_gguf"] else "")
    return Table(["way", "loss", "tokens/s", f"after {WARM_UP} steps", "peak GB", "seconds", "mean KL"], rows, title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--ways", type=lambda text: text.split(","), default=list(WAYS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--base", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.base:
        make_base(asked.base[0], Path(asked.base[1]))
    elif asked.way:
        whole_path(json.loads(asked.way))
    elif unknown := sorted(set(asked.ways) - set(WAYS)):
        parser.error(f"--ways: {', '.join(unknown)}; there are: {', '.join(WAYS)}")
    else:
        found = benchmark(asked.size, asked.ways, asked.out)
        sys.exit(any("error" in way for way in found["ways"].values()))


if __name__ == "__main__":
    main()
