"""Several processes under torchrun: who speaks, how they agree, and a wish to stop them.

Everything here also holds for one process: it is then the main one and agrees with itself. torch is imported where
several processes need it: the command's parent process asks `is_main` without it.
"""

import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any, Self

from kit.common.errors import KitError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
    return list(map(bool, _reduced("MAX", flags)))


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
    return reduced.tolist()


def from_main(make: Any) -> Any:
    """What `make()` returns in the main process, for all of them; an error there is an error in each."""
    if world_size() == 1:
        return make()
    from torch import distributed

    outcome: list[Any] = [None]
    if is_main():
        try:
            outcome = [make()]
        except KitError as error:
            outcome = [error]
    distributed.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], KitError):
        raise outcome[0]
    return outcome[0]


def wait() -> None:
    """Until every process is here."""
    if world_size() > 1:
        from torch import distributed

        distributed.barrier()


class StopWish:
    """Within `with`, the first signal is noted in `asked`, so that a checkpoint can be written after the step at work.

    A second one ends at once, as it would outside.
    """

    def __init__(self) -> None:
        self.asked = ""

    def __enter__(self) -> Self:
        # Python gives signals to the main thread only; a training in another one is stopped by its owner.
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        print(f"\n{self.asked}: a checkpoint is written after this step; once more stops at once, without it",
              flush=True)
