"""Tools: each form of definitions and calls gives the same conversation, and templates that have them are masked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.answering.question_files import read_questions
from kit.data.formatting import load_data
from kit.data.lint import lint
from kit.data.masks import Formatter
from kit.data.rows import rows_of
from kit.data.segments import ToolsNotShown
from kit.data.shapes import to_messages
from kit.gguf.child import LlamaChild
from kit.gguf.messages import Message, for_template
from kit.models.saved import saved_tokenizer
from kit.models.template import prepare_tokenizer, render
from kit.recipe.recipe import Recipe
from kit.runs.run import Run
from support.vocabularies import FOLDER, PAIRS, WHY_NOT, real_tokenizer

Row = dict[str, Any]
INNER = {"name": "weather", "description": "天气 of a \"city\"", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}
TOOLS = [{"type": "function", "function": INNER}]
ASK, RESULT = {"role": "user", "content": "北京天气？"}, '{"celsius": 21, "text": "晴\\n"}'
ANSWER = {"role": "assistant", "content": "21 度。"}


def call(city: str, **more: str) -> Row:
    return {**more, "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


def calling(*made: Row, content: str | None = "") -> Row:
    return {"role": "assistant", "content": content, "tool_calls": list(made)}


def result(**more: str) -> Row:
    return {"role": "tool", "content": RESULT, **more}


FORMS: dict[str, Row] = {
    "OpenAI": {"messages": [ASK, calling(call("北京", id="call_9"), content=None), result(tool_call_id="call_9"),
                            ANSWER], "tools": TOOLS},
    "arguments and definitions as text": {
        "messages": [ASK, {"role": "assistant", "tool_calls": [
            {"function": {"name": "weather", "arguments": '{"city": "北京"}'}}]}, result(), ANSWER],
        "tools": json.dumps(TOOLS)},
    "definitions without the shell": {"messages": [ASK, calling(call("北京")), result(), ANSWER], "tools": [INNER]},
    "OpenAI's older names": {
        "messages": [ASK, {"role": "assistant", "content": None, "function_call": {
            "name": "weather", "arguments": '{"city": "北京"}'}},
            {"role": "function", "name": "weather", "content": RESULT}, ANSWER], "functions": [INNER]},
    "ShareGPT": {"conversations": [
        {"from": "human", "value": ASK["content"]},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "北京"}}'},
        {"from": "observation", "value": RESULT}, {"from": "gpt", "value": ANSWER["content"]}],
        "tools": json.dumps([INNER], ensure_ascii=False)},
}
TALKS: dict[str, list[Row]] = {
    "one call": [ASK, calling(call("北京"))],
    "call and answer": [ASK, calling(call("北京")), result(), ANSWER],
    "no call": [ASK, ANSWER],
    "two rounds": [ASK, calling(call("北京")), result(), ANSWER, {"role": "user", "content": "And \"Paris\"?"},
                   calling(call('Par"is')), result(), ANSWER],
    "system": [{"role": "system", "content": "Be brief."}, ASK, calling(call("北京")), result(), ANSWER],
    "two calls": [ASK, calling(call("北京"), call("上海")), result(), result(), ANSWER],
}
LLAMA = ("two calls",)  # says itself that it takes one call at a time
# Templates that must take tools, and which conversations they refuse.
TAKE: dict[str, tuple[str, ...]] = {
    "Qwen-Qwen2.5-7B-Instruct": (), "Qwen-Qwen3-0.6B": (), "Qwen3-Coder": (), "Qwen3.5-4B": (),
    "meta-llama-Llama-3.1-8B-Instruct": LLAMA, "meta-llama-Llama-3.2-3B-Instruct": LLAMA,
    "meta-llama-Llama-3.3-70B-Instruct": LLAMA, "mistralai-Mistral-Nemo-Instruct-2407": ("system",),
    "Mistral-Small-3.2-24B-Instruct-2506": (), "ibm-granite-granite-4.0": (), "moonshotai-Kimi-K2": ()}


def parsed(row: Row) -> list[Message]:
    made = to_messages(row)
    assert not made.faults
    return made.messages


def test_every_form_gives_the_same_conversation() -> None:
    first, *others = (for_template(parsed(row)) for row in FORMS.values())
    assert first[1] == TOOLS
    assert first[0][1]["tool_calls"] == [{"id": first[0][2]["tool_call_id"], "type": "function",
                                          "function": {"name": "weather", "arguments": {"city": "北京"}}}]
    assert all(other == first for other in others)


def test_a_table_fills_no_arguments_in(tmp_path: Path) -> None:
    """Arrow gives every struct the fields of all."""
    other = {"type": "function", "function": {"name": "clock", "parameters": {"zone": "UTC"}}}
    when = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    rows = [{"messages": [ASK, calling(call("北京")), result(), ANSWER], "tools": TOOLS},
            {"messages": [ASK, calling(when), result(), ANSWER], "tools": [other]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = [row.messages for row in rows_of(tmp_path / "rows.parquet", Recipe.load({}))]
    assert [for_template(messages) for messages in read] == [for_template(parsed(row)) for row in rows]


def test_without_definitions_a_function_call_of_sharegpt_stays_a_text() -> None:
    for nothing in ({}, {"tools": "[]"}, {"tools": None}):
        row = {"conversations": FORMS["ShareGPT"]["conversations"], **nothing}
        assert all(set(message) == {"role", "content"} for message in parsed(row))


@pytest.mark.parametrize("row", [
    {"messages": [ASK, ANSWER], "tools": "no JSON"}, {"messages": [ASK, ANSWER], "tools": [{"name": ""}]},
    {"messages": [ASK, ANSWER], "tools": [1]},
    {"messages": [ASK, calling({"function": {"name": "a", "arguments": "b"}})]},
    {"messages": [ASK, calling({"function": {"name": "a", "arguments": [1]}})]},
    {"messages": [{**ASK, "tool_calls": [call("a")]}, ANSWER]}])
def test_what_is_no_definition_or_call_is_named(row: Row) -> None:
    assert {fault.code for fault in to_messages(row).faults} == {"not_text"}


values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
                          ["type", "function", "name", "arguments", "id", "x"]), inner, max_size=4), max_leaves=8)


@settings(max_examples=300)
@given(tools=values, made=values, old=values)
def test_any_value_there_gives_a_conversation_or_a_fault(tools: Any, made: Any, old: Any) -> None:
    row = {"messages": [ASK, {**ANSWER, "tool_calls": made, "function_call": old}], "tools": tools}
    messages, faults = to_messages(row)[1:]
    assert bool(messages) != bool(faults)
    for_template(messages)


@pytest.mark.slow
@pytest.mark.skipif(FOLDER is None, reason=WHY_NOT)
@pytest.mark.parametrize("template", TAKE)
def test_what_is_trained_is_what_the_model_is_asked_for(template: str, subtests: pytest.Subtests) -> None:
    recipe = Recipe.load({})
    tokenizer = prepare_tokenizer(real_tokenizer(PAIRS[template].vocab, template, short=True), recipe)
    formatter, stop = Formatter(tokenizer, recipe), str(tokenizer.eos_token)
    for name, talk in TALKS.items():
        messages = parsed({"messages": talk, "tools": TOOLS})
        with subtests.test(name):
            if name in TAKE[template]:
                with pytest.raises(Exception, match="template"):
                    formatter.locate(messages)
                continue
            segments = formatter.locate(messages).segments
            [(ids, labels)] = formatter.encode([messages])
            full = render(tokenizer, messages, recipe)
            assert tokenizer.decode(ids) == "".join(text for text, _ in segments) == full
            trained = [text for text, trained in segments if trained]
            answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
            assert len(trained) == len(answers) == labels.count(tokenizer.eos_token_id)
            for place, text in zip(answers, trained, strict=True):
                prompt = render(tokenizer, messages[:place], recipe, add_generation_prompt=True)
                if full.startswith(prompt):
                    assert text == full[len(prompt):].partition(stop)[0] + stop
                said = messages[place]
                wanted = ["weather", "city"] if said.get("tool_calls") else [said["content"]]
                assert all(part in text for part in wanted) and text.endswith(stop) and "celsius" not in text
            assert INNER["description"].split()[0] in "".join(text for text, trained in segments if not trained)


@pytest.mark.slow
def test_a_template_without_a_place_for_tools_refuses_them_by_name(tokenizer: Any, tmp_path: Path) -> None:
    recipe = Recipe.load({})
    with pytest.raises(ToolsNotShown):
        Formatter(prepare_tokenizer(tokenizer, recipe), recipe).locate(parsed(FORMS["OpenAI"]))
    data = tmp_path / "rows.jsonl"
    rows = {"messages": TALKS["no call"], "tools": []}, {**FORMS["OpenAI"], "tools": []}, FORMS["OpenAI"]
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    found = {finding["code"]: [place["row"] for place in finding["places"]]
             for finding in lint(Recipe.load({}, dataset=str(data)), tokenizer).figures["findings"]}
    assert found["tools_not_shown"] == [2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"lazy_preprocess": True}, {"train_on_responses_only": False}],
                         ids=["in memory", "on disk", "all trained"])
def test_tools_reach_the_data_and_the_reference_is_what_the_model_would_write(tmp_path: Path, fields: Row) -> None:
    """A Qwen2.5: its template's own words for a call."""
    tokenizer = real_tokenizer("qwen2", "Qwen-Qwen2.5-7B-Instruct", short=True)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": talk, "tools": TOOLS}) + "\n" for talk in TALKS.values()),
                    encoding="utf-8")
    recipe = Recipe.load({}, dataset=str(file), max_seq_length=4096, **fields)
    data = load_data(recipe, prepare_tokenizer(tokenizer, recipe))["train"]
    rows = [data[place] for place in range(len(data))]
    assert len(rows) == len(TALKS)
    assert rows[0]["reference"] == '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
    assert rows[1]["reference"] == ANSWER["content"]
    for row in rows:
        prompt = render(tokenizer, row["prompt"], recipe, add_generation_prompt=True)
        assert INNER["name"] in prompt and render(tokenizer, row["messages"], recipe).startswith(prompt)


def test_questions_bring_their_tools(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"messages": TALKS["call and answer"], "tools": TOOLS}), encoding="utf-8")
    [asked] = read_questions(file).asked.values()
    assert [message["role"] for message in asked] == ["user", "assistant", "tool"]
    assert for_template(asked)[1] == TOOLS


@pytest.mark.slow
def test_a_gguf_shows_tools_as_the_training_does(sure_run: Path) -> None:
    run = Run.open(sure_run)
    recipe, tokenizer = run.recipe, saved_tokenizer(run.adapter)
    options = {} if recipe.enable_thinking is None else {"enable_thinking": recipe.enable_thinking}
    with LlamaChild(next(run.gguf.glob("*f16.gguf"))) as child:
        for talk in TALKS.values():
            asked = parsed({"messages": talk, "tools": TOOLS})[:-1]
            expected = render(tokenizer, asked, recipe, add_generation_prompt=True)
            assert child.render(asked, options) == expected and "天气" in expected
