"""What a recipe becomes on this machine: each choice with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kit.common.errors import KitError
from kit.common.processes import world_size
from kit.recipe.machine import Machine, unsloth_cpu
from kit.recipe.machine import machine as this_machine
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


def settings(recipe: Recipe, machine: Machine) -> Settings:
    """Decide precision, optimiser and packing; KitError where a wish would silently change the result."""
    notes: list[str] = []
    computed = _computed_in(recipe, machine, notes)
    dtype = _weights_in(recipe, computed, notes)
    cpu = machine.device == "cpu"
    if cpu:
        _check_quantised_on_cpu(recipe, notes)
    optim = recipe.optim
    if cpu and any(tag in optim.lower() for tag in GPU_ONLY_OPTIMIZERS):
        optim = "adamw_torch_fused"
        notes.append(f"{optim} instead of {recipe.optim}: 8-bit and paged optimisers are GPU kernels "
                     "(same update rule, states in 32-bit)")
    if recipe.packing and cpu:
        notes.append("packing off: without a GPU's attention kernels packed rows would see each other")
    notes.append("attention: PyTorch's SDPA (xformers needs CUDA)" if cpu else
                 "attention: xformers or FlashAttention where Unsloth finds them")
    return Settings(dtype, computed == "bfloat16", computed == "float16", optim, recipe.packing and not cpu, notes)


def _computed_in(recipe: Recipe, machine: Machine, notes: list[str]) -> str:
    """The number format of matrix products, by dtype, bf16 and fp16 as far as this machine has it."""
    cpu = machine.device == "cpu"
    best = "bfloat16" if machine.bf16 else "float32" if cpu else "float16"
    if recipe.dtype is None:
        notes.append(f"{best}: {machine.bf16_reason}")
    if cpu and (recipe.fp16 or recipe.dtype == "float16"):
        notes.append(f"{best} instead of float16: half precision on a CPU is slow and overflows")
        return best
    if recipe.bf16 and not machine.bf16:
        notes.append(f"{best} instead of bfloat16: {machine.bf16_reason}")
        return best
    return "bfloat16" if recipe.bf16 else "float16" if recipe.fp16 else recipe.dtype or best


def _weights_in(recipe: Recipe, computed: str, notes: list[str]) -> str:
    """The number format of the weights: that of the products, but when all are trained."""
    if not recipe.full_finetuning or computed == "float32":
        return computed
    if recipe.dtype is None:
        notes.append(f"full finetuning keeps its weights in float32 and computes in {computed}: in 16-bit most of an "
                     "update is smaller than a weight's last digit")
        return "float32"
    notes.append(f"weights trained in {computed} lose what is smaller than their last digit: without dtype they are "
                 "trained in float32")
    return computed


def _check_quantised_on_cpu(recipe: Recipe, notes: list[str]) -> None:
    if recipe.load_in_4bit:
        if not unsloth_cpu().cpu_bnb_4bit_supported():
            raise KitError("load_in_4bit: bitsandbytes has no 4-bit kernels for this CPU, and 16-bit in its place "
                           "would not be what you asked for", "set load_in_4bit: false, or use a GPU")
        notes.append(f"4-bit really runs on this CPU (bitsandbytes {recipe.bnb_4bit_quant_type.upper()}): it saves "
                     "memory, not time")
    if recipe.load_in_8bit:
        notes.append("8-bit through transformers + bitsandbytes + PEFT: Unsloth's CPU path would load 16-bit instead")


def resolved(recipe: Recipe) -> Settings:
    """What the recipe becomes on this machine, with reasons."""
    chosen = settings(recipe, this_machine(Path(recipe.output_dir)))
    if world_size() > 1:
        engine = sharding(recipe)["engine"]
        chosen.notes.append(f"{world_size()} processes: {engine}")
        if engine == "ZeRO-3":
            chosen.notes.append("the loss of transformers, in place of Unsloth's chunked one, which can't see the "
                                "weights that ZeRO-3 holds elsewhere")
    return chosen
