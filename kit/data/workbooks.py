"""Excel workbooks (.xlsx): the first sheet's rows, one at a time.

Own code, because openpyxl keeps a tree of every part, in which two megabytes can become gigabytes, and does not tell a
formula without a value from an empty cell.
"""

import itertools
import re
from array import array
from collections.abc import Iterator
from datetime import date, datetime, time
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zipfile import ZipFile

from kit.data.workbook_parts import SHEET, TEXTS, Parts
from kit.recipe.fields import ROW_FIELDS

LAST_ROW, LAST_COLUMN = 2**20, 2**14  # where sheets end
LONGEST_CELL, LONGEST_ROW = 2**20, 2**24  # characters; Excel takes 32,767 in a cell
MOST_STYLES = 200_000  # Excel takes 64,000
MOST_TITLES = 3  # rows above the column names
LONGEST_NAME = 60  # characters of a column name below a title
SAVE_VALUES = "open the workbook in Excel or LibreOffice and save it: then the values are stored"


class SheetRow(NamedTuple):
    """The cells of a row that hold something, by column from 1, as the sheet shows them.

    `unsaved` are the columns of formulas that were never worked out: the file has no value for them.
    """

    number: int
    cells: dict[int, str]
    unsaved: list[int]


def sheet_rows(file: BinaryIO, size: int) -> Iterator[SheetRow]:
    """The rows of the first worksheet that hold something, of a file of `size` bytes.

    Raises ValueError for what no sound workbook has; a damaged one raises whatever its parts do.
    """
    with ZipFile(file) as archive:
        parts = Parts(archive, size)
        book = parts.relations("").get("/officedocument", {"": ""}).popitem()[1]
        relations = parts.relations(book)
        sheet, from_1904 = "", False
        for tag, attributes in parts.elements(book):
            if tag == "workbookPr":
                from_1904 = attributes.get("date1904") in ("1", "true")
            elif tag == "sheet" and not sheet:
                number = next(value for name, value in attributes.items() if name.rpartition(":")[2] == "id")
                sheet = relations.get("/worksheet", {}).get(number, "")
        if not sheet:
            raise ValueError("it has no worksheet")
        texts, styles = (relations.get(kind, {"": ""}).popitem()[1] for kind in ("/sharedstrings", "/styles"))
        yield from _Sheet(_Texts(parts, texts), _Numbers(parts, styles, from_1904)).rows(parts, sheet)


def below_titles(path: Path, rows: Iterator[SheetRow]) -> tuple[SheetRow | None, Iterator[SheetRow]]:
    """The row of the column names, None without any rows, and those below it.

    It is the first row, unless that and perhaps two more have a single cell each, no field's name, and what follows is
    a table: a row of several short and different texts, and another row with several cells. Then it is said.
    """
    first = list(itertools.islice(rows, MOST_TITLES + 2))
    titles = 0
    while titles < len(first) and len(first[titles].cells) == 1 and not first[titles].unsaved:
        titles += 1
    below = first[titles:titles + 2]
    if not 0 < titles <= MOST_TITLES or len(below) < 2 or len(below[1].cells) + len(below[1].unsaved) < 2 \
            or {*first[0].cells.values()} & {*ROW_FIELDS} or not _names(below[0]):
        titles = 0
    else:
        _say(f"{path}: row {first[0].number} is taken for a title: the column names are in row {below[0].number} "
             f"({', '.join(below[0].cells.values())})")
    return (first[titles] if first else None), itertools.chain(first[titles + 1:], rows)


def row_of_names(path: Path) -> int:
    """The sheet's row in which the column names of a workbook stand that has been read before."""
    with path.open("rb") as file:
        names, _ = below_titles(path, sheet_rows(file, path.stat().st_size))
    return names.number if names else 1


def _names(row: SheetRow) -> bool:
    texts = [text.strip() for text in row.cells.values()]
    return not row.unsaved and 1 < len({*texts}) == len(texts) and all(
        0 < len(text) <= LONGEST_NAME and "\n" not in text for text in texts)


_say = lru_cache(print)  # once, not at each reading


class _Texts:
    """The texts that cells share, as UTF-8 in one piece: as objects, short ones would be ten times as large."""

    def __init__(self, parts: Parts, name: str) -> None:
        self.texts, self.ends = bytearray(), array("Q", [0])
        self.characters = 0
        self.text = lru_cache(64)(self._text)  # a system prompt in every row is one object
        for _ in parts.parsed(name, TEXTS, lambda *_: None, self._end, self._data) if name else ():
            pass

    def _data(self, path: list[str], piece: str) -> None:
        # A phonetic guide (rPh) stands above the text, and is no part of it.
        if path[-1] == "t" and path[-2] != "rPh":
            self.texts += piece.encode()
            self.characters += len(piece)
            if self.characters > LONGEST_CELL:
                raise ValueError(f"a cell of more than {LONGEST_CELL:,} characters")

    def _end(self, tag: str) -> None:
        if tag == "si":
            self.ends.append(len(self.texts))
            self.characters = 0

    def _text(self, number: int) -> str:
        if number < 0:
            raise IndexError(number)
        return self.texts[self.ends[number] : self.ends[number + 1]].decode()


