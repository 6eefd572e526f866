r"""Files of questions, and the same files with answers: text, tables, JSON, workbooks.

A written file keeps every row, column, order and type of the one that was read. In a .txt each line is a question and,
in the file that is written, line N answers line N: a backslash, line feed and carriage return within an answer are
written as two characters (\\, \n, \r).
"""

import csv
import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from kit.common.errors import KitError, nearest
from kit.common.files import writing
from kit.data.encodings import not_utf8, refuse_utf16
from kit.data.readers import delimiter_of, read_rows
from kit.data.records import Record
from kit.data.shapes import TURNS, Fault, definitions_of, is_blank, turns_of
from kit.data.tools import numbered
from kit.data.workbooks import SAVE_VALUES, row_of_names
from kit.models.template import Message, alpaca_turn
from kit.recipe.fields import Columns

SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".json", ".xlsx")
TABLES = (".csv", ".tsv")
LONGEST_CELL = 32_767  # characters in a cell of .xlsx; openpyxl cuts what is longer, and says nothing
ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", "\r": r"\r"})


class Questions(NamedTuple):
    """The rows of a file; `asked` and `faults` are by place in `rows`. A blank line of a .txt is in neither."""

    path: Path
    column: str  # the questions'
    columns: list[str]
    rows: list[dict[str, Any]]
    lines: list[int | None]  # where each row starts, from 1; the sheet's row for .xlsx
    asked: dict[int, list[Message]]
    faults: dict[int, str]  # why a row can't be asked


def read_questions(path: Path, column: str | None = None, columns: Columns | None = None) -> Questions:
    """The questions of a file that ends in one of SUFFIXES.

    They stand in `column`; by default in the one that the recipe's `columns` call prompt or question, else in `prompt`,
    `question` or `messages`, else in the first; an Alpaca `instruction` brings its `input` with it. A question is a
    text or a list of messages. Raises KitError where the file can't be read or has no such column.
    """
    is_text = known_suffix(path) == ".txt"
    items = list(_text_lines(path) if is_text else read_rows(path))
    names = list(dict.fromkeys(name for item in items if isinstance(item, Record) and isinstance(item.value, dict)
                               for name in item.value))
    asked_column = _column(path, names, column, columns or {}) if names else column or "prompt"
    items = [item for item in items if not isinstance(item, Record) or not item.only_formulas([asked_column])]
    rows: list[dict[str, Any]] = []
    asked, faults = {}, {}
    for place, item in enumerate(items):
        if not isinstance(item, Record):
            rows.append({})
            faults[place] = item.message
            continue
        rows.append(item.value if isinstance(item.value, dict) else {asked_column: item.value})
        if is_text and is_blank(item.value):
            continue
        if asked_column in item.unsaved:
            faults[place] = f"the question is a formula whose value is not stored: {SAVE_VALUES}"
            continue
        try:
            asked[place] = _messages(rows[-1], asked_column, with_input=column is None)
        except KitError as error:
            faults[place] = error.message
    return Questions(path, asked_column, names or [asked_column], rows, [item.line for item in items], asked, faults)


