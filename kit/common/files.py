"""Files and folders that appear whole or not at all, and their hashes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from kit.common.errors import KitError
from kit.common.show import bar


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


def hashes_of(folder: Path) -> dict[str, str]:
    """{file: sha256} of a model's weights and config."""
    return _hashes(folder, [*sorted(folder.glob("*.safetensors")), folder / "config.json"], "hashing the base model")


def _hashes(folder: Path, paths: list[Path], what: str) -> dict[str, str]:
    found = {}
    with bar(len(paths), what, "file", leave=False, delay=2) as progress:
        for path in paths:
            found[path.relative_to(folder).as_posix()] = sha256(path)
            progress.update()
    return found


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears complete or not at all; what it replaces stays until then."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        old = folder.with_name(folder.name + ".old")
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        # safetensors and tokenizers raise types of their own, with the system's words in them.
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        raise KitError(f"{folder} could not be written: {getattr(error, 'strerror', None) or error}",
                       "free disk space or choose another output_dir") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
