"""After training on several processes: one ordinary process with the whole model."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from kit.model import reload
from kit.processes import is_main, leave, sharding, wait, world_size
from kit.runs import Run

if TYPE_CHECKING:
    from trl import SFTTrainer

    from kit.recipe import Recipe


def whole_model(trainer: SFTTrainer, recipe: Recipe) -> Any:
    """The trained model in one piece; of several processes the main one gets it, and trains no more with the others.

    Under DDP each process has it. FSDP2 and ZeRO gather their shards into a folder, from which it is loaded again.
    """
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
