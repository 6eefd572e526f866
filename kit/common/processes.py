"""Several processes under torchrun: who speaks, and how they agree.

Everything here also holds for one process: it is then the main one and agrees with itself. torch is imported where
several processes need it: the command's parent process asks `is_main` without it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from kit.common.errors import KitError


def world_size() -> int:
    """How many processes train together; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """This process's number among all of them."""
    return int(os.environ.get("RANK") or 0)


def is_main() -> bool:
    """The one process that speaks, writes the run folder and exports."""
    return rank() == 0


def any_of(*flags: bool) -> list[bool]:
    """Each flag, true for all processes when it is true for one of them."""
    return [bool(flag) for flag in _reduced("MAX", flags)]


def total(*numbers: float) -> list[float]:
    """The sums over all processes, in float64."""
    return _reduced("SUM", numbers)


def _reduced(operation: str, numbers: Sequence[float]) -> list[float]:
    """The maximum (MAX) or sum (SUM) of each number over all processes."""
    if world_size() == 1:
        return list(numbers)
    import torch
    from torch import distributed

    reduced = torch.tensor(numbers, dtype=torch.float64)
    if distributed.get_backend() == "nccl":
        reduced = reduced.cuda()
    distributed.all_reduce(reduced, op=getattr(distributed.ReduceOp, operation))
    return list(reduced.tolist())


def from_main(make: Any) -> Any:
    """What `make()` returns in the main process, for all of them; an error there is an error in each."""
    if world_size() == 1:
        return make()
    from torch import distributed

    outcome: list[Any] = [None]
    if is_main():
        try:
            outcome = [(make(), None)]
        except KitError as problem:
            outcome = [(None, problem)]
    distributed.broadcast_object_list(outcome, src=0)
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


def wait() -> None:
    """Until every process is here."""
    if world_size() > 1:
        from torch import distributed

        distributed.barrier()
