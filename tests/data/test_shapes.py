"""Rows to messages: every known shape gives the same conversation, and every other row says what is wrong with it."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.data.shapes import ROLES, SHAPES, Fault, is_blank, renamed, shape_of, to_messages
from kit.recipe.recipe import Recipe

Turn = dict[str, str]


def turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def said(sender: str, value: str) -> Turn:
    return {"from": sender, "value": value}


SYSTEM, ASK, ANSWER = turn("system", "Be brief."), turn("user", "你好 🙂"), turn("assistant", "Hello")
AGAIN, MORE = turn("user", "Again"), turn("assistant", "Hello again")
CALL, RESULT = '{"name": "clock"}', '{"time": "12:00"}'

SHAPED: dict[str, tuple[str, dict[str, Any], list[Turn]]] = {
    "alpaca": ("alpaca", {"instruction": "你好 🙂", "output": "Hello"}, [ASK, ANSWER]),
    "alpaca without input": (
        "alpaca", {"instruction": "你好 🙂", "input": "", "output": "Hello", "system": None, "history": None},
        [ASK, ANSWER]),
    "alpaca with input": (
        "alpaca", {"instruction": "Translate", "input": "猫", "output": "cat"},
        [turn("user", "Translate\n\n### Input:\n猫"), turn("assistant", "cat")]),
    "alpaca with all": (
        "alpaca", {"instruction": "Again", "input": "猫", "output": "Hello again", "system": "Be brief.",
                   "history": [["你好 🙂", "Hello"]]},
        [SYSTEM, ASK, ANSWER, turn("user", "Again\n\n### Input:\n猫"), MORE]),
    "messages": ("messages", {"messages": [SYSTEM, ASK, ANSWER, AGAIN, MORE]}, [SYSTEM, ASK, ANSWER, AGAIN, MORE]),
    "messages of Qwen": ("messages", {"type": "chatml", "source": "self-made", "messages": [ASK, ANSWER]},
                         [ASK, ANSWER]),
    "messages with a prompt beside them": ("messages", {"prompt": "x", "prompt_id": "7", "messages": [ASK, ANSWER]},
                                           [ASK, ANSWER]),
    "messages with tools": (
        "messages", {"messages": [ASK, turn("assistant", CALL), turn("tool", RESULT), turn("tool", RESULT), ANSWER]},
        [ASK, turn("assistant", CALL), turn("tool", RESULT), turn("tool", RESULT), ANSWER]),
    "messages in parts": (
        "messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "你好"},
                                                               {"type": "text", "text": " 🙂"}]}, ANSWER]},
        [ASK, ANSWER]),
    "messages with reasoning": (
        "messages", {"messages": [ASK, {**ANSWER, "reasoning_content": "A greeting."}]},
        [ASK, turn("assistant", "<think>\nA greeting.\n</think>\n\nHello")]),
    "messages without reasoning": ("messages", {"messages": [ASK, {**ANSWER, "reasoning_content": None}]},
                                   [ASK, ANSWER]),
    "sharegpt": ("sharegpt", {"id": "a_0", "conversations": [said("human", "你好 🙂"), said("gpt", "Hello")]},
                 [ASK, ANSWER]),
    "sharegpt with a system turn": (
        "sharegpt", {"conversations": [said("system", "Be brief."), said("human", "你好 🙂"), said("gpt", "Hello")]},
        [SYSTEM, ASK, ANSWER]),
    "sharegpt with a system field": (
        "sharegpt", {"system": "Be brief.", "tools": "[]",
                     "conversations": [said("human", "你好 🙂"), said("gpt", "Hello")]},
        [SYSTEM, ASK, ANSWER]),
    "sharegpt with both": (
        "sharegpt", {"system": "Another.", "conversations": [said("system", "Be brief."), said("user", "你好 🙂"),
                                                             said("assistant", "Hello")]},
        [SYSTEM, ASK, ANSWER]),
    "sharegpt with a call": (
        "sharegpt", {"conversations": [said("human", "你好 🙂"), said("function_call", CALL),
                                       said("observation", RESULT), said("gpt", "Hello")]},
        [ASK, turn("assistant", CALL), turn("tool", RESULT), ANSWER]),
    "sharegpt with a tool": (
        "sharegpt", {"conversations": [said("human", "你好 🙂"), said("function_call", CALL), said("tool", RESULT),
                                       said("chatgpt", "Hello")]},
        [ASK, turn("assistant", CALL), turn("tool", RESULT), ANSWER]),
    "prompt": ("prompt", {"prompt": "你好 🙂", "completion": "Hello"}, [ASK, ANSWER]),
    "prompt with system": ("prompt", {"prompt": "你好 🙂", "completion": "Hello", "system": "Be brief."},
                           [SYSTEM, ASK, ANSWER]),
    "prompt as messages": ("prompt", {"prompt": [SYSTEM, ASK, ANSWER, AGAIN], "completion": [MORE]},
                           [SYSTEM, ASK, ANSWER, AGAIN, MORE]),
    "question": ("question", {"question": "你好 🙂", "answer": "Hello", "source": "x"}, [ASK, ANSWER]),
}  # fmt: skip

A_B = [turn("user", "a"), turn("assistant", "b")]
RENAMED: dict[str, tuple[dict[str, str | None], dict[str, Any], list[Turn]]] = {
    "the field of messages, said of ShareGPT's list": (
        {"role": "speaker", "content": "text", "user": "客户"},
        {"conversations": [{"speaker": "客户", "text": "q"}, {"speaker": "gpt", "text": "a"}]},
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]),
    "roles by other words": ({"user": "客户", "assistant": "客服", "system": "提示", "messages": "话"}, {"话": [
        turn("提示", "S"), turn("客户", "a"), turn("客服", "b")]}, [turn("system", "S"), *A_B]),
    "words that are known besides": ({"tool": "工具"}, {"conversations": [
        said("human", "a"), said("gpt", "b"), said("工具", "c"), said("assistant", "d")]}, [
            *A_B, turn("tool", "c"), turn("assistant", "d")]),
    "human and gpt in messages": ({"input": None}, {"messages": [turn("human", "a"), turn("gpt", "b")]}, A_B),
    "a column that is not read": ({"system": None, "input": None}, {
        "instruction": "a", "output": "b", "system": "S", "input": "i"}, A_B),
    "not read under its name, but as another": ({"prompt": "system", "completion": "c", "system": None}, {
        "system": "a", "c": "b"}, A_B),
    "prompt": ({"prompt": "问题", "completion": "答案"}, {"问题": "你好 🙂", "答案": "Hello", "编号": 1},
               [ASK, ANSWER]),
    "alpaca": ({"instruction": "指令", "input": "输入", "output": "输出", "system": "系统"},
               {"指令": "Translate", "输入": "猫", "输出": "cat", "系统": "Be brief."},
               [SYSTEM, turn("user", "Translate\n\n### Input:\n猫"), turn("assistant", "cat")]),
    "messages": ({"messages": "对话", "role": "角色", "content": "内容"},
                 {"对话": [{"角色": "user", "内容": "你好 🙂"}, {"角色": "assistant", "内容": "Hello"}]},
                 [ASK, ANSWER]),
    "sharegpt": ({"conversations": "dialog", "from": "role", "value": "content"}, {"dialog": [ASK, ANSWER]},
                 [ASK, ANSWER]),
    "prompt as messages": ({"prompt": "问题", "completion": "答案", "role": "角色", "content": "内容"},
                           {"问题": [{"角色": "user", "内容": "你好 🙂"}],
                            "答案": [{"角色": "assistant", "内容": "Hello"}]},
                           [ASK, ANSWER]),
    "two names exchanged": ({"prompt": "completion", "completion": "prompt"},
                            {"completion": "你好 🙂", "prompt": "Hello"}, [ASK, ANSWER]),
    "a column that a field's name also has, before": (
        {"prompt": "问题", "completion": "答案"}, {"prompt": "id 7", "问题": "你好 🙂", "答案": "Hello"},
        [ASK, ANSWER]),
    "a column that a field's name also has, behind": (
        {"prompt": "问题", "completion": "答案"}, {"问题": "你好 🙂", "答案": "Hello", "prompt": "id 7"},
        [ASK, ANSWER]),
}  # fmt: skip

NO_FIELDS = ("no fields messages, conversations, instruction and output, prompt and completion, or question and answer "
             "(found: {})")
FAULTY: dict[str, tuple[Any, list[Fault]]] = {
    "a list": ([1], [Fault("not_an_object", "a list where an object is needed")]),
    "a text": ("x", [Fault("not_an_object", "a str where an object is needed")]),
    "null": (None, [Fault("not_an_object", "a NoneType where an object is needed")]),
    "other fields": ({"text": "x", "id": 1}, [Fault("missing_field", NO_FIELDS.format("text, id"))]),
    "no fields": ({}, [Fault("missing_field", NO_FIELDS.format("none"))]),
    "no answer": ({"instruction": "a", "n": 1}, [Fault("missing_field", "no field output (found: instruction, n)")]),
    "no prompt": ({"completion": "a"}, [Fault("missing_field", "no field prompt (found: completion)")]),
    "no completion behind messages": ({"prompt": [ASK]}, [
        Fault("missing_field", "no field completion (found: prompt)")]),
    "no role": ({"messages": [ASK, {"content": "a"}]}, [Fault("missing_field", "turn 2 has no field role")]),
    "no value": ({"conversations": [{"from": "human"}, said("gpt", "b")]}, [
        Fault("missing_field", "turn 1 has no field value")]),
    "a slip in the first field": ({"mesages": [ASK, ANSWER]}, [
        Fault("misnamed_field", "no known fields, but 'mesages' (did you mean 'messages'?)")]),
    "a slip in the second field": ({"instruction": "a", "outputs": "b"}, [
        Fault("misnamed_field", "no field output (did you mean 'outputs'?)")]),
    "a slip in a turn": ({"messages": [ASK, {"role": "assistant", "contents": "b"}]}, [
        Fault("misnamed_field", "turn 2 has no field content (did you mean 'contents'?)")]),
    "a number": ({"prompt": "a", "completion": 3}, [Fault("not_text", "completion is a int, not text")]),
    "an input of a list": ({"instruction": "a", "input": ["x"], "output": "b"}, [
        Fault("not_text", "input is a list, not text")]),
    "a system of a dict": ({"question": "a", "answer": "b", "system": {}}, [
        Fault("not_text", "system is a dict, not text")]),
    "a history of texts": ({"instruction": "a", "output": "b", "history": ["x"]}, [
        Fault("not_text", "history is no list of pairs of texts [question, answer]")]),
    "a history of threes": ({"instruction": "a", "output": "b", "history": [["x", "y", "z"]]}, [
        Fault("not_text", "history is no list of pairs of texts [question, answer]")]),
    "messages of text": ({"messages": "a"}, [Fault("not_text", "a str where a list of turns is needed")]),
    "a turn of text": ({"messages": ["a", ANSWER]}, [Fault("not_text", "turn 1 is a str, not an object")]),
    "a content of a number": ({"messages": [ASK, {"role": "assistant", "content": 3}]}, [
        Fault("not_text", "content of turn 2 is a int, not text")]),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER]}, [
        Fault("not_text", "content of turn 1 is a list, not text")]),
    "a call that is no text": ({"messages": [ASK, {**ANSWER, "tool_calls": [{}]}]}, [
        Fault("not_text", "turn 2 calls a tool: call 1 has no name of a function")]),
    "a slip in a role": ({"messages": [turn("usr", "a"), ANSWER]}, [
        Fault("wrong_role", f"role 'usr' in turn 1 (did you mean 'user'?); there are: {', '.join(ROLES)}")]),
    "an unknown sender": ({"conversations": [said("xyz", "a"), said("gpt", "b")]}, [
        Fault("wrong_role", f"role 'xyz' in turn 1; there are: {', '.join(ROLES)}")]),
    "a role that is no text": ({"messages": [{"role": ["user"], "content": "a"}, ANSWER]}, [
        Fault("wrong_role", f"role ['user'] in turn 1 (did you mean 'user'?); there are: {', '.join(ROLES)}")]),
    "the assistant first": ({"messages": [SYSTEM, ANSWER, ASK, ANSWER]}, [
        Fault("first_turn", "the first turn is not the user's (turns: system, assistant, user, assistant)")]),
    "a tool first": ({"messages": [turn("tool", "a"), ANSWER]}, [
        Fault("first_turn", "the first turn is not the user's (turns: tool, assistant)")]),
    "two questions": ({"messages": [ASK, AGAIN, ANSWER]}, [
        Fault("role_order", "turns must alternate user, assistant and end with the assistant, these are: user, user, "
              "assistant")]),
    "a question at the end": ({"messages": [ASK, ANSWER, AGAIN]}, [
        Fault("role_order", "turns must alternate user, assistant and end with the assistant, these are: user, "
              "assistant, user")]),
    "a late system turn": ({"messages": [ASK, SYSTEM, ANSWER]}, [
        Fault("role_order", "turns must alternate user, assistant and end with the assistant, these are: user, system, "
              "assistant")]),
    "a long conversation": ({"messages": [ASK, ANSWER] * 10 + [ASK]}, [
        Fault("role_order", "turns must alternate user, assistant and end with the assistant, these are: "
              + "user, assistant, " * 6 + "…")]),
    "no turns": ({"messages": []}, [Fault("no_assistant", "no turn of the assistant (turns: none)")]),
    "no answers": ({"messages": [SYSTEM, ASK]}, [
        Fault("no_assistant", "no turn of the assistant (turns: system, user)")]),
    "an empty answer": ({"instruction": "a", "output": " \n"}, [Fault("empty_response", "the answer is empty")]),
    "an answer that is null": ({"instruction": "a", "output": None}, [
        Fault("empty_response", "the answer is empty")]),
    "one empty answer": ({"messages": [ASK, turn("assistant", ""), AGAIN, MORE]}, [
        Fault("empty_response", "one of the answers is empty")]),
    "an empty prompt": ({"question": "　", "answer": "b"}, [Fault("empty_prompt", "the prompt is empty")]),
    "one empty prompt": ({"messages": [ASK, ANSWER, turn("user", ""), MORE]}, [
        Fault("empty_prompt", "one of the user's turns is empty")]),
    "nothing but empty": ({"prompt": "", "completion": ""}, [
        Fault("empty_response", "the answer is empty"), Fault("empty_prompt", "the prompt is empty")]),
    "two mistakes": ({"messages": [turn("usr", "a"), {"role": "assistant", "content": 1}]}, [
        Fault("wrong_role", f"role 'usr' in turn 1 (did you mean 'user'?); there are: {', '.join(ROLES)}"),
        Fault("not_text", "content of turn 2 is a int, not text")]),
}  # fmt: skip
CODES = {"not_an_object", "missing_field", "misnamed_field", "not_text", "wrong_role", "first_turn", "role_order",
         "no_assistant", "empty_response", "empty_prompt"}


@pytest.mark.parametrize("case", SHAPED)
def test_every_shape_becomes_messages(case: str) -> None:
    shape, row, messages = SHAPED[case]
    assert to_messages(row) == (shape, messages, [])


def test_every_shape_is_tested() -> None:
    assert {shape for shape, _, _ in SHAPED.values()} == set(SHAPES)


@pytest.mark.parametrize("case", RENAMED)
def test_columns_give_other_names_to_the_fields(case: str) -> None:
    columns, row, messages = RENAMED[case]
    columns = Recipe.load({}, columns=columns).columns
    assert to_messages(renamed(row, columns))[1:] == (messages, [])


def test_renaming_leaves_the_row_itself_alone() -> None:
    row = {"对话": [{"角色": "user"}]}
    assert renamed(row, {"messages": "对话", "role": "角色"}) == {"messages": [{"role": "user"}]}
    assert row == {"对话": [{"角色": "user"}]}
    assert renamed([1], {"prompt": "x"}) == [1]


@pytest.mark.parametrize("case", FAULTY)
def test_every_fault_is_named(case: str) -> None:
    row, faults = FAULTY[case]
    assert to_messages(row).faults == faults
    assert to_messages(row) == (shape_of(row), [], faults)


def test_every_code_is_tested() -> None:
    assert {fault.code for _, faults in FAULTY.values() for fault in faults} == CODES


NAMES = ["messages", "conversations", "instruction", "input", "output", "system", "history", "prompt", "completion",
         "question", "answer", "role", "content", "from", "value", "type", "text", "tool_calls", "reasoning_content"]
WORDS = [*ROLES, "text", "", " ", "a"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=5)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
    st.sampled_from(NAMES) | st.text(max_size=5), inner, max_size=5), max_leaves=20)
# Nearly right rows, so that most examples get past the first check.
TURN = st.fixed_dictionaries({}, optional={
    "role": st.sampled_from(WORDS) | JSON, "content": st.text(max_size=3) | JSON, "from": st.sampled_from(WORDS) | JSON,
    "value": st.text(max_size=3) | JSON, "reasoning_content": JSON, "tool_calls": JSON})
TURNS = st.lists(TURN, max_size=5) | JSON
ROW = st.fixed_dictionaries({}, optional={name: TURNS if name in ("messages", "conversations", "prompt", "completion")
                                          else SCALARS | JSON for name in NAMES[:11]})


@settings(max_examples=500, deadline=None)
@given(JSON | ROW)
def test_any_json_value_gives_messages_or_faults_and_no_exception(row: Any) -> None:
    shape, messages, faults = to_messages(row)
    assert bool(messages) != bool(faults)
    assert {fault.code for fault in faults} <= CODES and all(fault.message for fault in faults)
    assert shape in (*SHAPES, None)
    for message in messages:
        assert set(message) == {"role", "content"} and message["role"] in ("system", "user", "assistant", "tool")
        assert message["role"] in ("system", "tool") or message["content"].strip()
    assert not messages or messages[-1]["role"] == "assistant"


@pytest.mark.parametrize("name", ["images", "video"])
@pytest.mark.parametrize("row", [{"messages": [ASK, ANSWER]}, {"prompt": "a", "completion": "b"}])
def test_a_column_that_changes_what_a_row_means_is_not_dropped_in_silence(row: dict[str, Any], name: str) -> None:
    [fault] = to_messages({**row, name: ["cat.png"]}).faults
    assert fault.code == "untrained_column" and fault.message.startswith(f"{name}: ")
    for nothing in (None, "", "[]", [], {}):
        assert to_messages({**row, name: nothing}).messages


@pytest.mark.parametrize("fields", [("chosen", "rejected"), ("chosen_messages", "rejected_messages")])
def test_preferences_are_named(fields: tuple[str, str]) -> None:
    [fault] = to_messages({name: [ASK, ANSWER] for name in fields}).faults
    assert fault.code == "preferences" and fields[0] in fault.message


INVISIBLE = ["\u200b", "\ufeff", "\u2060", "\u00ad", "\u00a0", "\u200d", "\u180e", "\u3164", "\u2800", "\ufe0f", 
             "\u202e", "\u0000", "\u0085", "\U000e0041", "\u3000"]


@pytest.mark.parametrize("text", [*INVISIBLE, "".join(INVISIBLE), " \n\u200b\t"])
def test_a_text_of_which_nothing_is_seen_is_empty(text: str) -> None:
    assert [fault.code for fault in to_messages({"prompt": "a", "completion": text}).faults] == ["empty_response"]
    assert [fault.code for fault in to_messages({"messages": [turn("user", text), ANSWER]}).faults] == ["empty_prompt"]


@pytest.mark.parametrize("text", ["0", ".", "猫", "é", "\u0301", "👩\u200d👩", "\u200b!", "\u0600", "\ufffd", "\ue000"])
def test_a_text_of_which_little_is_seen_is_none_the_less_a_text(text: str) -> None:
    assert to_messages({"prompt": text, "completion": text}).faults == []


def test_white_space_and_format_characters_are_invisible_but_for_signs_in_arabic_and_other_scripts() -> None:
    seen = {chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) in ("Cf", "Cc", "Zs", "Zl", "Zp")
            and not is_blank(chr(code))}
    assert {unicodedata.name(character).split()[0] for character in seen} <= {
        "ARABIC", "SYRIAC", "KAITHI", "EGYPTIAN", "INTERLINEAR"}
