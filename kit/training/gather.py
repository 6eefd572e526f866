"""After training: one ordinary process with the whole model, as it is shipped."""

from __future__ import annotations

import shutil
from typing import Any

import kit.common.unsloth

import torch
from trl import SFTTrainer

from kit.common.processes import is_main, wait, world_size
from kit.models.load import reload
from kit.models.precision import rounded_by_chance
from kit.recipe.recipe import Recipe
from kit.recipe.settings import resolved
from kit.recipe.sharding import leave, sharding
from kit.runs.run import Run


def whole_model(trainer: SFTTrainer, recipe: Recipe) -> Any:
    """The trained model in one piece; of several processes the main one gets it, and trains no more with the others.

    Under DDP each process has it. FSDP2 and ZeRO gather their shards into a folder, from which it is loaded again.
    Fully fine-tuned weights leave in 16-bit, so that what is answered and recorded from here on is what is shipped.
    """
    model = _in_one_piece(trainer, recipe)
    if recipe.full_finetuning and is_main():
        _to_16bit(model, resolved(recipe).fp16)
    return model


def _to_16bit(model: Any, fp16: bool) -> None:
    kind = torch.float16 if fp16 else torch.bfloat16
    for name, weight in model.named_parameters():
        if weight.dtype == torch.float32:
            # By chance, as in a merge: to the nearest, small changes would all fall away.
            weight.data = weight.data.to(kind) if fp16 else rounded_by_chance(weight.data, name).to(weight.device)
    model.config.dtype = kind


def _in_one_piece(trainer: SFTTrainer, recipe: Recipe) -> Any:
    if world_size() == 1:
        return trainer.model
    if sharding(recipe)["engine"] == "DDP":
        leave()
        return trainer.model
    folder = Run.of(recipe).folder / "gathered"
    trainer.save_model(str(folder))
    wait()
    leave()
    if not is_main():
        return None
    model, _ = reload(folder, recipe)
    shutil.rmtree(folder)
    return model
