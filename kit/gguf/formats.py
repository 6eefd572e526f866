"""GGUF files: the quantisations they can have, in one table, and their header, which tells whether a file is whole.

GGUF version 3, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: little endian; "GGUF", u32 version, u64
tensors, u64 fields; each field is a string (u64 length, bytes), a u32 type and the value; each tensor is a string, u32
dimensions, u64 per dimension, u32 type, u64 offset; then padding to general.alignment (32 if it is not given), then
the tensors. The package gguf reads the same, but takes seconds for a vocabulary of 150,000 tokens.

A file may come from anyone: what llama.cpp refuses or no sound header has is refused here, before much memory is taken.
"""

import math
import os
import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from kit.common.errors import KitError, nearest

VOCABULARY_BYTES = 16 * 2**20  # of a file, beside its weights
# The scalar types by number, as struct codes.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
CONTROL = 3  # tokenizer.ggml.token_type of a special token
UINT64 = struct.Struct("<Q")
MAX_HEADER = 50_000_000  # bytes, three times that of Gemma 4 with its 262,144 tokens and their merges
MAX_DIMENSIONS = 4  # llama.cpp's GGML_MAX_DIMS
MAX_NAMES = 100_000  # of fields, and of tensors: large mixtures of experts have some thousands
NAMES = {str: "text", bool: "truth value", int: "whole number", float: "fraction"}
# What the kit itself reads; a wrong type there would be an error anywhere.
EXPECTED = {
    **dict.fromkeys(("general.architecture", "general.description", "tokenizer.ggml.model", "tokenizer.ggml.pre",
                     "tokenizer.chat_template"), "a text"),
    **dict.fromkeys(("tokenizer.ggml.tokens", "tokenizer.ggml.merges"), "a list of texts"),
    **dict.fromkeys(("general.alignment", *(f"tokenizer.ggml.{name}_token_id" for name in (
        "bos", "eos", "eot", "unknown"))), "a whole number"),
    "tokenizer.ggml.token_type": "a list of whole numbers",
}
DAMAGED = "the file is damaged: copy it again, or export it again"


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
    """Fields (arrays as lists) and tensors of a GGUF file.

    Raises KitError, naming the file and the place in it, when it is none, ends too early or holds what no sound one
    does. Takes at most about ten bytes of memory for each of a header's, of which there may be MAX_HEADER.
    """
    path = Path(path)
    if not path.is_file():
        raise KitError(f"no GGUF at {path}", "export one first (gguf=[q8_0]), or give its path")
    state = path.stat()
    return _read_header(path, (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns))


@lru_cache(maxsize=2)
def _read_header(path: Path, state: tuple[int, ...]) -> Header:
    """A vocabulary takes a second, and one check after another asks for it; `state` tells another file of that name."""
    with path.open("rb") as file:
        reader = _Reader(file, path)
        try:
            return reader.header()
        except (struct.error, EOFError):
            if reader.size > MAX_HEADER:
                raise reader.wrong(f"reaches beyond the {MAX_HEADER:,} bytes that a header may have") from None
            raise KitError(f"{path} is cut short: its {reader.size} bytes end inside the header, in {reader.place}",
                           "copy it again or run the export again") from None
        except UnicodeDecodeError:
            raise reader.wrong("is no UTF-8") from None


def chat_templates(header: Header) -> list[str]:
    """The Jinja templates of a GGUF: its own and any further ones, which llama-cpp-python compiles all."""
    return [value for name, value in header.fields.items()
            if name.startswith("tokenizer.chat_template") and isinstance(value, str)]


def control_tokens(header: Header) -> list[str]:
    """The special tokens of a GGUF's vocabulary as they are written: llama.cpp reads them so wherever they stand."""
    fields = header.fields
    kinds = zip(fields.get("tokenizer.ggml.tokens", ()), fields.get("tokenizer.ggml.token_type", ()), strict=False)
    return [token for token, kind in kinds if kind == CONTROL]