class _Numbers:
    """Numbers as the sheet shows them: a date is one, too."""

    def __init__(self, parts: Parts, styles: str, from_1904: bool) -> None:
        from openpyxl.styles.numbers import BUILTIN_FORMATS, is_date_format, is_timedelta_format
        from openpyxl.utils.datetime import MAC_EPOCH, WINDOWS_EPOCH

        self.epoch = MAC_EPOCH if from_1904 else WINDOWS_EPOCH
        self.dates: set[str] = set()  # styles of a cell
        self.durations: set[str] = set()
        formats, section, style = {str(number): text for number, text in BUILTIN_FORMATS.items()}, "", 0
        for tag, attributes in parts.elements(styles) if styles else ():
            if tag == "numFmt":
                formats[attributes["numFmtId"]] = attributes["formatCode"]
            elif tag.endswith("Xfs"):
                section = tag
            elif tag == "xf" and section == "cellXfs":
                shown = formats.get(attributes.get("numFmtId", "0"), "")
                for known, styled in ((is_date_format, self.dates), (is_timedelta_format, self.durations)):
                    if known(shown):
                        styled.add(str(style))
                style += 1
                if style > MOST_STYLES:
                    raise ValueError(f"more than {MOST_STYLES:,} styles of cells")

    def value(self, text: str, style: str) -> Any:
        from openpyxl.utils.datetime import from_excel

        number = float(text) if re.search("[.eE]", text) else int(text)
        if style not in self.dates and style not in self.durations:
            return number
        try:
            return from_excel(number, self.epoch, timedelta=style in self.durations)
        except (OverflowError, ValueError):  # as Excel shows a date before all dates
            return "#VALUE!"


class _Sheet:
    """A worksheet's rows, as its tags come."""

    def __init__(self, shared: _Texts, numbers: _Numbers) -> None:
        self.shared, self.numbers = shared, numbers
        self.ready: list[SheetRow] = []
        self.number = self.count = self.column = self.characters = 0
        self.cells: dict[int, str] = {}
        self.unsaved: list[int] = []
        self.kind = self.style = ""
        self.formula = self.valued = False
        self.text: list[str] = []

    def rows(self, parts: Parts, name: str) -> Iterator[SheetRow]:
        for _ in parts.parsed(name, SHEET, self._start, self._end, self._data):
            yield from self.ready
            self.ready.clear()

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        if tag == "c":
            reference = attributes.get("r")
            self.column = _column(reference) if reference else self.column + 1
            if not 0 < self.column <= LAST_COLUMN:
                raise ValueError(f"a cell outside columns 1 to {LAST_COLUMN:,}, where sheets end")
            self.kind, self.style = attributes.get("t", "n"), attributes.get("s", "0")
            self.formula = self.valued = False
        elif tag == "f":
            self.formula = True
        elif tag == "v":
            self.valued = True
        elif tag == "row":
            self.number = int(float(attributes["r"])) if "r" in attributes else self.number + 1
            self.count += 1
            if max(self.number, self.count) > LAST_ROW:
                raise ValueError(f"a row above {LAST_ROW:,}, where sheets end")
            self.column = self.characters = 0

    def _data(self, path: list[str], piece: str) -> None:
        if path[-1] == "v" or (path[-1] == "t" and path[-2] != "rPh"):
            self.text.append(piece)
            self._counted(len(piece))

    def _counted(self, characters: int) -> None:
        self.characters += characters
        if self.characters > LONGEST_ROW:
            raise ValueError(f"row {self.number} has more than {LONGEST_ROW:,} characters")

    def _end(self, tag: str) -> None:
        if tag == "c":
            text = "".join(self.text)
            self.text.clear()
            # Excel stores an empty text as a value with nothing in it, and says that it is a text.
            if self.formula and not text and not (self.valued and self.kind == "str"):
                self.unsaved.append(self.column)
            elif text and (shown := self._shown(text)):
                self.cells[self.column] = shown
        elif tag == "row" and (self.cells or self.unsaved):
            self.ready.append(SheetRow(self.number, self.cells, self.unsaved))
            self.cells, self.unsaved = {}, []

    def _shown(self, text: str) -> str:
        if self.kind == "s":
            text = self.shared.text(int(text))
            self._counted(len(text))
        elif self.kind == "b":
            return str(bool(int(text))).upper()
        elif self.kind == "d":
            from openpyxl.utils.datetime import from_ISO8601

            return shown_value(from_ISO8601(text))
        elif self.kind == "n":
            return shown_value(self.numbers.value(text, self.style))
        # What XML has no place for, "\r" among it, Excel writes as _x000D_, and _x000D_ as _x005F_x000D_.
        return re.sub("_x(00[01][0-9A-Fa-f]|005F)_", lambda found: chr(int(found[1], 16)), text)


def shown_value(value: Any) -> str:
    """A number or a date as the spreadsheet shows it."""
    if isinstance(value, float):
        return f"{value:.15g}".replace("e", "E")
    if isinstance(value, datetime) and value.time() == time():
        return value.date().isoformat()
    return value.isoformat() if isinstance(value, date | time) else str(value)


def _column(reference: str) -> int:
    """1 of A7."""
    column = 0
    for letter in reference.rstrip("0123456789").upper()[:4]:
        column = 26 * column + ord(letter) - 64
    return column
