"""From sources to tokens: weights, held-out rows, rows that are too long, and rows that stay on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.answering.replies import score
from kit.common.errors import KitError
from kit.common.files import PROJECT
from kit.data.formatting import load_data
from kit.data.masks import IGNORED
from kit.data.splits import DiskRows, prompt_key, read_splits
from kit.models.template import Message, render
from kit.recipe.recipe import Recipe

USUAL = dict(os.environ)  # with the cache that holds the starter model
STOP = "<|im_end|>"
LONG = " ".join(f"word{i}" for i in range(300))


def row(prompt: str, answer: str = "yes", **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": answer, **fields}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def numbered(path: Path, count: int, prompts: int | None = None) -> str:
    """A file of rows with answers `<stem> 0`, `<stem> 1`, … and, if asked, fewer different prompts."""
    return write(path, [row(f"{path.stem}? {i % (prompts or count)}", f"{path.stem} {i}") for i in range(count)])


def answers(rows: Any) -> list[str]:
    return [example.messages[-1]["content"] for example in rows]


def prompts(rows: Any) -> set[str]:
    return {example.messages[-2]["content"] for example in rows}


def refusal(tokenizer: Any, **fields: Any) -> str:
    with pytest.raises(KitError) as caught:
        load_data(Recipe.load({}, **fields), tokenizer)
    assert caught.value.hint
    return str(caught.value)


lazy_too = pytest.mark.parametrize("lazy", [False, True], ids=["in memory", "on disk"])


@pytest.fixture(autouse=True)
def kit_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A cache of its own, so that what is left in it can be seen; the starter model stays in the usual one."""
    if "tokenizer" in request.fixturenames:
        request.getfixturevalue("tokenizer")
    monkeypatch.setenv("KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Sources and weights


@lazy_too
@pytest.mark.slow
def test_sources_follow_each_other_in_the_recipes_order(tmp_path: Path, lazy: bool) -> None:
    a, b = numbered(tmp_path / "a.jsonl", 3), numbered(tmp_path / "b.jsonl", 2)
    train, held_out = read_splits(Recipe.load({}, dataset=[b, a], lazy_preprocess=lazy))
    assert answers(train) == ["b 0", "b 1", "a 0", "a 1", "a 2"] and len(held_out) == 0
    assert [(example.place.file, example.place.row) for example in train][1:3] == [(b, 2), (a, 1)]


@lazy_too
@pytest.mark.slow
def test_weights_say_how_often_rows_are_taken(tmp_path: Path, lazy: bool) -> None:
    a, b, c = (numbered(tmp_path / f"{name}.jsonl", 10) for name in "abc")
    recipe = Recipe.load({}, dataset={a: 2, b: 0.5, c: 1.3}, lazy_preprocess=lazy)
    taken = answers(read_splits(recipe)[0])
    assert [Counter(text[0] for text in taken)[name] for name in "abc"] == [20, 5, 13]
    counts = Counter(taken)
    assert all(counts[f"a {i}"] == 2 for i in range(10))
    assert {counts[f"b {i}"] for i in range(10)} == {0, 1} and {counts[f"c {i}"] for i in range(10)} == {1, 2}
    assert answers(read_splits(recipe)[0]) == taken


@pytest.mark.slow
def test_the_share_of_a_source_depends_on_the_seed_alone(tmp_path: Path) -> None:
    a, b = numbered(tmp_path / "a.jsonl", 40), numbered(tmp_path / "b.jsonl", 7)

    def half(seed: int, *sources: dict[str, float]) -> list[str]:
        weights = {name: weight for source in (*sources, {a: 0.5}) for name, weight in source.items()}
        taken = read_splits(Recipe.load({}, dataset=weights, seed=seed))[0]
        return [text for text in answers(taken) if text.startswith("a")]

    assert half(1) == half(1, {b: 2}) == half(1, {b: 0.5}) != half(2)
    # In the file's order, so that a larger share holds a smaller one's rows.
    assert half(1) == sorted(half(1), key=lambda text: int(text.split()[1]))
    assert set(half(1)) < set(answers(read_splits(Recipe.load({}, dataset={a: 0.8}, seed=1))[0]))


@pytest.mark.slow
def test_a_share_too_small_for_one_row_says_so(tmp_path: Path, tokenizer: Any) -> None:
    message = refusal(tokenizer, dataset={numbered(tmp_path / "a.jsonl", 10): 0.01})
    assert "max_seq_length" not in message and "a.jsonl" in message


@lazy_too
@pytest.mark.slow
def test_only_the_first_rows_when_asked(tmp_path: Path, tokenizer: Any, lazy: bool) -> None:
    a, held = numbered(tmp_path / "a.jsonl", 10), numbered(tmp_path / "held.jsonl", 10)
    data = load_data(Recipe.load({}, dataset=a, eval_dataset=held, max_train_samples=3, max_eval_samples=4,
                                 lazy_preprocess=lazy), tokenizer)
    assert [item["reference"] for item in data["train"]] == ["a 0", "a 1", "a 2"]
    assert [item["reference"] for item in data["test"]] == ["held 0", "held 1", "held 2", "held 3"]
    assert len(load_data(Recipe.load({}, dataset=a, eval_dataset=held, max_eval_samples=0, lazy_preprocess=lazy),
                         tokenizer)["test"]) == 0


# Held-out rows


@lazy_too
@pytest.mark.slow
def test_a_share_or_a_number_is_held_out(tmp_path: Path, lazy: bool) -> None:
    recipe = Recipe.load({}, dataset=numbered(tmp_path / "a.jsonl", 50), lazy_preprocess=lazy)
    for size, count in ((0.2, 10), (7, 7), (0.001, 1), (49, 49)):
        train, held_out = read_splits(Recipe.load(recipe, test_size=size))
        assert (len(train), len(held_out)) == (50 - count, count)
        assert sorted(answers(train) + answers(held_out)) == sorted(f"a {i}" for i in range(50))
        assert answers(train) == sorted(answers(train), key=lambda text: int(text.split()[1]))
    for size in (50, 500, 0.999):
        with pytest.raises(KitError, match=r"leaves nothing to train on: there are 50 rows with 50 different prompts"):
            read_splits(Recipe.load(recipe, test_size=size))


@pytest.mark.slow
def test_the_split_is_seeded(tmp_path: Path) -> None:
    recipe = Recipe.load({}, dataset=numbered(tmp_path / "a.jsonl", 50), test_size=0.2)
    assert read_splits(recipe) == read_splits(recipe)
    assert answers(read_splits(recipe)[1]) != answers(read_splits(Recipe.load(recipe, seed=1))[1])
    on_disk = read_splits(Recipe.load(recipe, lazy_preprocess=True))
    assert [answers(side) for side in on_disk] == [answers(side) for side in read_splits(recipe)]


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 12), min_size=2, max_size=40), st.integers(0, 10_000),
       st.floats(0.02, 0.6) | st.integers(2, 20))
