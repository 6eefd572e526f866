"""Rows to messages: the shapes instruction data comes in, and what can be wrong with a row.

| shape      | fields                                                           |
|------------|------------------------------------------------------------------|
| messages   | messages: [{role, content}, …]                                   |
| sharegpt   | conversations: [{from, value}, …]                                |
| alpaca     | instruction, output, and optionally input, system, history      |
| prompt     | prompt, completion: texts, or lists of messages (TRL's names)    |
| question   | question, answer                                                 |

Field names of other files are given to these by the recipe's `columns`.
"""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

from kit.common.errors import nearest
from kit.data import tools
from kit.gguf.messages import FOR_TOOLS, said
from kit.models.template import Message, alpaca_turn
from kit.recipe.fields import ROLE_WORDS, Columns

# OpenAI's and ShareGPT's words for the roles; other ones a recipe's `columns` says. A function_call is one where the
# row has tools; else it is trained as the assistant's text.
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool", "function": "tool",
         "human": "user", "gpt": "assistant", "chatgpt": "assistant", "function_call": "assistant",
         "observation": "tool", "function_response": "tool"}
# The first field decides, or the second where the first is missing.
SHAPES = {"messages": ("messages",), "sharegpt": ("conversations",), "alpaca": ("instruction", "output"),
          "prompt": ("prompt", "completion"), "question": ("question", "answer")}
NAMES = tuple(field for fields in SHAPES.values() for field in fields)
# Fields that can hold a list of turns: a turn's role, its text, and the roles there are.
TURNS = {"messages": ("role", "content", ROLES), "conversations": ("from", "value", ROLES),
         "prompt": ("role", "content", ROLES), "completion": ("role", "content", ROLES)}
# Columns that change what a row means, and that are not trained: a row that has something there is refused.
UNTRAINED = ("image", "images", "video", "videos", "audio", "audios")
NOTHING: tuple[Any, ...] = (None, "", "[]", "{}", [], {})
# Anything but white space, control characters, and what Unicode says is to be shown as nothing (its Default_Ignorable:
# zero-width spaces and joiners, soft hyphens, byte order marks, fillers, selectors, tags) or as an empty pattern.
VISIBLE = re.compile("[^\\s\0-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
                     "\u202a-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8"
                     "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]")
