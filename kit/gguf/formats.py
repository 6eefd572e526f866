"""GGUF files: the quantisations they can have, in one table, and their header, which tells whether a file is whole.

GGUF version 3, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: little endian; "GGUF", u32 version, u64
tensors, u64 fields; each field is a string (u64 length, bytes), a u32 type and the value; each tensor is a string, u32
dimensions, u64 per dimension, u32 type, u64 offset; then padding to general.alignment (32 if it is not given), then
the tensors. The package gguf reads the same, but takes seconds for a vocabulary of 150,000 tokens.
"""

import math
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from kit.common.errors import KitError, nearest

VOCABULARY_BYTES = 16 * 2**20  # of a file, beside its weights
# The scalar types by number, as struct codes.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
CONTROL = 3  # tokenizer.ggml.token_type of a special token
UINT64 = struct.Struct("<Q")


class Quantization(NamedTuple):
    """What is known of a GGUF's format.

    `types` are the tensor types (enum ggml_type in ggml.h) that llama.cpp's quantiser uses for it, the fallbacks for
    narrow matrices among them. `tiny_kl` (nats per token) is what it may cost the rehearsal's random tiny model, None
    for a format that is only reported there.
    """

    file_type: int  # llama.cpp's number for it, enum llama_ftype in llama.h
    bits: float  # an upper bound for the disk check: narrow models fall back to larger types for most k-quant tensors
    about: str
    types: frozenset[int]
    tiny_kl: float | None


FLOAT32, FLOAT16, BFLOAT16, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K = 0, 1, 30, 6, 7, 8, 12, 13, 14
EXACT = frozenset((FLOAT32, FLOAT16, BFLOAT16))
QUANTIZATIONS = {
    "f16": Quantization(1, 16.1, "16 bits per weight: exact for nearly every trained weight; the reference when sizes "
                        "are compared", EXACT, 1e-3),
    "bf16": Quantization(32, 16.1, "16 bits per weight: exact for a bfloat16 model, runs best on hardware that has "
                         "bfloat16", EXACT, 1e-3),
    "q8_0": Quantization(7, 8.6, "8.5 bits per weight: answers as the 16-bit file does; the safe choice where it fits",
                         EXACT | {Q8_0}, 0.05),
    "q5_k_m": Quantization(17, 7.2, "about 5.7 bits per weight: a little better than q4_k_m for a fifth more room",
                           EXACT | {Q5_1, Q8_0, Q5_K, Q6_K}, None),
    "q4_k_m": Quantization(15, 6.6, "about 4.9 bits per weight: the usual choice for a small machine; small models "
                           "lose most by it", EXACT | {Q5_0, Q8_0, Q4_K, Q5_K, Q6_K}, None),
}


def check_quantizations(names: Sequence[str]) -> None:
    """Raise KitError for a quantisation that does not exist, listing those that do."""
    for name in names:
        if name not in QUANTIZATIONS:
            raise KitError(f"gguf: no quantisation {name!r}{nearest(str(name), QUANTIZATIONS)}",
                           f"choose from {', '.join(QUANTIZATIONS)}; gguf=[] makes none")


def needed_bytes(parameters: int, names: Sequence[str]) -> int:
    """Disk room in bytes for these GGUFs of a model with `parameters` weights, a temporary 16-bit file included."""
    files = set(names)
    if files and not {"f16", "bf16"} & files:
        files.add("bf16")
    return sum(file_bytes(parameters, name) for name in files)


def file_bytes(parameters: int, name: str) -> int:
    """Upper bound of a GGUF's bytes."""
    return int(parameters * QUANTIZATIONS[name].bits / 8) + VOCABULARY_BYTES


def quantization_of(gguf: Path) -> str:
    """q8_0 of <name>-q8_0.gguf."""
    return gguf.stem.rpartition("-")[2]


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