def test_rows_of_one_prompt_stay_on_one_side(tmp_path: Path, groups: list[int], seed: int, size: float) -> None:
    source = write(tmp_path / "rows.jsonl", [row(f"Question {group}", f"{i}") for i, group in enumerate(groups)])
    try:
        train, held_out = read_splits(Recipe.load({}, dataset=source, test_size=size, seed=seed))
    except KitError as error:
        assert "leaves nothing to train on" in error.message
        return
    assert train and held_out and not prompts(train) & prompts(held_out)
    assert sorted(map(int, answers(train) + answers(held_out))) == list(range(len(groups)))


@pytest.mark.slow
def test_as_many_rows_are_held_out_as_whole_prompts_allow(tmp_path: Path) -> None:
    """One prompt has 60 of 150 rows. 15 rows are asked for, which the other prompts can make up exactly."""
    rows = [row("The usual question", f"{i}") for i in range(60)] + [row(f"Question {i}", "x") for i in range(90)]
    recipe = Recipe.load({}, dataset=write(tmp_path / "rows.jsonl", rows), test_size=0.1)
    sizes = [len(read_splits(Recipe.load(recipe, seed=seed))[1]) for seed in range(30)]
    assert all(abs(size - 15) <= 30 for size in sizes), sizes


@lazy_too
@pytest.mark.slow
def test_a_prompt_that_two_sources_share_stays_on_one_side(tmp_path: Path, lazy: bool) -> None:
    a = write(tmp_path / "a.jsonl", [row(f"Question {i}", f"a {i}") for i in range(20)])
    b = write(tmp_path / "b.jsonl", [row(f"Question {i}", f"b {i}") for i in reversed(range(30))])
    train, held_out = read_splits(Recipe.load({}, dataset=[a, b], test_size=0.3, lazy_preprocess=lazy))
    assert len(train) + len(held_out) == 50 and not prompts(train) & prompts(held_out)