def known_suffix(path: Path) -> str:
    """The file's ending, one of SUFFIXES; KitError for another."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise KitError(f"{path}: unknown kind of file {suffix or '(no ending)'}{nearest(suffix, SUFFIXES)}",
                       f"a file of questions or answers ends in {', '.join(SUFFIXES)}")
    return suffix


def answers_beside(path: Path, table: bool = False) -> Path:
    """Where answers go by default: <stem>.answers<suffix>; a `table` is a .csv where the questions are a .txt."""
    suffix = ".csv" if table and path.suffix.lower() == ".txt" else path.suffix
    return path.with_name(f"{path.stem}.answers{suffix}")


def _text_lines(path: Path) -> Iterator[Record]:
    if not path.is_file():
        raise KitError(f"{path} is {'a folder' if path.is_dir() else 'not there'}", "name a file of questions")
    try:
        refuse_utf16(path)
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise not_utf8(path) from None
    except OSError as error:
        raise KitError(f"{path}: {error.strerror or error}", "look at the file's permissions and its disk") from None
    if not text.strip():
        raise KitError(f"{path} is empty", "it needs at least one line")
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        yield Record(line.removesuffix("\r"), number, number)


def _column(path: Path, names: list[str], column: str | None, columns: Columns) -> str:
    if column is None:
        by_lower = {name.casefold(): name for name in reversed(names)}
        usual = (columns.get("prompt"), columns.get("question"), "prompt", "question", "messages")
        return next((by_lower[name.casefold()] for name in usual if name and name.casefold() in by_lower), names[0])
    if column not in names:
        raise KitError(f"{path} has no column {column!r}{nearest(column, names)}", f"its columns: {', '.join(names)}")
    return column


def _messages(row: dict[str, Any], column: str, with_input: bool) -> list[Message]:
    value = row.get(column)
    if isinstance(value, str) and not is_blank(value):
        context = row.get("input") if with_input and column == "instruction" else None
        return [{"role": "user", "content": alpaca_turn(value, context if isinstance(context, str) else None)}]
    if value is None or value == [] or isinstance(value, str):
        raise KitError("the question is empty")
    if not isinstance(value, list):
        shown = json.dumps(value, ensure_ascii=False)[:40]
        raise KitError(f"a question is a text or a list of messages, this is {shown}")
    faults: list[Fault] = []
    definitions, turns = definitions_of(row, faults), turns_of(value, TURNS["messages"], faults)
    if faults:
        raise KitError("; ".join(fault.message for fault in faults))
    # A row of training data brings the answer that is wanted: it is not shown to the model.
    turns = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        raise KitError("the last message is neither the user's nor a tool's")
    if turns[-1]["role"] == "user" and is_blank(turns[-1]["content"]):
        raise KitError("the question is empty")
    if definitions:
        turns[0]["tools"] = definitions
    numbered(turns)
    return turns


def write_answers(path: Path, questions: Questions, added: dict[str, list[str | None]]) -> None:
    """The rows of `questions` with further columns, `added` (one value per row), as the ending of `path` says.

    A .txt gets the first of them only. Raises KitError where the file can't be written.
    """
    suffix = known_suffix(path)
    names = [*questions.columns, *added]
    rows = [{**row, **{name: values[place] for name, values in added.items()}}
            for place, row in enumerate(questions.rows)]
    with writing(path) as file:
        if suffix == ".txt":
            file.writelines((answer or "").translate(ESCAPES) + "\n" for answer in next(iter(added.values())))
        elif suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        elif suffix == ".json":
            file.write(json.dumps(rows, ensure_ascii=False, indent=2) + "\n")
        elif suffix in TABLES:
            _write_table(file, suffix, questions.path, [names, *([row.get(name) for name in names] for row in rows)])
        else:
            _write_workbook(file, questions, added, {name: [row.get(name) for row in rows] for name in names})


def _write_table(file: TextIO, suffix: str, source: Path, rows: list[list[Any]]) -> None:
    """With the delimiter, line end and byte-order mark of the table that was read, if it was one: Excel needs them."""
    bom, end, delimiter = False, "\n", "\t" if suffix == ".tsv" else ","
    if source.suffix.lower() in TABLES:
        with source.open("rb") as old:
            first = old.readline()
        bom, end = first.startswith(BOM_UTF8), "\r\n" if first.endswith(b"\r\n") else "\n"
        delimiter = delimiter_of(source) if suffix == source.suffix.lower() == ".csv" else delimiter
    cells = [[_cell(value) for value in row] for row in rows]
    file.write("\ufeff" * bom)
    # The writer quotes a cell for the characters of its own line end only, but a reader breaks rows at any.
    csv.writer(file, delimiter=delimiter, lineterminator=end,
               quoting=csv.QUOTE_ALL if any("\r" in cell for row in cells for cell in row) else csv.QUOTE_MINIMAL,
               ).writerows(cells)


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _write_workbook(file: TextIO, questions: Questions, added: dict[str, list[str | None]],
                    columns: dict[str, list[Any]]) -> None:
    """Into the workbook that was read, behind its last column, so that numbers, formulas and formats stay.

    Questions of another kind of file get a new workbook with all `columns`.
    """
    from openpyxl import Workbook, load_workbook

    if questions.path.suffix.lower() == ".xlsx":
        book = load_workbook(questions.path)
        filled = [cell.column for cells in book.worksheets[0].iter_rows() for cell in cells
                  if cell.value not in (None, "")]
        lines, first, columns = [row_of_names(questions.path), *questions.lines], max(filled) + 1, added
    else:
        book, lines, first = Workbook(), list(range(1, len(questions.rows) + 2)), 1
    for column, (name, values) in enumerate(columns.items(), first):
        for line, value in zip(lines, [name, *values], strict=True):
            _put(book.worksheets[0].cell(line, column), value)
    book.save(file.buffer)  # type: ignore[attr-defined]


def _put(cell: Any, value: Any) -> None:
    """A text stays one, also where it begins like a formula; what XML has no place for is written as Excel does."""
    if isinstance(value, int | float):
        cell.value = value
    elif text := _cell(value):
        cell.value = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda m: f"_x{ord(m[0]):04X}_", text)[:LONGEST_CELL]
        cell.data_type = "s"
