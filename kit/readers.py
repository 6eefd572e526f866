"""Files to rows: one record at a time, with the place each came from."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, NamedTuple

from kit.encodings import CUT, mostly_other, not_utf8, refuse_utf16
from kit.errors import KitError, nearest

KINDS = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".xlsx", ".parquet")
MEGABYTE = 1_000_000
# A quote that is never closed makes one cell of the rest of the file; larger than this is no row.
LARGEST_CELL = 2**27
LAST_SHEET_ROW = 2**20
TORN = "; the file was cut off here"


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


def read_rows(path: Path, on_bytes: Callable[[int], None] | None = None) -> Rows:
    """The rows of a file of one of KINDS. Raises KitError where the file as a whole cannot be read."""
    kind = path.suffix.lower()
    if kind not in READERS:
        raise KitError(f"{path}: unknown kind of file {kind or '(no ending)'}{nearest(kind, KINDS)}",
                       f"a file of rows ends in {', '.join(KINDS)}")
    found = False
    try:
        if not path.is_file():
            raise KitError(f"{path} is {'a folder' if path.is_dir() else 'not there'}", "name a file of rows")
        progress = _Progress(path.stat().st_size, on_bytes)
        if kind not in (".xlsx", ".parquet"):
            refuse_utf16(path)
        for item in READERS[kind](path, progress) if progress.size else ():
            found = True
            yield item
        progress.at(progress.size, step=1)
    except OSError as error:
        raise KitError(f"{path}: {error.strerror or error}", "look at the file's permissions and its disk") from None
    if not found:
        table = kind in (".csv", ".tsv", ".xlsx")
        raise KitError(f"{path} is empty", f"it needs at least one row{' below the column names' if table else ''}")


def _lines(path: Path, progress: _Progress) -> Iterator[tuple[int, bytes, bool]]:
    """Number, bytes, and whether it is the last and has no line end. Only \\n divides: \\u2028 may stand in a text."""
    position = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            position += len(line)
            progress.at(position)
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            yield number, text.removesuffix(b"\n").removesuffix(b"\r"), not line.endswith(b"\n")


def _jsonl(path: Path, progress: _Progress) -> Rows:
    filled = (raw for _, raw, _ in _lines(path, _Progress(0, None)) if raw.strip())
    if mostly_other(itertools.islice(filled, 100)):
        raise not_utf8(path)
    row = 0
    for number, line, last in _lines(path, progress):
        if not line.strip():
            continue
        row += 1
        try:
            text = line.decode()
            value = json.loads(text)
        except UnicodeDecodeError as error:
            torn = last and error.reason == CUT
            seen = _excerpt(line.decode(errors="replace"), len(line[: error.start].decode()))
            yield Problem("torn_line" if torn else "wrong_encoding",
                          f"line {number}: not UTF-8 at byte {error.start + 1}: {seen}{TORN * torn}", row, number)
        except (RecursionError, ValueError) as error:
            torn = last and isinstance(error, json.JSONDecodeError)
            yield Problem("torn_line" if torn else "invalid_json", _why(error, text, number) + TORN * torn, row, number)
        else:
            yield _whole_text(value, text, row, number)


def _json(path: Path, progress: _Progress) -> Rows:
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
    at, row, line, counted = _skip(text, start + 1), 0, 1, 0
    more, problem, torn = not text.startswith("]", at), "", False
    while more and not problem:
        row += 1
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
        at = _skip(text, end)
        more = text.startswith(",", at)
        if more:
            at = _skip(text, at + 1)
        elif at == len(text):
            problem, torn = f"{_place(text, at)}: the list has no end", True
        elif text[at] != "]":
            problem = f"{_place(text, at)}: a comma or ] is missing before {_excerpt(text, at)}"
    else:
        row += 1
        if not problem and (at := _skip(text, at + 1)) < len(text):
            problem = f"{_place(text, at)}: text after the end of the list: {_excerpt(text, at)}"
    if problem:
        yield Problem("torn_line" if torn else "invalid_json", problem + TORN * torn, row,
                      line + text.count("\n", counted, at))


def _csv(path: Path, progress: _Progress) -> Rows:
    csv.field_size_limit(max(csv.field_size_limit(), LARGEST_CELL))
    header: list[str] = []
    row, line = 0, 1
    try:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(path)
        with path.open("rb") as file:
            reader = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
            for cells in reader:
                if not header:
                    header = _names(path, cells) if cells else []
                elif any(cells):
                    row += 1
                    yield _fitted(cells, header, row, line)
                line = reader.line_num + 1
                progress.at(file.tell())
    except UnicodeDecodeError:
        raise not_utf8(path) from None
    except csv.Error as error:
        what = (f"line {line}: {error}, in the row that starts here; a cell with quotes or line breaks in it is put "
                'into quotes, and each quote in it is written twice: "so ""it"" goes"')
        if not header:
            raise KitError(f"{path}: {what}", "the first row names the columns") from None
        yield Problem("ragged_row", what, row + 1, line)


def _delimiter(path: Path) -> str:
    """What divides the header into most columns: where a comma is the decimal mark, Excel writes semicolons."""

    def columns(delimiter: str) -> int:
        with path.open(encoding="utf-8-sig", newline="") as file:
            try:
                return next((len(cells) for cells in csv.reader(file, delimiter=delimiter, strict=True) if cells), 0)
            except csv.Error:
                return 0

    return max(",;\t", key=columns)


def _txt(path: Path, progress: _Progress) -> Rows:
    row = 0
    for number, raw, _ in _lines(path, progress):
        try:
            line = raw.decode()
        except UnicodeDecodeError:
            raise not_utf8(path) from None
        prompt, tab, completion = line.partition("\t")
        if tab or line.strip():
            row += 1
            yield (Record({"prompt": prompt, "completion": completion}, row, number) if tab else Problem(
                "ragged_row", f"line {number}: no tab between prompt and answer: {_excerpt(line, 0)}", row, number))


def _xlsx(path: Path, progress: _Progress) -> Rows:
    try:
        from openpyxl import load_workbook
    except ImportError:
        raise KitError(f"{path}: reading .xlsx needs openpyxl", "pip install openpyxl") from None
    # It warns of styles and menus it leaves out; only the values are wanted.
    warnings.filterwarnings("ignore", category=UserWarning, module="openpyxl")
    header: list[str] = []
    row = 0
    with _library(path, "an Excel workbook"), path.open("rb") as file:
        sheet = load_workbook(file, read_only=True, data_only=True).worksheets[0]
        sheet.reset_dimensions()  # some programs write wrong ones, and rows would be lost
        for number, values in enumerate(sheet.iter_rows(values_only=True), 1):
            # Gaps come as empty rows; a damaged row number would make them go on for hours.
            if number > LAST_SHEET_ROW:
                raise ValueError(f"a row above {LAST_SHEET_ROW}, where sheets end")
            cells = [_shown(value) for value in values]
            while cells and cells[-1] in (None, ""):
                cells.pop()
            if cells and not header:
                header = _names(path, [cell or "" for cell in cells])
            elif cells:
                row += 1
                yield _fitted(cells + [None] * (len(header) - len(cells)), header, row, number)


def _shown(value: Any) -> str | None:
    """A cell's value as the spreadsheet shows it."""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float):
        return f"{value:.15g}".replace("e", "E")
    if isinstance(value, datetime) and value.time() == time():
        return value.date().isoformat()
    if isinstance(value, date | time):
        return value.isoformat()
    # What XML has no place for, "\r" among it, Excel writes as _x000D_.
    return None if value is None else re.sub(r"_x00([01][0-9A-Fa-f])_", lambda m: chr(int(m[1], 16)), str(value))