# Each answer follows a question or a tool's result; several tools may answer at once.
FOLLOWERS = {"user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}


def longest_user_turn(messages: list[Message]) -> tuple[str, Callable[[str, str], list[Message]]]:
    """The text of the longest user turn, and what puts the two ends of it that are kept into the messages.

    A long prompt is cut in its middle, because the task stands at the beginning or at the end of it.
    """
    longest = max((i for i, m in enumerate(messages) if m["role"] == "user"), key=lambda i: len(messages[i]["content"]))

    def with_ends(head: str, tail: str) -> list[Message]:
        return [{**m, "content": f"{head} … {tail}"} if i == longest else m for i, m in enumerate(messages)]

    return messages[longest]["content"], with_ends


def is_blank(text: str) -> bool:
    """Whether nothing in a text can be seen."""
    return not VISIBLE.search(text)


class Fault(NamedTuple):
    """Why a row can't be trained on."""

    code: str
    message: str


def renamed(row: Any, columns: Columns) -> Any:
    """The row under the names of this module; `columns` is {our name: the file's, None for one that is not read}."""
    if not columns or not isinstance(row, dict):
        return row
    ours = {theirs: name for name, theirs in columns.items() if theirs and (name not in ROLE_WORDS or name == "system")}
    roles = {theirs: name for name, theirs in columns.items() if name in ROLE_WORDS}
    unread = {name for name, theirs in columns.items() if theirs is None}

    def under_our_names(fields: dict[str, Any]) -> dict[str, Any]:
        # A column that happens to have the name another one is given is not read.
        left_out = unread | {ours[key] for key in fields if key in ours}
        return {ours.get(key, key): value for key, value in fields.items() if key in ours or key not in left_out}

    def turn_of(turn: Any, role: str, text: str) -> Any:
        if not isinstance(turn, dict):
            return turn
        turn = under_our_names(turn)
        for name, here in (("role", role), ("content", text)):  # said of ShareGPT's from and value as well
            if name in columns and here not in columns and name in turn:
                turn[here] = turn.pop(name)
        word = turn.get(role)
        return {**turn, role: roles[word]} if isinstance(word, str) and word in roles else turn

    row = under_our_names(row)
    for key, (role, text, _) in TURNS.items():
        if isinstance(row.get(key), list):
            row[key] = [turn_of(turn, role, text) for turn in row[key]]
    return row


def shape_of(row: Any) -> str | None:
    """The shape a row has, or None."""
    if isinstance(row, dict):
        for shape, fields in SHAPES.items():
            if fields[0] in row or fields[-1] in row:
                return shape
    return None


class Parsed(NamedTuple):
    """A row's messages, or what is wrong with it: one of the two is empty."""

    shape: str | None
    messages: list[Message]
    faults: list[Fault]


def to_messages(row: Any) -> Parsed:
    """The row's shape, and its messages or its faults."""
    shape = shape_of(row)
    if not isinstance(row, dict):
        return Parsed(None, [], [Fault("not_an_object", f"a {type(row).__name__} where an object is needed")])
    if shape is None:
        return Parsed(None, [], [_unknown(row)])
    faults: list[Fault] = []
    definitions = definitions_of(row, faults)
    if shape in ("messages", "sharegpt"):
        field = SHAPES[shape][0]
        messages = turns_of(row.get(field), TURNS[field], faults, bool(definitions))
        system = _text(row, "system", faults, needed=False)
        if system and messages and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
    elif shape == "alpaca":
        messages = _alpaca(row, faults)
    elif shape == "prompt" and isinstance(row.get("prompt"), list):
        messages = turns_of(row["prompt"], TURNS["prompt"], faults)
        messages += (turns_of(row["completion"], TURNS["completion"], faults)
                     if isinstance(row.get("completion"), list) else
                     [{"role": "assistant", "content": _text(row, "completion", faults)}])
    else:
        messages = _pair(row, SHAPES[shape], faults)
    faults = faults or _structure(messages) or [
        Fault("untrained_column", f"{name}: no text") for name in UNTRAINED if row.get(name) not in NOTHING]
    if faults:
        return Parsed(shape, [], faults)
    if definitions:
        messages[0]["tools"] = definitions
    tools.numbered(messages)
    return Parsed(shape, messages, [])


def definitions_of(row: dict[str, Any], faults: list[Fault]) -> str:
    """The row's tool definitions as JSON text, '' for none."""
    for name in tools.DEFINITIONS:
        try:
            if text := tools.definitions(row.get(name)):
                return text
        except (RecursionError, ValueError) as error:
            faults.append(Fault("not_text", f"{name} are no tool definitions: {error}"))
    return ""


def _unknown(row: dict[str, Any]) -> Fault:
    if pair := [str(key) for key in row if str(key).startswith(("chosen", "rejected"))]:
        return Fault("preferences", f"{', '.join(pair[:4])}: pairs of a better and a worse answer")
    for key in row:
        if near := nearest(str(key), NAMES, cutoff=0.8):
            return Fault("misnamed_field", f"no known fields, but {key!r}{near}")
    return Fault("missing_field", f"no fields messages, conversations, instruction and output, prompt and completion, "
                 f"or question and answer (found: {_names(row) or 'none'})")


def _names(row: dict[str, Any]) -> str:
    return ", ".join(map(str, list(row)[:8]))


def _text(row: dict[str, Any], field: str, faults: list[Fault], needed: bool = True) -> str:
    value = row.get(field)
    if isinstance(value, str):
        return value
    if field not in row and needed:
        near = nearest(field, [str(key) for key in row], cutoff=0.75)
        faults.append(Fault("misnamed_field" if near else "missing_field",
                            f"no field {field}{near or f' (found: {_names(row)})'}"))
    elif value is not None:
        faults.append(Fault("not_text", f"{field} is a {type(value).__name__}, not text"))
    return ""


def _pair(row: dict[str, Any], fields: tuple[str, ...], faults: list[Fault]) -> list[Message]:
    system = _text(row, "system", faults, needed=False)
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": _text(row, fields[0], faults)},
            {"role": "assistant", "content": _text(row, fields[1], faults)}]


