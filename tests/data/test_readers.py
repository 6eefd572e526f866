"""Files to rows: every kind comes back unchanged, every mistake has its place, and damage never gets through."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import warnings
import zipfile
from collections import Counter
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.common.errors import KitError
from kit.data.readers import SUFFIXES, read_rows
from kit.data.records import Problem, Record

PROJECT = Path(__file__).resolve().parents[2]
BOM = b"\xef\xbb\xbf"


def read(path: Path, content: bytes | str) -> list[Record | Problem]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_rows(path))


def places(found: list[Record | Problem]) -> list[tuple[Any, int, int | None]]:
    """Value or code, row and line."""
    return [(item.value if isinstance(item, Record) else item.code, item.row, item.line) for item in found]


def refusal(path: Path, content: bytes | str) -> str:
    with pytest.raises(KitError) as caught:
        read(path, content)
    assert str(path) in caught.value.message and caught.value.hint
    return str(caught.value)


def workbook(path: Path, rows: list[list[Any]]) -> None:
    """Texts as Excel writes them: one with = in front is no formula, and \\r, which XML would drop, is spelled out."""
    from openpyxl import Workbook

    book = Workbook()
    for number, row in enumerate(rows, 1):
        for column, value in enumerate(row, 1):
            cell = book.active.cell(number, column)
            cell.value = value.replace("\r", "_x000D_") if isinstance(value, str) else value
            if isinstance(value, str):
                cell.data_type = "s"
    book.save(path)


def parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, **options)


# JSON Lines

@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_binary_data_is_told_as_such(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"picture.{kind}"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x02X\x9d")
    with pytest.raises(KitError, match="no text, but binary data"):
        list(read_rows(path))


def test_jsonl_goes_on_behind_each_broken_line(tmp_path: Path) -> None:
    lines = [b'{"a": 1}', b"", b'{"a" 2}', b"  \t", b'{"a": "\xff\xfe\x80"}', b'{"a": "\\ud800"}', b"[1, 2]\r",
             '{"a": "猫\u2028\x85"}'.encode(), b"[" * 100_000, b"9" * 5000, b'{"a": "\\ud83d\\ude00"}',
             '"ä"'.encode(), b'{"a": "tor']
    found = read(tmp_path / "rows.jsonl", b"\n".join(lines))
    assert places(found) == [
        ({"a": 1}, 1, 1), ("invalid_json", 2, 3), ("wrong_encoding", 3, 5), ("invalid_json", 4, 6), ([1, 2], 5, 7),
        ({"a": "猫\u2028\x85"}, 6, 8), ("invalid_json", 7, 9), ("invalid_json", 8, 10), ({"a": "😀"}, 9, 11),
        ("ä", 10, 12), ("torn_line", 11, 13)]
    assert [item.message for item in found if isinstance(item, Problem)] == [
        "line 3, column 6: Expecting ':' delimiter: {\"a\" 2}",
        'line 5: not UTF-8 at byte 8: {"a": "���"}',
        "line 6: half of a surrogate pair (\\ud800) in a text",
        "line 9: nested too deeply",
        "line 10: a whole number with too many digits",
        'line 13, column 7: Unterminated string starting at: {"a": "tor; the file was cut off here']


@pytest.mark.parametrize("end, codes", [
    (b'{"a": 2', ["torn_line"]), (b'{"a": 2\n', ["invalid_json"]), ('{"a": "猫'.encode()[:-1], ["torn_line"]),
    ('{"a": "猫'.encode()[:-1] + b"\n", ["wrong_encoding"]), (b'{"a": 2}', [{"a": 2}]), (b"\n\n", [])])
def test_jsonl_a_last_line_without_an_end_was_torn(tmp_path: Path, end: bytes, codes: list[Any]) -> None:
    found = read(tmp_path / "rows.jsonl", BOM + '{"a": "ä"}\n{"a": "ö"}\n'.encode() + end)
    assert [value for value, _, _ in places(found)[2:]] == codes


# JSON

def test_json_rows_know_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert places(read(path, BOM + b'\n[\n  {"a":\n 1},\n 2\n , "\\ud800", null]\n')) == [
        ({"a": 1}, 1, 3), (2, 2, 5), ("invalid_json", 3, 6), (None, 4, 6)]


@pytest.mark.parametrize("text, code, line, words", [
    ('[1,\n {"a" 2}, 3]', "invalid_json", 2, "line 2, column 7: Expecting ':' delimiter:  {\"a\" 2}, 3]"),
    ("[1\n, 2\n 3]", "invalid_json", 3, "line 3, column 2: a comma or ] is missing before  3]"),
    ("[1\n, 2]\n]", "invalid_json", 3, "line 3, column 1: text after the end of the list: ]"),
    ("[1,\n,]", "invalid_json", 2, "line 2, column 1: Expecting value: "),
    ("[1, nul]", "invalid_json", 1, "column 5: Expecting value"),
    ("[1,\n2\n", "torn_line", 3, "the list has no end; the file was cut off here"),
    ("[1,\n", "torn_line", 2, "cut off"), ('[1, {"a": "x]', "torn_line", 1, "cut off"),
    ('[1, {"a":', "torn_line", 1, "cut off"), ('[1,\n\n{"a": 1, ', "torn_line", 3, "cut off"),
    ("[1, tr", "torn_line", 1, "cut off"), ("[1, -", "torn_line", 1, "cut off"),
    ('[1, "\\u12', "torn_line", 1, "cut off"), ('[1, "\\', "torn_line", 1, "cut off"),
    ("[1,\n" + "[" * 100_000, "invalid_json", 2, "line 2: nested too deeply"),
    ("[1,\n" + '{"a":' * 100_000, "invalid_json", 2, "line 2: nested too deeply"),
    ("[1,\n" + "9" * 5000 + "]", "invalid_json", 2, "line 2: a whole number with too many digits"),
])
def test_json_stops_at_a_mistake(tmp_path: Path, text: str, code: str, line: int, words: str) -> None:
    *before, problem = read(tmp_path / "rows.json", text)
    assert isinstance(problem, Problem) and (problem.code, problem.line, problem.row) == (code, line, len(before) + 1)
    assert before and all(isinstance(item, Record) for item in before)
    assert words in problem.message and f"line {line}" in problem.message


@pytest.mark.parametrize("text, code, words", [
    ("rows", "invalid_json", "line 1, column 1: Expecting value: rows"), ('{"a" 1}', "invalid_json", "column 6"),
    ("[\n{,}]", "invalid_json", "line 2, column 2"), ("[", "torn_line", "line 1, column 2"),
    ("[" * 100_000, "invalid_json", "nested too deeply"), ('{"a":' * 100_000, "invalid_json", "nested too deeply"),
    ("9" * 5000, "invalid_json", "too many digits"),
    ('{\n  "a": 1\n  "b": 2\n}\n', "invalid_json", "line 3, column 3: Expecting ',' delimiter"),
    ('{\n  "a": [\n    {"b": 1},\n', "torn_line", "cut off here"),
    ('{\n  "a": "ä",\n  "b": "ö\udcff"\n}\n', "wrong_encoding", "line 1: not UTF-8 in the object"),
])
@pytest.mark.parametrize("kind", [".json", ".jsonl"])
def test_json_without_a_row_is_one_problem(tmp_path: Path, kind: str, text: str, code: str, words: str) -> None:
    [problem] = read(tmp_path / f"rows{kind}", text.encode(errors="surrogateescape"))
    assert isinstance(problem, Problem) and problem.code == code and words in problem.message


PRINTED = ['{"a": {"b": "猫"},\n"c": [1]}', '{\n  "a": {\n    "b": "猫"\n  },\n\n  "c": [\n    1\n  ]\n}',
           '{"a": {"b": "猫"}, "c": [1]}']


@pytest.mark.parametrize("kind", [".json", ".jsonl"])
@pytest.mark.parametrize("text", [
    *PRINTED, f"[{', '.join(PRINTED)}]", f"[\n{PRINTED[1]},\n]\n\n", "\n".join(PRINTED), "\n\n".join(PRINTED * 3),
    ",\n".join(PRINTED) + ",", ", ".join([PRINTED[1]] * 3), "  " + "\n  ".join(PRINTED[1].split("\n"))])
@pytest.mark.parametrize("mark, end", [(b"", "\n"), (BOM, "\r\n")])
def test_rows_are_read_however_they_are_printed(tmp_path: Path, kind: str, text: str, mark: bytes, end: str) -> None:
    path = tmp_path / f"行 rows{kind}"
    found = values(path, mark + text.replace("\n", end).encode())
    assert found and all(value == {"a": {"b": "猫"}, "c": [1]} for value in found)
    assert next(item.line for item in read_rows(path)) == 1 + text.startswith("[\n")


def test_a_broken_printed_row_is_one_problem_and_others_are_read(tmp_path: Path) -> None:
    broken = PRINTED[1].replace("},", "}")
    found = read(tmp_path / "rows.jsonl", "\n".join([PRINTED[0], broken, PRINTED[1], PRINTED[2], PRINTED[1][:20]]))
    assert [(item.row, item.line) for item in found] == [(1, 1), (2, 3), (3, 12), (4, 21), (5, 22)]
    assert [getattr(item, "code", "row") for item in found] == ["row", "invalid_json", "row", "row", "torn_line"]


def test_a_torn_line_takes_no_other_row_along(tmp_path: Path) -> None:
    lines = ['{"messages": [{"role": "user"},', '{"messages": []}', '{"a":', '{"b": 1}', '{"c": 1}', "x", '{"d": ']
    assert places(read(tmp_path / "rows.jsonl", "\n".join(lines))) == [
        ("invalid_json", 1, 1), ({"messages": []}, 2, 2), ("invalid_json", 3, 3), ({"b": 1}, 4, 4), ({"c": 1}, 5, 5),
        ("invalid_json", 6, 6), ("torn_line", 7, 7)]


def test_a_list_is_read_in_pieces(tmp_path: Path) -> None:
    """Values that begin in one piece of the file and end in another, of all kinds; lines and columns stay right."""
    rows: list[Any] = [{"a": "猫😀\\" * n, "b": [1.5, -2e9, True, None, 12345]} for n in (1, 80_000, 7)]
    rows += [*range(140_000, 147_000), True, None, "é" * 300_000, *range(140_000, 147_000)]
    for indent in (None, 0):
        text = json.dumps(rows, ensure_ascii=indent is None, indent=indent)
        assert values(tmp_path / "rows.jsonl", text.encode()) == rows
        *_, problem = read(tmp_path / "rows.jsonl", text[:-1] + ", x]")
        assert isinstance(problem, Problem)
        line = text.count("\n") + 1
        assert problem.message.startswith(f"line {line}, column {len(text) - text.rfind(chr(10)) + 1}: Expecting value")


@pytest.mark.parametrize("text", ["[]", " \n", "[ ]\n"])
def test_json_with_nothing_in_it_is_empty(tmp_path: Path, text: str) -> None:
    assert "is empty" in refusal(tmp_path / "rows.json", text)


# Tables

def test_csv_places(tmp_path: Path) -> None:
    text = 'a,b\r\n1,"x\ny\r\nz"\r\n,\r\n\r\n2,3,4\r\n5\r\n"say ""hi""",\r\n6,"7\r\n'
    found = read(tmp_path / "rows.csv", BOM + text.encode())
    assert places(found) == [({"a": "1", "b": "x\ny\r\nz"}, 1, 2), ("ragged_row", 2, 7), ("ragged_row", 3, 8),
                             ({"a": 'say "hi"', "b": ""}, 4, 9), ("ragged_row", 5, 10)]
    assert found[1].message == "line 7: 3 cells where the header has 2 (a, b)"  # type: ignore[union-attr]
    assert "unexpected end of data" in found[-1].message  # type: ignore[union-attr]
    assert places(read(tmp_path / "rows.csv", "a,b\r1,2\r3,4\r")) == [
        ({"a": "1", "b": "2"}, 1, 2), ({"a": "3", "b": "4"}, 2, 3)]


