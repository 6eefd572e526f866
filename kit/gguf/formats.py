"""The quantisations a GGUF can have: one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kit.common.errors import KitError, nearest

QUANTIZATIONS: dict[str, str] = {
    "f16": "16 bits per weight: exact for nearly every trained weight; the reference when sizes are compared",
    "bf16": "16 bits per weight: exact for a bfloat16 model, runs best on hardware that has bfloat16",
    "q8_0": "8.5 bits per weight: answers as the 16-bit file does; the safe choice where it fits",
    "q5_k_m": "about 5.7 bits per weight: a little better than q4_k_m for a fifth more room",
    "q4_k_m": "about 4.9 bits per weight: the usual choice for a small machine; small models lose most by it",
}
# llama.cpp's numbers for them, enum llama_ftype in llama.h.
FILE_TYPES = {"f16": 1, "bf16": 32, "q8_0": 7, "q5_k_m": 17, "q4_k_m": 15}
# Upper bounds for the disk check: narrow models fall back to larger types for most k-quant tensors.
BITS = {"f16": 16.1, "bf16": 16.1, "q8_0": 8.6, "q5_k_m": 7.2, "q4_k_m": 6.6}
VOCABULARY_BYTES = 16 * 2**20


def check_quantizations(names: Sequence[str]) -> None:
    """Raise KitError for a quantisation that does not exist, listing those that do."""
    for name in names:
        if name not in QUANTIZATIONS:
            raise KitError(f"gguf: no quantisation {name!r}{nearest(str(name), QUANTIZATIONS)}",
                           f"choose from {', '.join(QUANTIZATIONS)}; gguf=[] makes none")


def needed_bytes(parameters: int, names: Sequence[str]) -> int:
    """Disk room in bytes for these GGUFs of a model with `parameters` weights, a temporary 16-bit file included."""
    check_quantizations(names)
    made = list(dict.fromkeys(names))
    if made and not {"f16", "bf16"} & set(made):
        made.append("bf16")
    return sum(int(parameters * BITS[name] / 8) + VOCABULARY_BYTES for name in made)


def quantization_of(gguf: Path) -> str:
    """q8_0 of <name>-q8_0.gguf."""
    return gguf.stem.rpartition("-")[2]