@pytest.mark.slow
def test_weights_do_not_repeat_held_out_rows(tmp_path: Path) -> None:
    train, held_out = read_splits(Recipe.load({}, dataset={numbered(tmp_path / "a.jsonl", 20): 3}, test_size=0.1))
    assert len(train) == 54 and len(set(answers(held_out))) == len(held_out) == 2
    assert not set(answers(train)) & set(answers(held_out))


def talk(*contents: str, system: str | None = None) -> list[Message]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


@pytest.mark.parametrize("same", [
    talk("Say this", "no"), talk("Say this", "yes", system="Be brief."), talk(" Say this\n", "yes"),
    talk("\u3000Say this", "yes"), talk("Say  this", "yes"), talk("Say\nthis", "yes"), talk("Say\u00a0this", "yes"),
], ids=["answer", "system", "space around", "wide space", "two spaces", "line break", "hard space"])  # fmt: skip
def test_a_prompt_is_the_same_whatever_its_answer_system_and_space(same: list[Message]) -> None:
    assert prompt_key(same) == prompt_key(talk("Say this", "yes"))


@pytest.mark.parametrize("other", [
    talk("Say That", "yes"), talk("Saythis", "yes"), talk("Say this", "yes", "And now?", "yes"),
    talk("x", "Say this", "Say this", "yes"), talk("Say", "this", "x", "yes"), talk("", "yes"),
])  # fmt: skip
def test_other_turns_are_another_prompt(other: list[Message]) -> None:
    assert prompt_key(other) != prompt_key(talk("Say this", "yes"))


@pytest.fixture
def overlapping(tmp_path: Path) -> dict[str, Any]:
    """25 of 30 held-out rows ask what is trained on, with space around and with other answers."""
    held = [row(f" Question {i}\n", "no") for i in range(25)] + [row(f"New {i}", "no") for i in range(5)]
    return {"dataset": write(tmp_path / "a.jsonl", [row(f"Question {i}") for i in range(40)]),
            "eval_dataset": write(tmp_path / "held.jsonl", held)}


@lazy_too
@pytest.mark.slow
def test_held_out_rows_that_are_trained_on_are_refused_by_row(overlapping: dict[str, Any], lazy: bool) -> None:
    with pytest.raises(KitError) as caught:
        read_splits(Recipe.load({}, **overlapping, lazy_preprocess=lazy))
    message = str(caught.value)
    assert overlapping["eval_dataset"] in message and "(25):\n  row 1: Question 0\n  row 2: Question 1\n" in message
    assert "row 20: Question 19\n  … and 5 more" in message and "eval_overlap: drop" in message


