"""Trains recipes one after the other, in one process or under torchrun: the training's side of the resume tests.

    python tests/support/train_driver.py RECIPES.json OUT.json
    torchrun --nproc_per_node 2 tests/support/train_driver.py RECIPES.json OUT.json

RECIPES.json is a list of recipes as dicts. With STOP=N each is sent SIGTERM in step N, but the last one SIGKILL.
With FULL=N the disk takes no file above 100 kB any more from step N on.
OUT.json gets a dict for each recipe: its losses, evaluations, the hash of the weights in its last checkpoint, and the
largest share of the layers' weights that a process held before the training.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import kit
from kit import Recipe, Run
from kit.common.errors import Stopped
from kit.common.files import sha256
from kit.common.processes import _reduced, is_main
from kit.recipe.settings import join

STOP, FULL = int(os.environ.get("STOP", 0)), int(os.environ.get("FULL", 0))


def trained(recipe: Recipe, kill: bool) -> dict[str, Any] | None:
    from accelerate.state import AcceleratorState
    from transformers import TrainerCallback
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from kit.models.sharded import whole_size

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == STOP:
                os.kill(os.getpid(), signal.SIGKILL if kill else signal.SIGTERM)
            if state.global_step == FULL:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    AcceleratorState._reset_state()  # nothing of the training before
    unset_hf_deepspeed_config()
    run = Run.start(recipe)
    model, tokenizer = kit.load_model(recipe)
    run.manifest(recipe, tokenizer, [])
    model = kit.add_lora(model, recipe)
    parts = [weight for name, weight in model.named_parameters() if ".layers." in name and ".lora_" not in name]
    held = sum((weight.ds_tensor if hasattr(weight, "ds_tensor") else weight).numel() for weight in parts)
    held_share, = _reduced("MAX", [held / sum(map(whole_size, parts))])
    data = kit.load_data(recipe, tokenizer)
    trainer = kit.make_trainer(model, tokenizer, data, recipe)
    trainer.callback_handler.callbacks.insert(0, Stop())  # before the kit's own look at the signal
    try:
        result = kit.train(trainer, recipe)
    except Stopped as stopped:
        assert STOP, stopped
        return {"stopped": str(stopped)}
    last = run.checkpoints / f"checkpoint-{result.steps}"
    weights = next(last / name for name in ("adapter_model.safetensors", "model.safetensors")
                   if (last / name).is_file())
    wrapper = trainer.model_wrapped
    stage = getattr(wrapper, "zero_optimization_stage", str)
    logged = [json.loads(line)["step"] for line in run.log.read_text(encoding="utf-8").splitlines()]
    return {"losses": result.losses, "evaluations": result.evaluations, "weights": sha256(weights),
            "resumed_from": result.resumed_from, "logged": logged, "tokens": result.tokens,
            "tokens_per_second": result.tokens_per_second, "peak_memory_gb": result.peak_memory_gb,
            "held_share": held_share, "wrapper": f"{type(wrapper).__name__} {stage()}".strip()}


def main() -> None:
    recipes = [Recipe.load(fields) for fields in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))]
    join(recipes[0])
    found = [trained(recipe, kill=recipe is recipes[-1]) for recipe in recipes]
    if is_main():
        Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
