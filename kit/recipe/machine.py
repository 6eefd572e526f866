"""What this machine is."""

import importlib.util
import os
import platform
import resource
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import psutil

from kit.common.errors import KitError
from kit.common.files import existing
from kit.common.hosts import environment
from kit.common.nvidia import driver, has_gpu
from kit.common.packages import OLDEST

ON_THE_CPU = "set CUDA_VISIBLE_DEVICES to nothing, and the run takes the CPU"


def peak_memory_gb() -> float:
    """Peak memory in GB (1e9 bytes): the GPU's where one is used, else this process's."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        return float(torch.cuda.max_memory_reserved()) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


@dataclass(frozen=True)
class Machine:
    """Device (`cuda` or `cpu`), memory and number formats. Sizes in GB (1e9 bytes)."""

    device: str
    device_name: str
    cores: int
    memory_gb: float
    free_disk_gb: float
    bf16: bool
    bf16_reason: str
    environment: str = field(default_factory=environment)


def machine(folder: Path = Path(".")) -> Machine:
    """This machine. Imports unsloth, which must come before transformers: a run looks at its machine first."""
    import kit.common.unsloth

    return look(folder)


def look(folder: Path = Path(".")) -> Machine:
    """The same without unsloth, and without torch where its build is for CPUs. Free disk is that of `folder` now."""
    return replace(_hardware(), free_disk_gb=shutil.disk_usage(existing(folder)).free / 1e9)


@cache
def _hardware() -> Machine:
    if not version("torch").endswith("+cpu"):
        import torch

        if torch.cuda.is_available():
            gpu = torch.cuda.get_device_properties(0)
            if float(f"{gpu.major}.{gpu.minor}") < OLDEST:
                raise KitError(f"{gpu.name} has compute capability {gpu.major}.{gpu.minor}; Unsloth's kernels (Triton) "
                               f"need {OLDEST}", f"use a newer GPU (a T4 will do), or {ON_THE_CPU}")
            bf16 = gpu.major >= 8
            reason = f"compute capability {gpu.major}.{gpu.minor} {'has' if bf16 else 'has no'} bfloat16"
            return Machine("cuda", gpu.name, cores(), gpu.total_memory / 1e9, 0.0, bf16, reason)
    if has_gpu():
        raise KitError(*_unused_gpu())
    bf16 = bool(unsloth_cpu().cpu_bf16_supported())
    reason = f"this CPU {'computes' if bf16 else 'does not compute'} in bfloat16 itself"
    return Machine("cpu", _cpu_name(), cores(), psutil.virtual_memory().total / 1e9, 0.0, bf16, reason)


def _unused_gpu() -> tuple[str, str]:
    """(cause, remedy) where there is a GPU that the installed torch can't use: never a silent run on the CPU."""
    card, release, cuda = driver()
    built = version("torch").partition("+")[2]  # cu130 or cpu
    about = f"{card} with driver {release}, which serves CUDA up to {cuda}"
    torch_is = f"torch {version('torch')} can't use it"
    torch_is += ": it is built without CUDA" if built == "cpu" else ""
    newest = int(cuda.partition(".")[0] or 0)
    index = "cu130" if newest >= 13 else "cu126"  # a driver serves all of its CUDA's minor versions
    remedy = (f"install torch from PyTorch's index {index}: its install page has the line" if newest >= 12
              else "update the driver to 525 or newer, for CUDA 12")
    return f"there is a GPU ({about}), but {torch_is}", f"{remedy}; or {ON_THE_CPU}"


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def unsloth_cpu() -> ModuleType:
    """Unsloth's own rules for this CPU: the one file, because importing its package takes seconds."""
    package = importlib.util.find_spec("unsloth_zoo")
    for folder in (package and package.submodule_search_locations) or ():
        file = Path(folder) / "cpu" / "runtime.py"
        spec = importlib.util.spec_from_file_location("unsloth_cpu", file)
        if file.is_file() and spec and spec.loader:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise KitError("unsloth_zoo is not installed, or older than its CPU path")


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Installed versions of Python and the packages a result depends on."""
    installed = {"python": platform.python_version()}
    for name in ("unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets",
                 "accelerate", "llama_cpp_python", "papermill", "jupytext"):
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed
