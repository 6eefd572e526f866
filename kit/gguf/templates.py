"""Chat templates that came with a model: tried out in a process of their own before they are rendered in this one."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NoReturn

from kit.common.errors import KitError
from kit.gguf.child import child_environment, how_it_ended
from kit.gguf.trial import NO_REAL_ONE, OVERTIME, OVERTIME_CODE, SECONDS

PATIENCE = 60  # seconds for a trial where its own limits do not hold (Windows), or the machine is overloaded


@cache
def check_template(template: str) -> None:
    """Raise KitError for a template that loops or grows without end; a sound one costs 0.2 s, once in a process."""
    try:
        done = subprocess.run([sys.executable, "-m", "kit.gguf.trial"], input=template.encode("utf-8", "surrogatepass"),
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=PATIENCE, check=False,
                              env=child_environment())
    except subprocess.TimeoutExpired:
        raise _refused(OVERTIME) from None
    if done.returncode:
        raise _refused(OVERTIME if done.returncode == OVERTIME_CODE else
                       f"trying out the chat template ends Python ({how_it_ended(done.returncode)})")
    if done.stdout:
        raise _refused(done.stdout.decode("utf-8").strip())


@contextmanager
def in_time() -> Iterator[None]:
    """Raise KitError after 2 × SECONDS inside: a template may loop only for some conversations.

    Only in the main thread, where signals arrive, and where no other timer runs.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread() or \
            signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return
    before = signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, 2 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)


def _stop(*_: object) -> NoReturn:
    raise _refused(f"the chat template takes more than {2 * SECONDS} seconds for one conversation")


def _refused(cause: str) -> KitError:
    return KitError(cause, NO_REAL_ONE)
