"""The safetensors files of a model: their headers, and the index that names the shards."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from kit.common.errors import KitError


def safetensors_header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """{tensor: (shape, dtype)} of a file, which begins with its header: length (u64, little endian), then JSON."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    return {name: (tuple(tensor["shape"]), tensor["dtype"]) for name, tensor in header.items()
            if name != "__metadata__"}


INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: those its index names, else all. KitError when there is none."""
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if missing := [path for path in files if not path.is_file()] or ([] if files else [folder / "*.safetensors"]):
        raise KitError(f"{missing[0]} is not there", "fetch the model again, as safetensors")
    return files


def _layout(file: Path) -> tuple[int, dict[str, tuple[tuple[int, ...], int, int]]]:
    """(where the data of a safetensors file starts, {tensor: (shape, begin, end)}), in bytes.

    The format: an unsigned 64-bit length, a JSON header, the data without gaps
    (https://huggingface.co/docs/safetensors).
    """
    try:
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            header = json.loads(stream.read(length))
    except (ValueError, struct.error, OverflowError, MemoryError):
        raise KitError(f"{file} is damaged: it has no readable safetensors header", "fetch the model again") from None
    return 8 + length, {name: (tuple(tensor["shape"]), *tensor["data_offsets"]) for name, tensor in header.items()
                        if name != "__metadata__"}
