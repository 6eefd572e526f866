"""Safe repairs: what they mend is mended, what is well stays as it is, and nothing is ever overwritten."""

from __future__ import annotations

import copy
import csv
import io
import json
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.common.errors import KitError
from kit.data.findings import FINDINGS
from kit.data.repair import Repairs, fix, repaired
from kit.data.rows import good_rows
from kit.data.shapes import ROLES, shape_of, to_messages
from kit.recipe.recipe import Recipe
from support.command import kit

GOOD = {"instruction": "Where?", "output": "Here."}
TALK = {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]}


def turns(*contents: str, role: str = "role", text: str = "content") -> list[dict[str, str]]:
    names = ("user", "assistant") if role == "role" else ("human", "gpt")
    return [{role: names[i % 2], text: content} for i, content in enumerate(contents)]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    return path


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def mend(source: Path, out: Path, **fields: Any) -> Repairs:
    return fix(str(source), out, Recipe.load({}, dataset=str(source), **fields))


# What comes in, what goes out, and what is said of it.
REPAIRS: list[tuple[Any, Any, str]] = [
    ({"instrution": "a", "output": "b"}, {"instruction": "a", "output": "b"}, "renamed: instrution to instruction"),
    ({"Instruction": "a", " output": "b"}, {"instruction": "a", "output": "b"},
    "renamed: Instruction to instruction"),
    ({"question": "a", "anwser": "b"}, {"question": "a", "answer": "b"}, "renamed: anwser to answer"),
    ({"prompt": "a", "completions": "b"}, {"prompt": "a", "completion": "b"}, "renamed: completions to completion"),
    ({"mesages": turns("a", "b")}, {"messages": turns("a", "b")}, "renamed: mesages to messages"),
    ({"conversation": turns("a", "b", role="from", text="value")},
     {"conversations": turns("a", "b", role="from", text="value")}, "renamed: conversation to conversations"),
    ({"messages": [{"Role": "user", "contnet": "a"}, {"role": "assistant", "content": "b"}]},
     {"messages": turns("a", "b")}, "renamed: contnet to content"),
    ({"messages": [{"role": "User", "content": "a"}, {"role": "assitant", "content": "b"}]},
     {"messages": turns("a", "b")}, "renamed: role assitant to assistant"),
    ({"conversations": [{"from": "humans", "value": "a"}, {"from": "GPT", "value": "b"}]},
     {"conversations": turns("a", "b", role="from", text="value")}, "renamed: role humans to human"),
    ({"instruction": 1, "output": 2.5}, {"instruction": "1", "output": "2.5"}, "numbers written as text"),
    ({"messages": [{"role": "user", "content": 12}, {"role": "assistant", "content": "b"}]},
     {"messages": turns("12", "b")}, "numbers written as text"),
    ({"instruction": "a\r\nb\rc", "output": "b"}, {"instruction": "a\nb\nc", "output": "b"},
     "line ends written as \\n"),
    ({"instruction": "a\x07b\x1b", "output": "\ufeffb"}, {"instruction": "ab", "output": "b"},
     "control characters removed"),
    ({"instruction": "a", "input": "c\x00", "output": "b", "system": "\x7fs"},
     {"instruction": "a", "input": "c", "output": "b", "system": "s"}, "control characters removed"),
    ({"instruction": "cafe\u0301", "output": "b"}, {"instruction": "café", "output": "b"},
     "characters composed as usual (NFC)"),
    ({"prompt": turns("a\x07"), "completion": [{"role": "assistent", "content": "b"}]},
     {"prompt": turns("a"), "completion": turns("a", "b")[1:]}, "renamed: role assistent to assistant"),
    # Wherever a text stands that becomes part of a turn.
    ({**GOOD, "history": [["cafe\u0301\x07", "b\r\nc"]]}, {**GOOD, "history": [["café", "b\nc"]]},
     "control characters removed"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a\x07"}]}, *turns("a", "b")[1:]]},
     {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, *turns("a", "b")[1:]]},
     "control characters removed"),
    ({"messages": [*turns("a"), {"role": "assistant", "content": "b", "reasoning_content": "c\x07"}]},
     {"messages": [*turns("a"), {"role": "assistant", "content": "b", "reasoning_content": "c"}]},
     "control characters removed"),
]