@pytest.mark.parametrize("text, row", [
    ("a;b\n1,5;2\n", {"a": "1,5", "b": "2"}), ("a\tb\n1,5\t2;3\n", {"a": "1,5", "b": "2;3"}),
    ("a,b;c\n1,2\n", {"a": "1", "b;c": "2"}), ('"a;x";"b,y,z"\n1;2\n', {"a;x": "1", "b,y,z": "2"}),
    ("a\n1\n", {"a": "1"}),
    ("\n\na;b\n1;2\n", {"a": "1", "b": "2"})])
def test_csv_finds_its_delimiter(tmp_path: Path, text: str, row: dict[str, str]) -> None:
    assert [value for value, _, _ in places(read(tmp_path / "rows.csv", text))] == [row]


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
@pytest.mark.parametrize("text, words", [
    ("a,a\n1,2\n", "two columns are named 'a'"), ("a,,c\n1,2,3\n", "column 2 has no name"), (",\n1,2\n", "has no name"),
    ("a,b\n", "is empty\n  → it needs at least one row below the column names"), ("\n\r\n", "is empty"),
    ('"a,b\n1,2\n', "unexpected end of data"), ("a,b\n,\n", "is empty")])
def test_tables_without_a_usable_header(tmp_path: Path, name: str, text: str, words: str) -> None:
    assert words in refusal(tmp_path / name, text.replace(",", "\t") if name == "rows.tsv" else text)


