"""How far an artefact's logits may be from the trained model's: what rounding to its format does to this model.

The spread between two models is the root mean square of d = log q - log p over the 16 likeliest tokens of each place,
d's own mean at the place taken off, in nats. Unlike KL or top-1 it hangs little on the text: a place where the model is
sure of its token tells as much as one where it is not, so a few answers are enough.

How much a model answers to rounding is measured on itself: its weights are shaken once, by JITTER times the root mean
square of their row, and the spread that this makes, divided by JITTER, is its sensitivity. A format that rounds weights
by the share r then makes a spread of about sensitivity x r.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from kit.gguf.formats import BFLOAT16, EXACT, FLOAT16, FLOAT32, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, Header
from kit.models.saved import weights_of

LIKELIEST = 16
JITTER = 0.01
# Root mean square of the weights' rounding errors divided by that of the weights, by GGML's type: measured on Gaussian
# weights and on the starter's, the larger of both.
ROUNDING = {FLOAT32: 0.0, FLOAT16: 0.0003, BFLOAT16: 0.003, Q8_0: 0.0065, Q6_K: 0.02, Q5_K: 0.04, Q5_1: 0.05,
            Q5_0: 0.05, Q4_K: 0.078}
# What flows through a quantised layer is rounded too, to 8 bits in blocks (Q8_0, Q8_K).
ACTIVATIONS = 0.0065
# A merge rounds what is changed to the base's format, bfloat16 as a rule; a reference computed in 16-bit rounds all.
MERGED, ADDITIONS, COMPUTED_16BIT = 0.0025, 0.0001, 0.01
NF4, INT8 = 0.1, 0.03


def deviations(reference: Sequence[Any], other: Sequence[Any]) -> np.ndarray:
    """d (n, LIKELIEST) in nats at all n places of these predictions, which are of the same tokens."""
    off = np.concatenate([b.top[:, :LIKELIEST].astype(np.float64) - a.top[:, :LIKELIEST]
                          for a, b in zip(reference, other, strict=True)])
    return off - off.mean(-1, keepdims=True)


def spread(reference: Sequence[Any], other: Sequence[Any]) -> float:
    """The spread between two models' predictions, in nats."""
    return float(np.sqrt((deviations(reference, other) ** 2).mean()))


def lost(reference: Sequence[Any], other: Sequence[Any], base: Sequence[Any]) -> tuple[float, float]:
    """The share of what training changed in the logits that `other` lacks, and the size of that change in nats.

    Least squares of other - reference on base - reference: 0 for the trained model, 1 for the base, -1 for an adapter
    that was added twice.
    """
    change, off = deviations(reference, base), deviations(reference, other)
    size = float((change ** 2).sum())
    return (float((change * off).sum()) / size if size else 0.0), math.sqrt(size / max(change.size, 1))


def rounding_of(header: Header) -> float:
    """The share by which a GGUF's weights, and what flows through them, are rounded: over its matrices, each as one.

    Not weight by weight: a vocabulary may hold most of them, and is rounded least.
    """
    matrices = [tensor.kind for tensor in header.tensors if len(tensor.shape) > 1]
    flow = {kind: 0.0 if kind in EXACT else ACTIVATIONS for kind in matrices}
    errors = [ROUNDING.get(kind, max(ROUNDING.values())) ** 2 + flow[kind] ** 2 for kind in matrices]
    return math.sqrt(sum(errors) / len(errors)) if errors else 0.0


def shake(model: Any) -> None:
    """Add noise of JITTER times their row's root mean square to a model's floating-point matrices, for good.

    An adapter's own matrices and quantised weights stay as they are. The dice are seeded.
    """
    dice = cache(lambda device: torch.Generator(device=device).manual_seed(0))
    seen: set[int] = set()
    for name, weight in weights_of(model):
        if weight.dim() < 2 or not weight.is_floating_point() or ".lora_" in name or weight.data_ptr() in seen:
            continue
        seen.add(weight.data_ptr())
        for part in weight.flatten(0, -2).split(4096):  # a vocabulary's matrix would need three of its size
            exact = part.float()
            size = exact.pow(2).mean(-1, keepdim=True).sqrt()
            part.copy_(exact + JITTER * size * torch.randn(part.shape, generator=dice(part.device), device=part.device))
