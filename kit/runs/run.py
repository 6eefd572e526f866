"""The run folder: whether it is free, at work or finished; what a run made in it; stages, manifest and result.

`result.json` is the truth about a run: its `status` is `running` until `finish` or `fail` is called.
"""

import atexit
import hashlib
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil

from kit.common.errors import DiskError, KitError, Stopped
from kit.common.files import PROJECT, hashes_of, read_json, sha256, timestamp, write_json, write_text
from kit.common.notebook import ipython
from kit.common.processes import is_main
from kit.data.sources import data_files
from kit.models.fetch import adapter_folder, model_folder, read_adapter_config
from kit.recipe.machine import machine, peak_memory_gb, versions
from kit.recipe.recipe import Recipe
from kit.runs.gates import Gates
from kit.runs.own import MODELS, check_own, clear, mark

SAME_SECONDS = 2  # by which a process's start may seem to move when the clock is set


class Run:
    """One run's folder. Use `Run.start(recipe)` in a run and `Run.open(path)` to look at one.

    `trust_remote_code` says whether code that came with its model may run. A recipe in the user's hand says so; of a
    folder that is opened, only whoever opens it.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        self.folder, self.trust_remote_code = folder, trust_remote_code
        self.adapter, self.merged, self.merged_4bit, self.gguf = (folder / name for name in MODELS)
        self.figures, self.log, self.checkpoints = folder / "figures", folder / "log.jsonl", folder / "checkpoints"
        self.result: dict[str, Any] = {}
        self._stage_began = 0.0

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        run = cls(Path(recipe.output_dir).expanduser() / recipe.run_name, recipe.trust_remote_code)
        if recipe.checkpoint_dir:
            run.checkpoints = Path(recipe.checkpoint_dir).expanduser() / recipe.run_name
        return run

    @classmethod
    def start(cls, recipe: Recipe) -> Self:
        """Make the folder and write what is known before the first step.

        Raises KitError when it holds a finished run. What an unfinished run left is replaced, but for its checkpoints,
        which `kit.train` resumes from. Of several processes the main one writes for all.
        """
        run = cls.of(recipe)
        if not is_main():
            return run
        if recipe.overwrite and read_result(run.folder).get("status") == "finished":
            clear(run.folder, run.checkpoints, ("notebook.ipynb",))
        check_free(run)
        kept = ("notebook.ipynb", *(("checkpoints",) if recipe.resume_from_checkpoint else ()))
        clear(run.folder, run.checkpoints, kept)
        run.folder.mkdir(parents=True, exist_ok=True)
        if recipe.checkpoint_dir:
            mark(run.checkpoints)
        write_text(run.folder / "recipe.yaml", recipe.dump())
        run._stage_began = time.perf_counter()
        run.note(status="running", stage="start", pid=os.getpid(), process_started=psutil.Process().create_time(),
                 started=timestamp(), seconds={})
        _watch(run)
        return run

    @classmethod
    def open(cls, path: str | Path, trust_remote_code: bool = False) -> Self:
        """A run folder that exists; a bare name is looked for in runs/. It may be anybody's: see the class."""
        for folder in (Path(path).expanduser(), Path("runs") / path):
            if (folder / "recipe.yaml").is_file():
                run = cls(folder, trust_remote_code)
                run.result = read_result(folder)
                return run
        names = sorted(file.parent.name for file in Path("runs").glob("*/recipe.yaml"))
        raise KitError(f"{path} is no run folder (no recipe.yaml in it)",
                       f"runs here: {', '.join(names) or 'none yet; make one with `kit run recipes/quickstart.yaml`'}")

    @property
    def recipe(self) -> Recipe:
        """The recipe in the folder, but for its trust_remote_code: that is the caller's."""
        return Recipe.load(self.folder / "recipe.yaml", trust_remote_code=self.trust_remote_code)

    def stage(self, name: str) -> None:
        """Close the stage before, with its seconds, and say in result.json that this one began."""
        self._check_open()
        self._close_stage()
        self.result.pop("reason", None)  # a cell that was interrupted is run again
        self.note(stage=name, status="running")

    def gate(self, gates: Gates) -> None:
        """Add gates to result.json; GateError when one of them failed."""
        self.note(gates={**self.result.get("gates", {}), gates.title: gates.as_json()})
        gates.require()

    def note(self, **figures: Any) -> None:
        """Add figures to result.json. KitError when the run is finished: nothing is written to it any more."""
        self._check_open()
        self.result.update(figures)
        self._write()

    def _check_open(self) -> None:
        if self.result.get("status") == "finished":
            raise KitError(f"{self.folder} is a finished run, and stays as it is",
                           "for another one set another run_name and run all cells from the first; to ask this one: "
                           "kit ask RUN")

    def _write(self) -> None:
        if is_main():
            write_json(self.folder / "result.json", self.result)

    def finish(self) -> None:
        """Write the files with their sizes and mark the run finished."""
        self._check_open()
        self._close_stage()
        self.result.update(status="finished", stage="done", finished=timestamp(), files=file_sizes(self.folder),
                           peak_memory_gb=round(peak_memory_gb(), 2))
        if forecast := self.result.get("forecast"):
            forecast = {**forecast, "train_seconds": self.result.get("train", {}).get("forecast_seconds")}
            self.result.update(forecast=forecast, forecast_score=forecast_score(forecast, self.result))
        self._write()

    def fail(self, reason: str, status: str = "failed") -> None:
        """Mark the run as ended early: `stage` stays where it stopped."""
        self._check_open()
        self._close_stage()
        with suppress(DiskError):  # the reason itself, maybe: without it, the file says that the process is gone
            self.note(status=status, reason=reason, finished=timestamp(), peak_memory_gb=round(peak_memory_gb(), 2))

    def manifest(self, recipe: Recipe, tokenizer: Any, notes: list[str]) -> None:
        """Write manifest.json: what went in, so that a run can be told from another."""
        if not is_main():
            return
        data: dict[str, str] = {}
        for path in data_files(recipe):
            data[str(path) if path.name in data else path.name] = sha256(path)
        base = Path(model_folder(recipe))
        write_json(self.folder / "manifest.json", {
            "model_name": recipe.model_name, "revision": recipe.revision, "dataset": recipe.dataset,
            "data_sha256": data,
            # A hub id's is known when the adapter has been merged into it.
            "base_sha256": hashes_of(base) if base.is_dir() else None,
            "adapter_name_or_path": _adapter_hashes(adapter_folder(recipe)) if recipe.adapter_name_or_path else None,
            "template_sha256": hashlib.sha256(tokenizer.chat_template.encode()).hexdigest(),
            "stop_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token,
            "versions": versions(), "machine": vars(machine(self.folder)), "settings": notes,
            "seed": recipe.seed, "random_state": recipe.random_state, "command": sys.argv, "git": _commit()})

    def _close_stage(self) -> None:
        now = time.perf_counter()
        if self._stage_began:
            seconds = self.result.setdefault("seconds", {})
            name = self.result["stage"]
            seconds[name] = round(seconds.get(name, 0) + now - self._stage_began, 2)
            self.result.setdefault("peak_memory_gb_until", {})[name] = round(peak_memory_gb(), 2)
        self._stage_began = now


