"""The safetensors files of a model: their headers, and the index that names the shards.

The format: an unsigned 64-bit length (little endian), a JSON header of that length, then the data without gaps
(https://huggingface.co/docs/safetensors#format).
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from kit.common.errors import KitError

INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # the format's own limit, in bytes
FETCH_AGAIN = "fetch or write the model again, as safetensors"


class TensorInfo(NamedTuple):
    """A tensor's shape, its dtype as the format spells it (BF16), and its bytes, counted from the data's start."""

    shape: tuple[int, ...]
    dtype: str
    begin: int
    end: int


class WeightsHeader(NamedTuple):
    """`start` is the byte at which the data begins."""

    start: int
    tensors: dict[str, TensorInfo]


def read_weights_header(file: Path) -> WeightsHeader:
    """The header of a safetensors file. Raises KitError when it has none, or the file is shorter than it says."""
    try:
        with file.open("rb") as stream:
            length = header_length(stream.read(8))
            tensors = header_tensors(stream.read(length))
        missing = 8 + length + max((info.end for info in tensors.values()), default=0) - file.stat().st_size
    except OSError as error:
        raise KitError(f"{file} can't be read: {error.strerror or error}", FETCH_AGAIN) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise KitError(f"{file} is damaged: it has no readable safetensors header", FETCH_AGAIN) from None
    if missing > 0:
        raise KitError(f"{file} is cut short: {missing} bytes are missing", FETCH_AGAIN)
    return WeightsHeader(8 + length, tensors)


def header_length(beginning: bytes) -> int:
    """How long the header is that follows these first eight bytes of a file. ValueError where there can be none."""
    if len(beginning) < 8 or (length := int.from_bytes(beginning[:8], "little")) > MAX_HEADER:
        raise ValueError("no header, or too long a one")
    return length


def header_tensors(header: bytes) -> dict[str, TensorInfo]:
    """The tensors of a header's JSON. Raises ValueError, KeyError, TypeError or AttributeError for what is none."""
    found: dict[str, dict[str, Any]] = json.loads(header)
    return {name: TensorInfo(tuple(info["shape"]), info["dtype"], *info["data_offsets"])
            for name, info in found.items() if name != "__metadata__"}


def shard_names(folder: Path) -> list[str]:
    """Names of a model's weight files, missing ones too: those its index names, else all, else model.safetensors.

    Raises KitError for an index that can't be read.
    """
    index = folder / INDEX
    if not index.is_file():
        return sorted(path.name for path in folder.glob("*.safetensors")) or ["model.safetensors"]
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise KitError(f"{index} can't be read", FETCH_AGAIN) from None


def weight_files(folder: Path) -> list[Path]:
    """The files of `shard_names`; KitError when one of them is missing."""
    files = [folder / name for name in shard_names(folder)]
    for path in files:
        if not path.is_file():
            raise KitError(f"{path} is missing", FETCH_AGAIN)
    return files
