"""One error type for everything a user can mend."""

import difflib
from collections.abc import Iterable

from kit.common.debug import debugging, traced


class KitError(Exception):
    """A mistake the user can mend: `message` says what is wrong and where, `hint` what to change.

    The command line prints both without a traceback and exits with `exit_code`
    (2 for bad input, 1 for a check or a run that failed, 75 for a training stopped with a checkpoint).
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.hint}" if self.hint else self.message

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in a notebook in place of a traceback."""
        return (traced(self) if debugging() else f"{type(self).__name__}: {self}").splitlines()


class GateError(KitError):
    """A check that failed: the input was fine, what came out of it is not."""

    exit_code = 1


class DiskError(KitError):
    """A disk that is full, or fails: the input was fine, what was to be made of it could not be written."""

    exit_code = 1


class Stopped(KitError):
    """A training that was asked to stop and wrote a checkpoint: the same command resumes it. 75: EX_TEMPFAIL."""

    exit_code = 75


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """' (did you mean …?)' with the closest known name, or '' when none is close."""
    matches = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def one_line(error: BaseException, most: int = 300) -> str:
    """What an upstream library says, on one line of at most so many characters; its type where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__
