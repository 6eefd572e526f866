"""Speed and memory of one process and of several, by engine: the table of docs/several-devices.md.

    python benchmarks/processes.py [--processes 2] [--steps 8] [--model starter]
    python benchmarks/processes.py --loading       memory of each process while a model of 1.2 GB is loaded and shared

Each training is a run of its own of tests/train_driver.py (starter model, real rows, no evaluation): LoRA and full
finetuning, each with the same effective batch. Peak memory is that of the main process; tokens/s are without padding
and leave out nothing, so the first step's warming up is in them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
ENGINES: dict[str, dict[str, Any]] = {
    "DDP": {}, "FSDP2": {"fsdp": True}, "ZeRO-2": {"deepspeed": "recipes/deepspeed/zero2.json"},
    "ZeRO-3": {"deepspeed": "recipes/deepspeed/zero3.json"}}
WAYS: dict[str, dict[str, Any]] = {"LoRA": {}, "full": {"full_finetuning": True, "learning_rate": 2e-5}}


def measured(recipe: dict[str, Any], processes: int) -> dict[str, Any]:
    """Tokens/s, peak memory in GB and last loss of a training."""
    with tempfile.TemporaryDirectory() as made:
        given, out = Path(made) / "recipes.json", Path(made) / "out.json"
        given.write_text(json.dumps([{**recipe, "output_dir": made}]), encoding="utf-8")
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] * (processes > 1)
        done = subprocess.run([sys.executable, *start, "tests/train_driver.py", str(given), str(out)], cwd=PROJECT,
                              capture_output=True, text=True, env={**os.environ, "STOP": "0"})
        if not out.is_file():
            sys.exit(done.stderr[-2000:])
        return dict(json.loads(out.read_text(encoding="utf-8"))[0])


LOADING = """
import json, sys, threading, time
sys.path.insert(0, "tests")
import kit
from kit import Recipe
from kit.common.processes import _reduced, is_main
from kit.recipe.settings import join

recipe = Recipe.load(json.loads(sys.argv[1]))
join(recipe)  # before unsloth is imported
from kit import load_model, make_trainer

def anonymous():  # kB of this process that no file backs
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon")))

before = peak = anonymous()
over = False
def watch():
    global peak
    while not over:
        peak = max(peak, anonymous())
        time.sleep(0.01)

threading.Thread(target=watch, daemon=True).start()
model, tokenizer = load_model(recipe)
model = kit.add_lora(model, recipe)
data = kit.load_data(recipe, tokenizer)
loaded = peak
trainer = make_trainer(model, tokenizer, data, recipe)
trainer.train()
over = True
found = _reduced("MAX", [(loaded - before) / 1e6, (peak - before) / 1e6])
if is_main():
    print("PEAK", *found)
"""


def large_model(folder: Path) -> Path:
    """0.6 billion random weights in bfloat16 with the starter's tokenizer."""
    import kit.common.unsloth

    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from kit.models.starter import starter_model

    config = LlamaConfig(hidden_size=1536, intermediate_size=4608, num_hidden_layers=18, num_attention_heads=12,
                         num_key_value_heads=12, vocab_size=49152, tie_word_embeddings=True)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(starter_model()).save_pretrained(folder)
    return folder


def loading(processes: int) -> None:
    print("| engine | peak of each process over what it had before, GB: loading | and a step |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as made:
        model = large_model(Path(made) / "model")
        for engine, fields in ENGINES.items():
            recipe = {"model_name": str(model), "dataset": "starter", "max_seq_length": 128,
                      "max_steps": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
                      "output_dir": f"{made}/{engine}", "save_minutes": None, "dtype": "bfloat16", **fields}
            done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                                   str(processes), "--no-python", sys.executable, "-c", LOADING, json.dumps(recipe)],
                                  cwd=PROJECT, capture_output=True, text=True)
            peaks = next((line.split()[1:] for line in done.stdout.splitlines() if line.startswith("PEAK")), None)
            if peaks is None:
                sys.exit("\n".join(line for line in done.stderr.splitlines() if line.startswith("[rank0]")))
            print(f"| {engine} | {' | '.join(f'{float(peak):.2f}' for peak in peaks)} |", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--steps", type=int, default=8)
    options.add_argument("--model", default="starter")
    options.add_argument("--loading", action="store_true")
    asked = options.parse_args()
    if asked.loading:
        loading(asked.processes)
        return
    base = {"model_name": asked.model, "dataset": "starter", "max_seq_length": 256, "max_steps": asked.steps,
            "per_device_train_batch_size": 4, "use_gradient_checkpointing": False, "save_minutes": None,
            "save_strategy": "steps", "save_steps": asked.steps, "local_files_only": True}
    print("| training | processes | tokens/s | peak memory of each, GB | last loss |\n|---|---|---|---|---|")
    for name, way in WAYS.items():
        alone = {**base, **way, "gradient_accumulation_steps": asked.processes}
        every = [("one process", 1, alone)] + [
            (engine, asked.processes, {**base, **way, **fields, "gradient_accumulation_steps": 1})
            for engine, fields in ENGINES.items()]
        for engine, processes, recipe in every:
            found = measured(recipe, processes)
            cells = (f"{name}, {engine}", processes, f"{found['tokens_per_second']:.0f}",
                     f"{found['peak_memory_gb']:.2f}", f"{found['losses'][-1][1]:.4f}")
            print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
