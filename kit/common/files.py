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

from kit.common.errors import KitError, one_line
from kit.common.show import bar


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file (UTF-8), whole or not at all."""
    with writing(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all; what JSON does not know is written as its text."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


@contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """A file to write (UTF-8) that appears under its name when all is written, and not at all after an error."""
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        yield file


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The name to write to: the file takes its own, `path`, when all is written. After an error nothing stays.

    Raises KitError when the system refuses, of a full disk for example.
    """
    partial = path.with_name(path.name + ".partial")
    with unwritable(path):
        try:
            yield partial
            os.replace(partial, path)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """The same for a folder; what it replaces stays until it is complete."""
    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    with unwritable(folder):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            yield partial
            if folder.exists():
                os.replace(folder, old)
            os.replace(partial, folder)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def unwritable(path: Path, hint: str = "free room, or name another place (output_dir, KIT_CACHE)") -> Iterator[None]:
    """The system's refusal becomes a KitError, also in the types that safetensors and tokenizers wrap it in."""
    try:
        yield
    except KitError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        raise KitError(f"{path} can't be written: {getattr(error, 'strerror', None) or one_line(error)}",
                       hint) from error


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
