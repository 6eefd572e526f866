"""Workbooks: formulas without a value, titles above the column names, and files made to take memory and time."""

from __future__ import annotations

import ast
import itertools
import random
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import pytest

from kit.answering.question_files import read_questions, write_answers
from kit.common.errors import KitError
from kit.common.files import PROJECT
from kit.data.readers import read_rows
from kit.data.records import Problem, Record
from kit.data.rows import rows_of
from kit.recipe.recipe import Recipe
from support import grammars
from support.crafted import workbook_parts, zipped

Cells = list[list[Any]]


def workbook(path: Path, rows: Cells) -> Path:
    from openpyxl import Workbook

    book = Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)
    return path


def values(path: Path) -> list[Any]:
    return [item.code if isinstance(item, Problem) else item.unsaved or item.value for item in read_rows(path)]


# Formulas

FORMULAS: Cells = [["question", "answer", "length"], ["a", "b"], ["=A2", "c"], ["=A3", '="x"'], [None, None],
                   ["d", "e", "=LEN(A6)"], [None, None, "=LEN(A7)"], ["f", "g", None, "=LEN(A8)"]]


def test_a_formula_without_a_value_is_named(tmp_path: Path) -> None:
    """In the columns that are read; what stands beside them, or is filled down below the last row, does not matter."""
    path = workbook(tmp_path / "rows.xlsx", FORMULAS)
    rows = list(rows_of(path, Recipe.load({})))
    assert [(row.place.row, row.place.line, [fault.code for fault in row.faults]) for row in rows] == [
        (1, 2, []), (2, 3, ["unsaved_formula"]), (3, 4, ["unsaved_formula"]), (4, 6, []), (6, 8, [])]
    assert [row.faults[0].message for row in rows[1:3]] == ["question", "question, answer"]
    others = Recipe.load({}, columns={"prompt": "question", "completion": "length"})
    assert [row.faults[0].code for row in rows_of(path, others)][3:5] == ["unsaved_formula"] * 2


def test_a_question_that_is_a_formula_without_a_value(tmp_path: Path) -> None:
    questions = read_questions(workbook(tmp_path / "rows.xlsx", FORMULAS))
    assert [turns[0]["content"] for turns in questions.asked.values()] == ["a", "d", "f"]
    assert list(questions.faults) == [1, 2] and questions.lines == [2, 3, 4, 6, 8]


def test_column_names_that_are_formulas_without_values(tmp_path: Path) -> None:
    with pytest.raises(KitError, match="row 1") as error:
        list(read_rows(workbook(tmp_path / "rows.xlsx", [["=1", "=2"], ["a", "b"]])))
    assert "save it" in error.value.hint


@pytest.mark.parametrize("cell, shown", [
    ('<c r="B2" t="str"><f>A2</f><v>c</v></c>', "c"), ('<c r="B2"><f>1+1</f><v>2</v></c>', "2"),
    ('<c r="B2" t="str"><f>IF(TRUE,"")</f><v></v></c>', None),  # as Excel stores an empty text
    ('<c r="B2" t="b"><f>A2=1</f><v>1</v></c>', "TRUE"), ('<c r="B2" t="e"><f>1/0</f><v>#DIV/0!</v></c>', "#DIV/0!"),
    ('<c r="B2"><f>1+1</f></c>', ("b",)), ('<c r="B2"><f>1+1</f><v/></c>', ("b",)),
    ('<c r="B2"><f t="shared" si="0"/></c>', ("b",)),
    ('<c t="inlineStr"><is><r><t>x</t></r><r><t xml:space="preserve"> y</t></r><rPh sb="0" eb="1"><t>z</t></rPh></is>'
     '</c>', "x y"), ('<c r="B2" t="inlineStr"><is><t>_x005F_x000D_ _x000D_</t></is></c>', "_x000D_ \r"),
])
def test_what_a_cell_shows(tmp_path: Path, cell: str, shown: Any) -> None:
    parts = workbook_parts(f'<row r="2"><c r="A2" t="inlineStr"><is><t>a</t></is></c>{cell}</row>')
    (tmp_path / "rows.xlsx").write_bytes(zipped(parts))
    [found] = values(tmp_path / "rows.xlsx")
    assert (found["b"] if isinstance(found, dict) else found) == shown


def pieces(rng: random.Random) -> Any:
    return rng.choice([None, rng.randint(-9, 10**12), rng.uniform(-1e6, 1e6), rng.uniform(0, 1e-9), True, False, "",
                       "text", "猫 <&> \n x", "_x000D_", 1e300, date(1999, 12, 31), datetime(2024, 2, 29, 23, 59, 59),
                       time(12, 30), timedelta(hours=30), datetime(1900, 1, 1), "#N/A", "12", " a "])


