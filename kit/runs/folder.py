"""The state of a run folder: whether it is free, at work or finished, and what a run made in it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import psutil

from kit.common.errors import KitError
from kit.common.files import read_json, timestamp, write_json

MADE = ("recipe.yaml", "manifest.json", "log.jsonl", "result.json", "notebook.ipynb", "data.html", "adapter", "merged",
        "merged-4bit", "gguf", "figures", "checkpoints", "gathered", "reference.safetensors", "verify.json",
        "report.html")


def check_free(folder: Path) -> None:
    """KitError when the folder holds a finished run, a run at work, or somebody else's files."""
    result = read_result(folder)
    status = result.get("status")
    if status == "finished":
        raise KitError(f"{folder} holds a finished run", "give another run_name, or --overwrite to replace it")
    if status == "running" and result["pid"] != os.getpid():  # a notebook may begin again in its own kernel
        raise KitError(f"{folder} is in use by a run at work (process {result['pid']})",
                       "wait for it, or give another run_name")
    if folder.is_dir() and not status:
        others = sorted(p.name for p in folder.iterdir() if p.name not in MADE)
        if others:
            raise KitError(f"{folder} is no run folder: it holds {', '.join(others[:5])}",
                           "give another run_name or output_dir")


def clear(folder: Path, checkpoints: Path, keep: tuple[str, ...] = ()) -> None:
    """Remove what a run made in its folder, and its checkpoints; nothing else."""
    for name in MADE:
        path = checkpoints if name == "checkpoints" else folder / name
        if name in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def file_sizes(folder: Path) -> dict[str, int]:
    """{path in the folder: bytes} of every file in it."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*")) if path.is_file()}


def read_result(folder: Path) -> dict[str, Any]:
    """result.json, with `stopped` for a run whose process is gone; {} when there is none."""
    result = read_json(folder / "result.json")
    if result.get("status") == "running" and not _alive(result.get("pid")):
        result.update(status="stopped", reason="the process was killed")
    return result


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json; KitError when there is none, or it is damaged."""
    path = folder / "manifest.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise KitError(f"{path} can't be read: {error}", "run the recipe again") from None


def close_dead(folder: Path, reason: str) -> dict[str, Any]:
    """After a run's process ended: its result, marked as stopped if it never got to mark itself."""
    result = read_result(folder)
    if result.get("status") in ("running", "stopped"):
        result.update(status="stopped", reason=result.get("reason") or reason, finished=timestamp())
        write_json(folder / "result.json", result)
    return result


def _alive(pid: Any) -> bool:
    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, TypeError, ValueError):
        return False
