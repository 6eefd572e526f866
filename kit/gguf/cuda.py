"""Whether llama.cpp is built for the GPU that is here: it takes far longer than a build for the CPU."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from kit.common.nvidia import cards

# Of processor time: nvcc 13.0, for compute capability 7.5 alone, of which 23 were measured for 109 of 157 files.
# Without a capability llama.cpp compiles for all of them.
CORE_MINUTES = 40
LONGEST = 10  # minutes that a set-up may take for it without being asked
FOR_THE_GPU = 'CMAKE_ARGS="-DGGML_CUDA=on"'
SLOW = "GGUFs answer on the CPU, a 4B model's at 4 to 5 tokens/s on two cores"


class Plan(NamedTuple):
    """CMake flags for a build with CUDA, '' for one without; whether the user asked for it; a line that says why."""

    flags: str = ""
    asked: bool = False
    remark: str = ""


def plan() -> Plan:
    """How llama.cpp is to be built here; without a GPU the remark is empty."""
    own = os.environ.get("CMAKE_ARGS", "")
    switches = re.findall(r"-DGGML_CUDA(?::\w+)?=(\w+)", own)
    asked = bool(switches) and switches[-1].lower() in ("on", "1", "true", "yes")
    targets = sorted({capability.replace(".", "") for _, capability in cards()})  # as CMake writes them: 75
    if not targets or (switches and not asked):
        return Plan(asked=asked)
    if not (nvcc := compiler()):
        return Plan(asked=asked, remark=f"for the CPU: there is no nvcc to build it for the GPU. {SLOW}; a wheel of "
                                        "this version built for CUDA, installed with pip, is taken as it is")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    minutes = round(CORE_MINUTES / cores) or 1
    if not asked and minutes > LONGEST:
        return Plan(remark=f"for the CPU: for the GPU it takes about {minutes} minutes on {cores} cores. {SLOW}; "
                           f"{FOR_THE_GPU} before the set-up builds it for the GPU, once: KIT_CACHE keeps it")
    flags = f"-DGGML_CUDA=ON -DCMAKE_CUDA_COMPILER={nvcc} -DCMAKE_CUDA_ARCHITECTURES={';'.join(targets)}"
    return Plan(flags, asked, f"for the GPU, about {minutes} minutes on {cores} cores")


def compiler() -> str:
    """nvcc's path, or ''; the toolkit of an image is often not on PATH."""
    usual = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin" / "nvcc"
    return shutil.which("nvcc") or (str(usual) if os.access(usual, os.X_OK) else "")


def release() -> str:
    """The CUDA release that nvcc is of: what it builds needs that one's libraries."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([compiler(), "--version"], capture_output=True, text=True, timeout=30, check=False)
        if found := re.search(r"release ([\d.]+)", done.stdout):
            return found[1]
    return ""


def offloads() -> bool:
    """Whether the installed runtime finds a GPU to compute on; asked in a child, as native code may end it."""
    code = "import llama_cpp; print(llama_cpp.llama_supports_gpu_offload())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() == "True"
