"""Where things lie: the project, the cache, the nearest folder that exists."""

from __future__ import annotations

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]  # the checkout that the kit runs from


def cache_dir() -> Path:
    """Where big made things live between runs: `KIT_CACHE`, or ~/.cache/unsloth-kit."""
    return Path(os.environ.get("KIT_CACHE") or "~/.cache/unsloth-kit").expanduser()


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above that exists."""
    nearest = folder.expanduser().resolve()
    while not nearest.exists():
        nearest = nearest.parent
    return nearest
