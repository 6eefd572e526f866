"""Hands for sabotage: copies of a finished run, and files replaced by damaged ones.

A copy shares its files with the run by hard links. So every change here writes a new file in the old one's place.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kit.gguf.formats import ARRAY, SCALARS, STRING, read_header
from kit.runs.run import Run


def copy_run(run: Path, folder: Path, without: tuple[str, ...] = ()) -> Run:
    """A copy of the run, under its own name, in `folder`; `without` are paths in it that are left out."""
    copy = folder / run.name
    shutil.copytree(run, copy, copy_function=os.link)
    for name in without:
        (copy / name).unlink()
    return Run.open(copy)


def replace(path: Path, content: bytes | str) -> None:
    new = path.with_name("new")
    new.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(new, path)


def edit_text(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {path}"
    replace(path, text.replace(old, new))


def edit_json(path: Path, **values: Any) -> None:
    replace(path, json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}))


def edit_tensors(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a safetensors file after `change` had its {name: tensor}."""
    from safetensors.torch import load_file, save

    tensors = load_file(path)
    change(tensors)
    replace(path, save(tensors, metadata={"format": "pt"}))


def edit_gguf(path: Path, **fields: Any) -> None:
    """Rewrite a GGUF with other values of fields it has (None takes one away); `__` in a name stands for a dot."""
    whole, header = path.read_bytes(), read_header(path)
    text, count = whole[:header.end], struct.unpack_from("<Q", whole, 16)[0]
    for name, value in fields.items():
        key = name.replace("__", ".").encode()
        named = struct.pack("<Q", len(key)) + key
        at = text.index(named) + len(named)
        old = _encoded(text, at, header.fields[key.decode()])
        assert text.startswith(old, at)
        if value is None:
            text, count = text[:at - len(named)] + text[at + len(old):], count - 1
        else:
            text = text[:at] + _encoded(text, at, value) + text[at + len(old):]
    text = text[:16] + struct.pack("<Q", count) + text[24:]
    # The tensors' places are counted from where they begin, a multiple of 32.
    replace(path, text + b"\0" * (-len(text) % 32) + whole[header.start:])


def _encoded(text: bytes, at: int, value: Any) -> bytes:
    """Type and value as the GGUF field whose type stands at `at` has them."""
    (kind,) = struct.unpack_from("<I", text, at)
    if kind == STRING:
        return struct.pack("<I", kind) + _string(value)
    if kind in SCALARS:
        return struct.pack("<I" + SCALARS[kind], kind, value)
    assert kind == ARRAY
    (item,) = struct.unpack_from("<I", text, at + 4)
    assert item == STRING
    return struct.pack("<IIQ", kind, item, len(value)) + b"".join(map(_string, value))


def _string(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def overwrite_gguf(path: Path, tensor: str, content: bytes) -> None:
    """Write `content` over the beginning of a tensor's data, and what follows it in the file."""
    whole, header = path.read_bytes(), read_header(path)
    [place] = [header.start + one.offset for one in header.tensors if one.name == tensor]
    assert place + len(content) <= len(whole)
    replace(path, whole[:place] + content + whole[place + len(content):])