def test_a_cell_larger_than_the_csv_modules_limit(tmp_path: Path) -> None:
    large = "x" * 200_000
    assert places(read(tmp_path / "rows.tsv", f"a\tb\n{large}\t1\n")) == [({"a": large, "b": "1"}, 1, 2)]


def test_txt_divides_at_the_first_tab(tmp_path: Path) -> None:
    found = read(tmp_path / "rows.txt", BOM + b'a\tb\r\n\n"x\\n"\t\ty\r\r\nno tab\n\t\nlast\tone')
    assert places(found) == [
        ({"prompt": "a", "completion": "b"}, 1, 1), ({"prompt": '"x\\n"', "completion": "\ty\r"}, 2, 3),
        ("ragged_row", 3, 4), ({"prompt": "", "completion": ""}, 4, 5), ({"prompt": "last", "completion": "one"}, 5, 6)]
    assert found[2].message == "line 4: no tab between prompt and answer: no tab"  # type: ignore[union-attr]
    assert "is empty" in refusal(tmp_path / "rows.txt", "\n \n")


def test_xlsx_values_are_what_the_sheet_shows(tmp_path: Path) -> None:
    path = tmp_path / "rows.XLSX"
    workbook(path, [[None], ["n", "v", 3, None], [1, 42], [None, None, "", None], [2, 1.5, "x"], [3, 42.0], [4, True],
                    [5, date(2024, 1, 2)], [6, datetime(2024, 1, 2, 3, 4, 5)], [7, "=1+1"], [8, 0.1 + 0.2], [9, 1e20],
                    [10, 1, 2, 3], [None, "only"]])
    found = list(read_rows(path))
    assert [item.value["v"] for item in found if isinstance(item, Record)] == [
        "42", "1.5", "42", "TRUE", "2024-01-02", "2024-01-02T03:04:05", "=1+1", "0.3", "1E+20", "only"]
    assert found[0] == Record({"n": "1", "v": "42", "3": None}, 1, 3)
    assert found[1] == Record({"n": "2", "v": "1.5", "3": "x"}, 2, 5)
    assert places(found)[-2:] == [("ragged_row", 10, 13), ({"n": None, "v": "only", "3": None}, 11, 14)]


