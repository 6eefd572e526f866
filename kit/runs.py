"""The run folder: names, manifest, stages and the result that says how a run ended.

runs/<name>/ holds recipe.yaml, manifest.json, log.jsonl, result.json, adapter/, merged/, gguf/, figures/, verify.json
and report.html.
`result.json` is the truth about a run: its `status` is `running` until `finish` or `fail` is called.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from kit.errors import KitError, Stopped
from kit.processes import is_main

if TYPE_CHECKING:
    from kit.gates import Gates
    from kit.recipe import Recipe

MADE = ("recipe.yaml", "manifest.json", "log.jsonl", "result.json", "notebook.ipynb", "data.html", "adapter", "merged",
        "merged-4bit", "gguf", "figures", "checkpoints", "gathered", "reference.safetensors", "verify.json",
        "report.html")


class Run:
    """One run's folder. Use `Run.start(recipe)` in a run and `Run.open(path)` to look at one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.adapter, self.merged, self.merged_4bit = folder / "adapter", folder / "merged", folder / "merged-4bit"
        self.gguf, self.figures = folder / "gguf", folder / "figures"
        self.log, self.checkpoints = folder / "log.jsonl", folder / "checkpoints"
        self.result: dict[str, Any] = {}
        self._stage_began = 0.0
        self._silent = False

    @classmethod
    def of(cls, recipe: Recipe) -> Run:
        run = cls(Path(recipe.output_dir).expanduser() / recipe.run_name)
        if recipe.checkpoint_dir:
            run.checkpoints = Path(recipe.checkpoint_dir).expanduser() / recipe.run_name
        return run

    @classmethod
    def start(cls, recipe: Recipe) -> Run:
        """Make the folder and write what is known before the first step.

        Raises KitError when it holds a finished run. What an unfinished run left is replaced, but for its checkpoints,
        which `kit.train` goes on from. Of several processes the main one writes for all.
        """
        run = cls.of(recipe)
        run._silent = not is_main()
        if run._silent:
            return run
        check_free(run)
        clear(run, keep=("notebook.ipynb", *(("checkpoints",) if recipe.resume_from_checkpoint else ())))
        run.folder.mkdir(parents=True, exist_ok=True)
        write_text(run.folder / "recipe.yaml", recipe.dump())
        run.result = {"status": "running", "stage": "start", "pid": os.getpid(), "started": _now(),
                      "seconds": {}}
        run._stage_began = time.perf_counter()
        run._save()
        _watch(run)
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """A run folder that exists; a bare name is looked for in runs/."""
        for folder in (Path(path).expanduser(), Path("runs") / path):
            if (folder / "recipe.yaml").is_file():
                run = cls(folder)
                run.result = read_result(folder)
                return run
        there = sorted(p.parent.name for p in Path("runs").glob("*/recipe.yaml"))
        raise KitError(f"{path} is no run folder (no recipe.yaml in it)",
                       f"runs here: {', '.join(there) or 'none yet; make one with `kit run recipes/quickstart.yaml`'}")

    @property
    def recipe(self) -> Recipe:
        from kit.recipe import Recipe

        return Recipe.load(self.folder / "recipe.yaml")

    def stage(self, name: str) -> None:
        """Close the stage before, with its seconds, and say in result.json that this one began."""
        self._close_stage()
        self.result["stage"] = name
        self._save()

    def gate(self, gates: Gates) -> None:
        """Add gates to result.json; GateError when one of them failed."""
        self.result.setdefault("gates", {})[gates.title] = gates.as_json()
        self._save()
        gates.require()

    def note(self, **figures: Any) -> None:
        """Add figures to result.json."""
        self.result.update(figures)
        self._save()

    def finish(self) -> None:
        """Write the files with their sizes and mark the run finished."""
        self._close_stage()
        files = {str(p.relative_to(self.folder)): p.stat().st_size
                 for p in sorted(self.folder.rglob("*")) if p.is_file()}
        self.result.update(status="finished", stage="done", finished=_now(), files=files,
                           peak_memory_gb=round(peak_memory_gb(), 2))
        if "forecast" in self.result:
            from kit.forecast import score

            said = {**self.result["forecast"], "train_seconds": self.result.get("train", {}).get("forecast_seconds")}
            self.result.update(forecast=said, forecast_score=score(said, self.result))
        self._save()

    def fail(self, reason: str, status: str = "failed") -> None:
        """Mark the run as ended early: `stage` stays where it stopped."""
        self._close_stage()
        self.result.update(status=status, reason=reason, finished=_now(), peak_memory_gb=round(peak_memory_gb(), 2))
        self._save()

    def manifest(self, recipe: Recipe, tokenizer: Any, notes: list[str]) -> None:
        """Write manifest.json: what went in, so that a run can be told from another."""
        if self._silent:
            return
        from kit.platforms import machine, versions
        from kit.sources import data_files

        data: dict[str, str] = {}
        for path in data_files(recipe):
            data[str(path) if path.name in data else path.name] = sha256(path)
        write_json(self.folder / "manifest.json", {
            "model_name": recipe.model_name, "revision": recipe.revision, "dataset": recipe.dataset,
            "data_sha256": data,
            "base_sha256": _base_hashes(recipe),
            "adapter_name_or_path": _adapter_hash(recipe),
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

    def _save(self) -> None:
        if not self._silent:
            write_json(self.folder / "result.json", self.result)


def _base_hashes(recipe: Recipe) -> dict[str, str] | None:
    """Of a base model that lies in a folder; that of a hub id is known when the adapter has been merged into it."""
    from kit.gates.provenance import hashes_of
    from kit.platforms import model_folder

    folder = Path(model_folder(recipe))
    return hashes_of(folder) if folder.is_dir() else None


def _adapter_hash(recipe: Recipe) -> dict[str, str] | None:
    """Of the adapter that is trained on, if there is one."""
    if recipe.adapter_name_or_path is None:
        return None
    from kit.merging import read_adapter_config
    from kit.model import adapter_folder

    folder = adapter_folder(recipe)
    read_adapter_config(folder)  # complains where there is none
    return {name: sha256(folder / name) for name in ("adapter_config.json", "adapter_model.safetensors")}


def _watch(run: Run) -> None:
    """Whatever ends the process or a notebook cell early is written to result.json."""
    def at_exit() -> None:
        if run.result.get("status") == "running":
            run.fail("the process ended before the run did (an early exit or a stopped kernel)", "stopped")

    atexit.register(at_exit)
    try:
        from IPython import get_ipython
    except ImportError:
        return
    shell = get_ipython()
    if shell is None:
        return

    def after_cell(result: Any) -> None:
        error = result.error_in_exec or result.error_before_exec
        if error is not None and run.result.get("status") == "running":
            stopped = isinstance(error, (Stopped, KeyboardInterrupt))
            run.fail(f"{type(error).__name__}: {error}", "stopped" if stopped else "failed")

    shell.events.register("post_run_cell", after_cell)


def check_free(run: Run) -> None:
    """KitError when the folder holds a finished run, a run at work, or somebody else's files."""
    result = read_result(run.folder)
    status = result.get("status")
    if status == "finished":
        raise KitError(f"{run.folder} holds a finished run", "give another run_name, or --overwrite to replace it")
    if status == "running" and result.get("pid") != os.getpid():  # a notebook may begin again in its own kernel
        raise KitError(f"{run.folder} is in use by a run at work (process {result.get('pid')})",
                       "wait for it, or give another run_name")
    if run.folder.is_dir() and not status:
        others = sorted(p.name for p in run.folder.iterdir() if p.name not in MADE)
        if others:
            raise KitError(f"{run.folder} is no run folder: it holds {', '.join(others[:5])}",
                           "give another run_name or output_dir")


def clear(run: Run, keep: tuple[str, ...] = ()) -> None:
    """Remove what a run made in its folder, and its checkpoints; nothing else."""
    for name in MADE:
        path = run.checkpoints if name == "checkpoints" else run.folder / name
        if name in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def read_result(folder: Path) -> dict[str, Any]:
    """result.json, with `stopped` for a run whose process is gone; {} when there is none."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if result.get("status") == "running" and result.get("pid") != os.getpid() and not _alive(result.get("pid")):
        result.update(status="stopped", reason="the process was killed")
    return dict(result)


def read_manifest(run: Run) -> dict[str, Any]:
    """manifest.json; KitError when there is none, or it is damaged."""
    path = run.folder / "manifest.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise KitError(f"{path} can't be read: {error}", "run the recipe again") from None


def close_dead(folder: Path, reason: str) -> dict[str, Any]:
    """After a run's process ended: its result, marked as stopped if it never got to mark itself."""
    result = read_result(folder)
    if result.get("status") in ("running", "stopped"):
        result.update(status="stopped", reason=result.get("reason") or reason, finished=_now())
        write_json(folder / "result.json", result)
    return result


def _alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except PermissionError:
        return True
    # A zombie still answers signal 0.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return True


def peak_memory_gb() -> float:
    """Peak memory in GB (1e9 bytes): the GPU's where one is used, else this process's."""
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            return float(torch.cuda.max_memory_reserved()) / 1e9
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """The file whole or not at all."""
    with writing(path) as file:
        file.write(text)


@contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """A file to write (UTF-8) that appears under its name when all is written, and not at all after an error."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            yield file
        os.replace(partial, path)
    except OSError as error:
        raise KitError(f"{path} can't be written: {error.strerror or error}",
                       "free room, or name another place") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _commit() -> str | None:
    """The commit of the checkout the kit runs from, if it is one."""
    from kit.recipe import PROJECT

    try:
        done = subprocess.run(["git", "-C", str(PROJECT), "rev-parse", "HEAD"], capture_output=True, text=True,
                              timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
