"""The state of a run folder: whether it is free, at work or finished, and what a run made in it."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from kit.common.errors import KitError
from kit.common.files import write_json

MADE = ("recipe.yaml", "manifest.json", "log.jsonl", "result.json", "notebook.ipynb", "data.html", "adapter", "merged",
        "merged-4bit", "gguf", "figures", "checkpoints", "gathered", "reference.safetensors", "verify.json",
        "report.html")


def check_free(folder: Path) -> None:
    """KitError when the folder holds a finished run, a run at work, or somebody else's files."""
    result = read_result(folder)
    status = result.get("status")
    if status == "finished":
        raise KitError(f"{folder} holds a finished run", "give another run_name, or --overwrite to replace it")
    if status == "running" and result.get("pid") != os.getpid():  # a notebook may begin again in its own kernel
        raise KitError(f"{folder} is in use by a run at work (process {result.get('pid')})",
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


def read_result(folder: Path) -> dict[str, Any]:
    """result.json, with `stopped` for a run whose process is gone; {} when there is none."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if result.get("status") == "running" and result.get("pid") != os.getpid() and not _alive(result.get("pid")):
        result.update(status="stopped", reason="the process was killed")
    return dict(result)


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


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
