"""What a recipe becomes on this machine, each choice with its reason; and how several processes share a model."""

import datetime
import hashlib
import importlib.util
import json
import os
import socket
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kit.common.errors import KitError
from kit.common.files import PROJECT, cache_dir
from kit.common.processes import is_main, rank, wait, world_size
from kit.recipe.machine import Machine, cores, unsloth_cpu
from kit.recipe.machine import machine as this_machine
from kit.recipe.recipe import Recipe

GPU_ONLY_OPTIMIZERS = ("8bit", "paged", "bnb", "apex", "npu", "xla")
LEFT_BY_TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK",
                    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "UNSLOTH_FSDP2", "ACCELERATE_USE_DEEPSPEED")


@dataclass(frozen=True)
class Settings:
    """What a recipe becomes on a machine. `notes` has a line for every choice and every difference.

    `dtype` is the weights' number format; `bf16` and `fp16` say in which one products are computed, if it is shorter.
    """

    dtype: str
    bf16: bool
    fp16: bool
    optim: str
    packing: bool
    notes: list[str]


def settings(recipe: Recipe, machine: Machine) -> Settings:
    """Decide precision, optimiser and packing; KitError where a wish would silently change the result."""
    notes: list[str] = []
    computed = _computed_in(recipe, machine, notes)
    dtype = _weights_in(recipe, computed, notes)
    bf16, fp16, optim = computed == "bfloat16", computed == "float16", recipe.optim
    if machine.device != "cpu":
        return Settings(dtype, bf16, fp16, optim, recipe.packing, notes)
    if recipe.load_in_4bit:
        if not unsloth_cpu().cpu_bnb_4bit_supported():
            raise KitError("load_in_4bit: bitsandbytes has no 4-bit kernels for this CPU, and 16-bit in its place "
                           "would not be what you asked for", "set load_in_4bit: false, or use a GPU")
        notes.append(f"4-bit really runs on this CPU (bitsandbytes {recipe.bnb_4bit_quant_type.upper()}): it saves "
                     "memory, not time")
    if recipe.load_in_8bit:
        notes.append("8-bit through transformers + bitsandbytes + PEFT: Unsloth's CPU path would load 16-bit instead")
    if any(tag in optim.lower() for tag in GPU_ONLY_OPTIMIZERS):
        optim = "adamw_torch_fused"
        notes.append(f"{optim} instead of {recipe.optim}: 8-bit and paged optimisers are GPU kernels "
                     "(same update rule, states in 32-bit)")
    if recipe.packing:
        notes.append("packing off: without a GPU's attention kernels packed rows would see each other")
    notes.append("attention: PyTorch's SDPA (xformers needs CUDA)")
    return Settings(dtype, bf16, fp16, optim, False, notes)


def _computed_in(recipe: Recipe, machine: Machine, notes: list[str]) -> str:
    """The number format of matrix products, by dtype, bf16 and fp16 as far as this machine has it."""
    cpu = machine.device == "cpu"
    best = "bfloat16" if machine.bf16 else "float32" if cpu else "float16"
    if recipe.dtype is None:
        notes.append(f"{best}: {machine.bf16_reason}")
    if cpu and (recipe.fp16 or recipe.dtype == "float16"):
        notes.append(f"{best} instead of float16: half precision on a CPU is slow and overflows")
        return best
    if not machine.bf16 and (recipe.bf16 or (recipe.dtype == "bfloat16" and not cpu)):
        notes.append(f"{best} instead of bfloat16: {machine.bf16_reason}")
        return best
    return "bfloat16" if recipe.bf16 else "float16" if recipe.fp16 else recipe.dtype or best


def _weights_in(recipe: Recipe, computed: str, notes: list[str]) -> str:
    """The number format of the weights: that of the products, but when all are trained or float32 is asked for."""
    if recipe.dtype == "float32" and computed != "float32":
        notes.append(f"float32 weights, as the recipe says, and products in {computed}")
        return "float32"
    if not recipe.full_finetuning or computed == "float32":
        return computed
    if recipe.dtype is None:
        notes.append(f"full finetuning keeps its weights in float32 and computes in {computed}: in 16-bit most of an "
                     "update is smaller than a weight's last digit")
        return "float32"
    notes.append(f"weights trained in {computed} lose what is smaller than their last digit: without dtype they are "
                 "trained in float32")
    return computed