def test_xlsx_with_shared_strings_and_a_wrong_dimension(tmp_path: Path) -> None:
    """As Excel writes it: texts in a table of their own, control characters spelled out."""
    workbook(tmp_path / "plain.xlsx", [["a"], ["x\r\ny"], ["=2 _x0007_"]])
    parts = members((tmp_path / "plain.xlsx").read_bytes())
    sheet, texts = parts["xl/worksheets/sheet1.xml"].decode(), []

    def share(found: re.Match[str]) -> str:
        texts.append(found[1])
        return f't="s"><v>{len(texts) - 1}</v>'

    sheet = re.sub(r't="inlineStr"><is>(.*?)</is>', share, sheet, flags=re.DOTALL)
    parts["xl/worksheets/sheet1.xml"] = re.sub(r'ref="A1:A3"', 'ref="A1:A1"', sheet).encode()
    parts["xl/sharedStrings.xml"] = ('<sst xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main">'
                                     + "".join(f"<si>{text}</si>" for text in texts) + "</sst>").encode()
    kind = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/sharedStrings"
    parts["xl/_rels/workbook.xml.rels"] = parts["xl/_rels/workbook.xml.rels"].replace(
        b"</Relationships>",
        f'<Relationship Id="t" Type="{kind}" Target="/xl/sharedStrings.xml"/></Relationships>'.encode())
    assert len(texts) == 3 and places(read(tmp_path / "rows.xlsx", zipped(parts))) == [
        ({"a": "x\r\ny"}, 1, 2), ({"a": "=2 \a"}, 2, 3)]


def test_xlsx_with_a_row_number_beyond_all_sheets(tmp_path: Path) -> None:
    workbook(tmp_path / "plain.xlsx", [["a"], ["x"], ["y"]])
    parts = members((tmp_path / "plain.xlsx").read_bytes())
    sheet = parts["xl/worksheets/sheet1.xml"]
    parts["xl/worksheets/sheet1.xml"] = sheet.replace(b'<row r="3">', b'<row r="99999999999999">')
    assert "where sheets end" in refusal(tmp_path / "rows.xlsx", zipped(parts))


