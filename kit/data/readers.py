"""Files to rows: one record at a time, with the place each came from."""

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kit.common.errors import KitError, nearest, one_line
from kit.data.encodings import not_utf8, refuse_utf16
from kit.data.json_rows import read_json
from kit.data.records import Problem, Progress, Record, Rows, excerpt, lines
from kit.data.workbooks import SAVE_VALUES, below_titles, sheet_rows

# A quote that is never closed makes one cell of the rest of the file; larger than this is no row.
LARGEST_CELL = 2**27


def check_file(path: Path) -> None:
    """KitError for what is no file of rows, as far as that shows without reading it."""
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise KitError(f"{path}: unknown kind of file {suffix or '(no ending)'}{nearest(suffix, SUFFIXES)}",
                       f"a file of rows ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise KitError(f"{path} is {'a folder' if path.is_dir() else 'not there'}", "name a file of rows")
    if not path.stat().st_size:
        raise _empty(path)


def read_rows(path: Path, on_bytes: Callable[[int], object] | None = None) -> Rows:
    """The rows of a file of one of SUFFIXES. Raises KitError where the file as a whole cannot be read."""
    empty = True
    try:
        check_file(path)
        progress = Progress(path.stat().st_size, on_bytes)
        if path.suffix.lower() not in (".xlsx", ".parquet"):
            refuse_utf16(path)
        for item in READERS[path.suffix.lower()](path, progress):
            empty = False
            yield item
        progress.at(progress.size, step=1)
    except OSError as error:
        raise KitError(f"{path}: {error.strerror or error}", "look at the file's permissions and its disk") from None
    if empty:
        raise _empty(path)


def _empty(path: Path) -> KitError:
    table = path.suffix.lower() in (".csv", ".tsv", ".xlsx")
    return KitError(f"{path} is empty", f"it needs at least one row{' below the column names' if table else ''}")


def _csv(path: Path, progress: Progress) -> Rows:
    csv.field_size_limit(max(csv.field_size_limit(), LARGEST_CELL))
    header: list[str] = []
    row, line = 0, 1
    try:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else delimiter_of(path)
        with path.open("rb") as file:
            reader = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
            for cells in reader:
                if not header:
                    header = _column_names(path, cells) if cells else []
                elif any(cells):
                    row += 1
                    yield _row_of(cells, header, row, line)
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


def delimiter_of(path: Path) -> str:
    """What divides the header into most columns: where a comma is the decimal mark, Excel writes semicolons."""

    def columns(delimiter: str) -> int:
        with path.open(encoding="utf-8-sig", newline="") as file:
            try:
                return next((len(cells) for cells in csv.reader(file, delimiter=delimiter, strict=True) if cells), 0)
            except csv.Error:
                return 0

    return max(",;\t", key=columns)


def _txt(path: Path, progress: Progress) -> Rows:
    row = 0
    for number, raw, _ in lines(path, progress):
        try:
            line = raw.decode()
        except UnicodeDecodeError:
            raise not_utf8(path) from None
        prompt, tab, completion = line.partition("\t")
        if tab or line.strip():
            row += 1
            yield (Record({"prompt": prompt, "completion": completion}, row, number) if tab else Problem(
                "ragged_row", f"line {number}: no tab between prompt and answer: {excerpt(line, 0)}", row, number))


def _xlsx(path: Path, progress: Progress) -> Rows:
    try:
        import openpyxl  # noqa: F401
    except ImportError:
        raise KitError(f"{path}: reading .xlsx needs openpyxl", "pip install openpyxl") from None
    row = 0
    with _library(path, "an Excel workbook"), path.open("rb") as file:
        top, rows = below_titles(path, sheet_rows(file, path.stat().st_size))
        if not top:
            return
        if top.unsaved:
            raise KitError(f"{path}: no values are stored for the formulas in row {top.number}, where the column names "
                           "are", SAVE_VALUES)
        header = _column_names(path, [top.cells.get(column, "") for column in range(1, max(top.cells) + 1)])
        for found in rows:
            row += 1
            if (last := max(found.cells, default=0)) > len(header):
                yield _ragged(last, header, row, found.number)
            else:
                yield Record({name: found.cells.get(column) for column, name in enumerate(header, 1)}, row,
                             found.number, tuple(header[column - 1] for column in found.unsaved
                                                 if column <= len(header)))


def _parquet(path: Path, progress: Progress) -> Rows:
    import pyarrow.parquet

    row = 0
    with _library(path, "a Parquet file"), path.open("rb") as file, pyarrow.parquet.ParquetFile(file) as table:
        _column_names(path, table.schema_arrow.names)
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
        raise KitError(f"{path}: cannot be read as {what}: {type(error).__name__}: {one_line(error)}",
                       "open it with the program that wrote it and save it again, a table as .csv if need be") from None


READERS: dict[str, Callable[[Path, Progress], Rows]] = {
    ".json": read_json, ".jsonl": read_json, ".csv": _csv, ".tsv": _csv, ".txt": _txt, ".xlsx": _xlsx,
    ".parquet": _parquet}
SUFFIXES = tuple(READERS)


def _column_names(path: Path, cells: list[str]) -> list[str]:
    """The column names, each there and each only once."""
    wrong = next((f"column {number} has no name" for number, name in enumerate(cells, 1) if not name.strip()), "")
    wrong = wrong or next((f"two columns are named {name!r}" for name, n in Counter(cells).items() if n > 1), "")
    if wrong or not cells:
        raise KitError(f"{path}: {wrong or 'no columns'}", "the first row names the columns, each one differently")
    return cells


def _row_of(cells: list[Any], header: list[str], row: int, line: int) -> Record | Problem:
    if len(cells) == len(header):
        return Record(dict(zip(header, cells, strict=True)), row, line)
    return _ragged(len(cells), header, row, line)


def _ragged(count: int, header: list[str], row: int, line: int) -> Problem:
    names = ", ".join(header[:8]) + (", …" if len(header) > 8 else "")
    return Problem("ragged_row", f"line {line}: {count} cells where the header has {len(header)} ({names})", row, line)
