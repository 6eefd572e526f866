"""Loading where several processes share a model's weights: each keeps its shard, none holds the whole model."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import kit.common.unsloth

from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from kit.common.processes import world_size
from kit.recipe.recipe import Recipe
from kit.recipe.settings import deepspeed_settings, joined, resolved, sharding

SHAPE = "_unsloth_fsdp2_preload"  # how Unsloth marks a weight of which it read this process's rows only


def loads_sharded(recipe: Recipe) -> bool:
    """Whether each process is to read its own shard only; the others load the whole model before it is shared."""
    if not joined() or world_size() == 1:
        return False
    engine = sharding(recipe)["engine"]
    # A quantised weight, and the lengths that DoRA begins with, are made from a whole weight.
    return engine == "ZeRO-3" or (engine == "FSDP2" and not recipe.quantised and not recipe.use_dora)


def load_shards(load: Callable[[], Any], recipe: Recipe) -> Any:
    """What `load()` returns, in whose `from_pretrained` each process reads its own shard.

    FSDP2: a linear layer's rows, on the meta device until then (embeddings and norms are in each). ZeRO-3: DeepSpeed
    divides each weight as it is made. A model that can't be read in shards is loaded whole, which is said.
    """
    try:
        with (_fsdp2 if recipe.fsdp else _zero3)(recipe):
            return load()
    except ValueError as error:
        if "sharded loading" not in str(error):
            raise
        print(f"each process loads the whole model: {str(error).partition(';')[0].removeprefix('Unsloth: ')}")
        return load()


@contextmanager
def _fsdp2(recipe: Recipe) -> Iterator[None]:
    from unsloth.models.fsdp2_load import fsdp2_sharded_loading

    with fsdp2_sharded_loading():
        yield


@contextmanager
def _zero3(recipe: Recipe) -> Iterator[None]:
    """transformers divides weights while a configuration of ZeRO-3 is alive, but takes no device_map beside it."""
    settings, whole = resolved(recipe), PreTrainedModel.__dict__["from_pretrained"]
    alive = HfDeepSpeedConfig({
        "zero_optimization": deepspeed_settings(recipe)["zero_optimization"], "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": settings.bf16}, "fp16": {"enabled": settings.fp16}})

    def from_pretrained(cls: Any, *arguments: Any, device_map: Any = None, **options: Any) -> Any:
        return whole.__func__(cls, *arguments, **options)

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = whole
        del alive
        unset_hf_deepspeed_config()  # the trainer sets its own


def is_sharded(model: Any) -> bool:
    """Whether this process holds parts of the model's weights only, and no layout yet by which to put them together."""
    return any(hasattr(weight, SHAPE) or hasattr(weight, "ds_shape") for weight in model.parameters())


def whole_size(weight: Any) -> int:
    """Elements of a weight, of which this process may hold a part only."""
    shape = getattr(weight, SHAPE, {}).get("shape") or getattr(weight, "ds_shape", weight.shape)
    return math.prod(shape)