@lazy_too
@pytest.mark.slow
def test_held_out_rows_that_are_trained_on_are_dropped_or_kept(overlapping: dict[str, Any], lazy: bool,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe.load({}, **overlapping, lazy_preprocess=lazy)
    train, held_out = read_splits(Recipe.load(recipe, eval_overlap="drop"))
    assert len(train) == 40 and prompts(held_out) == {f"New {i}" for i in range(5)}
    assert "25 of 30 held-out rows ask what is trained on; left out" in capsys.readouterr().out
    assert len(read_splits(Recipe.load(recipe, eval_overlap="keep"))[1]) == 30
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_the_starter_brings_held_out_rows_unless_others_are_named(tmp_path: Path) -> None:
    assert [len(side) for side in read_splits(Recipe.load({}))] == [500, 100]
    assert [len(side) for side in read_splits(Recipe.load({}, test_size=0.1, max_eval_samples=1000))] == [450, 50]
    held = numbered(tmp_path / "held.jsonl", 3)
    assert answers(read_splits(Recipe.load({}, eval_dataset=held))[1]) == ["held 0", "held 1", "held 2"]


# Rows that don't fit


def text_of(item: dict[str, Any], tokenizer: Any) -> str:
    return str(tokenizer.decode(item["input_ids"]))


def trained(item: dict[str, Any], tokenizer: Any) -> str:
    assert all(label in (IGNORED, token) for token, label in zip(item["input_ids"], item["labels"], strict=True))
    return str(tokenizer.decode([label for label in item["labels"] if label != IGNORED]))


@lazy_too
@pytest.mark.slow
def test_rows_that_are_too_long_are_left_out_and_counted(tmp_path: Path, tokenizer: Any, lazy: bool,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("one"), row(LONG), row("two"), row("three", LONG), row("four")]
    fields = {"dataset": write(tmp_path / "a.jsonl", rows), "lazy_preprocess": lazy}
    data = load_data(Recipe.load({}, max_seq_length=128, **fields), tokenizer)
    assert [item["prompt"][-1]["content"] for item in data["train"]] == ["one", "two", "four"]
    said = capsys.readouterr().out
    assert said == "2 of 5 training rows are longer than max_seq_length: 128 tokens and were left out\n"
    assert "no training row fits into max_seq_length: 8\n  → raise max_seq_length" in refusal(
        tokenizer, max_seq_length=8, **fields)


@pytest.mark.slow
def test_held_out_rows_that_are_too_long_are_counted_apart(tmp_path: Path, tokenizer: Any,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    held = write(tmp_path / "held.jsonl", [row("new"), row(LONG)])
    data = load_data(Recipe.load({}, max_seq_length=128, dataset=write(tmp_path / "a.jsonl", [row("one")]),
                                 eval_dataset=held), tokenizer)
    assert (len(data["train"]), len(data["test"])) == (1, 1)
    assert "1 of 2 held-out rows are longer" in capsys.readouterr().out


@lazy_too
@pytest.mark.slow
def test_a_row_of_exactly_the_longest_length_fits(tmp_path: Path, tokenizer: Any, lazy: bool) -> None:
    fields = {"dataset": write(tmp_path / "a.jsonl", [row(LONG)]), "lazy_preprocess": lazy}
    length = len(load_data(Recipe.load({}, **fields), tokenizer)["train"][0]["input_ids"])
    assert length > 300
    assert len(load_data(Recipe.load({}, max_seq_length=length, **fields), tokenizer)["train"]) == 1
    assert "no training row fits" in refusal(tokenizer, max_seq_length=length - 1, **fields)


@lazy_too
@pytest.mark.slow
def test_rows_that_are_too_long_are_refused_by_row_and_line_when_asked(tmp_path: Path, tokenizer: Any,
                                                                       lazy: bool) -> None:
    source = write(tmp_path / "a.jsonl", [row("one")])
    with open(source, "a", encoding="utf-8") as file:
        file.write("\n" + (json.dumps(row(LONG)) + "\n") * 25)
    message = refusal(tokenizer, dataset=source, overlong_rows="error", max_seq_length=128, lazy_preprocess=lazy)
    assert "training rows that can't be formatted (25):\n  row 2 (line 3): " in message
    assert message.count("tokens, more than max_seq_length: 128") == 20 and "… and 5 more" in message
    assert "row 21 (line 22)" in message and "overlong_rows: drop" in message


@lazy_too
@pytest.mark.slow
def test_the_file_of_a_row_is_named_when_there_are_several(tmp_path: Path, tokenizer: Any, lazy: bool) -> None:
    sources = [write(tmp_path / "a.jsonl", [row("one")]), write(tmp_path / "b.jsonl", [row("two"), row(LONG)])]
    message = refusal(tokenizer, dataset=sources, overlong_rows="error", max_seq_length=128, lazy_preprocess=lazy)
    assert "row 2" in message and "b.jsonl" in message


@lazy_too
@pytest.mark.slow
def test_the_middle_of_a_long_prompt_is_cut(tmp_path: Path, tokenizer: Any, lazy: bool,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(f"Sum up this.\n{LONG}\nIn one word.", "Words.", system="Be brief."), row("short"), row("x", LONG)]
    fields = {"dataset": write(tmp_path / "a.jsonl", rows), "lazy_preprocess": lazy}
    whole = load_data(Recipe.load({}, **fields), tokenizer)["train"][0]
    capsys.readouterr()
    data = load_data(Recipe.load({}, **fields, overlong_rows="truncate_prompt", max_seq_length=128), tokenizer)["train"]
    said = capsys.readouterr().out
    assert len(data) == 2  # an answer is never cut, so the last row is left out
    assert "1 of 3 training rows are longer than max_seq_length: 128 tokens and were left out" in said
    cut = len(whole["input_ids"]) - len(data[0]["input_ids"])
    assert "1 of 3 training rows were longer than max_seq_length: 128 tokens" in said
    assert f"; {cut:,} tokens were cut from the middle of their prompts" in said
    assert 100 < len(data[0]["input_ids"]) <= 128
    text = text_of(data[0], tokenizer)
    assert "<|im_start|>system\nBe brief.<|im_end|>" in text and trained(data[0], tokenizer) == "Words." + STOP
    assert "<|im_start|>user\nSum up this.\nword0 word1" in text and "word299\nIn one word.<|im_end|>" in text
    assert data[1]["input_ids"] == tokenizer(render(tokenizer, talk("short", "yes"), Recipe.load({})),
                                             add_special_tokens=False)["input_ids"]


@pytest.mark.slow
def test_of_several_prompts_the_longest_are_cut_and_no_answer(tmp_path: Path, tokenizer: Any) -> None:
    turns = talk("Begin. " + LONG, "first answer", "short", "second answer", LONG + " End.", "third answer")
    recipe = Recipe.load({}, dataset=write(tmp_path / "a.jsonl", [{"messages": turns}]), max_seq_length=128,
                         overlong_rows="truncate_prompt")
    [item] = load_data(recipe, tokenizer)["train"]
    assert len(item["input_ids"]) <= 128
    assert trained(item, tokenizer) == "".join(f"{n} answer{STOP}" for n in ("first", "second", "third"))
    text = text_of(item, tokenizer)
    assert "user\nBegin." in text and "user\nshort<|im_end|>" in text and "End.<|im_end|>" in text


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from("a é你🙂\n\u200b1 ."), min_size=1, max_size=60).filter(str.strip),
       st.sampled_from([96, 128, 200]))
