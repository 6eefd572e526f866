"""What kit.forecast says against what happens, with the starter model.

    python benchmarks/forecast.py                     every variant of a short training, a process each
    python benchmarks/forecast.py 4-bit long          those variants only
    python benchmarks/forecast.py runs/quickstart     finished runs

Of memory the forecast says what is certain and an upper bound. A variant trains and does not answer, so `answers` is
left out of its forecast.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

WORDS = (PROJECT / "README.md").read_text(encoding="utf-8").split()
LONG: dict[str, Any] = {"dataset": "long", "max_seq_length": 1024, "per_device_train_batch_size": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "quickstart": {},
    "batch-1": {"per_device_train_batch_size": 1},
    "batch-8": {"per_device_train_batch_size": 8},
    "checkpointing": {"use_gradient_checkpointing": True},
    "long": LONG,
    "long-checkpointing": {**LONG, "use_gradient_checkpointing": True},
    "r-64": {"r": 64},
    "4-bit": {"load_in_4bit": True},
    "8-bit": {"load_in_8bit": True},
    "full": {"full_finetuning": True, "learning_rate": 1e-4},
    "float32": {"dtype": "float32"},
}


def long_rows(path: Path) -> None:
    """60 rows that fill 600 to 1,000 tokens."""
    random_ = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(60):
            text = " ".join(random_.choices([word for word in WORDS if word.isalpha()], k=random_.randint(450, 620)))
            file.write(json.dumps({"instruction": f"Shorten text {i}.", "input": text, "output": text[:200]}) + "\n")


def measure(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train a few steps here; the forecast, with the time told after two steps, and what happened."""
    from kit import Recipe, add_lora, load_data, load_model, make_trainer
    from kit.readiness.forecast import ANSWERS, STEP, forecast
    from kit.training.train import train

    if fields.get("dataset") == "long":
        long_rows(folder / "long.jsonl")
        fields = {**fields, "dataset": str(folder / "long.jsonl")}
    recipe = Recipe.load(PROJECT / "recipes" / "quickstart.yaml", output_dir=str(folder),
                         **{"max_steps": 6, **fields})
    model, tokenizer = load_model(recipe)
    model = add_lora(model, recipe)
    data = load_data(recipe, tokenizer)
    said = forecast(recipe, data)
    trainer = make_trainer(model, tokenizer, data, recipe)
    result = train(trainer, recipe)
    parts = {name: size for name, size in said.memory_gb.items() if name != ANSWERS}
    return {"certain_gb": round(sum(parts.values()) - parts[STEP], 2), "most_gb": round(sum(parts.values()), 2),
            "peak_gb": result.peak_memory_gb, "parts": parts,
            "forecast_steps": said.steps, "steps": result.steps, "forecast_tokens": said.tokens,
            "tokens": result.tokens, "forecast_seconds": result.forecast_seconds,
            "seconds": result.train_seconds}


def in_a_process(fields: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a process of its own, so that its peak memory is its own."""
    done = subprocess.run([sys.executable, __file__, "--one", json.dumps(fields)], cwd=PROJECT, capture_output=True,
                          text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"{', '.join(VARIANTS)}; or folders of finished runs")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(json.loads(chosen.one), Path(folder))))
        return
    for name in chosen.names or VARIANTS:
        if name not in VARIANTS:
            finished(Path(name))
            continue
        found = in_a_process(VARIANTS[name])
        parts = ", ".join(f"{part} {size:.2f}" for part, size in found["parts"].items())
        print(f"{name:18} memory {found['certain_gb']:5.2f} to {found['most_gb']:5.2f} GB forecast, "
              f"{found['peak_gb']:5.2f} happened; steps {found['forecast_steps']}, {found['steps']}; "
              f"seconds {found['forecast_seconds']}, {found['seconds']}; {parts}", flush=True)


def finished(folder: Path) -> None:
    """The score of a run, forecast afresh from its recipe and data."""
    from kit import load_data, load_tokenizer
    from kit.readiness.forecast import forecast
    from kit.runs.run import Run, forecast_score

    run = Run.open(folder)
    said = forecast(run.recipe, load_data(run.recipe, load_tokenizer(run.recipe)))
    print(f"{folder}: happened / forecast {forecast_score(said.as_json(), run.result)}\n{said}", flush=True)


if __name__ == "__main__":
    main()