def _parquet(path: Path, progress: _Progress) -> Rows:
    import pyarrow.parquet

    row = 0
    with _library(path, "a Parquet file"), path.open("rb") as file, pyarrow.parquet.ParquetFile(file) as table:
        _names(path, table.schema_arrow.names)
        total = max(1, table.metadata.num_rows)
        for batch in table.iter_batches(batch_size=1000):
            for value in batch.to_pylist():
                row += 1
                yield Record(value, row, None)
            progress.at(progress.size * row // total)


@contextmanager
def _library(path: Path, what: str) -> Iterator[None]:
    """A damaged file can raise anything out of the library that reads it."""
    try:
        yield
    except (KitError, PermissionError):
        raise
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0][:200]
        raise KitError(f"{path}: cannot be read as {what}: {type(error).__name__}: {reason}",
                       "open it with the program that wrote it and save it again") from None


READERS: dict[str, Callable[[Path, _Progress], Rows]] = {
    ".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv, ".txt": _txt, ".xlsx": _xlsx, ".parquet": _parquet}


def _names(path: Path, cells: list[str]) -> list[str]:
    """The column names, each there and each only once."""
    wrong = next((f"column {number} has no name" for number, name in enumerate(cells, 1) if not name.strip()), "")
    wrong = wrong or next((f"two columns are named {name!r}" for name, n in Counter(cells).items() if n > 1), "")
    if wrong or not cells:
        raise KitError(f"{path}: {wrong or 'no columns'}", "the first row names the columns, each one differently")
    return cells


def _fitted(cells: list[Any], header: list[str], row: int, line: int) -> Record | Problem:
    if len(cells) == len(header):
        return Record(dict(zip(header, cells, strict=True)), row, line)
    names = ", ".join(header[:8]) + (", …" if len(header) > 8 else "")
    return Problem("ragged_row", f"line {line}: {len(cells)} cells where the header has {len(header)} ({names})",
                   row, line)


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
        return f"{_place(text, error.pos, line, start)}: {error.msg}: {_excerpt(text, error.pos)}"
    # The other ValueError is Python's limit of 4300 digits.
    deep = isinstance(error, RecursionError)
    return f"line {line}: " + ("nested too deeply" if deep else "a whole number with too many digits")


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
    found = re.compile(r"[ \t\n\r]*").match(text, position)
    return found.end() if found else position


def _place(text: str, position: int, line: int = 1, start: int = 0) -> str:
    line += text.count("\n", start, position)
    return f"line {line}, column {position - text.rfind(chr(10), 0, position)}"


def _excerpt(text: str, position: int) -> str:
    """What stands around a place in its line, without characters that would move the terminal's cursor."""
    first, last = text.rfind("\n", 0, position) + 1, text.find("\n", position) % (len(text) + 1)
    start, end = max(first, position - 15), min(last, position + 25)
    shown = "".join(character if character.isprintable() else "·" for character in text[start:end])
    return "…" * (start > first) + shown + "…" * (end < last)
