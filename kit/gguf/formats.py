"""The quantisations a GGUF can have: one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kit.common.errors import KitError, nearest

VOCABULARY_BYTES = 16 * 2**20  # of a file, beside its weights


class Quantization(NamedTuple):
    """What is known of a GGUF's format, and what it may cost.

    `mean_kl` (nats per token) and `top1` (a share, None: not judged) are the parity gate's tolerances against the model
    that was trained; `tiny_kl` is that of the rehearsal's random tiny model, None for a format that is only reported.
    """

    file_type: int  # llama.cpp's number for it, enum llama_ftype in llama.h
    bits: float  # an upper bound for the disk check: narrow models fall back to larger types for most k-quant tensors
    about: str
    mean_kl: float
    top1: float | None
    tiny_kl: float | None
    why: str


# f16 and bf16 hold the merged weights exactly (f16: all within its range), so only the merge's own rounding is left:
# 0.000004 on the demo. q8_0 rounds each block of 32 weights to 8 bits: 0.00014 there, 0.007 on a model that was hardly
# trained. Below 4.5 bits a narrow model loses visibly; beyond 0.3 its answers are others.
QUANTIZATIONS = {
    "f16": Quantization(1, 16.1, "16 bits per weight: exact for nearly every trained weight; the reference when sizes "
                        "are compared", 1e-3, 1.0, 1e-3, "holds the merged weights exactly"),
    "bf16": Quantization(32, 16.1, "16 bits per weight: exact for a bfloat16 model, runs best on hardware that has "
                         "bfloat16", 1e-3, 1.0, 1e-3, "holds the merged weights exactly"),
    "q8_0": Quantization(7, 8.6, "8.5 bits per weight: answers as the 16-bit file does; the safe choice where it fits",
                         0.02, 0.97, 0.05, "8-bit blocks of 32 weights"),
    "q5_k_m": Quantization(17, 7.2, "about 5.7 bits per weight: a little better than q4_k_m for a fifth more room",
                           0.3, None, None, "about 5.7 bits; reported"),
    "q4_k_m": Quantization(15, 6.6, "about 4.9 bits per weight: the usual choice for a small machine; small models "
                           "lose most by it", 0.3, None, None, "about 4.9 bits; reported"),
}


def check_quantizations(names: Sequence[str]) -> None:
    """Raise KitError for a quantisation that does not exist, listing those that do."""
    for name in names:
        if name not in QUANTIZATIONS:
            raise KitError(f"gguf: no quantisation {name!r}{nearest(str(name), QUANTIZATIONS)}",
                           f"choose from {', '.join(QUANTIZATIONS)}; gguf=[] makes none")


def needed_bytes(parameters: int, names: Sequence[str]) -> int:
    """Disk room in bytes for these GGUFs of a model with `parameters` weights, a temporary 16-bit file included."""
    check_quantizations(names)
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
