"""The training cell, run again after an interrupt: it trains to the end, and to the bit as without the interrupt."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

import kit
from kit.common.errors import KitError, Stopped
from kit.common.files import sha256
from kit.recipe.recipe import Recipe
from kit.runs.run import Run
from support.train_runs import BASE

pytestmark = pytest.mark.slow


def trainer_of(model: Path, folder: Path, **fields: Any) -> tuple[Any, Recipe]:
    recipe = Recipe.load({**BASE, "model_name": str(model), "output_dir": str(folder), "dtype": "float32",
                          "save_strategy": "epoch", **fields})
    run = Run.start(recipe)
    model_, tokenizer = kit.load_model(recipe)
    run.manifest(recipe, tokenizer, [])
    data = kit.load_data(recipe, tokenizer)
    return kit.make_trainer(kit.add_lora(model_, recipe), tokenizer, data, recipe), recipe


def interrupted_at(trainer: Any, *steps: int) -> None:
    from transformers import TrainerCallback

    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in steps:
                os.kill(os.getpid(), signal.SIGINT)

    trainer.callback_handler.callbacks.insert(0, Interrupt())


def test_twice_interrupted_it_goes_on_to_the_end(tiny_starter: Path, tmp_path: Path) -> None:
    trainer, recipe = trainer_of(tiny_starter, tmp_path / "whole")
    whole, kept = kit.train(trainer, recipe), Run.of(recipe).checkpoints / "checkpoint-6"
    trainer, recipe = trainer_of(tiny_starter, tmp_path / "parts")
    interrupted_at(trainer, 2, 3)
    for step in (2, 3):
        with pytest.raises(Stopped, match=f"after step {step} of 6"):
            kit.train(trainer, recipe)
    result = kit.train(trainer, recipe)
    assert result.steps == 6 and result.resumed_from == 3 and result.losses == whole.losses
    weights = "adapter_model.safetensors"
    assert sha256(Run.of(recipe).checkpoints / "checkpoint-6" / weights) == sha256(kept / weights)
    again = kit.train(trainer, recipe)
    assert again.steps == 6 and again.losses == whole.losses, "nothing is left to train"


def test_without_a_checkpoint_a_trained_model_is_not_trained_on(tiny_starter: Path, tmp_path: Path) -> None:
    trainer, recipe = trainer_of(tiny_starter, tmp_path, save_strategy="no", max_steps=2)
    kit.train(trainer, recipe)
    with pytest.raises(KitError, match="has taken 2 steps already"):
        kit.train(trainer, recipe)
