"""What a recipe becomes on this machine: each choice with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kit.common.errors import KitError
from kit.common.processes import world_size
from kit.recipe.machine import Machine, machine
from kit.recipe.recipe import Recipe
from kit.recipe.sharding import sharding

GPU_ONLY_OPTIMIZERS = ("8bit", "paged", "bnb", "apex", "npu", "xla")


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


def settings(recipe: Recipe, there: Machine) -> Settings:
    """Decide precision, optimiser and packing; KitError where a wish would silently change the result."""
    notes = []
    cpu = there.device == "cpu"
    best = "bfloat16" if there.bf16 else "float32" if cpu else "float16"
    dtype = recipe.dtype or best
    if recipe.dtype is None:
        notes.append(f"{best}: {there.bf16_reason}")
    if cpu and (recipe.fp16 or dtype == "float16"):
        dtype = best
        notes.append(f"{best} instead of float16: half precision on a CPU is slow and overflows")
    elif recipe.bf16 and not there.bf16:
        notes.append(f"{best} instead of bfloat16: {there.bf16_reason}")
        dtype = best
    elif recipe.bf16 or recipe.fp16:
        dtype = "bfloat16" if recipe.bf16 else "float16"
    computed = dtype
    if recipe.full_finetuning and recipe.dtype is None and dtype != "float32":
        dtype = "float32"
        notes.append(f"full finetuning keeps its weights in float32 and computes in {computed}: in 16-bit most of an "
                     "update is smaller than a weight's last digit")
    elif recipe.full_finetuning and dtype != "float32":
        notes.append(f"weights trained in {dtype} lose what is smaller than their last digit: without dtype they are "
                     "trained in float32")
    if recipe.load_in_4bit and cpu:
        _check_4bit_on_cpu()
        notes.append(f"4-bit really runs on this CPU (bitsandbytes {recipe.bnb_4bit_quant_type.upper()}): it saves "
                     "memory, not time")
    if recipe.load_in_8bit and cpu:
        notes.append("8-bit through transformers + bitsandbytes + PEFT: Unsloth's CPU path would load 16-bit instead")
    optim = recipe.optim
    if cpu and any(tag in optim.lower() for tag in GPU_ONLY_OPTIMIZERS):
        optim = "adamw_torch_fused"
        notes.append(f"adamw_torch_fused instead of {recipe.optim}: 8-bit and paged optimisers are GPU kernels "
                     "(same update rule, states in 32-bit)")
    packing = recipe.packing and not cpu
    if recipe.packing and cpu:
        notes.append("packing off: without a GPU's attention kernels packed rows would see each other")
    attention = "xformers or FlashAttention where Unsloth finds them" if not cpu else \
        "PyTorch's SDPA (xformers needs CUDA)"
    notes.append(f"attention: {attention}")
    return Settings(dtype, computed == "bfloat16", computed == "float16", optim, packing, notes)


def _check_4bit_on_cpu() -> None:
    from unsloth_zoo.cpu.runtime import cpu_bnb_4bit_supported

    if not cpu_bnb_4bit_supported():
        raise KitError("load_in_4bit: bitsandbytes has no 4-bit kernels for this CPU, and 16-bit in its place would "
                       "not be what you asked for", "set load_in_4bit: false, or use a GPU")


def resolved(recipe: Recipe) -> Settings:
    """What the recipe becomes on this machine, with reasons."""
    chosen = settings(recipe, machine(Path(recipe.output_dir)))
    if world_size() > 1:
        chosen.notes.append(f"{world_size()} processes: {sharding(recipe)['engine']}")
        if sharding(recipe)["engine"] == "ZeRO-3":
            chosen.notes.append("the loss of transformers, in place of Unsloth's chunked one, which can't see the "
                                "weights that ZeRO-3 holds elsewhere")
    return chosen
