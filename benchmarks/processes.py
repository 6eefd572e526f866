"""Speed and memory of one process and of several, by engine: the table of docs/several-devices.md.

    python benchmarks/processes.py [--processes 2] [--steps 8] [--model starter]

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


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--steps", type=int, default=8)
    options.add_argument("--model", default="starter")
    asked = options.parse_args()
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