def test_xlsx_without_openpyxl_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    assert "pip install openpyxl" in refusal(tmp_path / "rows.xlsx", b"PK")


def test_parquet_keeps_types_and_has_no_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = [{"n": i, "messages": [{"role": "user", "content": str(i)}], "none": None} for i in range(2500)]
    parquet(path, rows, row_group_size=700)
    assert list(read_rows(path)) == [Record(row, i, None) for i, row in enumerate(rows, 1)]
    parquet(path, [])
    with pytest.raises(KitError, match="no columns"):
        list(read_rows(path))


# Files as a whole

@pytest.mark.parametrize("kind", SUFFIXES)
def test_no_rows_no_file_a_folder_and_no_permission(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows{kind}"
    assert "is empty" in refusal(path, b"")
    if kind in (".xlsx", ".parquet"):
        assert "cannot be read as" in refusal(path, b"rows")
    else:
        assert "is empty" in refusal(path, BOM + b"\n")
    path.chmod(0)
    if not os.access(path, os.R_OK):  # nothing is forbidden to root
        with pytest.raises(KitError, match="Permission denied"):
            list(read_rows(path))
    path.unlink()
    with pytest.raises(KitError, match="is not there"):
        list(read_rows(path))
    path.mkdir()
    with pytest.raises(KitError, match="is a folder"):
        list(read_rows(path))


def test_unknown_ending_names_the_known_ones(tmp_path: Path) -> None:
    assert "unknown kind of file .jsnol (did you mean '.jsonl'?)" in (text := refusal(tmp_path / "rows.jsnol", b"1"))
    assert all(kind in text for kind in SUFFIXES)
    assert "(no ending)" in refusal(tmp_path / "rows", b"1")


TEXT_KINDS = {".json": '[\n{{"q": "x"}},\n{{"q": "{}"}}]', ".jsonl": '{{"q": "x"}}\n\n{{"q": "{}"}}\n',
              ".csv": 'q,r\n"a\nb",{0}\n', ".tsv": 'q\tr\n"a\nb"\t{0}\n', ".txt": "x\ty\n\nx\t{}\n"}
SAMPLES = {
    "GB18030": "如果您忘记了密码,请点击登录页面上的链接,我们会给您发送一封邮件。",
    "BIG5": "如果您忘記了密碼,請點擊登錄頁面上的連結,我們會給您發送一封郵件。",
    "SHIFT_JIS": "パスワードを忘れた場合は、ログインページのリンクをクリックしてください。",
    "CP1252": "Vous avez oublié le mot de passe\xa0? Cliquez là où c’est indiqué, à côté du numéro du café."}


@pytest.mark.parametrize("kind", TEXT_KINDS)
@pytest.mark.parametrize("name", SAMPLES)
def test_other_encodings_are_named(tmp_path: Path, kind: str, name: str) -> None:
    content = TEXT_KINDS[kind].format(SAMPLES[name]).encode(name)
    with pytest.raises(UnicodeDecodeError) as caught:
        content.decode()
    assert (f"not UTF-8 (byte {caught.value.start + 1}, line 3); it reads as {name}\n"
            f"  → iconv -f {name} -t UTF-8 OLD > NEW") in refusal(tmp_path / f"rows{kind}", content)


@pytest.mark.parametrize("kind", [".json", ".csv", ".tsv", ".txt"])
def test_a_broken_byte_far_into_a_utf8_file_is_no_other_encoding(tmp_path: Path, kind: str) -> None:
    content = TEXT_KINDS[kind].format(SAMPLES["GB18030"] * 40_000).encode()
    content = content[:3_000_000] + b"\xff" + content[3_000_000:]
    assert re.search(r"not UTF-8 \(byte 300\d{4}, line 3\)\n", refusal(tmp_path / f"rows{kind}", content))


def test_jsonl_mostly_utf8_is_read_on(tmp_path: Path) -> None:
    right, wrong = ('{"q": "您忘记了密码"}\n'.encode(codec) for codec in ("utf-8", "gb18030"))
    ascii_line = b'{"q": "x"}\n'
    found = read(tmp_path / "rows.jsonl", ascii_line * 100 + wrong + ascii_line)
    assert [item.line for item in found if isinstance(item, Problem)] == [101]
    assert places(read(tmp_path / "rows.jsonl", right + wrong))[1] == ("wrong_encoding", 2, 2)
    assert "it reads as GB18030" in refusal(tmp_path / "rows.jsonl", right + wrong * 2)


@pytest.mark.parametrize("kind", TEXT_KINDS)
@pytest.mark.parametrize("codec", ["UTF-16", "UTF-16LE", "UTF-16BE", "UTF-32", "UTF-32LE", "UTF-32BE"])
def test_utf16_and_utf32_are_named(tmp_path: Path, kind: str, codec: str) -> None:
    text = refusal(tmp_path / f"rows{kind}", TEXT_KINDS[kind].format("猫").encode(codec))
    assert f"this is {codec}, not UTF-8\n  → iconv -f {codec} -t UTF-8" in text


@pytest.mark.parametrize("kind", SUFFIXES)
def test_progress_adds_up_to_the_file(tmp_path: Path, kind: str) -> None:
    path, text = tmp_path / f"rows{kind}", "猫" * 1000
    if kind == ".xlsx":
        workbook(path, [["a"], *([text] for _ in range(50))])
    elif kind == ".parquet":
        parquet(path, [{"a": text}] * 50)
    else:
        row = {".json": f'"{text}",\n', ".jsonl": f'"{text}"\n', ".txt": f"{text}\t\n"}.get(kind, text + "\n")
        head = {".json": "[", ".csv": "a\n", ".tsv": "a\n"}.get(kind, "")
        path.write_text(head + row * 2000 + "1]" * (kind == ".json"), "utf-8")
    told: list[int] = []
    count = sum(1 for _ in read_rows(path, told.append))
    assert sum(told) == path.stat().st_size and min(told) > 0 and len(told) <= 1 + sum(told) // 1_000_000
    assert count >= 50 and (len(told) > 3 or kind in (".xlsx", ".parquet"))


def test_rows_come_before_the_file_is_read_to_its_end(tmp_path: Path) -> None:
    for kind, head, row in ((".jsonl", "", '{"a": 1}\n'), (".json", "[", '{"a": 1}, '), (".csv", "a,b\n", "1,2\n"),
                            (".txt", "", "a\tb\n")):
        path = tmp_path / f"rows{kind}"
        path.write_text(head + row * 300_000, "utf-8")
        told: list[int] = []
        next(read_rows(path, told.append))
        assert not told


def test_the_libraries_are_loaded_only_for_their_files() -> None:
    code = "import sys, kit.data.readers; print(sorted({'openpyxl', 'pyarrow', 'pandas', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert done.stdout.strip() == "[]"


# What is written comes back

JSON_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
NAMES = st.lists(JSON_TEXT.filter(str.strip), min_size=1, max_size=4, unique=True)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | JSON_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(JSON_TEXT, inner, max_size=3), max_leaves=6)
OBJECTS = st.lists(st.dictionaries(JSON_TEXT, VALUES, max_size=4), min_size=1, max_size=6)


