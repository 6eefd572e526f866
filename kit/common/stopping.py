"""A wish to stop (SIGINT, SIGTERM) that is taken up after the step at work, so that a checkpoint can be written."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopWish:
    """Within `with`, the first signal is noted in `asked`; a second one ends at once, as it would outside."""

    def __init__(self) -> None:
        self.asked = ""

    def __enter__(self) -> StopWish:
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
