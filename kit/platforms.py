"""What this machine is, and what follows from it for a recipe: each choice with its reason."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.errors import KitError

if TYPE_CHECKING:
    from kit.recipe import Recipe

GPU_ONLY_OPTIMIZERS = ("8bit", "paged", "bnb", "apex", "npu", "xla")
# Of a model on a hub; other formats of its weights would double the download.
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.py", "tokenizer.model"]


def cache_dir() -> Path:
    """Where big made things live between runs: `KIT_CACHE`, or ~/.cache/unsloth-kit."""
    return Path(os.environ.get("KIT_CACHE") or "~/.cache/unsloth-kit").expanduser()


def environment() -> str:
    """colab, kaggle, autodl or local: decides only which advice is printed."""
    if "COLAB_RELEASE_TAG" in os.environ or "google.colab" in sys.modules:
        return "colab"
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return "kaggle"
    if Path("/root/autodl-tmp").is_dir():
        return "autodl"
    return "local"


@dataclass(frozen=True)
class Machine:
    """What is there. Memory in GB (1e9 bytes)."""

    device: str
    device_name: str
    cores: int
    memory_gb: float
    free_disk_gb: float
    bf16: bool
    bf16_reason: str
    environment: str = field(default_factory=environment)


def machine(folder: Path = Path(".")) -> Machine:
    """Look at this machine; imports unsloth and torch."""
    from kit.model import import_unsloth

    unsloth = import_unsloth()  # before torch's users, as it asks for
    return look(folder, unsloth.is_bfloat16_supported)


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above that is there."""
    there = folder.expanduser().resolve()
    while not there.exists():
        there = there.parent
    return there


def look(folder: Path, cpu_bf16: Callable[[], bool]) -> Machine:
    """The machine; `cpu_bf16`, asked where there is no GPU, says whether the CPU computes in bfloat16."""
    import psutil
    import torch

    disk = shutil.disk_usage(existing(folder)).free / 1e9
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        bf16 = gpu.major >= 8
        reason = f"compute capability {gpu.major}.{gpu.minor} {'has' if bf16 else 'has no'} bfloat16"
        return Machine("cuda", gpu.name, cores, gpu.total_memory / 1e9, disk, bf16, reason)
    bf16 = bool(cpu_bf16())
    reason = f"this CPU {'computes' if bf16 else 'does not compute'} in bfloat16 itself"
    return Machine("cpu", _cpu_name(), cores, psutil.virtual_memory().total / 1e9, disk, bf16, reason)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


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


def model_folder(recipe: Recipe) -> str:
    """What to load: the starter's folder, a folder of the user's, or a hub id.

    With `hub: modelscope` the model is fetched there first, or found in its cache. Raises KitError when a path is no
    model.
    """
    if recipe.model_name == "starter":
        from kit.starter import starter_model

        return str(starter_model())
    path = Path(recipe.model_name).expanduser()
    if path.exists() or recipe.model_name.startswith((".", "/", "~")) or recipe.model_name.count("/") > 1:
        _check_model_folder(path)
        return str(path)
    if recipe.hub == "modelscope":
        if importlib.util.find_spec("modelscope") is None:
            raise KitError("hub: modelscope needs the package modelscope", "pip install modelscope")
        from modelscope import snapshot_download

        try:
            return str(snapshot_download(recipe.model_name, revision=recipe.revision, allow_patterns=MODEL_FILES,
                                         local_files_only=recipe.local_files_only))
        except Exception as error:  # of its own, of requests, of the disk
            reason = " ".join(str(error).split())[:300]
            raise KitError(f"model_name: {recipe.model_name} could not be fetched from ModelScope: {reason}",
                           hub_hint()) from None
    return recipe.model_name


def _check_model_folder(path: Path) -> None:
    if not path.is_dir():
        what = "is a file" if path.is_file() else "does not exist"
        raise KitError(f"model_name: {path} {what}; a model is a folder or a hub id like Qwen/Qwen3-4B",
                       "correct model_name, or use `starter`")
    missing = [name for name in ("config.json", "tokenizer_config.json") if not (path / name).is_file()]
    if not list(path.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise KitError(f"model_name: {path} is no model folder: no {', '.join(missing)} in it (found: {found})",
                       "name the folder that holds config.json and the weights as safetensors")


def base_folder(recipe: Recipe) -> Path:
    """The base model's 16-bit weights on this disk: what an adapter is merged into. Fetched if they are not there.

    Raises KitError when the hub can't be reached or has no such model.
    """
    name = model_folder(recipe)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, revision=recipe.revision, local_files_only=recipe.local_files_only,
                                      allow_patterns=MODEL_FILES))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise KitError(f"model_name: the weights of {name} could not be fetched: "
                       f"{str(error).strip().splitlines()[0][:300]}", hub_hint()) from None


def hub_hint() -> str:
    """What helps when a hub can't be reached."""
    return ("without that hub: set model_name and dataset to folders on this disk, HF_ENDPOINT to a mirror, "
            "or hub: modelscope; for what is already cached, local_files_only: true")


def model_label(recipe: Recipe) -> str:
    """The model's own name, for file names: Qwen/Qwen3-4B → Qwen3-4B."""
    if recipe.model_name == "starter":
        return "SmolLM2-135M-Instruct"
    return Path(recipe.model_name.rstrip("/")).name


def versions() -> dict[str, str]:
    """Installed versions of the packages a result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, Any] = {"python": platform.python_version()}
    for name in ("unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets",
                 "accelerate", "llama_cpp_python", "papermill", "jupytext"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