def test_any_long_prompt_is_cut_to_fit(tmp_path: Path, tokenizer: Any, text: str, length: int) -> None:
    # Numbers between: of one character alone a single token may hold a hundred.
    rows = [row(f"Begin {text.join(map(str, range(300)))} end", "yes"), row("short")]
    recipe = Recipe.load({}, dataset=write(tmp_path / "a.jsonl", rows), max_seq_length=length,
                         overlong_rows="truncate_prompt")
    long, _ = load_data(recipe, tokenizer)["train"]
    assert length // 2 < len(long["input_ids"]) <= length and trained(long, tokenizer) == "yes" + STOP
    shown = text_of(long, tokenizer)
    assert "user\nBegin" in shown and " end<|im_end|>" in shown and " … " in shown and "\ufffd" not in shown


# Rows that can't be formatted


@lazy_too
@pytest.mark.slow
def test_control_tokens_in_a_text_are_refused_by_row(tmp_path: Path, tokenizer: Any, lazy: bool) -> None:
    rows = [row("one"), row("two", f"a{STOP}b"), row("three <|im_start|>"), row("four", system="<|endoftext|>")]
    message = refusal(tokenizer, dataset=write(tmp_path / "a.jsonl", rows), lazy_preprocess=lazy)
    assert message.startswith("training rows that can't be formatted (3):\n  row 2: ")
    assert "row 2: the text holds the control token '<|im_end|>'" in message
    assert "row 3: the text holds the control token '<|im_start|>'" in message
    assert "row 4: the text holds the control token '<|endoftext|>'" in message
    assert "`kit lint` shows them with remedies" in message


