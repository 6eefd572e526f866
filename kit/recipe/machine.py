"""What this machine is."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from kit.common.paths import existing


def peak_memory_gb() -> float:
    """Peak memory in GB (1e9 bytes): the GPU's where one is used, else this process's."""
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            return float(torch.cuda.max_memory_reserved()) / 1e9

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


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
    from kit.common.unsloth import is_bfloat16_supported

    return look(folder, is_bfloat16_supported)


def look(folder: Path, cpu_bf16: Callable[[], bool]) -> Machine:
    """The machine; `cpu_bf16`, asked where there is no GPU, says whether the CPU computes in bfloat16."""
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


def versions() -> dict[str, str]:
    """Installed versions of the packages a result depends on."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in ("unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets",
                 "accelerate", "llama_cpp_python", "papermill", "jupytext"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
