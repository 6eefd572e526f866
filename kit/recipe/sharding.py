"""How a model is shared among several processes: DDP, FSDP2, ZeRO."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from kit.common.errors import KitError
from kit.common.paths import PROJECT, cache_dir
from kit.common.processes import is_main, rank, wait, world_size
from kit.recipe.machine import cores
from kit.recipe.recipe import Recipe

LEFT_BY_TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK",
                    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "UNSLOTH_FSDP2", "ACCELERATE_USE_DEEPSPEED")


def join(recipe: Recipe) -> None:
    """Join the other processes; the ones that are not the main one fall silent. Nothing to do for one process.

    Raises KitError for a set-up that can't work, before anything is loaded.
    """
    if world_size() == 1:
        if recipe.fsdp or recipe.deepspeed:
            raise KitError("fsdp and deepspeed share a model among several processes, and this is one",
                           "torchrun --nproc_per_node 2 -m kit train RECIPE, or leave them out")
        if "ACCELERATE_MIXED_PRECISION" in os.environ:
            print("accelerate launch started one process (with --cpu it always does): torchrun starts several")
        return
    # Read when unsloth is imported. Its chunked loss looks at the size of weights, which is 0 where ZeRO-3 took them.
    engine = sharding(recipe)["engine"]
    if engine == "FSDP2":
        os.environ["UNSLOTH_FSDP2"] = "1"
    elif engine == "ZeRO-3":
        os.environ["UNSLOTH_CPU_CHUNKED_CE"] = "0"

    import torch
    from torch import distributed

    cuda = torch.cuda.is_available()
    # DeepSpeed compiles an operator with ninja, which lies beside this Python.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        if os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's own choice where nothing was set
            torch.set_num_threads(max(cores() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1), 1))
        # An optimiser saved under DDP says that its tensors lie on "cpu:0", a place torch.load knows nothing of.
        torch.serialization.register_package(5, lambda value: None,
                                             lambda value, place: value if place.startswith("cpu") else None)
    if not is_main():
        # Unsloth writes the code it compiles to files while it is imported: two at once would read half of one.
        os.environ["UNSLOTH_COMPILE_LOCATION"] = str(cache_dir() / f"unsloth_compiled_cache-{rank()}")
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (it stays until the process ends)
    # The others wait while the main process answers the held-out rows.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                   timeout=datetime.timedelta(seconds=recipe.ddp_timeout))


def sharding(recipe: Recipe) -> dict[str, Any]:
    """How the training is spread, for people and for a checkpoint's identity: processes, engine, its settings.

    Raises KitError when the DeepSpeed configuration can't be read or does not fit the recipe.
    """
    processes = world_size()
    if recipe.fsdp or recipe.deepspeed is None:
        alone = "DDP" if processes > 1 else "one process"
        return {"processes": processes, "engine": "FSDP2" if recipe.fsdp else alone}
    settings = deepspeed_settings(recipe)
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage == 3 and recipe.quantised:
        raise KitError(f"deepspeed: {recipe.deepspeed} is ZeRO-3, which can't shard quantised weights",
                       "recipes/deepspeed/zero2.json with load_in_4bit, or ZeRO-3 without it")
    return {"processes": processes, "engine": f"ZeRO-{stage}",
            "deepspeed settings": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()}


def deepspeed_settings(recipe: Recipe) -> dict[str, Any]:
    """The configuration that `deepspeed` names, as a dict. KitError when it can't be read."""
    if importlib.util.find_spec("deepspeed") is None:
        raise KitError("deepspeed: the package is not installed", "pip install --no-build-isolation deepspeed")
    for path in (Path(recipe.deepspeed or "").expanduser(), PROJECT / (recipe.deepspeed or "")):
        if path.is_file():
            try:
                return dict(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise KitError(f"deepspeed: {path} is no JSON object: {error}",
                               "see recipes/deepspeed/zero2.json") from None
    raise KitError(f"deepspeed: there is no file {recipe.deepspeed}", "recipes/deepspeed/zero2.json or zero3.json")


def leave() -> None:
    """End the work in common. Afterwards the main process is an ordinary single one."""
    if world_size() == 1:
        return
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from torch import distributed
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    wait()
    distributed.destroy_process_group()
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    unset_hf_deepspeed_config()
    if is_main():
        for name in LEFT_BY_TORCHRUN:
            os.environ.pop(name, None)
