"""Number formats: float32 for a while, and float32 to bfloat16 without losing small changes."""

import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


def rounded_by_chance(exact: Any, name: str) -> Any:
    """float32 → bfloat16, up or down with the probability that keeps the mean (Gupta et al. 2015, section 3).

    An adapter's changes are mostly smaller than bfloat16's steps (1/256 of a weight). Rounded to the nearest they fall
    away, all in the same direction: a fifth of a short training is lost. Rounded by chance they are kept on average.
    The dice are seeded by the tensor's name, so the same merge gives the same bits everywhere.
    """
    dice = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    bits = exact.cpu().contiguous().view(torch.int32)
    # bfloat16 is the upper half of float32: adding a random lower half carries into it as often as it should.
    carried = torch.randint(0, 1 << 16, bits.shape, generator=dice, dtype=torch.int32).add_(bits)
    return carried.bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


@contextmanager
def in_float32(model: Any) -> Iterator[str]:
    """Inside, a model on a CPU computes in float32: each layer's 16-bit weights are widened while it is at work.

    Weights stay as they are, so no second copy of the model is in memory. Quantised layers multiply their own rounded
    weights in float32. On a GPU, whose kernels take 16-bit inputs only, nothing changes. Yields the format's name.
    """
    if model.device.type != "cpu":
        yield str(next(model.parameters()).dtype).removeprefix("torch.")
        return
    half = (torch.bfloat16, torch.float16)

    def widen(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        module.kept_16bit = {name: p.data for name, p in module.named_parameters(recurse=False) if p.dtype in half}
        for name, data in module.kept_16bit.items():
            getattr(module, name).data = data.float()
        return tuple(x.float() if isinstance(x, torch.Tensor) and x.dtype in half else x for x in inputs)

    def narrow(module: Any, *_: Any) -> None:
        for name, data in module.kept_16bit.items():
            getattr(module, name).data = data
        del module.kept_16bit

    with ExitStack() as undo:
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                undo.callback(module.register_forward_pre_hook(widen).remove)
                undo.callback(module.register_forward_hook(narrow, always_call=True).remove)
            if getattr(module, "compute_dtype", None) in half:  # bitsandbytes' Linear4bit
                undo.callback(setattr, module, "compute_dtype", module.compute_dtype)
                module.compute_dtype = torch.float32
        yield "float32"
