"""Progress where it is looked at: a widget in a notebook, a bar in a terminal, plain lines everywhere else.

Jupyter paints what comes on standard error pink, and an executed notebook keeps every carriage return. So in a kernel
nothing of it goes there: libraries' own bars (downloads, loading of weights, mapping of rows) come the same way.
"""

import io
import sys
import time
import warnings
from typing import Any

from tqdm.std import tqdm

from kit.common.notebook import in_kernel, shows_widgets

LINE_SECONDS, LONGEST_SILENCE = 5, 60  # between two lines: at least, and at most where a tenth takes longer


class Lines(tqdm):  # type: ignore[misc]
    """A line for every tenth, or each minute; none for what is done within seconds."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.said, self.began = 0.0, time.monotonic()
        self.said_at = self.began
        # What tqdm writes to its file is for a terminal: `display` alone speaks. disable=None, as huggingface_hub has
        # it, means "where that is no terminal".
        own = {"file": io.StringIO(), "mininterval": LINE_SECONDS, "ncols": 0, "dynamic_ncols": False,
               "disable": bool(options.get("disable"))}
        super().__init__(*arguments, **(options | own))

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """What tqdm calls when it would draw."""
        silence = time.monotonic() - self.said_at
        tenth = self.total and self.n - self.said >= self.total / 10
        if silence >= LINE_SECONDS and (tenth or silence >= LONGEST_SILENCE):
            self._say()

    def close(self) -> None:
        long = time.monotonic() - self.began >= LINE_SECONDS
        if not self.disable and self.leave and long and self.n > self.said:
            self._say()
        super().close()

    def __del__(self) -> None:
        """One that was never closed ends unsaid: tqdm would close it when the modules for that are gone already."""

    def _say(self) -> None:
        self.said, self.said_at = self.n, time.monotonic()
        # Where standard output is a program's input, as of `kit ask RUN PROMPT > FILE`, progress is no part of it.
        stream = sys.stdout if in_kernel() else sys.stderr
        stream.write(f"{str(self).strip()}\n")  # at once: an interrupt between the two leaves half a line
        stream.flush()


def kind() -> type[tqdm]:
    """The class of bar for where this runs."""
    if shows_widgets():
        from tqdm.notebook import tqdm as widget

        class Widget(widget):  # type: ignore[misc, valid-type]
            def __exit__(self, error: Any, *rest: Any) -> None:
                if error is None:  # a widget that saw less than was expected would be red, as after an error
                    self.total = self.n
                super().__exit__(error, *rest)

        return Widget
    return tqdm if sys.stderr.isatty() and not in_kernel() else Lines


def say(text: str) -> None:
    """Print a line beside a bar that may be at work."""
    tqdm.write(text)
    sys.stdout.flush()


def take_over() -> None:
    """Let transformers, datasets and huggingface_hub, if not imported yet, show theirs in a kernel as `bar` does."""
    # Without ipywidgets tqdm.auto says that bars are text: here they are meant to be.
    warnings.filterwarnings("ignore", message="IProgress not found")
    import tqdm.auto

    if not shows_widgets():
        tqdm.auto.tqdm = Lines
