"""kit answer without a model: files of every kind, the journal, what becomes of rows that fail."""

from __future__ import annotations

import csv
import json
import resource
import sys
from pathlib import Path
from typing import Any

import pytest

from kit.answering.answer_file import answer_file, answer_rows
from kit.answering.choosing import Engine
from kit.answering.engines import InMemory, Prompt, fitted
from kit.answering.journal import Answer, Journal
from kit.answering.question_files import LONGEST_CELL, SUFFIXES, read_questions, write_answers
from kit.common.errors import GateError, KitError
from kit.models.template import Message, any_of
from kit.recipe.recipe import Recipe

TEXTS = ["What is it?", "包裹在哪里？\n第二行 🙂", 'Say "hi", please', " =1+1 ", "tab\there\nand a line"]
ANSWERS: list[str | None] = ['{"a": "b"}', "好的，\n两行", None, "=SUM(A1)", "back\\slash \x07\r\n\r"]


def workbook(path: Path, rows: list[list[Any]]) -> None:
    from openpyxl import Workbook

    book = Workbook()
    for row in rows:
        book.worksheets[0].append(row)
    book.save(path)


def made(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of that kind, written by other means than the kit's."""
    kind = path.suffix
    if kind == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    elif kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == ".xlsx":
        workbook(path, [list(rows[0]), *(list(row.values()) for row in rows)])
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def read_back(path: Path) -> list[dict[str, Any]]:
    from kit.data.readers import read_rows

    return [item.value for item in read_rows(path)]  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl", ".json", ".xlsx"])
def test_every_kind_keeps_its_columns_and_order(kind: str, tmp_path: Path) -> None:
    rows = [{"id": f"n{i}", "question": text, "备注": f"注 {i}"} for i, text in enumerate(TEXTS)]
    questions = read_questions(made(tmp_path / f"q{kind}", rows))
    assert questions.column == "question"
    assert [questions.asked[place][0]["content"] for place in range(5)] == TEXTS
    write_answers(tmp_path / f"out{kind}", questions, {"answer": ANSWERS})
    answers = ANSWERS if kind in (".json", ".jsonl", ".xlsx") else [text or "" for text in ANSWERS]
    found = read_back(tmp_path / f"out{kind}")
    assert list(found[0]) == ["id", "question", "备注", "answer"]
    assert found == [{**row, "answer": text} for row, text in zip(rows, answers, strict=True)]


@pytest.mark.parametrize("kind", [kind for kind in SUFFIXES if kind != ".txt"])
def test_a_text_file_can_become_any_kind(kind: str, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_bytes("\ufeff第一\r\n\n third ".encode())
    questions = read_questions(tmp_path / "q.txt")
    assert {place: turns[0]["content"] for place, turns in questions.asked.items()} == {0: "第一", 2: " third "}
    assert not questions.faults
    write_answers(tmp_path / f"out{kind}", questions, {"answer": ["一", None, "3"]})
    found = read_back(tmp_path / f"out{kind}")
    kept = [("第一", "一"), ("", None), (" third ", "3")]
    blank_rows_count = kind in (".json", ".jsonl")
    assert [tuple(row.values()) for row in found] == [pair for pair in kept if pair[1] or blank_rows_count]


def test_line_n_of_a_text_file_answers_line_n(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("one\n\nthree\u2028still three\nfour\n", encoding="utf-8")
    questions = read_questions(tmp_path / "q.txt")
    assert sorted(questions.asked) == [0, 2, 3]
    write_answers(tmp_path / "out.txt", questions, {"answer": ["a\nb", None, "c\\n", "\r"], "answer_note": ["x"] * 4})
    assert (tmp_path / "out.txt").read_bytes() == b"a\\nb\n\nc\\\\n\n\\r\n"


def test_json_values_stay_what_they_are(tmp_path: Path) -> None:
    rows = [{"n": 1, "share": 0.1, "prompt": "x", "deep": {"a": [None, True, 1.0]}}, {"prompt": "y", "more": "z"}]
    for kind in (".json", ".jsonl"):
        write_answers(tmp_path / f"o{kind}", read_questions(made(tmp_path / f"q{kind}", rows)), {"answer": ["1", None]})
        assert read_back(tmp_path / f"o{kind}") == [{**rows[0], "answer": "1"}, {**rows[1], "answer": None}]
    write_answers(tmp_path / "o.csv", read_questions(tmp_path / "q.json"), {"answer": ["1", None]})
    assert read_back(tmp_path / "o.csv")[0] == {"n": "1", "share": "0.1", "prompt": "x",
                                               "deep": '{"a": [null, true, 1.0]}', "more": "", "answer": "1"}


def test_a_json_list_of_texts(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text('["one", {"prompt": "two", "id": 2}, 3]')
    questions = read_questions(tmp_path / "q.json")
    assert [questions.asked[place][0]["content"] for place in sorted(questions.asked)] == ["one", "two"]
    assert questions.faults == {2: "a question is a text or a list of messages, this is 3"}
    write_answers(tmp_path / "o.json", questions, {"answer": ["1", "2", None]})
    assert read_back(tmp_path / "o.json")[0] == {"prompt": "one", "answer": "1"}


def test_a_workbook_keeps_numbers_formulas_and_other_sheets(tmp_path: Path) -> None:
    from openpyxl import Workbook, load_workbook

    book = Workbook()
    sheet = book.worksheets[0]
    for cells in ([], ["id", "prompt", "sum"], [1.5, "x", "=A3*2"], [None, None, None], [2, "y", True]):
        sheet.append(cells)
    sheet["A3"].number_format = "0.000"
    book.create_sheet("other")["B2"] = "kept"
    book.save(tmp_path / "q.xlsx")
    questions = read_questions(tmp_path / "q.xlsx")
    write_answers(tmp_path / "o.xlsx", questions, {"answer": ["=no formula", "b\x07"]})
    sheet = load_workbook(tmp_path / "o.xlsx").worksheets[0]
    assert [[cell.value for cell in row] for row in sheet.iter_rows(min_row=2)] == [
        ["id", "prompt", "sum", "answer"], [1.5, "x", "=A3*2", "=no formula"], [None] * 4, [2, "y", True, "b_x0007_"]]
    assert (sheet["A3"].number_format, sheet["C3"].data_type, sheet["D3"].data_type) == ("0.000", "f", "s")
    assert load_workbook(tmp_path / "o.xlsx")["other"]["B2"].value == "kept"


def test_a_table_keeps_what_excel_reads_it_by(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_bytes("\ufeffid;prompt\r\n1;你好\r\n".encode())
    write_answers(tmp_path / "o.csv", read_questions(tmp_path / "q.csv"), {"answer": ["a;b"]})
    assert (tmp_path / "o.csv").read_bytes() == "\ufeffid;prompt;answer\r\n1;你好;\"a;b\"\r\n".encode()
    (tmp_path / "q.csv").write_bytes(b"id,prompt\n1,x\n")
    write_answers(tmp_path / "o.csv", read_questions(tmp_path / "q.csv"), {"answer": ["a;b"]})
    assert (tmp_path / "o.csv").read_bytes() == b"id,prompt,answer\n1,x,a;b\n"


def test_which_column_holds_the_questions(tmp_path: Path) -> None:
    def column(names: str, asked: str | None = None, columns: dict[str, str] | None = None) -> str:
        (tmp_path / "q.csv").write_text(f"{names}\n{','.join('v' * (names.count(',') + 1))}\n", encoding="utf-8")
        return read_questions(tmp_path / "q.csv", asked, columns).column

    assert column("id,question,prompt") == "prompt"
    assert column("id,Question") == "Question"
    assert column("text,id") == "text"
    assert column("id,prompt,问题", columns={"prompt": "问题"}) == "问题"
    assert column("id,prompt", "id") == "id"
    with pytest.raises(KitError, match=r"no column 'promt' \(did you mean 'prompt'\?\)\n.*its columns: id, prompt"):
        column("id,prompt", "promt")


def test_conversations_and_alpaca_rows_are_asked_whole(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},
             {"role": "assistant", "content": "wanted"}]
    rows: list[dict[str, Any]] = [{"messages": turns}, {"messages": [turns[2]]}, {"messages": [{"role": "user"}]},
                                  {"messages": []}]
    questions = read_questions(made(tmp_path / "q.jsonl", rows))
    assert questions.asked == {0: turns[:2]}
    assert list(questions.faults) == [1, 2, 3]
    made(tmp_path / "q.json", [{"instruction": "do", "input": "this", "output": "that"}])
    assert read_questions(tmp_path / "q.json").asked[0][0]["content"] == "do\n\n### Input:\nthis"
    assert read_questions(tmp_path / "q.json", "instruction").asked[0][0]["content"] == "do"


def test_rows_that_cannot_be_read_are_recorded(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n{"prompt": "c"}\n{"prompt": " "}\n')
    questions = read_questions(tmp_path / "q.jsonl")
    assert sorted(questions.asked) == [0, 2]
    assert questions.faults[1].startswith("line 2") and questions.faults[3] == "the question is empty"


@pytest.mark.parametrize(("name", "content", "words"), [
    ("q.txt", b" \n\n", "is empty"), ("q.jsonl", b"", "is empty"), ("q.csv", b"prompt\n", "is empty"),
    ("q.txt", "请问包裹在哪里？".encode("gb18030"), "GB18030"), ("q.txt", "hello".encode("utf-16"), "UTF-16"),
    ("q.doc", b"x", "unknown kind of file .doc"), ("q.jsnl", b"x", "did you mean '.jsonl'")])
def test_files_that_cannot_be_read(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(KitError, match=words):
        read_questions(tmp_path / name)
    for missing in ("no.txt", "no.csv"):
        with pytest.raises(KitError, match=f"{missing} is not there"):
            read_questions(tmp_path / missing)


class Fake(InMemory):
    """Stands in for a model where only the order of work matters: it answers with the question, backwards."""

    def __init__(self, room: int = 100) -> None:
        self.recipe, self.room, self.control = Recipe.load({}), room, any_of(["<|im_end|>", "<|im_start|>"])
        self.batches: list[list[str]] = []
        self.proven = 0

    def ids(self, messages: list[Message]) -> list[int]:
        return [ord(letter) for message in messages for letter in message["content"]]

    def answer(self, prompts: list[Prompt], seed: int) -> list[Answer]:
        texts = [prompt.messages[-1]["content"] for prompt in prompts]
        self.batches.append(texts)
        self.trouble(texts)
        return [Answer(text[::-1], True, len(text)) for text in texts]

    def trouble(self, texts: list[str]) -> None:
        """For subclasses."""

    def prove(self, prompts: list[Prompt]) -> str:
        self.proven += 1
        return ""

    def close(self) -> None:
        pass


def asked(model: Fake, *texts: str) -> dict[int, Prompt]:
    return {place: fitted(model, [{"role": "user", "content": text}]) for place, text in enumerate(texts)}


def run(model: Fake, prompts: dict[int, Prompt], out: Path,
        batch_size: int = 2) -> tuple[dict[int, str], dict[int, str]]:
    """Answers and failures by place."""
    with Journal(out, {"file": "f"}) as journal:
        failed = answer_rows(model, prompts, journal, batch_size)
        return {place: answer.text for place, answer in journal.done.items()}, failed


WORDS = ("ab", "abcdef", "abc", "abcde", "a")


def test_rows_of_like_length_share_a_batch_and_keep_their_place(tmp_path: Path) -> None:
    model = Fake()
    done, failed = run(model, asked(model, *WORDS), tmp_path / "o.txt")
    assert model.batches == [["abcdef", "abcde"], ["abc", "ab"], ["a"]]
    assert done == {place: word[::-1] for place, word in enumerate(WORDS)} and not failed
    assert model.proven == 1


def test_a_batch_cut_short_by_a_kill_is_done_again_with_the_same_neighbours(tmp_path: Path) -> None:
    model, out = Fake(), tmp_path / "o.txt"
    done, _ = run(model, asked(model, *WORDS), out)
    journal = out.with_name("o.txt.partial.jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6
    journal.write_bytes(b"".join(lines[:4]) + lines[4][:-7])  # in the middle of the second batch's second row
    model = Fake()
    assert run(model, asked(model, *WORDS), out) == (done, {})
    assert model.batches == [["abc", "ab"], ["a"]]
    model = Fake()
    assert run(model, asked(model, *WORDS), out) == (done, {})
    assert not model.batches and not model.proven


def test_a_failing_row_leaves_its_batch_in_peace(tmp_path: Path) -> None:
    class Bad(Fake):
        def trouble(self, texts: list[str]) -> None:
            if "abc" in texts:
                raise ValueError("no  such\nthing")

    done, failed = run(Bad(), asked(Bad(), *WORDS), tmp_path / "o.txt")
    assert failed == {2: "ValueError: no such thing"} and sorted(done) == [0, 1, 3, 4]


def test_too_little_memory_halves_the_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Small(Fake):
        def trouble(self, texts: list[str]) -> None:
            if len(texts) > 2:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    model = Small()
    done, failed = run(model, asked(model, *WORDS), tmp_path / "o.txt", batch_size=4)
    assert len(done) == 5 and not failed
    assert [len(batch) for batch in model.batches] == [4, 2, 2, 1]
    assert capsys.readouterr().err.count("out of memory: from here on 2 rows at a time") == 1


def test_when_nothing_works_any_more_it_stops(tmp_path: Path) -> None:
    class Dead(Fake):
        def trouble(self, texts: list[str]) -> None:
            raise GateError("the device is lost")

    model = Dead()
    with pytest.raises(GateError, match="20 rows failed one after the other, the last with: the device is lost"):
        run(model, asked(model, *"x" * 30), tmp_path / "o.txt", batch_size=10)
    assert not (tmp_path / "o.txt.partial.jsonl").exists()


def test_the_middle_of_a_long_prompt_is_cut() -> None:
    model = Fake(room=21)
    found = fitted(model, [{"role": "system", "content": "sys"}, {"role": "user", "content": "b" * 50 + "e" * 50}])
    assert found.messages[1]["content"] == "b" * 7 + " … " + "e" * 7
    assert len(found.ids) == 20 and found.cut == 83
    with pytest.raises(KitError, match="30 tokens where 21 fit"):
        fitted(model, [{"role": "system", "content": "s" * 20}, {"role": "user", "content": "b" * 10}])


def test_a_journal_of_another_request_is_refused(tmp_path: Path) -> None:
    about = {"file": "q", "sha256": "1" * 64, "settings": {"temperature": 0, "seed": 1}}
    out = tmp_path / "o.csv"
    with Journal(out, about) as journal:
        journal.add({0: Answer("a", True, 1)})
        with pytest.raises(KitError, match="another process"), Journal(out, about):
            pass
    other = {**about, "sha256": "2" * 64, "settings": {"temperature": 0.5, "seed": 1}}
    changed = r"1 answers of another request: sha256 has changed; temperature was 0, is 0\.5"
    with pytest.raises(KitError, match=changed), Journal(out, other):
        pass
    with Journal(out, about, overwrite=True) as journal:
        assert journal.done == {0: Answer("a", True, 1)}, "--overwrite resumes what fits"
    with Journal(out, other, overwrite=True) as journal:
        assert not journal.done
        journal.add({1: Answer("b", False, 2)})
    with Journal(out, other) as journal:
        assert journal.done == {1: Answer("b", False, 2)}


def test_ctrl_c_while_answers_are_written_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a.jsonl"

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), Journal(out, {}) as journal:
        patch.setattr("os.fsync", interrupted)
        journal.add({0: Answer("yes", True, 1)})
    with Journal(out, {}) as journal:
        assert journal.done == {0: Answer("yes", True, 1)}


def test_a_full_disk_costs_no_answer_that_was_kept(tmp_path: Path) -> None:
    out, first, second = tmp_path / "o.csv", {0: Answer("a", True, 1)}, {1: Answer("b" * 100, True, 1)}
    with Journal(out, {}) as journal:
        journal.add(first)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 20, before[1]))
        try:
            with pytest.raises(KitError, match="can't be written: "):
                journal.add(second)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with Journal(out, {}) as journal:
        assert journal.done == first
        journal.add(second)
    with Journal(out, {}) as journal:
        assert journal.done == {**first, **second}


def test_two_models_are_compared_and_survive_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped while the second one is at work, the same call asks the first one nothing again."""
    module = sys.modules["kit.answering.answer_file"]
    asked_of: dict[str, list[str]] = {"one": [], "two": []}
    stop = [True]

    class Other(Fake):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def answer(self, prompts: list[Prompt], seed: int) -> list[Answer]:
            if self.name == "two" and stop:
                stop.clear()
                raise KeyboardInterrupt
            texts = [prompt.messages[-1]["content"] for prompt in prompts]
            asked_of[self.name] += texts
            return [Answer(text[::-1] if self.name == "two" else "aa", True, 1) for text in texts]

    def named(name: str) -> Engine:
        return Engine("base", Recipe.load({}, model_name=name), None)

    monkeypatch.setattr(module, "InMemory", lambda chosen: Other(chosen.recipe.model_name))
    monkeypatch.setattr(module, "choose", lambda *_, **__: named("one"))
    monkeypatch.setattr(module, "second", lambda *_, **__: named("two"))
    file = made(tmp_path / "q.jsonl", [{"prompt": "aa"}, {"prompt": "ab"}])
    with pytest.raises(KeyboardInterrupt):
        answer_file("r", file, against="s")
    assert asked_of == {"one": ["aa", "ab"], "two": []}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.answers.jsonl.partial.jsonl", "q.jsonl"]
    done = answer_file("r", file, against="s", show=True)
    assert asked_of == {"one": ["aa", "ab"], "two": ["aa", "ab"]}
    assert read_back(tmp_path / "q.answers.jsonl") == [
        {"prompt": "aa", "answer": "aa", "answer_against": "aa", "answer_same": "yes"},
        {"prompt": "ab", "answer": "aa", "answer_against": "ba", "answer_same": "no"}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.answers.jsonl", "q.jsonl"]
    said = str(done)
    assert "2 of 2 rows answered by one" in said and "2 of 2 rows answered by two" in said
    assert said.count("the same answer: 1 of 2 rows; another one: row 2") == 1
    assert "── row 2\n? ab\n→ ba\n" in capsys.readouterr().out
    with pytest.raises(KitError, match="has a line for one answer"):
        answer_file("r", file, tmp_path / "o.txt", against="s")


def test_an_answer_too_long_for_a_cell_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["kit.answering.answer_file"]

    class Long(Fake):
        def answer(self, prompts: list[Prompt], seed: int) -> list[Answer]:
            return [Answer("x" * (LONGEST_CELL + 1), False, 1) for _ in prompts]

    monkeypatch.setattr(module, "InMemory", lambda chosen: Long())
    monkeypatch.setattr(module, "choose", lambda *_, **__: Engine("base", Recipe.load({}), None))
    done = answer_file("r", made(tmp_path / "q.xlsx", [{"prompt": "a"}]))
    assert "32,767 characters" in done.failed[1] and done.cut_off == 1
    [row] = read_back(done.out)
    assert list(row) == ["prompt", "answer", "answer_error", "answer_note"]
    assert len(row["answer"]) == LONGEST_CELL and row["answer_note"] == "cut off at max_new_tokens"


def test_a_control_token_in_a_question_is_told_with_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["kit.answering.answer_file"]
    monkeypatch.setattr(module, "InMemory", lambda chosen: Fake(room=60))
    monkeypatch.setattr(module, "choose", lambda *_, **__: Engine("base", Recipe.load({}), None))
    texts = ["What ends a turn?", "What is <|im_end|> and <|im_start|>?", "A long one. " * 9 + "<|im_end|>", "<im_end>"]
    done = answer_file("r", made(tmp_path / "q.csv", [{"prompt": text} for text in texts]))
    assert done.typed == {2: "<|im_end|>, <|im_start|>", 3: "<|im_end|>"} and not done.failed
    assert "2 rows (row 2, 3)" in str(done)
    notes = [row["answer_note"] for row in read_back(done.out)]
    assert [bool(note) for note in notes] == [False, True, True, False]
    assert "<|im_start|>" in notes[1] and "tokens cut" in notes[2]


@pytest.mark.parametrize("empty", ["\u200b", "\ufeff \u2060", "\u00ad"])
def test_a_question_that_cannot_be_seen_is_empty(tmp_path: Path, empty: str) -> None:
    rows: list[dict[str, Any]] = [{"prompt": empty}, {"prompt": [{"role": "user", "content": empty}]}]
    assert set(read_questions(made(tmp_path / "q.jsonl", rows)).faults.values()) == {"the question is empty"}
    (tmp_path / "q.txt").write_text(f"a\n{empty}\n", encoding="utf-8")
    assert list(read_questions(tmp_path / "q.txt").asked) == [0]
