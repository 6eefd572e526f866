"""The answers so far, beside the file they will be written to: what lets `kit answer` resume after a kill.

`OUT.partial.jsonl` begins with a line that says what is asked of which model; each further line is one answered row.
"""

import errno
import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple, Self

from kit.common.errors import KitError
from kit.common.files import unwritable

ROOM = "free room and ask again, which resumes, or name another place with -o"


class Answer(NamedTuple):
    """A row's answer, whether the model stopped by itself, and how many tokens it has."""

    text: str
    stopped: bool
    tokens: int


class Journal:
    """`done` has the answers by place of the row. Use it in a `with` block: the file is locked inside."""

    def __init__(self, out: Path, about: dict[str, Any], overwrite: bool = False) -> None:
        self.path = out.with_name(out.name + ".partial.jsonl")
        self.about = json.loads(json.dumps(about, default=str))
        self.overwrite = overwrite
        self.done: dict[int, Answer] = {}

    def __enter__(self) -> Self:
        """Raises KitError when another process writes it, or it belongs to another file, engine or setting.

        With `overwrite` such a one is begun anew; one that fits is always resumed.
        """
        with unwritable(self.path, ROOM):
            self.file = self.path.open("a+b", buffering=0)  # a line that did not fit must not come again at the end
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._read()
            except BaseException as error:
                self.file.close()
                if isinstance(error, BlockingIOError):
                    raise KitError(f"{self.path} is being written by another process",
                                   "wait for it, or name another file with -o") from None
                raise
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is KeyboardInterrupt:
            print(f"\n{len(self.done):,} rows are answered and kept: the same command resumes", file=sys.stderr)
        # By what is in the file: Ctrl-C may come between the writing of answers and the counting of them.
        if self.path.exists() and self.path.read_bytes().count(b"\n") <= 1:
            self.path.unlink()  # nothing to resume
        self.file.close()

    def add(self, answers: dict[int, Answer]) -> None:
        """Keep the answers of a batch; afterwards they survive a kill and a power cut."""
        lines = b"".join(_line({"row": place + 1, **answer._asdict()}) for place, answer in answers.items())
        with unwritable(self.path, ROOM):
            if self.file.write(lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self.file.fileno())
        self.done.update(answers)

    def _read(self) -> None:
        self.file.seek(0)
        # A kill can cut the last line off: only lines with an end count, and writing goes on behind them.
        content = self.file.read()
        whole = content[:content.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise KitError(f"{self.path} is damaged: {error}", "delete it to start again") from None
        self.file.truncate(len(whole))
        if lines and lines[0] != self.about:
            if not self.overwrite:
                changed = [name for name in self.about if lines[0].get(name) != self.about[name]]
                raise KitError(f"{self.path} holds {len(lines) - 1:,} answers of another request: "
                               + "; ".join(_change(name, lines[0].get(name), self.about[name]) for name in changed),
                               "ask as before to resume, or --overwrite to start again")
            lines = []
            self.file.truncate(0)
        if not lines:
            self.file.write(_line(self.about))
        self.done = {line["row"] - 1: Answer(line["text"], line["stopped"], line["tokens"]) for line in lines[1:]}


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _change(name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        names = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return ", ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in names)
    return f"{name} was {before!r}, is {now!r}" if max(len(str(before)), len(str(now))) < 60 else f"{name} has changed"
