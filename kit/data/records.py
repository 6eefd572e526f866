"""What readers yield: records and problems, each with its place."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

MEGABYTE = 1_000_000


class Record(NamedTuple):
    """A row as the file has it: a dict, or whatever stands there in .json and .jsonl."""

    value: Any
    row: int  # from 1, in the file's order; broken rows count, blank ones do not
    line: int | None  # where the row starts, from 1; the sheet's row for .xlsx, None for .parquet


class Problem(NamedTuple):
    """A row that could not be read; reading goes on behind it where that is possible."""

    code: str  # invalid_json, torn_line, wrong_encoding or ragged_row
    message: str
    row: int
    line: int | None


Rows = Iterator[Record | Problem]


class _Progress:
    """Turns positions in the file into numbers of further bytes, a megabyte or more at a time."""

    def __init__(self, size: int, tell: Callable[[int], None] | None) -> None:
        self.size, self.tell, self.told = size, tell, 0

    def at(self, position: int, step: int = MEGABYTE) -> None:
        further = min(position, self.size) - self.told
        if self.tell and further >= step:
            self.tell(further)
            self.told += further


def _lines(path: Path, progress: _Progress) -> Iterator[tuple[int, bytes, bool]]:
    """Number, bytes, and whether it is the last and has no line end. Only \\n divides: \\u2028 may stand in a text."""
    position = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            position += len(line)
            progress.at(position)
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            yield number, text.removesuffix(b"\n").removesuffix(b"\r"), not line.endswith(b"\n")