def _alpaca(row: dict[str, Any], faults: list[Fault]) -> list[Message]:
    messages = _pair(row, SHAPES["alpaca"], faults)
    messages[-2]["content"] = alpaca_turn(messages[-2]["content"], _text(row, "input", faults, needed=False))
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
            for pair in history):
        faults.append(Fault("not_text", "history is no list of pairs of texts [question, answer]"))
        return messages
    earlier = [{"role": role, "content": text}
               for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [*messages[:-2], *earlier, *messages[-2:]]


def turns_of(turns: Any, keys: tuple[str, str, dict[str, str]], faults: list[Fault],
             call_tools: bool = False) -> list[Message]:
    """The messages of a list of turns, `keys` as in TURNS. With `call_tools` a function_call is one, and no text."""
    role_key, text_key, roles = keys
    if not isinstance(turns, list):
        faults.append(Fault("not_text", f"a {type(turns).__name__} where a list of turns is needed"))
        return []
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            faults.append(Fault("not_text", f"turn {number} is a {type(turn).__name__}, not an object"))
            continue
        for key in (role_key, text_key):
            if key not in turn and not (key == text_key and turn.get("tool_calls")):
                near = nearest(key, [str(k) for k in turn])
                code = "misnamed_field" if near else "missing_field"
                faults.append(Fault(code, f"turn {number} has no field {key}{near}"))
        role, text = turn.get(role_key), _content(turn.get(text_key))
        if role_key in turn and roles.get(str(role)) is None:
            faults.append(Fault("wrong_role", f"role {role!r} in turn {number}{nearest(str(role), roles)}; there are: "
                                f"{', '.join(roles)}"))
        calls = _calls(turn, role, text, call_tools, number, faults)
        if text is None and text_key in turn and not (calls and turn[text_key] is None):
            faults.append(Fault("not_text", f"{text_key} of turn {number} is a {type(turn[text_key]).__name__}, "
                                "not text"))
        if isinstance(reasoning := turn.get("reasoning_content"), str) and reasoning:
            text = f"<think>\n{reasoning}\n</think>\n\n{text or ''}"
        if calls and role == "function_call":
            text = ""
        message = {"role": roles.get(str(role), ""), "content": text or "", "tool_calls": calls}
        message |= {key: turn[key] for key in ("tool_call_id", "name") if isinstance(turn.get(key), str)
                    and message["role"] == "tool"}
        messages.append({key: value for key, value in message.items() if value or key not in FOR_TOOLS})
    return messages


def _calls(turn: dict[str, Any], role: Any, text: str | None, call_tools: bool, number: int,
           faults: list[Fault]) -> str:
    """The turn's calls as JSON text, '' for none."""
    made = turn.get("tool_calls") or turn.get("function_call")
    if role == "function_call" and call_tools:
        made = text
    try:
        if made and ROLES.get(str(role)) != "assistant":
            raise ValueError(f"only the assistant can, not the role {role!r}")
        return tools.calls(made)
    except (RecursionError, ValueError) as error:
        faults.append(Fault("not_text", f"turn {number} calls a tool: {error}"))
        return ""


def _content(value: Any) -> str | None:
    """A turn's text; a list of text parts (OpenAI's form) is joined."""
    if isinstance(value, list) and value and all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in value):
        return "".join(part["text"] for part in value)
    return value if isinstance(value, str) else None


def _structure(messages: list[Message]) -> list[Fault]:
    """System first if at all, then the user (or tools) and the assistant in turn, the assistant last; no empty turn."""
    talk = [m["role"] for m in messages]
    order = ", ".join(talk[:12]) + (", …" if len(talk) > 12 else "") or "none"
    if talk[:1] == ["system"]:
        talk = talk[1:]
    if "assistant" not in talk:
        return [Fault("no_assistant", f"no turn of the assistant (turns: {order})")]
    if talk[0] != "user":
        return [Fault("first_turn", f"the first turn is not the user's (turns: {order})")]
    if talk[-1] != "assistant" or not all(after in FOLLOWERS.get(turn, ()) for turn, after in pairwise(talk)):
        return [Fault("role_order", "turns must alternate user, assistant and end with the assistant, these are: "
                      f"{order}")]
    faults = []
    for role, code, the_only, one_of in (
            ("assistant", "empty_response", "the answer is empty", "one of the answers is empty"),
            ("user", "empty_prompt", "the prompt is empty", "one of the user's turns is empty")):
        texts = [said(m) for m in messages if m["role"] == role]
        if any(map(is_blank, texts)):
            faults.append(Fault(code, the_only if len(texts) == 1 else one_of))
    return faults
