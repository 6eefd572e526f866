"""kit.answer within a time: which rows are answered, in which batches, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from kit.answering import prompts as module
from kit.answering.prompts import answer
from kit.answering.replies import Reply, by_length, score, score_stages
from kit.common.show import scores
from kit.recipe.recipe import Recipe

RECIPE = Recipe.load({})
LENGTHS = {number: [0] * (number * 37 % 101 + 1) for number in range(100)}
PROMPTS = [[{"role": "user", "content": "x" * len(ids)}] for ids in LENGTHS.values()]
AT_ONCE = 20


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The batches that are answered, as lengths of prompts. Each takes ten seconds of a clock of its own."""
    clock, made = [0.0], []

    def answer_batch(model: Any, tokenizer: Any, rows: list[list[int]], recipe: Recipe) -> list[Reply]:
        clock[0] += 10
        made.append([len(ids) for ids in rows])
        return [Reply(f"answer to {len(ids)}", True) for ids in rows]

    @contextmanager
    def opened(gguf: str, recipe: Recipe) -> Iterator[Any]:
        def stream(messages: Any, **sampling: Any) -> Iterator[str]:
            clock[0] += 10
            yield f"answer to {len(messages[0]['content'])}"

        yield SimpleNamespace(stream=stream, finish_reason="stop", gguf=SimpleNamespace(name=gguf))

    monkeypatch.setattr("kit.answering.in_memory.answer_batch", answer_batch)
    monkeypatch.setattr(module, "prompt_ids", lambda tokenizer, messages, recipe: [0] * len(messages[0]["content"]))
    monkeypatch.setattr(module, "opened", opened)
    monkeypatch.setattr(module, "monotonic", lambda: clock[0])
    return made


def texts(count: int) -> list[str]:
    return [f"answer to {len(ids)}" for ids in list(LENGTHS.values())[:count]]


@pytest.mark.parametrize("seconds", [None, 50, 1000])
def test_a_time_that_is_enough_changes_nothing(batches: list[list[int]], seconds: float | None,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    replies = answer(object(), None, PROMPTS, RECIPE, seconds=seconds)
    assert [reply.text for reply in replies] == texts(100)
    assert batches == [[len(LENGTHS[number]) for number in batch] for batch in by_length(LENGTHS, AT_ONCE)]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "rows"), [(49, 60), (35, 40), (29, 32), (1, 32)])
def test_with_less_time_the_first_rows_are_answered_and_it_is_said(
        batches: list[list[int]], seconds: float, rows: int, capsys: pytest.CaptureFixture[str]) -> None:
    replies = answer(object(), None, PROMPTS, RECIPE, seconds=seconds, least=32)
    # A row behind them may have been in the first batch, that of the longest prompts.
    longest = set(by_length(LENGTHS, AT_ONCE)[0])
    answered = next(number for number in range(rows, 101) if number not in longest)
    assert [reply.text for reply in replies] == texts(answered)
    assert len(batches) * 10 <= max(seconds, 30)
    out = capsys.readouterr().out
    assert out.startswith(f"answered the first {answered} of 100 rows in {len(batches) * 10} s")
    assert f"of at most {seconds}" in out


@pytest.mark.parametrize(("seconds", "rows"), [(None, 100), (395, 40), (1, 32)])
def test_llama_cpp_stops_when_the_time_is_used_up(batches: list[list[int]], seconds: float | None, rows: int) -> None:
    replies = answer("model.gguf", None, PROMPTS, RECIPE, seconds=seconds, least=32)
    assert [reply.text for reply in replies] == texts(rows) and replies[0].stopped


def test_no_prompts_no_answers(batches: list[list[int]]) -> None:
    assert answer(object(), None, [], RECIPE, seconds=1) == [] and batches == []


def test_stages_are_scored_over_the_rows_that_all_answered() -> None:
    replies = {"before": [Reply("no", True)] * 4, "after": [Reply(text, True) for text in "abc"],
               "q8_0": [Reply(text, True) for text in "ax"]}
    compared = score_stages(["a", "b", "c", "d"], "exact", **replies)
    assert compared == {"before": {"exact": 0}, "after": {"exact": 1}, "q8_0": {"exact": 0.5}}
    assert score_stages(["a", "b"], "none", after=replies["after"]) == {"after": {}}
    answered = {"rows": 4, **{stage: len(given) for stage, given in replies.items()}}
    assert scores(answered, **compared).columns == ["held-out score, first 2 of 4 rows", "before", "after", "q8_0"]
    assert scores({"rows": 4, "before": 4}, **compared).columns[0] == "held-out score, 4 rows"
    assert scores(None, **compared).columns[0] == "held-out score"


def test_answers_that_are_no_json_are_scored_as_text() -> None:
    assert score(["yes", "no"], ["yes", "maybe"], "json") == {"exact": 0.5}
    assert score(["yes", '{"a": 1}'], ["yes", '{"a":1}'], "json") == {"exact": 0.5, "a": 0.5}


@pytest.mark.slow
def test_a_real_model_gives_the_same_answers_within_a_time(starter: Any) -> None:
    """Time is up at once: of 6 rows the first 2 are answered, as without a limit."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = Recipe.load({}, max_new_tokens=4)
    tokenizer = AutoTokenizer.from_pretrained(starter)
    model = AutoModelForCausalLM.from_pretrained(starter, dtype=torch.float32)
    asked = [[{"role": "user", "content": f"Name {word}."}] for word in
             ("a colour", "two rivers", "the moon of Jupiter that is the largest", "a tree", "a very small fish", "me")]
    whole = answer(model, tokenizer, asked, recipe, batch_size=2)
    part = answer(model, tokenizer, asked, recipe, batch_size=2, seconds=1e-6, least=2)
    assert 2 <= len(part) < 6 and part == whole[: len(part)]