@pytest.mark.parametrize("row, expected, what", REPAIRS, ids=[f"{i}: {r[2]}" for i, r in enumerate(REPAIRS)])
def test_each_repair(row: Any, expected: Any, what: str) -> None:
    before = copy.deepcopy(row)
    value, changes = repaired(row)
    assert value == expected and what in changes
    assert row == before
    assert repaired(value) == (value, [])


def test_two_fields_that_are_nearly_the_same_name_lose_no_text() -> None:
    value, _ = repaired({"promt": "a", "prompts": "b", "completion": "c"})
    assert {"a", "b", "c"} <= set(value.values())


@pytest.mark.parametrize("row", [
    {**GOOD, "inputs": "not asked for"}, {"question": "a", "answer": "b", "prompts": "c"}, {**TALK, "prompt_id": 3},
    {"prompt": "a", "completion": "b", "message": "c"}, {**GOOD, "id": 7, "tags": ["a\x07"], "score": 0.5},
    {**GOOD, "input": None, "system": None, "history": None}, {**GOOD, "Answers": "b"},
])
def test_a_good_row_with_other_fields_stays_as_it_is(row: Any) -> None:
    assert to_messages(row).faults == []
    assert repaired(row) == (row, [])


@pytest.mark.parametrize("row", [
    {"instruction": True, "output": "b"}, {"instruction": None, "output": "b"}, {"text": "a"},
    {"messages": [{"role": "robot", "content": "a"}]}, {"messages": [{"role": None, "content": {}}]},
    {"messages": "a"},
    {"messages": {"role": "user"}}, [], 3, None, "text", {},
])
def test_what_would_be_a_guess_is_left_alone(row: Any) -> None:
    assert repaired(row) == (row, [])


BROKEN = [
    {"instrution": "Where is 1?", "output": "Here\x07."}, {"instruction": "Where is 2?", "output": 2},
    {"instruction": "Where is 3?", "output": "cafe\u0301"}, {"instruction": "a\r\nb", "output": "b"}, b"", GOOD,
    {"output": " Here. ", "instruction": " Where?"}, {"instruction": "", "output": "b"}, [1], b'{"instruction": ',
    {"instruction": "e", "output": "Log in with hf_" + "Ab3dE5gH" * 5},
    {"instruction": "c", "output": "\x07"}, {"instruction": "d", "output": " "}, b'{"instruction": "cut',
]
MENDED = ("invalid_json", "torn_line", "not_an_object", "misnamed_field", "not_text", "empty_response",
"empty_prompt",
          "duplicate", "control_character", "not_normalised", "secret")


def test_the_copy_holds_what_can_be_trained_and_the_source_stays(tmp_path: Path) -> None:
    source, out = write(tmp_path / "rows.jsonl", BROKEN), tmp_path / "out.jsonl"
    before = source.read_bytes()
    done = mend(source, out)
    assert done == {
        "rows written": 5, "renamed: instrution to instruction": 1, "control characters removed": 1,
        "numbers written as text": 1, "characters composed as usual (NFC)": 1, "line ends written as \\n": 1,
        "left out: invalid_json": 1, "left out: torn_line": 1, "left out: duplicate": 1, "left out: empty_prompt": 1,
        "left out: not_an_object": 1, "left out: empty_response": 2, "left out: secret": 1}
    assert [row["output"] for row in read(out)] == ["Here.", "2", "café", "b", "Here."]
    assert len(list(good_rows(out, Recipe.load({})))) == 5
    assert source.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]