def _adapter_hashes(folder: Path) -> dict[str, str]:
    """Of the adapter that is trained on. Raises KitError when the folder holds none."""
    read_adapter_config(folder)
    return hashes_of(folder, [folder / "adapter_config.json", folder / "adapter_model.safetensors"])


def _watch(run: Run) -> None:
    """Whatever ends the process or a notebook cell early is written to result.json."""
    def at_exit() -> None:
        if run.result.get("status") == "running":
            run.fail("the process ended before the run did (an early exit or a stopped kernel)", "stopped")

    def after_cell(result: Any) -> None:
        error = result.error_in_exec or result.error_before_exec
        if error is not None and run.result.get("status") == "running":
            stopped = isinstance(error, (Stopped, KeyboardInterrupt))
            run.fail(f"{type(error).__name__}: {error}", "stopped" if stopped else "failed")

    atexit.register(at_exit)
    if shell := ipython():
        shell.events.register("post_run_cell", after_cell)


def _commit() -> str | None:
    """The commit of the checkout the kit runs from, if it is one."""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(PROJECT), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip() or None
    return None


def forecast_score(forecast: dict[str, Any], result: dict[str, Any]) -> dict[str, float]:
    """What happened divided by what was forecast, for each figure that both know; 1 is exact, of memory the bound.

    `forecast` has peak_memory_gb, disk_gb, steps, train_seconds; `result` is result.json. Disk counts adapter, merged,
    gguf and checkpoints: notebook, figures and pages are not forecast.
    """
    train, files = result.get("train") or {}, result.get("files") or {}
    kept = sum(size for name, size in files.items() if name.partition("/")[0] in (*MODELS, "checkpoints"))
    happened = {"peak_memory_gb": result.get("peak_memory_gb"), "disk_gb": kept / 1e9, "steps": train.get("steps"),
                "train_seconds": train.get("train_seconds")}
    return {name: round(value / forecast[name], 3) for name, value in happened.items() if value and forecast.get(name)}


def check_free(run: Run, overwrite: bool = False) -> None:
    """KitError when the run's folder holds a finished run (`overwrite`: that may be), one at work, or others' files."""
    result = read_result(run.folder)
    status = result.get("status")
    if status == "finished" and not overwrite:
        raise KitError(f"{run.folder} holds a finished run", "give another run_name, or replace it: --overwrite, in a "
                       "notebook overwrite = True in the parameters cell")
    if status == "running" and result["pid"] != os.getpid():  # a notebook may begin again in its own kernel
        raise KitError(f"{run.folder} is in use by a run at work (process {result['pid']})",
                       "wait for it, or give another run_name")
    check_own(run.folder, run.checkpoints)


def file_sizes(folder: Path) -> dict[str, int]:
    """{path in the folder: bytes} of every file in it."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*")) if path.is_file()}


def read_result(folder: Path) -> dict[str, Any]:
    """result.json, with `stopped` for a run whose process is gone; {} when there is none."""
    result = read_json(folder / "result.json")
    if result.get("status") == "running" and not _alive(result):
        result.update(status="stopped", reason="the process was killed")
    return result


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json; KitError when there is none, or it is damaged."""
    path = folder / "manifest.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or error
        raise KitError(f"{path} can't be read: {cause}", "copy it from where the run was made, or run again") from None


def close_dead(folder: Path, reason: str) -> dict[str, Any]:
    """After a run's process ended: its result, marked as stopped if it never got to mark itself."""
    result = read_result(folder)
    if result.get("status") in ("running", "stopped"):
        result.update(status="stopped", reason=result.get("reason") or reason, finished=timestamp())
        with suppress(DiskError):
            write_json(folder / "result.json", result)
    return result


def _alive(result: dict[str, Any]) -> bool:
    """Whether the run's process is there, and no other one that has its number since a reboot or in a container."""
    try:
        process, began = psutil.Process(int(result["pid"])), result.get("process_started")
        same = began is None or abs(process.create_time() - began) < SAME_SECONDS
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return False