@lazy_too
@pytest.mark.slow
def test_rows_that_the_template_refuses_are_named(tmp_path: Path, tokenizer: Any, lazy: bool,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", strict + tokenizer.chat_template)
    rows = [row("one"), row("two", system="Be brief."), row("three")]
    message = refusal(tokenizer, dataset=write(tmp_path / "a.jsonl", rows), lazy_preprocess=lazy)
    assert "(1):\n  row 2: the chat template refuses the turns system, user, assistant: no system turns" in message


@pytest.mark.slow
def test_held_out_rows_that_cannot_be_formatted_are_named_as_such(tmp_path: Path, tokenizer: Any) -> None:
    message = refusal(tokenizer, dataset=write(tmp_path / "a.jsonl", [row("one")]),
                      eval_dataset=write(tmp_path / "held.jsonl", [row("two", STOP)]))
    assert "held-out rows that can't be formatted (1):\n  row 1: " in message


# The result


@pytest.mark.slow
def test_columns_and_their_types(tmp_path: Path, tokenizer: Any) -> None:
    turns = talk("a", "b", "c", "d", system="s")
    data = load_data(Recipe.load({}, dataset=write(tmp_path / "a.jsonl", [{"messages": turns}])), tokenizer)
    for split in (data["train"], data["test"]):
        types = {name: str(kind) for name, kind in zip(split.data.schema.names, split.data.schema.types, strict=True)}
        a_list = "list<item: struct<role: string, content: string>>"
        assert types == {"messages": a_list, "input_ids": "list<item: int32>", "labels": "list<item: int32>",
                         "prompt": a_list, "reference": "string"}
    [item] = data["train"]
    assert (item["messages"], item["prompt"], item["reference"]) == (turns, turns[:-1], "d")
    assert text_of(item, tokenizer) == render(tokenizer, turns, Recipe.load({}))
    assert trained(item, tokenizer) == f"b{STOP}d{STOP}"
    assert len(data["test"]) == 0


@pytest.fixture
def mixed(tmp_path: Path) -> dict[str, Any]:
    """Two weighted sources of different shapes, with rows that are cut, rows that are left out and a split."""
    words = LONG.split()
    a = [row(f"Question {i}: " + " ".join(words[: i % 50 * 2]), f"a {i}") for i in range(60)]
    b = [{"messages": talk(f"Talk {i}", "ok", "And?", " ".join(words[: i % 20 * 4]) + f" b {i}")} for i in range(40)]
    return {"dataset": {write(tmp_path / "a.jsonl", a): 1.5, write(tmp_path / "b.jsonl", b): 2}, "test_size": 0.1,
            "max_seq_length": 256}


@pytest.mark.slow
@pytest.mark.parametrize("fields", [
    {}, {"overlong_rows": "truncate_prompt"}, {"last_response_only": True, "system_prompt": "Be brief."},
    {"test_size": 0, "max_train_samples": 70, "prompt_style": "alpaca"}, {"train_on_responses_only": False},
], ids=lambda fields: ", ".join(fields) or "plain")  # fmt: skip
def test_on_disk_the_rows_are_the_same(mixed: dict[str, Any], fields: dict[str, Any], tokenizer: Any,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe.load({}, **{**mixed, **fields})
    plain, said = load_data(recipe, tokenizer), capsys.readouterr().out
    lazy = load_data(Recipe.load(recipe, lazy_preprocess=True), tokenizer)
    assert capsys.readouterr().out == said and "training rows" in said
    for split in ("train", "test"):
        assert list(lazy[split]) == list(plain[split])
    assert lazy["train"][5:8] == plain["train"][5:8]
    assert lazy["train"][-1] == plain["train"][-1]


@pytest.mark.slow
@pytest.mark.parametrize("column", ["messages", "prompt", "reference"])
def test_on_disk_one_column_can_be_taken_too(mixed: dict[str, Any], tokenizer: Any, column: str) -> None:
    plain = load_data(Recipe.load({}, **mixed), tokenizer)["train"]
    lazy = load_data(Recipe.load({}, **mixed, lazy_preprocess=True), tokenizer)["train"]
    assert "input_ids" not in lazy.column_names  # by this the trainer knows that there is nothing to prepare
    assert list(lazy[column]) == list(plain[column])


@pytest.mark.slow
def test_rows_on_disk_behave_like_a_list(tmp_path: Path) -> None:
    recipe = Recipe.load({}, dataset=numbered(tmp_path / "a.jsonl", 5))
    plain, lazy = read_splits(recipe)[0], read_splits(Recipe.load(recipe, lazy_preprocess=True))[0]
    assert isinstance(lazy, DiskRows) and isinstance(plain, list)
    assert list(lazy) == plain and list(lazy[-1:]) == plain[-1:] and list(lazy[1:4:2]) == plain[1:4:2]
    assert list(lazy.select([4, 0, 4])) == [plain[i] for i in (4, 0, 4)]
    assert len(lazy[:0]) == 0 and len(lazy[3:99]) == 2


IN_A_PROCESS = """
import os, sys
from pathlib import Path
from kit.data.formatting import load_data
from kit.common.errors import KitError
from kit.models.template import load_tokenizer
from kit.recipe.recipe import Recipe
tokenizer = load_tokenizer(Recipe.load({}))
os.environ["KIT_CACHE"] = sys.argv[1]
try:
    data = load_data(Recipe.load({}, dataset=sys.argv[2:], lazy_preprocess=True), tokenizer)
    from torch.utils.data import DataLoader
    for _ in range(2):  # workers that end must leave the files to the process that wrote them
        seen = [item["reference"] for item in DataLoader(data["train"], batch_size=None, num_workers=2)]
    print(len(seen), len(list(data["train"])))
except KitError as error:
    print(error.message.split("\\n")[0])
print(sum(path.is_file() for path in Path(sys.argv[1]).rglob("*")))
if "fail" in os.environ:
    raise ValueError("a mistake that nobody caught")
"""


def in_a_process(cache: Path, *sources: str, **environment: str) -> tuple[list[str], list[Path]]:
    """What a process printed that read these sources, and what it left in the cache."""
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS, str(cache), *sources], cwd=PROJECT, text=True,
                          capture_output=True, timeout=120, env={**USUAL, **environment})
    assert done.returncode == ("fail" in environment), done.stderr
    return done.stdout.splitlines(), list(cache.rglob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, {"fail": "1", "TOKENIZERS_PARALLELISM": "false"}],  # as Unsloth sets it
                         ids=["finished", "failed"])