def test_cells_are_those_that_openpyxl_reads(tmp_path: Path) -> None:
    from openpyxl import load_workbook

    rng = random.Random(3)
    for number in range(30):
        names = [f"n{k}" for k in range(rng.randint(2, 5))]
        rows = [[pieces(rng) for _ in names] for _ in range(20)]
        path = workbook(tmp_path / f"{number}.xlsx", [names, *rows])
        read = load_workbook(path, read_only=True, data_only=True).worksheets[0].iter_rows(min_row=2, values_only=True)
        filled = [row for row in read if any(value not in (None, "") for value in row)]
        found = values(path)
        assert len(found) == len(filled)
        for row, cells in zip(found, filled, strict=True):
            for shown, value in itertools.zip_longest(row.values(), cells):
                expected = {True: "TRUE", False: "FALSE"}.get(value) if isinstance(value, bool) else \
                    value.isoformat() if isinstance(value, time) else \
                    value.isoformat().removesuffix("T00:00:00") if isinstance(value, datetime) else \
                    f"{value:.15g}".upper() if isinstance(value, float) else \
                    "\r" if value == "_x000D_" else value or None if isinstance(value, str | None) else str(value)
                assert shown == expected, value


# Titles

TABLE: Cells = [["question", "answer"], ["a", "b"], ["c", "d"]]
READ = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]


@pytest.mark.parametrize("above", [[["Customer questions"]], [["Customer questions"], []], [["FAQ"], ["as of May"], []],
                                   [[None, "Customer questions"], [None], []], [["a"], ["b"], ["c"]]])
def test_column_names_below_a_title(tmp_path: Path, above: Cells, capsys: pytest.CaptureFixture[str]) -> None:
    path = workbook(tmp_path / "rows.xlsx", [*above, *TABLE])
    assert values(path) == READ
    assert capsys.readouterr().out.count(str(path)) == 1
    assert [item.line for item in read_rows(path)] == [len(above) + 2, len(above) + 3]
    # The workbook that is written back has the answers beside their questions, and their name beside the others.
    questions = read_questions(path)
    assert questions.column == "question"
    write_answers(tmp_path / "out.xlsx", questions, {"reply": ["x", "y"]})
    assert values(tmp_path / "out.xlsx") == [{**row, "reply": reply} for row, reply in zip(READ, "xy", strict=True)]


@pytest.mark.parametrize("rows, names", [
    (TABLE, ["question", "answer"]), ([["q"], ["a"], ["b"]], ["q"]), ([["prompt"], ["a", "b"], ["c", "d"]], ["prompt"]),
    ([["q"], ["a"], ["b", "a remark"], ["c"]], ["q"]), ([["q"], ["a", "b"]], ["q"]),
    ([["q"], ["a " * 40, "b"], ["c", "d"]], ["q"]), ([["q"], ["a", "a"], ["c", "d"]], ["q"]),
    ([["q"], ["a"], ["b"], ["c"], ["x", "y"], ["x", "z"]], ["q"]), ([["q", "a"], ["only"], ["b", "c"]], ["q", "a"]),
])
def test_a_first_row_that_names_the_columns_is_no_title(tmp_path: Path, rows: Cells, names: list[str]) -> None:
    found = list(read_rows(workbook(tmp_path / "rows.xlsx", rows)))
    assert len(found) == len(rows) - 1
    assert all(list(item.value) == names for item in found if isinstance(item, Record))


# Files made to do harm

HEADER = '<row r="1"><c r="A1" t="inlineStr"><is><t>a</t></is></c><c r="B1" t="inlineStr"><is><t>b</t></is></c></row>'
STRINGS = "xl/sharedStrings.xml"