def resolved(recipe: Recipe) -> Settings:
    """What the recipe becomes on this machine, with reasons."""
    machine = this_machine(Path(recipe.output_dir))
    result = settings(recipe, machine)
    if machine.device == "cuda":
        result.notes.append(_attention())
    engine = sharding(recipe)["engine"]
    if world_size() > 1 or recipe.deepspeed:
        result.notes.append(f"{world_size()} process{'es' * (world_size() > 1)}: {engine}")
        if engine == "ZeRO-3":
            result.notes.append("the loss of transformers, in place of Unsloth's chunked one, which can't see the "
                                "weights that ZeRO-3 holds elsewhere")
    return result


def _attention() -> str:
    """Which attention Unsloth really runs on this GPU, and what is installed for a faster one but does not load."""
    from unsloth.utils.attention_dispatch import HAS_FLASH_ATTENTION, HAS_XFORMERS, select_attention_backend

    backend = select_attention_backend(use_varlen=True)
    loaded = {"flash-attn": HAS_FLASH_ATTENTION, "xformers": HAS_XFORMERS}
    remarks = [f"; {name} {version(name)} is installed and does not load: it was built for another torch than "
               f"{version('torch')}" for name, loads in loaded.items()
               if not loads and importlib.util.find_spec(name.replace("-", "_")) is not None]
    names = {"flash_varlen": "FlashAttention", "sdpa": "PyTorch's SDPA"}
    return f"attention: {names.get(backend, backend)}{''.join(remarks)}"


def join(recipe: Recipe) -> None:
    """Join the other processes; the ones that are not the main one fall silent. Nothing to do for one process, but with
    DeepSpeed, which makes a group of one.

    Raises KitError for a set-up that can't work, before anything is loaded.
    """
    if world_size() == 1:
        if "ACCELERATE_MIXED_PRECISION" in os.environ:
            print("accelerate launch started one process (with --cpu it always does): torchrun starts several")
        if not recipe.deepspeed:
            check_joined(recipe)
            return
        with socket.socket() as free:
            free.bind(("localhost", 0))
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
                           "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
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


def check_joined(recipe: Recipe) -> None:
    """KitError where fsdp or deepspeed would do nothing, because this process has joined no group."""
    if (recipe.fsdp or recipe.deepspeed) and not joined():
        raise KitError("fsdp and deepspeed share a model among processes, and this is one that torchrun did not start",
                       "torchrun --nproc_per_node 2 -m kit train RECIPE; deepspeed with one process: kit train RECIPE; "
                       "or leave them out")


def joined() -> bool:
    """Whether this process belongs to a group, be it of one."""
    from torch import distributed

    return distributed.is_initialized()


def sharding(recipe: Recipe) -> dict[str, Any]:
    """How the training is spread, for people and for a checkpoint's identity: processes, engine, its settings.

    Raises KitError when the DeepSpeed configuration can't be read or does not fit the recipe.
    """
    processes = world_size()
    if recipe.fsdp or recipe.deepspeed is None:
        engine = "FSDP2" if recipe.fsdp else "DDP" if processes > 1 else "one process"
        return {"processes": processes, "engine": engine}
    configuration = deepspeed_settings(recipe)
    stage = configuration.get("zero_optimization", {}).get("stage", 0)
    if stage == 3 and recipe.quantised:
        raise KitError(f"deepspeed: {recipe.deepspeed} is ZeRO-3, which can't shard quantised weights",
                       "recipes/deepspeed/zero2.json with load_in_4bit, or ZeRO-3 without it")
    return {"processes": processes, "engine": f"ZeRO-{stage}",
            "deepspeed settings": hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()}


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
    if not joined():
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