@st.composite
def tables(draw: st.DrawFn, names: st.SearchStrategy[list[str]] = NAMES,
           cell: st.SearchStrategy[Any] = JSON_TEXT) -> list[dict[str, Any]]:
    """Rows with the same columns, each with something in it."""
    header = draw(names)
    rows = st.tuples(*[cell] * len(header)).filter(any)
    return [dict(zip(header, row, strict=True)) for row in draw(st.lists(rows, min_size=1, max_size=6))]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readers")


def values(path: Path, content: bytes | None = None) -> list[Any]:
    if content is not None:
        path.write_bytes(content)
    found = list(read_rows(path))
    assert all(isinstance(item, Record) for item in found), found
    assert [item.row for item in found] == list(range(1, len(found) + 1))
    return [item.value for item in found if isinstance(item, Record)]


@settings(deadline=None)
@given(rows=OBJECTS, escaped=st.booleans(), indent=st.sampled_from([None, 0, 2]), mark=st.sampled_from([b"", BOM]))
def test_json_comes_back(scratch: Path, rows: list[Any], escaped: bool, indent: int | None, mark: bytes) -> None:
    assert values(scratch / "rows.json", mark + json.dumps(rows, ensure_ascii=escaped, indent=indent).encode()) == rows


@settings(deadline=None)
@given(rows=OBJECTS, escaped=st.booleans(), mark=st.sampled_from([b"", BOM]), end=st.sampled_from(["\n", "\r\n"]),
       last=st.booleans())
