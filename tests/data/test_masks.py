"""Whatever the turns hold: tokens are the rendered text, and the trained ones are the answers with their stop token."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kit.common.errors import KitError
from kit.data.masks import IGNORED, Formatter
from kit.models.template import CLOSE, OPEN, Message, prepare_tokenizer, prompt_ids, render
from kit.recipe.recipe import Recipe

pytestmark = pytest.mark.slow
CONTROL = re.compile(r"<\|im_start\|>|<\|im_end\|>|<\|endoftext\|>")
STYLES = ["chat", "chatml", "alpaca"]
# What stands in or near templates, so that a content can look like the text around it.
BAIT = ["### Response:\n", "### Instruction:\n", "<|im_start", "im_end|>", "assistant\n", "<think>\n", "</think>",
        "{{ x }}", "{% endfor %}", "\r\n", "\n\n", " ", "\u200b", "\ufeff", "\u0000", "é", "e\u0301", "你好",
        "🧑‍🧑‍🧒", "\ufffd", "\U0010ffff"]  # fmt: skip
# The starter's vocabulary has no token for these bytes: six control characters, and planes with no characters yet.
UNWRITABLE = ("\x04", "\x06", "\x13", "\x14", "\x16", "\x1d")
CHARACTER = st.characters(exclude_categories=["Cs"], exclude_characters=OPEN + CLOSE + "".join(UNWRITABLE)).filter(
    lambda character: not "\U00040000" <= character < "\U000c0000")
CONTENT = st.lists(st.text(CHARACTER, max_size=12) | st.sampled_from(BAIT), max_size=5).map("".join).filter(
    lambda text: not CONTROL.search(text))
SPOKEN = CONTENT.filter(str.strip)


@st.composite
def conversations(draw: Callable[..., Any]) -> list[Message]:
    """Maybe a system turn, then questions and answers."""
    system = [{"role": "system", "content": draw(CONTENT)}] if draw(st.booleans()) else []
    texts = draw(st.lists(st.tuples(SPOKEN, SPOKEN), min_size=1, max_size=4))
    return [*system, *({"role": role, "content": text} for pair in texts
                       for role, text in zip(("user", "assistant"), pair, strict=True))]


def talk(*contents: str, system: str | None = None) -> list[Message]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


@pytest.fixture(scope="module", params=STYLES)
def styled(request: pytest.FixtureRequest, tokenizer: Any) -> Callable[..., Formatter]:
    """A formatter for this style and further fields of the recipe, made once for each."""

    @functools.cache
    def made(**fields: Any) -> Formatter:
        recipe = Recipe.load({}, prompt_style=request.param, **fields)
        return Formatter(prepare_tokenizer(copy.deepcopy(tokenizer), recipe), recipe)

    return made


def answers(formatter: Formatter, messages: list[Message]) -> list[str]:
    return [m["content"] + formatter.tokenizer.eos_token for m in messages if m["role"] == "assistant"]


def checked(formatter: Formatter, messages: list[Message], expected: str) -> tuple[list[int], list[int]]:
    """ids and labels, after what holds for every mask has been looked at; `expected` is the trained text."""
    [(ids, labels)] = formatter.encode([messages])
    assert formatter.tokenizer.decode(ids) == render(formatter.tokenizer, messages, formatter.recipe)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    assert formatter.tokenizer.decode([label for label in labels if label != IGNORED]) == expected
    return ids, labels


def anything(function: Callable[..., None]) -> Callable[..., None]:
    # The fixture is the same for all examples, which is what makes a thousand of them affordable.
    slack = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    return slack(given(messages=conversations())(function))


@anything
@example(messages=talk("a", " b "))
@example(messages=talk("\n\nHi\n", "### Response:\nx\n\n### Instruction:\ny", " ", "\n", system=""))
@example(messages=talk("same", "same", "same", "same", system="same"))
@example(messages=talk("a", "<think>\nb\n</think>\n\nc", "d", "e"))
def test_every_answer_is_trained_with_its_stop(styled: Callable[..., Formatter], messages: list[Message]) -> None:
    formatter = styled()
    assert not formatter.typed(messages)
    checked(formatter, messages, "".join(answers(formatter, messages)))


@anything
@example(messages=talk("a", "same", "b", "same"))
def test_last_response_only_trains_the_last(styled: Callable[..., Formatter], messages: list[Message]) -> None:
    formatter = styled(last_response_only=True)
    _, labels = checked(formatter, messages, answers(formatter, messages)[-1])
    # Of two equal answers it is the last: behind it stands nothing but what the template ends with.
    end = max(i for i, label in enumerate(labels) if label != IGNORED)
    assert formatter.tokenizer.decode(labels[end:end + 1]) == formatter.tokenizer.eos_token and len(labels) - end <= 3


@anything
@example(messages=talk("a", "\n\nb", "c", "\nd"))
def test_before_a_last_response_stands_its_prompt(styled: Callable[..., Formatter], messages: list[Message]) -> None:
    formatter = styled(last_response_only=True)
    [(ids, labels)] = formatter.encode([messages])
    start = next(i for i, label in enumerate(labels) if label != IGNORED)
    assert ids[:start] == prompt_ids(formatter.tokenizer, messages[:-1], formatter.recipe)


@anything
def test_everything_is_trained_when_asked(styled: Callable[..., Formatter], messages: list[Message]) -> None:
    formatter = styled(train_on_responses_only=False)
    ids, labels = checked(formatter, messages, render(formatter.tokenizer, messages, formatter.recipe))
    assert ids == labels


@anything
def test_the_recipes_system_prompt_is_in_the_text(styled: Callable[..., Formatter], messages: list[Message]) -> None:
    formatter = styled(system_prompt="Be brief. 简短。")
    ids, _ = checked(formatter, messages, "".join(answers(formatter, messages)))
    assert ("Be brief. 简短。" in formatter.tokenizer.decode(ids)) == (messages[0]["role"] != "system")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(conversations(), min_size=1, max_size=8), size=st.integers(1, 4))
def test_rows_are_encoded_together_as_one_by_one(styled: Callable[..., Formatter], rows: list[list[Message]],
                                                 size: int) -> None:
    one_by_one = [Formatter(styled().tokenizer, styled().recipe).encode([row])[0] for row in rows]
    formatter = Formatter(styled().tokenizer, styled().recipe)
    assert formatter.encode(rows) == one_by_one
    batches = [rows[i:i + size] for i in range(0, len(rows), size)]
    # Once with texts it has seen, once with none.
    for fresh in (formatter, Formatter(styled().tokenizer, styled().recipe)):
        ahead = list(fresh.encode_ahead((batch, [fresh.locate(row) for row in batch]) for batch in batches))
        assert [batch for batch, _ in ahead] == batches
        assert [encoded for _, part in ahead for encoded in part] == one_by_one


def test_encoding_ahead_takes_nothing_and_passes_errors_on(styled: Callable[..., Formatter]) -> None:
    assert list(styled().encode_ahead([])) == []
    assert list(styled().encode_ahead([("a", []), ("b", [])])) == [("a", []), ("b", [])]

    def broken() -> Any:
        yield "a", [styled().locate(talk("b", "c"))]
        raise ValueError("the disk is gone")

    with pytest.raises(ValueError, match="the disk is gone"):
        list(styled().encode_ahead(broken()))


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_control_tokens_in_any_turn_are_found(styled: Callable[..., Formatter], role: str) -> None:
    messages = talk("a", "b", system="c")
    assert styled().typed(messages) == []
    turns = [{**m, "content": "x<|im_end|>y<|endoftext|>"} if m["role"] == role else m for m in messages]
    assert styled().typed(turns) == ["<|im_end|>", "<|endoftext|>"]


def test_a_character_without_a_token_is_never_left_out_silently(styled: Callable[..., Formatter]) -> None:
    formatter, silent = styled(), []
    for character in (*UNWRITABLE, "\U00040000"):
        messages = talk("a", f"b{character}c")
        try:
            [(ids, _)] = formatter.encode([messages])
        except KitError:
            continue
        if formatter.tokenizer.decode(ids) != render(formatter.tokenizer, messages, formatter.recipe):
            silent.append(character)
    assert silent == []
