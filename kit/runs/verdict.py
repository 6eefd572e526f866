"""While `kit verify` is at work, and when it can't be done, verify.json and report.html hold no earlier verdict."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from kit.common.errors import KitError, one_line
from kit.common.files import timestamp, write_json
from kit.runs.report import write_report
from kit.runs.run import Run

UNFINISHED = "not finished: kit verify is at work, or was ended before it was done"
ROOM = "the verdict lies in the run's folder: make it writable, or free room there"


@contextmanager
def withdrawn(run: Run) -> Iterator[None]:
    """Until the new verdict is written inside, the run counts as not verified, whatever ends the process.

    An error inside stands in verify.json as the reason, and goes on. Raises KitError when the folder can't be written.
    """
    _write(run, UNFINISHED)
    try:
        yield
    except BaseException as error:
        cause = "interrupted" if isinstance(error, KeyboardInterrupt) else \
            error.message if isinstance(error, KitError) else f"{type(error).__name__}: {one_line(error)}"
        with suppress(KitError):  # the error itself says more, and nothing says "passed" by now
            _write(run, f"could not be verified: {cause}")
        raise


def _write(run: Run, why: str) -> None:
    """A verdict that is none: `passed` is null."""
    try:
        write_json(run.folder / "verify.json", {"passed": None, "verdict": why, "checked": timestamp(), "gates": []})
        write_report(run)
    except KitError as error:
        paths = [run.folder / name for name in ("verify.json", "report.html")]
        for path in paths:
            with suppress(OSError):  # a full disk lets files go, a read-only one does not
                path.unlink(missing_ok=True)
        left = [path.name for path in paths if path.exists()]
        old = f"; {' and '.join(left)} in it could not be withdrawn and may be out of date" if left else ""
        raise KitError(f"nothing was checked: {error.message}{old}", ROOM) from error