def test_jsonl_comes_back(scratch: Path, rows: list[Any], escaped: bool, mark: bytes, end: str, last: bool) -> None:
    text = end.join(json.dumps(row, ensure_ascii=escaped) for row in rows) + end * last
    assert values(scratch / "rows.jsonl", mark + text.encode()) == rows


# The header decides what divides the cells, so the other two marks are not in it here.
CSV_NAMES = NAMES.filter(lambda names: not re.search("[;\t]", "".join(names)))


@settings(deadline=None)
@given(rows=tables(CSV_NAMES), end=st.sampled_from(["\n", "\r\n"]))
def test_csv_comes_back(scratch: Path, rows: list[dict[str, str]], end: str) -> None:
    assert values(scratch / "rows.csv", written(rows, ",", end)) == rows


@settings(deadline=None)
@given(rows=tables(), end=st.sampled_from(["\n", "\r\n"]))
def test_tsv_comes_back(scratch: Path, rows: list[dict[str, str]], end: str) -> None:
    assert values(scratch / "rows.tsv", written(rows, "\t", end)) == rows


def written(rows: list[dict[str, str]], delimiter: str, end: str) -> bytes:
    """With a byte order mark: without one, a header that begins with U+FEFF could not be told from it."""
    file = io.StringIO(newline="")
    # Python before 3.13 quotes \r only when it is in the line end, so everything is quoted.
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return BOM + file.getvalue().encode()


# A tab divides and \n ends the row; nothing else is special.
TXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\n"))


@settings(deadline=None)
@given(pairs=st.lists(st.tuples(TXT, TXT), min_size=1, max_size=6), end=st.sampled_from(["\n", "\r\n"]),
       last=st.booleans())
def test_txt_comes_back(scratch: Path, pairs: list[tuple[str, str]], end: str, last: bool) -> None:
    if end == "\n" or not last:  # here one \r at the end of an answer is read as part of the line's end
        pairs = [(prompt, answer.rstrip("\r")) for prompt, answer in pairs]
    content = BOM + (end.join("\t".join(pair) for pair in pairs) + end * last).encode()
    assert values(scratch / "rows.txt", content) == [{"prompt": p, "completion": c} for p, c in pairs]


# XML has no place for the other control characters, U+FFFE and U+FFFF, and openpyxl refuses to write the former.
XLSX = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\r\n\t",
                             exclude_characters="\ufffe\uffff"))
XLSX = XLSX.filter(lambda text: not re.search("_x00[01]", text))  # Excel's spelling of a control character


@settings(deadline=None)
@given(rows=tables(st.lists(XLSX.filter(str.strip), min_size=1, max_size=4, unique=True),
                   st.none() | XLSX.filter(bool)))  # an empty text is stored as an empty cell
def test_xlsx_comes_back(scratch: Path, rows: list[dict[str, Any]]) -> None:
    workbook(scratch / "rows.xlsx", [list(rows[0]), *(list(row.values()) for row in rows)])
    assert values(scratch / "rows.xlsx") == rows


@settings(deadline=None)
@given(rows=tables(cell=st.none() | JSON_TEXT))
def test_parquet_comes_back(scratch: Path, rows: list[dict[str, Any]]) -> None:
    parquet(scratch / "rows.parquet", rows)
    assert values(scratch / "rows.parquet") == rows


# Damage

