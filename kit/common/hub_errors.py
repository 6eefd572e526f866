"""What a hub's library raises, taken apart: two libraries, two HTTP clients and a native one, each with own types."""

import errno
import os
import re
from collections.abc import Iterator

from kit.common.errors import one_line

# By name: those of Python, of httpx and of requests.
UNREACHABLE = {"ConnectionError", "TimeoutError", "TransportError", "RequestException"}


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what was raised before it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def status_of(error: BaseException) -> int:
    """The HTTP status of the hub's answer; 0 for an error without one."""
    return int(getattr(getattr(error, "response", None), "status_code", 0) or getattr(error, "status_code", 0) or 0)


class Trouble:
    """An error of a hub's library with its causes: the answer's `status` (0 without one), one line of `reason`, the
    names of all `types`, and whether the disk is full or the hub can't be reached."""

    def __init__(self, error: BaseException) -> None:
        chain = list(causes(error))
        answers = [one for one in chain if status_of(one)][:1]
        self.first = type(error).__name__
        self.status = status_of(answers[0]) if answers else 0
        self.reason = _reason(answers or [chain[0], chain[-1]])
        self.types = {kind.__name__ for one in chain for kind in type(one).__mro__}
        self.disk_full = any(isinstance(one, OSError) and one.errno == errno.ENOSPC for one in chain)
        self.unreachable = bool(self.types & UNREACHABLE) and not self.status


def _reason(errors: list[BaseException]) -> str:
    """One line of some errors, without the signatures that addresses of an upload carry, and without tokens."""
    text = re.sub(r"\?\S+", "?…", ": ".join(dict.fromkeys(one_line(error, 10_000) for error in errors)))
    for name, value in os.environ.items():
        if name.endswith("_TOKEN") and len(value) >= 8:
            text = text.replace(value, f"${name}")
    return text[:300]
