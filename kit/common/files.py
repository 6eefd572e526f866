"""Where things lie; files and folders that appear whole or not at all, and their hashes."""

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from kit.common.errors import DiskError, KitError, one_line
from kit.common.show import bar

ROOM = "free room, or name another place (output_dir, KIT_CACHE)"
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # what a disk has, not the name of a file
LARGE = 100_000_000  # bytes of a file whose hash is remembered
PROJECT = Path(__file__).resolve().parents[2]  # the checkout that the kit runs from


def cache_dir() -> Path:
    """Where big made things live between runs: `KIT_CACHE`, or ~/.cache/unsloth-kit."""
    return Path(os.environ.get("KIT_CACHE") or "~/.cache/unsloth-kit").expanduser()


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above that exists."""
    folder = folder.expanduser().resolve()
    return next(path for path in (folder, *folder.parents) if path.exists())


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

    Raises KitError when the system refuses, DiskError of a full disk.
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
    """The same for a folder; what it replaces stays until it is complete, and comes back when it can't be put there."""
    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    with unwritable(folder):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            yield partial
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(folder, old)
            try:
                os.replace(partial, folder)
            except OSError:
                if old.exists():
                    os.replace(old, folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def unwritable(path: Path, hint: str = ROOM, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """The system's refusal to write `path` becomes a KitError with `hint`; out of memory stays what it is.

    A refusal is an OSError, one that safetensors or tokenizers wrapped in a type of their own, and what is in `also`.
    It is a DiskError where the disk is full or fails, which a name such as a missing folder's is not.
    """
    try:
        yield
    except Exception as error:
        refused = isinstance(error, (OSError, *also)) or "os error" in str(error)
        if isinstance(error, KitError) or not refused or "out of memory" in str(error).lower():
            raise
        kind = DiskError if isinstance(error, also) or _of_disk(error) else KitError
        raise kind(f"{path} can't be written: {getattr(error, 'strerror', None) or one_line(error)}", hint) from error


def disk_error(error: OSError, folder: Path | str) -> DiskError | None:
    """What to tell of a full or failing disk, wherever it shows: it names the file, or else `folder`; else None."""
    if not _of_disk(error):
        return None
    return DiskError(f"{error.filename or folder} can't be written: {error.strerror or one_line(error)}", ROOM)


def _of_disk(error: Exception) -> bool:
    code = getattr(error, "errno", None)
    if code is None and (said := re.search(r"os error (\d+)", str(error))):
        code = int(said[1])
    return code in DISK or os.strerror(errno.ENOSPC) in str(error)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object; {} when the file is missing or damaged, or holds something else."""
    with suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    return {}


def timestamp() -> str:
    """Now, in ISO 8601 with the zone: how the files of a run state a time."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_sha256(path: Path) -> str:
    """`sha256`; of a large file it is kept in the cache folder, by size and time, so that it is read through once."""
    about, memory = path.stat(), cache_dir() / "hashes.json"
    if about.st_size < LARGE:
        return sha256(path)
    known, key, state = read_json(memory), str(path.resolve()), [about.st_size, about.st_mtime_ns, about.st_ino]
    if (entry := known.get(key)) and entry[:-1] == state:
        return str(entry[-1])
    digest = hashes_of(path.parent, [path])[path.name]
    with suppress(KitError, OSError):  # a cache that can't be written
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, {name: value for name, value in known.items() if Path(name).exists()}
                   | {key: [*state, digest]})
    return digest


def hashes_of(folder: Path, paths: list[Path] | None = None) -> dict[str, str]:
    """{path in the folder: sha256} of `paths`; without them, of a model's weights and config."""
    if paths is None:
        paths = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
    progress = bar(len(paths), "hashing", "file", iterable=paths, leave=False, delay=2)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in progress}