def test_a_repaired_file_is_repaired_to_itself(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", BROKEN)
    mend(source, tmp_path / "once.jsonl")
    done = mend(tmp_path / "once.jsonl", tmp_path / "twice.jsonl")
    assert done == {"rows written": 5}
    assert (tmp_path / "twice.jsonl").read_bytes() == (tmp_path / "once.jsonl").read_bytes()


@pytest.mark.slow
def test_a_repaired_file_has_none_of_these_findings(tmp_path: Path, tokenizer: Any) -> None:
    from kit.data.lint import lint

    def codes(path: Path) -> set[str]:
        report = lint(Recipe.load({}, dataset=str(path)), tokenizer)
        return {finding["code"] for finding in report.figures["findings"]}

    source = write(tmp_path / "rows.jsonl", BROKEN)
    assert codes(source) == set(MENDED)
    mend(source, tmp_path / "out.jsonl")
    assert codes(tmp_path / "out.jsonl") == set()


def test_what_the_remedies_promise_is_done() -> None:
    promised = {code for code, (_, _, remedy) in FINDINGS.items() if "--fix" in remedy}
    # Near misses of roles and fields have tests of their own.
    assert promised - {"wrong_role"} <= set(MENDED)


def test_columns_and_other_kinds_of_file_become_json_lines(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("问题,答案\n北京？,\x07中国。\n", encoding="utf-8")
    columns = {"prompt": "问题", "completion": "答案"}
    mend(tmp_path / "rows.csv", tmp_path / "out.jsonl", columns=columns)
    assert read(tmp_path / "out.jsonl") == [{"prompt": "北京？", "completion": "中国。"}]
    assert mend(tmp_path / "out.jsonl", tmp_path / "again.jsonl", columns=columns) == {"rows written": 1}


def test_a_folder_is_written_into_one_file(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows" / "a.jsonl", [GOOD])
    write(tmp_path / "rows" / "b.jsonl", [GOOD, {"instruction": "When?", "output": "Now."}])
    assert mend(tmp_path / "rows", tmp_path / "out.jsonl") == {"rows written": 2, "left out: duplicate": 1}


def refused(source: str | Path, out: Path, words: str) -> None:
    folder = out.parent if out.parent.is_dir() else out.parent.parent
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(KitError, match=words) as caught:
        fix(str(source), out, Recipe.load({}))
    assert caught.value.hint
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_refusals_leave_everything_as_it_was(tmp_path: Path) -> None:
    source, out = write(tmp_path / "rows.jsonl", [GOOD]), tmp_path / "out.jsonl"
    write(tmp_path / "old.jsonl", [TALK])
    refused(source, tmp_path / "old.jsonl", "exists already")
    refused(source, source, "exists already")
    for name in ("out.json", "out.csv", "out", "out.jsonl.gz"):
        refused(source, tmp_path / name, "JSON Lines")
    refused("somebody/data", out, "works on files")
    refused("starter", out, "works on files")
    refused(tmp_path / "no.jsonl", out, "there is no")
    refused(source, tmp_path / "nowhere" / "out.jsonl", "can't be written")
    refused(write(tmp_path / "bad.jsonl", [[1], {"instruction": "", "output": ""}]),
    out, "no row of .* can be trained")
    (tmp_path / "empty.jsonl").write_text("")
    refused(tmp_path / "empty.jsonl", out, "is empty")


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [GOOD])
    refused(source, source / "out.jsonl", "can't be written")


def test_an_error_midway_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kit.data import repair

    def breaks(row: Any) -> Any:
        if row["output"] == "3":
            raise KeyboardInterrupt
        return row, []

    source = write(tmp_path / "rows.jsonl", [{"instruction": str(i), "output": str(i)} for i in range(9)])
    monkeypatch.setattr(repair, "repaired", breaks)
    with pytest.raises(KeyboardInterrupt):
        mend(source, tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == [source]


SHAPED = ("messages", "conversations", "instruction", "input", "output", "system", "history", "prompt", "completion",
          "question", "answer")
NEARLY = ("mesages", "prompts", "Answer", "outputs", "inputs", "contents")
NAMES = st.sampled_from([*SHAPED, *NEARLY, "role", "content", "from", "value", "type", "text", "tool_calls",
                         "reasoning_content"])
WORDS = st.one_of(st.text(max_size=8), st.sampled_from([*ROLES, *ROLES, "usr", "User", "cafe\u0301\r\n\x07",
"text"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | WORDS, inner, max_size=5), max_leaves=25)


@settings(deadline=None, database=None)
@given(JSON | st.dictionaries(NAMES, JSON, max_size=5))
def test_any_json_is_repaired_without_an_error_and_then_has_nothing_left(row: Any) -> None:
    before = json.dumps(row)
    value, _ = repaired(row)
    assert json.dumps(row) == before
    assert repaired(value)[1] == []
    to_messages(value)
    json.dumps(value, ensure_ascii=False).encode()


TEXTS = st.text(st.sampled_from("abc é ü 北京 🦥 \n\t .,?!«»„“’"), min_size=1, max_size=20).filter(str.strip)


def talks(role: str, text: str, user: str, assistant: str) -> st.SearchStrategy[list[dict[str, str]]]:
    pair = st.tuples(TEXTS, TEXTS).map(lambda t: [{role: user, text: t[0]}, {role: assistant, text: t[1]}])
    return st.lists(pair, min_size=1, max_size=3).map(lambda pairs: [turn for two in pairs for turn in two])


MESSAGES = talks("role", "content", "user", "assistant")
CLEAN = st.one_of(
    st.fixed_dictionaries({"messages": MESSAGES}),
    st.fixed_dictionaries({"conversations": talks("from", "value", "human", "gpt")}, optional={"system": TEXTS}),
    st.fixed_dictionaries({"instruction": TEXTS, "output": TEXTS}, optional={
        "input": TEXTS | st.none() | st.just(""), "system": TEXTS,
        "history": st.lists(st.tuples(TEXTS, TEXTS).map(list))}),
    st.fixed_dictionaries({"prompt": TEXTS, "completion": TEXTS}, optional={"system": TEXTS}),
    st.fixed_dictionaries({"question": TEXTS, "answer": TEXTS}, optional={"system": TEXTS}),
    MESSAGES.map(lambda messages: {"prompt": messages[:-1], "completion": messages[-1:]}),
)  # fmt: skip


@settings(deadline=None, database=None)
@given(CLEAN, st.dictionaries(st.sampled_from(NEARLY) | NAMES | st.text(max_size=6), JSON, max_size=3))
def test_a_row_without_faults_and_with_clean_text_comes_back_equal(row: dict[str, Any],
extra: dict[str, Any]) -> None:
    # Fields that belong to a shape make another row of it; any others must not matter.
    whole = {**{key: value for key, value in extra.items() if key not in SHAPED}, **row}
    assert to_messages(whole).faults == [] and shape_of(whole) == shape_of(row)
    assert repaired(whole) == (whole, [])


# Every type of JSON in every place

ROWS: list[dict[str, Any]] = [
    {**TALK, "system": "s", "tools": []}, {"conversations": turns("a", "b", role="from", text="value"),
    "system": "s"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]},
                  {"role": "assistant", "content": "b", "reasoning_content": "c", "tool_calls": [{"id": "1"}]},
                  {"role": "tool", "content": "{}", "tool_call_id": "1"}, {"role": "assistant", "content": "d"}]},
    {**GOOD, "input": "i", "system": "s", "history": [["a", "b"]]}, {"instrution": "a", "output": "b"},
    {"prompt": turns("a"), "completion": turns("a", "b")[1:]}, {"chosen": "a", "rejected": "b"},
    {"question": "a", "answer": "b", "images": None},
    {"messages": [{"rol": "user", "conten": "a"}, {"role": "asistant", "content": "b"}]},
]
ANY: list[Any] = [None, True, 0, -1.5, 1e300, 10**40, float("nan"), "", "x", "\u200b", "assistant", [], [[]], [1],
                  [None], ["user"], {}, {"a": {}}, {"role": []}, [{"role": []}], [{"type": "text"}],
                  [{"type": "text", "text": []}], {"messages": []}, [["a", "b"]], [[[], {}]]]


def places_in(value: Any) -> Iterator[tuple[Any, ...]]:
    """The path to everything in a value."""
    yield ()
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from ((key, *path) for path in places_in(part))


def with_value(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    made = value.copy()
    made[path[0]] = with_value(value[path[0]], path[1:], new)
    return made


def mutations() -> Iterator[Any]:
    for row in ROWS:
        for path in places_in(row):
            yield from (with_value(row, path, new) for new in ANY)
            if path and isinstance(path[-1], str):  # another thing under this name
                yield from (with_value(row, path[:-1], {name: "x"}) for name in ("role", "text", "", "messages"))


def test_every_type_of_json_in_every_place_is_repaired_or_named() -> None:
    for row in mutations():
        before = json.dumps(row)
        value, _ = repaired(row)
        assert json.dumps(row) == before and repaired(value)[1] == [], row
        messages, faults = to_messages(value)[1:]
        assert bool(messages) != bool(faults), row


@pytest.mark.slow
def test_lint_and_fix_take_a_file_of_them(tmp_path: Path, tokenizer: Any) -> None:
    from kit.data.lint import lint

    rows = [as_bytes(row) for row in mutations()]
    rows += [b'{"prompt": "a", "completion": "b", "x": ' + b"[" * depth + b"]" * depth + b"}"
             for depth in range(800, 1000, 7)]
    rows += [b'{"prompt": "a", "completion": "b", "' + b"[" * 500 + b'": 1}', b"[[]]",
             b'{"": "a", "completion": "b"}']
    source, columns = tmp_path / "rows.jsonl", {"prompt": "question", "role": "from"}
    source.write_bytes(b"\n".join(rows))
    for number, fields in enumerate(({}, {"columns": columns})):
        report = lint(Recipe.load({}, dataset=str(source), **fields), tokenizer)
        assert report.figures["rows"] == len(rows) and report.page() and repr(report)
        done = mend(source, tmp_path / f"{number}.jsonl", **fields)
        assert done["rows written"] and len(read(tmp_path / f"{number}.jsonl")) == done["rows written"]


def as_bytes(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def test_what_json_has_no_word_for_is_written_as_text(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{**GOOD, "at": datetime(2024, 1, 2), "raw": b"x", "sum": Decimal("1.5")}]),
                   tmp_path / "rows.parquet")
    mend(tmp_path / "rows.parquet", tmp_path / "out.jsonl")
    [row] = read(tmp_path / "out.jsonl")
    assert row["at"].startswith("2024-01-02") and row["sum"] == "1.5" and row["output"] == GOOD["output"]


# Other encodings

def numbered(prompt: str, completion: str) -> list[dict[str, str]]:
    return [{"prompt": prompt.format(i), "completion": completion.format(i)} for i in range(40)]


CHINESE = numbered("第{}号包裹在哪里？我等了很久，请帮我查一下。", "您好，「第{}号」包裹已经发出，\n预计明天送到。")
OTHERS = {"big5": numbered("第{}號包裹在哪裡？我等了很久。", "您好，第{}號包裹已經發出，預計明天送到。"),
          "cp1252": numbered("Où est le colis n° {}\xa0?", "Le colis n° {} est arrivé à côté du café, « là ».")}


def as_kind(rows: list[dict[str, str]], kind: str) -> str:
    if kind == ".json":
        return json.dumps(rows, ensure_ascii=False, indent=1)
    if kind == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if kind == ".txt":
        return "".join(f"{row['prompt']}\t{row['completion']}".replace("\n", " ") + "\n" for row in rows)
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == ".tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


# Without a mark at its beginning UTF-16 is known by the first characters, which must be ASCII's.
@pytest.mark.parametrize(("kind", "codec"), [
    (kind, codec) for kind in (".json", ".jsonl", ".csv", ".tsv", ".txt")
    for codec in ("gb18030", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "big5", "cp1252")
    if kind != ".txt" or codec not in ("utf-16-le", "utf-16-be")])
def test_other_encodings_come_back_as_utf8(tmp_path: Path, kind: str, codec: str) -> None:
    rows = OTHERS.get(codec, CHINESE)
    source = tmp_path / f"rows{kind}"
    source.write_bytes(as_kind(rows, kind).encode(codec))
    before = source.read_bytes()
    with pytest.raises(KitError, match="--fix"):
        list(good_rows(source, Recipe.load({})))
    done = mend(source, tmp_path / "out.jsonl")
    assert done["rows written"] == len(rows) and list(done.encodings) == [source]
    line_end = " " if kind == ".txt" else "\n"
    assert read(tmp_path / "out.jsonl") == [
        {name: text.replace("\n", line_end) for name, text in row.items()} for row in rows]
    assert source.read_bytes() == before
    assert len(list(good_rows(tmp_path / "out.jsonl", Recipe.load({})))) == len(rows)


def test_a_file_that_only_begins_in_another_encoding_is_refused_by_its_name(tmp_path: Path) -> None:
    source = tmp_path / "rows.csv"
    source.write_bytes(as_kind(CHINESE * 80, ".csv").encode("gb18030") + b"\xff\xff,\xff\n")
    with pytest.raises(KitError, match="GB18030") as caught:
        mend(source, tmp_path / "out.jsonl")
    assert str(source) in caught.value.message and not (tmp_path / "out.jsonl").exists()
    source.write_bytes("[{]".encode("utf-16"))  # what is wrong with the text names the file, too
    with pytest.raises(KitError) as caught:
        mend(source.rename(tmp_path / "rows.json"), tmp_path / "out.jsonl")
    assert str(tmp_path / "rows.json") in caught.value.message and "kit-utf8" not in caught.value.message


@pytest.mark.slow
def test_the_command_checks_and_repairs_a_file_from_excel(tmp_path: Path) -> None:
    source = tmp_path / "rows.csv"
    source.write_bytes(as_kind([*CHINESE, CHINESE[3]], ".csv").encode("gb18030"))
    done = kit("lint", str(source), "--fix", str(tmp_path / "out.jsonl"))
    assert done.returncode == 1 and "GB18030" in done.stderr and "duplicate" in done.stdout, done.stdout + done.stderr
    assert read(tmp_path / "out.jsonl") == CHINESE
