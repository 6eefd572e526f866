"""Reading rows: two shapes, two kinds of file, errors with their place, a seeded split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kit.data import load_data, read_splits
from kit.errors import KitError
from kit.recipe import Recipe
from kit.score import score
from kit.sources import read_conversations

ALPACA = {"instruction": "Translate", "input": "猫", "output": "cat"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "source": "x"}


def write(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    else:
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8-sig")
    return path




@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_alpaca_rows_from_both_kinds_of_json(tmp_path: Path, name: str) -> None:
    one, two = read_conversations(write(tmp_path / name, [ALPACA, {**ALPACA, "system": "S"}]))
    assert one == [{"role": "user", "content": "Translate\n\n### Input:\n猫"}, {"role": "assistant", "content": "cat"}]
    assert two[0] == {"role": "system", "content": "S"}


@pytest.mark.parametrize("row, words", [
    ({"text": "x"}, "no fields messages, or instruction and output (found: text)"),
    ({"instruction": "a", "output": ""}, "the answer is empty"),
    ({"instruction": "a", "output": 3}, "output is a int, not text"),
    ({"messages": []}, "no list of turns"),
    ({"messages": [{"role": "usr", "content": "a"}]}, "did you mean 'user'"),
    ({"messages": [{"role": "user", "content": "a"}]}, "end with the assistant"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "end with the assistant"),
    ([1], "a list where an object is needed"),
])
def test_bad_rows_are_named(tmp_path: Path, row: Any, words: str) -> None:
    with pytest.raises(KitError) as caught:
        read_conversations(write(tmp_path / "rows.jsonl", [ALPACA, row]))
    assert words in str(caught.value) and "row 2" in str(caught.value)


def test_bad_rows_are_collected_up_to_twenty(tmp_path: Path) -> None:
    with pytest.raises(KitError) as caught:
        read_conversations(write(tmp_path / "rows.jsonl", [{"text": "x"}] * 30))
    assert str(caught.value).count("no fields messages") == 20 and "10 more" in str(caught.value)


@pytest.mark.parametrize("content, words", [
    (b"", "is empty"), (b"\n\n", "is empty"), (b'{"a": 1\n', "line 1, column 8"), (b"\xff\xfe", "not UTF-8"),
])
def test_files_that_hold_no_rows(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(KitError, match=words):
        read_conversations(path)


def test_a_path_that_does_not_exist_names_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "tickets.jsonl", [ALPACA])
    with pytest.raises(KitError, match=r"did you mean 'tickets.jsonl'"):
        read_conversations(tmp_path / "tikets.jsonl")
    with pytest.raises(KitError, match=r"unknown kind of file \.csv"):
        (tmp_path / "x.csv").write_text("a,b\n")
        read_conversations(tmp_path / "x.csv")


@pytest.mark.slow
def test_the_split_is_seeded_and_disjoint(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{**ALPACA, "input": f"猫 {i}", "output": f"cat {i}"} for i in range(50)])
    recipe = Recipe.load({}, dataset=str(path), test_size=0.2)
    train, held_out = read_splits(recipe)
    assert (len(train), len(held_out)) == (40, 10)
    assert read_splits(recipe) == (train, held_out)
    assert read_splits(recipe.model_copy(update={"seed": 1}))[1] != held_out
    answers = [row.messages[-1]["content"] for row in (*train, *held_out)]
    assert len(set(answers)) == 50
    assert len(read_splits(Recipe.load(recipe, test_size=7))[1]) == 7
    with pytest.raises(KitError, match="leaves nothing to train on"):
        read_splits(Recipe.load(recipe, test_size=50))


@pytest.mark.slow
def test_rows_that_are_too_long_are_left_out_and_counted(tmp_path: Path, tokenizer: Any,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "rows.jsonl", [ALPACA, {**ALPACA, "output": "cat " * 300}])
    data = load_data(Recipe.load({}, dataset=str(path), max_seq_length=128), tokenizer)
    assert len(data["train"]) == 1
    assert "1 of 2 training rows are longer than max_seq_length: 128" in capsys.readouterr().out
    with pytest.raises(KitError, match="no training row fits"):
        load_data(Recipe.load({}, dataset=str(path), max_seq_length=8), tokenizer)


@pytest.mark.slow
def test_an_unreachable_hub_says_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KitError) as caught:
        read_conversations("nobody/nothing", Recipe.load({}, local_files_only=True))
    assert "HF_ENDPOINT" in str(caught.value) and "modelscope" in str(caught.value)


def test_scores() -> None:
    right = '{"order":1,"topic":"x"}'
    assert score([' {"topic": "x", "order": 1}'], [right], "json") == {"exact": 1, "order": 1, "topic": 1}
    assert score(["no json", '{"order":1,"topic":"y"}'], [right, right], "json") == {
        "exact": 0, "order": 0.5, "topic": 0}
    # 1 and true are equal in Python, but not in JSON.
    assert score(['{"order":true,"topic":"x"}'], [right], "json")["exact"] == 0
    assert score(["a\n", "b"], ["a", "c"], "exact") == {"exact": 0.5}
    assert score(["a"], ["a"], "none") == {}