class _Reader:
    """No length or count that the file gives is believed: more than the file holds raises EOFError, and takes no
    memory. `place` is what is being read."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.place = file, path, "its beginning"
        self.size = os.fstat(file.fileno()).st_size
        self.left = min(self.size, MAX_HEADER)

    def header(self) -> Header:
        if self.file.read(4) != b"GGUF":
            raise KitError(f"{self.path} is no GGUF: it does not begin with 'GGUF'", "give the path of a .gguf file")
        version, tensor_count, field_count = self._unpack("IQQ")
        if version not in (2, 3):
            raise KitError(f"{self.path}: GGUF version {version} is not known here (2 and 3 are)", "export it again")
        fields: dict[str, Any] = {}
        for name in self._names("field", field_count):
            fields[name] = value = self._value(*self._unpack("I"))
            if (expected := EXPECTED.get(name)) and described(value) != expected and \
                    not (value == [] and expected.startswith("a list")):
                raise self.wrong(f"is {described(value)}, not {expected}")
        tensors = [Tensor(name, self._shape(), *self._unpack("IQ")) for name in self._names("tensor", tensor_count)]
        alignment = fields.get("general.alignment", 32)
        if alignment < 1 or alignment & (alignment - 1):
            self.place = "the field 'general.alignment'"
            raise self.wrong(f"is {alignment}, not a power of two")
        end = self.file.tell()
        return Header(fields, tensors, end, -(-end // alignment) * alignment)

    def _names(self, kind: str, count: int) -> Iterator[str]:
        """The name of each field or tensor, whose rest the caller reads before the next."""
        self.place = f"its {count} {kind}s"
        if count > MAX_NAMES:
            raise self.wrong(f"are more than {MAX_NAMES:,}")
        known: set[str] = set()
        for number in range(1, count + 1):
            self.place = f"the name of {kind} {number}"
            name = self._string()
            self.place = f"the {kind} {name[:80]!r}"
            if name in known:
                raise self.wrong("is there twice")
            known.add(name)
            yield name

    def _shape(self) -> tuple[int, ...]:
        [dimensions] = self._unpack("I")
        if dimensions > MAX_DIMENSIONS:
            raise self.wrong(f"has {dimensions} dimensions, more than {MAX_DIMENSIONS}")
        shape = self._unpack(f"{dimensions}Q")
        if math.prod(shape) >= 2**63:
            raise self.wrong(f"has the shape {list(shape)}, too large for any file")
        return shape

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            item, count = self._unpack("IQ")
            if item in SCALARS:
                return list(self._unpack(f"{count}{SCALARS[item]}"))
            if item == STRING:
                self._expect(8 * count)  # the least that so many texts take
                return [self._string() for _ in range(count)]
            raise self.wrong(f"is a list of items of type {item}, which llama.cpp does not read")
        if kind not in SCALARS:
            raise self.wrong(f"is of type {kind}, which is no GGUF type")
        return self._unpack(SCALARS[kind])[0]

    def _string(self) -> str:
        self.left -= 8  # the length, read without _take: a vocabulary has 150,000
        return self._take(*UINT64.unpack(self.file.read(8))).decode("utf-8")

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self._take(struct.calcsize("<" + layout)))

    def _take(self, count: int) -> bytes:
        self._expect(count)
        self.left -= count
        data = self.file.read(count)
        if len(data) < count:
            raise EOFError
        return data

    def _expect(self, count: int) -> None:
        """EOFError unless so many bytes can follow."""
        if count > self.left:
            raise EOFError

    def wrong(self, cause: str) -> KitError:
        return KitError(f"{self.path}: {self.place} {cause}", DAMAGED)


def described(value: Any) -> str:
    """A field's type in words: 'a list of texts'."""
    if isinstance(value, list):
        return f"a list of {NAMES[type(value[0])]}s" if value else "an empty list"
    return f"a {NAMES[type(value)]}"
