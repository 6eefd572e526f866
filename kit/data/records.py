"""What readers yield: records and problems, each with its place; and the lines of a file."""

import codecs
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

MEGABYTE = 1_000_000


class Record(NamedTuple):
    """A row as the file has it: a dict, or whatever stands there in .json and .jsonl."""

    value: Any
    row: int  # from 1, in the file's order; broken rows count, blank ones do not
    line: int | None  # where the row starts, from 1; the sheet's row for .xlsx, None for .parquet
    unsaved: tuple[str, ...] = ()  # columns with a formula in this row for which an .xlsx has no value

    def only_formulas(self, columns: Collection[str]) -> bool:
        """Whether nothing is in the row but such formulas, none of them in these columns: people fill them down."""
        return bool(self.unsaved) and not any(self.value.values()) and not {*self.unsaved} & {*columns}


class Problem(NamedTuple):
    """A row that could not be read; reading goes on behind it where that is possible."""

    code: str  # invalid_json, torn_line, wrong_encoding or ragged_row
    message: str
    row: int
    line: int | None


Rows = Iterator[Record | Problem]


class Progress:
    """Turns positions in the file into numbers of further bytes, a megabyte or more at a time."""

    def __init__(self, size: int, on_bytes: Callable[[int], object] | None) -> None:
        self.size, self.on_bytes, self.reported = size, on_bytes, 0

    def at(self, position: int, step: int = MEGABYTE) -> None:
        further = min(position, self.size) - self.reported
        if self.on_bytes and further >= step:
            self.on_bytes(further)
            self.reported += further


class Line(NamedTuple):
    """A line without its end; `last` says that it had none."""

    number: int
    raw: bytes
    last: bool


def lines(path: Path, progress: Progress) -> Iterator[Line]:
    """The lines of a file. Only \\n divides: \\u2028 may stand in a text."""
    position = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            position += len(line)
            progress.at(position)
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            yield Line(number, text.removesuffix(b"\n").removesuffix(b"\r"), not line.endswith(b"\n"))


def excerpt(text: str, position: int) -> str:
    """What stands around a place in its line, without characters that would move the terminal's cursor."""
    first, last = text.rfind("\n", 0, position) + 1, text.find("\n", position) % (len(text) + 1)
    start, end = max(first, position - 15), min(last, position + 25)
    printable = "".join(character if character.isprintable() else "·" for character in text[start:end])
    return "…" * (start > first) + printable + "…" * (end < last)
