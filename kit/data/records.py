"""What readers yield: records and problems, each with its place; and the readers of JSON, which know their lines."""

import codecs
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kit.common.errors import KitError
from kit.data.encodings import CUT, mostly_other, not_utf8

MEGABYTE = 1_000_000
TORN = "; the file was cut off here"


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


def lines(path: Path, progress: Progress) -> Iterator[tuple[int, bytes, bool]]:
    """Number, bytes, and whether it is the last and has no line end. Only \\n divides: \\u2028 may stand in a text."""
    position = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            position += len(line)
            progress.at(position)
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            yield number, text.removesuffix(b"\n").removesuffix(b"\r"), not line.endswith(b"\n")


def excerpt(text: str, position: int) -> str:
    """What stands around a place in its line, without characters that would move the terminal's cursor."""
    first, last = text.rfind("\n", 0, position) + 1, text.find("\n", position) % (len(text) + 1)
    start, end = max(first, position - 15), min(last, position + 25)
    printable = "".join(character if character.isprintable() else "·" for character in text[start:end])
    return "…" * (start > first) + printable + "…" * (end < last)


def read_jsonl(path: Path, progress: Progress) -> Rows:
    """One row a line. A broken line is a problem; reading goes on behind it."""
    filled = (raw for _, raw, _ in lines(path, Progress(0, None)) if raw.strip())
    if mostly_other(itertools.islice(filled, 100)):
        raise not_utf8(path)
    row = 0
    for number, line, last in lines(path, progress):
        if not line.strip():
            continue
        row += 1
        try:
            text = line.decode()
            value = json.loads(text)
        except UnicodeDecodeError as error:
            torn = last and error.reason == CUT
            around = excerpt(line.decode(errors="replace"), len(line[: error.start].decode()))
            yield Problem("torn_line" if torn else "wrong_encoding",
                          f"line {number}: not UTF-8 at byte {error.start + 1}: {around}{TORN * torn}", row, number)
        except (RecursionError, ValueError) as error:
            torn = last and isinstance(error, json.JSONDecodeError)
            yield Problem("torn_line" if torn else "invalid_json", _why(error, text, number) + TORN * torn, row, number)
        else:
            yield _whole_text(value, text, row, number)


def read_json(path: Path, progress: Progress) -> Rows:
    """One list, parsed row by row: so each row knows its line, and those before a mistake are not lost."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise not_utf8(path) from None
    start = _skip(text, 0)
    if start == len(text):
        return
    if text[start] != "[":
        raise _no_list(path, text, start)
    at, row, line, counted = _skip(text, start + 1), 1, 1, 0
    more, problem = not text.startswith("]", at), ""
    while more:
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = json.JSONDecoder().raw_decode(text, at)
        except (RecursionError, ValueError) as error:
            problem, torn = _why(error, text, line, at), _ran_out(text, error)
            if row == 1:
                raise KitError(f"{path}: not JSON: {problem}", "a .json file is one list of objects") from None
            break
        yield _whole_text(value, text[at:end], row, line)
        progress.at(progress.size * end // len(text))
        row, at = row + 1, _skip(text, end)
        if more := text.startswith(",", at):
            at = _skip(text, at + 1)
    else:
        torn = at == len(text)
        if torn:
            problem = f"{_place(text, at)}: the list has no end"
        elif text[at] != "]":
            problem = f"{_place(text, at)}: a comma or ] is missing before {excerpt(text, at)}"
        elif (at := _skip(text, at + 1)) < len(text):
            problem = f"{_place(text, at)}: text after the end of the list: {excerpt(text, at)}"
    if problem:
        yield Problem("torn_line" if torn else "invalid_json", problem + TORN * torn, row,
                      line + text.count("\n", counted, at))


def _whole_text(value: Any, source: str, row: int, line: int) -> Record | Problem:
    """JSON can spell half of a surrogate pair, which is no text: no tokenizer and no file takes it."""
    if re.search(r"\\u[dD][89a-fA-F]", source):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            return Problem("invalid_json", f"line {line}: half of a surrogate pair ({half}) in a text", row, line)
        except RecursionError as error:
            return Problem("invalid_json", _why(error, source, line), row, line)
    return Record(value, row, line)


def _why(error: Exception, text: str, line: int, start: int = 0) -> str:
    """What json has against the row that starts in that line, at that place of the text."""
    if isinstance(error, json.JSONDecodeError):
        return f"{_place(text, error.pos, line, start)}: {error.msg}: {excerpt(text, error.pos)}"
    # The other ValueError is Python's limit of 4300 digits.
    return f"line {line}: " + ("nested too deeply" if isinstance(error, RecursionError) else
                               "a whole number with too many digits")


def _ran_out(text: str, error: Exception) -> bool:
    """Whether the text ended where JSON would have gone on."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    rest = text[error.pos : error.pos + 20].strip()
    return (not rest or error.msg.startswith("Unterminated") or (error.msg.startswith("Invalid \\u") and len(rest) < 6)
            or any(word.startswith(rest) for word in ("true", "false", "null", "-0")))


def _no_list(path: Path, text: str, start: int) -> KitError:
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (RecursionError, ValueError) as error:
        return KitError(f"{path}: not JSON: {_why(error, text, 1)}", "a .json file is one list of objects")
    following = _skip(text, end)
    hint = "put the rows into [ … ]"
    if isinstance(value, dict) and text.startswith("{", following):
        hint += " with commas between them"
        if "\n" in text[end:following] and "\n" not in text[start:end]:
            hint = f"these are JSON Lines: rename it to {path.stem}.jsonl"
    what = {dict: "an object", str: "a text", bool: "true or false", type(None): "null"}.get(type(value), "a number")
    return KitError(f"{path}: a list of rows is needed, this is {what}", hint)


def _skip(text: str, position: int) -> int:
    blank = re.compile(r"[ \t\n\r]*").match(text, position)
    return blank.end() if blank else position


def _place(text: str, position: int, line: int = 1, start: int = 0) -> str:
    line += text.count("\n", start, position)
    return f"line {line}, column {position - text.rfind(chr(10), 0, position)}"