def bomb(path: Path, name: str, before: str, unit: str, megabytes: int, after: str) -> Path:
    """A small workbook of which one part unpacks to so many megabytes of the same text."""
    made = workbook_parts("")
    made.pop(name, None)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for other, content in made.items():
            archive.writestr(other, content)
        piece = (unit * (1_000_000 // len(unit) + 1)).encode()
        with archive.open(name, "w", force_zip64=True) as part:
            part.write(before.encode())
            for _ in range(megabytes):
                part.write(piece)
            part.write(after.encode())
    assert path.stat().st_size < 3_000_000
    return path


SHEET = "xl/worksheets/sheet1.xml"
START, END = f"<worksheet><sheetData>{HEADER}", "</sheetData></worksheet>"
ROW = '<row r="2">'
BOMBS: dict[str, tuple[str, str, str, int, str]] = {
    "empty shared texts": (STRINGS, "<sst>", "<si/>", 400, "</sst>"),
    "many shared texts": (STRINGS, "<sst>", "<si><t>ab</t></si>", 100, "</sst>"),
    "a long shared text": (STRINGS, "<sst><si><t>", "x", 200, "</t></si></sst>"),
    "elements in one another": (STRINGS, "<sst>", "<a>", 100, ""),
    "a long attribute": (STRINGS, '<sst a="', "x", 150, '"></sst>'),
    "a long comment": (STRINGS, "<sst><!--", "x", 150, "--></sst>"),
    "a large sheet": (SHEET, START, "<row><c/><c/></row>", 300, END),
    "many cells in a row": (SHEET, START + ROW, "<c/>", 100, f"</row>{END}"),
    "a long cell": (SHEET, f'{START}{ROW}<c t="str"><v>', "x", 100, f"</v></c></row>{END}"),
    "many rows": (SHEET, START, '<row><c r="A1" t="b"><v>1</v></c></row>', 60, END),
    "far cells": (SHEET, START, '<row><c r="XFD1" t="b"><v>1</v></c></row>', 10, END),
    "a cell beyond the last column": (SHEET, START, '<row><c r="ZZZZZZ1"><v>1</v></c></row>', 1, END),
    "text outside of cells": (SHEET, START, "<foo>text</foo>", 100, END),
    "styles": ("xl/styles.xml", "<styleSheet><cellXfs>", '<xf numFmtId="14"/>', 31, "</cellXfs></styleSheet>"),
    "sheets": ("xl/workbook.xml", '<workbook xmlns:r="r"><sheets>', '<sheet r:id="x"/>', 100, "</sheets></workbook>"),
}
MEASURE = """
import re, sys, time
from pathlib import Path
from kit.common.errors import KitError
from kit.data.readers import read_rows

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

before = peak()
for path in sys.argv[1:]:
    start, count, told = time.monotonic(), 0, ""
    try:
        for item in read_rows(Path(path)):
            count += 1
    except KitError as error:
        told = error.message
    print(repr((path, peak() - before, time.monotonic() - start, count, told)))
"""


def check_bombs(folder: Path, bombs: Iterable[str]) -> None:
    paths = [bomb(folder / f"{number}.xlsx", *BOMBS[name]) for number, name in enumerate(bombs)]
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, paths)], capture_output=True, text=True,
                          cwd=PROJECT)
    assert not done.returncode, done.stderr
    for name, line in zip(bombs, done.stdout.splitlines(), strict=True):
        path, megabytes, seconds, count, told = ast.literal_eval(line)
        print(f"{name}: {Path(path).stat().st_size / 1e6:.2f} MB, {megabytes:.0f} MB, {seconds:.1f} s, {count} {told}")
        assert (told and path in told) or count <= 2**20
        assert megabytes < 400 and seconds < 60


READ_THROUGH = ("many shared texts", "many rows", "text outside of cells", "far cells", "styles",
                "a long cell")
LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its memory from /proc")


@LINUX
@pytest.mark.slow
def test_a_small_file_made_to_take_memory_is_refused(tmp_path: Path) -> None:
    check_bombs(tmp_path, [name for name in BOMBS if name not in READ_THROUGH])


@LINUX
@pytest.mark.long
def test_a_small_file_that_is_read_takes_little_memory(tmp_path: Path) -> None:
    check_bombs(tmp_path, READ_THROUGH)


@pytest.mark.long
def test_a_workbook_of_fifty_megabytes_is_read(tmp_path: Path) -> None:
    from openpyxl import Workbook

    rng = random.Random(5)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(30_000)]
    system = " ".join(rng.choices(words, k=800))  # written out in every row
    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    sheet.append(["system", "prompt", "completion"])
    for _ in range(120_000):
        sheet.append([system, " ".join(rng.choices(words, k=40)), " ".join(rng.choices(words, k=90))])
    book.save(path := tmp_path / "rows.xlsx")
    assert path.stat().st_size > 50_000_000
    assert sum(isinstance(item, Record) for item in read_rows(path)) == 120_000


@pytest.mark.parametrize("count", [pytest.param(800, marks=pytest.mark.slow),
                                   pytest.param(15_000, marks=pytest.mark.long)])
def test_random_workbooks_give_rows_or_one_error(tmp_path: Path, count: int) -> None:
    def use(data: bytes) -> None:
        path.write_bytes(data)
        for row in rows_of(path, Recipe.load({})):
            assert row.place.row > 0 and bool(row.messages) != bool(row.faults)

    with grammars.in_memory(tmp_path) as folder:
        path = folder / "random.xlsx"
        outcomes = grammars.attempts(count, grammars.workbook, use)
    assert min(outcomes["value"], outcomes["refused"]) > count / 10
