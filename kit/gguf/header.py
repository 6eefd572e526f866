"""The header of a GGUF file: its fields and tensors, and whether the file is whole.

GGUF version 3, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: little endian; "GGUF", u32 version, u64
tensors, u64 fields; each field is a string (u64 length, bytes), a u32 type and the value; each tensor is a string, u32
dimensions, u64 per dimension, u32 type, u64 offset; then padding to general.alignment (32 if it is not given), then
the tensors. The package gguf reads the same, but takes seconds for a vocabulary of 150,000 tokens.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from kit.common.errors import KitError

# The scalar types by number, as struct codes.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
CONTROL = 3  # tokenizer.ggml.token_type of a special token
UINT64 = struct.Struct("<Q")


class Tensor(NamedTuple):
    """One tensor's place: `shape` in the file's order (columns first), `offset` from the beginning of the tensors."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class Header(NamedTuple):
    """`start` is the byte at which the tensors begin, `end` where the header itself ends."""

    fields: dict[str, Any]
    tensors: list[Tensor]
    end: int
    start: int

    @property
    def expected_bytes(self) -> int:
        """The file's size as its header has it; a tensor of a type that the package gguf does not know is empty."""
        from gguf.constants import GGML_QUANT_SIZES  # here, as it takes 0.2 s and most readers need no size

        ends = [0]
        for tensor in self.tensors:
            weights, block_bytes = GGML_QUANT_SIZES.get(tensor.kind, (1, 0))
            ends.append(tensor.offset + math.prod(tensor.shape) // weights * block_bytes)
        return self.start + max(ends)


def check_gguf(path: Path) -> int:
    """Raise KitError if `path` is no GGUF or is shorter than its header says; return the expected bytes."""
    expected = read_header(path).expected_bytes
    size = Path(path).stat().st_size
    if size < expected:
        raise KitError(f"{path} is cut short: {expected - size} of {expected} bytes are missing",
                       "copy it again or run the export again")
    return expected


def read_header(path: Path) -> Header:
    """Fields (arrays as lists) and tensors of a GGUF file. Raises KitError when it is none, or ends too early."""
    path = Path(path)
    if not path.is_file():
        raise KitError(f"no GGUF at {path}", "export one first (gguf=[q8_0]), or give its path")
    try:
        with path.open("rb") as file:
            return _Reader(file, path).header()
    except (struct.error, EOFError):
        raise KitError(f"{path} is cut short: its {path.stat().st_size} bytes end inside the header",
                       "copy it again or run the export again") from None
    except (UnicodeDecodeError, RecursionError):
        raise KitError(f"{path}: a value in its header can't be read", "the file is damaged: export it again") from None


class _Reader:
    """No length that the file gives is believed: more than the file holds raises EOFError, and takes no memory."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size

    def header(self) -> Header:
        if self.file.read(4) != b"GGUF":
            raise KitError(f"{self.path} is no GGUF: it does not begin with 'GGUF'", "give the path of a .gguf file")
        version, tensor_count, field_count = self._unpack("IQQ")
        if version not in (2, 3):
            raise KitError(f"{self.path}: GGUF version {version} is not known here (2 and 3 are)", "export it again")
        fields = {}
        for _ in range(field_count):
            name = self._string()
            fields[name] = self._value(*self._unpack("I"))
        tensors = []
        for _ in range(tensor_count):
            name = self._string()
            shape = self._unpack("{}Q".format(*self._unpack("I")))
            tensors.append(Tensor(name, shape, *self._unpack("IQ")))
        end = self.file.tell()
        alignment = fields.get("general.alignment") or 32
        return Header(fields, tensors, end, -(-end // alignment) * alignment)

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            item, count = self._unpack("IQ")
            if item in SCALARS:
                return list(self._unpack(f"{count}{SCALARS[item]}"))
            return [self._value(item) for _ in range(count)]
        if kind not in SCALARS:
            raise KitError(f"{self.path}: value type {kind} is no GGUF type", "the file is damaged: export it again")
        return self._unpack(SCALARS[kind])[0]

    def _string(self) -> str:
        return self._take(*UINT64.unpack(self.file.read(8))).decode("utf-8")  # short, as a vocabulary has 150,000

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self._take(struct.calcsize("<" + layout)))

    def _take(self, count: int) -> bytes:
        data = self.file.read(min(count, self.size))
        if len(data) < count:
            raise EOFError
        return data