def members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(parts: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return file.getvalue()


BOMBS = [b"[" * 5000, b'{"a":' * 5000, b"9" * 5000, b"1e999999", b"-" * 300, b'"' * 99, b"\\ud800", b"\xff\xfe", BOM,
         b"\0" * 50, b",;\t" * 100, b"\r", b"\n" * 200, b"</row>", b'r="9999999"', b"\xe7\x8c", b"\xed\xa0\x80", b"NaN"]


def mutated(content: bytes, others: list[bytes], choose: random.Random) -> bytes:
    for _ in range(choose.choice((1, 1, 1, 2, 4))):
        data = bytearray(content)
        a, b = sorted(choose.randrange(len(data) + 1) for _ in range(2))
        match choose.randrange(6):
            case 0:
                for _ in range(choose.choice((1, 1, 3, 20))):
                    if data:
                        data[choose.randrange(len(data))] = choose.randrange(256)
            case 1:
                del data[a : choose.choice((b, a + 1, len(data)))]
            case 2:
                data[b:b] = data[a:b]
            case 3:
                data[a:a] = choose.randbytes(choose.choice((1, 4, 40)))
            case 4:
                other = choose.choice(others)
                data[a:b] = other[choose.randrange(len(other) + 1) :]
            case 5:
                data[a:a] = choose.choice(BOMBS)
        content = bytes(data[:60_000])
    return content


def seeds(folder: Path) -> dict[str, list[bytes]]:
    """Small good files of every kind, for the mutations to start from."""
    rows = [{"prompt": "Where is my order?", "completion": 'It "is" on\r\nits way, see #4; done.'},
            {"prompt": "密码忘了", "completion": "点击「忘记密码」🙂"}, {"prompt": "", "completion": "é\\ud83d\\ude00"}]
    texts = {".json": [json.dumps(rows), json.dumps(rows, ensure_ascii=False, indent=1), "[1, [2, {}], null, 1.5e3]"],
             ".jsonl": ["".join(json.dumps(row, ensure_ascii=escaped) + "\n" for row in rows) for escaped in (0, 1)],
             ".csv": [written(rows, mark, end).decode() for mark, end in ((",", "\n"), (";", "\r\n"), ("\t", "\r"))],
             ".tsv": [written(rows, "\t", "\n").decode()],
             ".txt": ["a\tb\r\n密码\t点击\n\nx\t\ty", "a\tb\n" * 20]}
    found = {kind: [text.encode(codec) for text in several for codec in ("utf-8", "utf-8-sig")]
             for kind, several in texts.items()}
    workbook(folder / "seed.xlsx", [["n", "text"], [1, "a"], [2.5, "密码\r\n"], [True, date(2024, 1, 2)]])
    found[".xlsx"] = [(folder / "seed.xlsx").read_bytes()]
    found[".parquet"] = []
    nested = [{"messages": [{"role": "user", "content": str(i)}], "n": i, "x": i / 2 if i % 2 else None}
              for i in range(20)]
    for several in (rows, nested):
        for compression in ("snappy", "none", "zstd"):
            parquet(folder / "seed.parquet", several, compression=compression, use_dictionary=compression != "none")
            found[".parquet"].append((folder / "seed.parquet").read_bytes())
    return found


class TooSlow(BaseException):
    """No Exception, so that no reader takes it for damage in the file."""


def too_slow(*_: Any) -> None:
    raise TooSlow("longer than 5 seconds")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer signal")
def test_a_hundred_thousand_mutated_files_give_rows_or_an_error(tmp_path: Path) -> None:
    shared = Path("/dev/shm")  # memory, where there is one: a disk would be written a hundred thousand times
    folder = shared if os.access(shared, os.W_OK) else tmp_path
    counts = {".json": 19_500, ".jsonl": 19_500, ".csv": 19_500, ".tsv": 18_000, ".txt": 18_000, ".xlsx": 2_500,
              ".parquet": 3_000}
    good, choose, outcomes = seeds(tmp_path), random.Random(7), Counter[tuple[str, str]]()
    everything = [content for several in good.values() for content in several]
    before = signal.signal(signal.SIGALRM, too_slow)
    try:
        for kind, count in counts.items():
            path = folder / f"readers-{os.getpid()}{kind}"
            for number in range(count):
                seed = choose.choice(good[kind])
                others = good[kind] if choose.random() < 0.8 else everything
                if kind == ".xlsx" and number % 2:  # the checksums of the archive catch most other damage
                    parts = members(seed)
                    name = choose.choice([*parts, *["xl/worksheets/sheet1.xml"] * 10])
                    content = zipped({**parts, name: mutated(parts[name], list(parts.values()), choose)})
                else:
                    content = mutated(seed, others, choose)
                path.write_bytes(content)
                signal.setitimer(signal.ITIMER_REAL, 5)
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        for item in read_rows(path):
                            assert isinstance(item, Record | Problem) and (kind == ".parquet") == (item.line is None)
                            outcomes[kind, "row" if isinstance(item, Record) else item.code] += 1
                except KitError as error:
                    assert str(path) in error.message and "\n" not in error.message
                    outcomes[kind, "refused"] += 1
                except BaseException:
                    print(f"{kind}, mutation {number}: {content!r}")
                    raise
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            path.unlink()
    finally:
        signal.signal(signal.SIGALRM, before)
    print(sorted(outcomes.items()))
    assert sum(counts.values()) >= 100_000
    for kind in counts:
        assert outcomes[kind, "row"] and outcomes[kind, "refused"], kind
