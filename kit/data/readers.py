"""Files to rows: one record at a time, with the place each came from."""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from kit.common.errors import KitError, nearest, one_line
from kit.data.encodings import not_utf8, refuse_utf16
from kit.data.json_rows import _excerpt, _json, _jsonl
from kit.data.records import Problem, Record, Rows, _lines, _Progress

KINDS = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".xlsx", ".parquet")
# A quote that is never closed makes one cell of the rest of the file; larger than this is no row.
LARGEST_CELL = 2**27
LAST_SHEET_ROW = 2**20


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
        reason = one_line(error)
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