def test_the_files_on_disk_go_with_the_process(tmp_path: Path, kit_cache: Path, starter: Path,
                                               environment: dict[str, str]) -> None:
    sources = [numbered(tmp_path / "a.jsonl", 1500), numbered(tmp_path / "b.jsonl", 5)]
    assert in_a_process(kit_cache, *sources, **environment) == (["1505 1505", "2"], [])


@pytest.mark.slow
def test_no_file_stays_on_disk_when_the_source_is_refused(tmp_path: Path, kit_cache: Path, starter: Path) -> None:
    rows = [row(f"{i}") for i in range(1500)]
    said, left = in_a_process(kit_cache, write(tmp_path / "a.jsonl", [*rows, row("x", "")]))
    assert "bad rows (1)" in said[0] and left == []


def test_scores() -> None:
    right = '{"order":1,"topic":"x"}'
    assert score([' {"topic": "x", "order": 1}'], [right], "json") == {"exact": 1, "order": 1, "topic": 1}
    assert score(["no json", '{"order":1,"topic":"y"}'], [right, right], "json") == {
        "exact": 0, "order": 0.5, "topic": 0}
    # 1 and true are equal in Python, but not in JSON.
    assert score(['{"order":true,"topic":"x"}'], [right], "json")["exact"] == 0
    # A field that only another row's reference has.
    assert score(['{"a":1,"b":2}', '{"a":1,"b":2}'], ['{"a":1}', '{"a":1,"b":2}'], "json") == {
        "exact": 0.5, "a": 1, "b": 0.5}
    assert score(["a\n", "b"], ["a", "c"], "exact") == {"exact": 0.5}
    assert score(["a"], ["a"], "none") == {}


def test_thinking_before_an_answer_is_not_scored() -> None:
    assert score(["<think>\n\n</think>\n\n42", "<think>\nhm\n</think>\n41"], ["42", "42"], "exact") == {"exact": 0.5}
    assert score(['<think>\n\n</think>\n\n{"a": 1}'], ['{"a": 1}'], "json") == {"exact": 1.0, "a": 1.0}
    assert score(["42 <think>no</think>"], ["42"], "exact") == {"exact": 0.0}


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("fields", [{}, {"test_size": 0.25}, {"test_size": 3}, {"weights": 1.5}, {"weights": 0.5},
                                    {"weights": 2, "test_size": 0.25, "max_eval_samples": 3}], ids=str)
def test_max_train_samples_keeps_the_first_of_the_rows_there_are_without_it(tmp_path: Path, lazy: bool,
                                                                            fields: dict[str, Any]) -> None:
    files = [write(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {i % 17}", "completion": str(i)}
                                                for i in range(30)]) for name in "ab"]
    fields = {**fields}
    weight = fields.pop("weights", 1)
    recipe = Recipe.load({}, dataset=dict.fromkeys(files, weight), lazy_preprocess=lazy, **fields)
    train, held_out = (list(part) for part in read_splits(recipe))
    for most in (1, 20, 29, 30, 31, 45, 500):
        limited = recipe.model_copy(update={"max_train_samples": most})
        assert [list(part) for part in read_splits(limited)] == [train[:most], held_out]
