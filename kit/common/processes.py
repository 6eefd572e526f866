"""Several processes under torchrun: who speaks, and how they agree.

Everything here also holds for one process: it is then the main one and agrees with itself.
"""

from __future__ import annotations

import os
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
    if world_size() == 1:
        return list(flags)
    import torch
    from torch import distributed

    together = torch.tensor([int(flag) for flag in flags])
    if distributed.get_backend() == "nccl":
        together = together.cuda()
    distributed.all_reduce(together, op=distributed.ReduceOp.MAX)
    return [bool(flag) for flag in together.tolist()]


def from_main(make: Any) -> Any:
    """What `make()` returns in the main process, for all of them; an error there is an error in each."""
    if world_size() == 1:
        return make()
    from torch import distributed

    told: list[Any] = [None]
    if is_main():
        try:
            told = [(make(), None)]
        except KitError as problem:
            told = [(None, problem)]
    distributed.broadcast_object_list(told, src=0)
    value, error = told[0]
    if error is not None:
        raise error
    return value


def total(*numbers: float) -> list[float]:
    """The sums over all processes, in float64."""
    if world_size() == 1:
        return list(numbers)
    import torch
    from torch import distributed

    together = torch.tensor(numbers, dtype=torch.float64)
    if distributed.get_backend() == "nccl":
        together = together.cuda()
    distributed.all_reduce(together)
    return list(together.tolist())


def wait() -> None:
    """Until every process is here."""
    if world_size() > 1:
        from torch import distributed

        distributed.barrier()
