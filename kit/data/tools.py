"""Tool definitions, calls and their results: the forms rows have them in, as JSON text in OpenAI's form.

A definition is {"type": "function", "function": {name, description, parameters}}, a call {"id", "type": "function",
"function": {name, arguments}} with arguments as an object (https://platform.openai.com/docs/guides/function-calling;
transformers' `apply_chat_template` takes the same). Rows also have the inner part alone, a call's arguments as a text,
and all of it as one text.
"""

import json
from collections.abc import Iterator
from typing import Any

from kit.gguf.messages import Message

DEFINITIONS = ("tools", "functions")  # columns with a row's tools


def definitions(value: Any) -> str:
    """A row's tools as JSON text, '' for none. Raises ValueError, which says what is no tool definition."""
    tools = _listed(value)
    for number, tool in enumerate(tools):
        inner = tool.get("function") if isinstance(tool, dict) and tool.get("type", "function") == "function" else None
        inner = inner if isinstance(inner, dict) else tool
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
            raise ValueError(f"tool {number + 1} has no name of a function")
        tools[number] = tool if inner is not tool else {"type": "function", "function": inner}
    return json.dumps(tools, ensure_ascii=False) if tools else ""


def calls(value: Any) -> str:
    """A turn's calls as JSON text, '' for none. Raises ValueError, which says what is no call."""
    made = []
    for number, call in enumerate(_listed(value), 1):
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
            raise ValueError(f"call {number} has no name of a function")
        arguments = inner.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = _parsed(arguments)
        if not isinstance(arguments, dict):
            raise ValueError(f"the arguments of call {number} ({inner['name']}) are no object")
        identity = call.get("id") if call is not inner else None
        made.append({**({"id": identity} if isinstance(identity, str) else {}), "type": "function",
                     "function": {"name": inner["name"], "arguments": arguments}})
    return json.dumps(made, ensure_ascii=False) if made else ""


def numbered(messages: list[Message]) -> None:
    """Give each call an id, and each result that of its call and the function's name, where the row has none.

    Ids that OpenAI made up (call_…) are replaced: they mean nothing, and Mistral's templates want nine characters.
    """
    count = 0
    open_calls: list[tuple[str, str]] = []
    names: dict[str, str] = {}
    for message in messages:
        if message.get("tool_calls"):
            made, open_calls = json.loads(message["tool_calls"]), []
            for call in made:
                count += 1
                old = call.get("id", "")
                call["id"] = f"{count:09d}" if not old or old.startswith("call_") else old
                open_calls.append((old, call["id"]))
                names[call["id"]] = call["function"]["name"]
            message["tool_calls"] = json.dumps([{"id": call["id"], **call} for call in made], ensure_ascii=False)
        elif message["role"] == "tool" and open_calls:
            given = message.get("tool_call_id", "")
            place = next((i for i, pair in enumerate(open_calls) if given in pair), 0)
            message["tool_call_id"] = open_calls.pop(place)[1]
            message.setdefault("name", names[message["tool_call_id"]])


def shown(tools: str, rendered: str, without: str) -> bool:
    """Whether a conversation shows its tools, by what the template makes of it with and `without` them."""
    return rendered != without and all(tool["function"]["name"] in rendered for tool in json.loads(tools))


def called(calls: str, text: str) -> bool:
    """Whether a text holds each of the calls: the function's name, its arguments' names, and those that are text."""
    return all(_holds(text, part) for call in json.loads(calls) for part in _parts(call["function"]))


def _parts(function: dict[str, Any]) -> Iterator[str]:
    yield function["name"]
    yield from function["arguments"]
    yield from (value for value in function["arguments"].values() if isinstance(value, str))


def _holds(text: str, part: str) -> bool:
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text


def unfilled(row: Any) -> Any:
    """A table's row without what its tools and calls lack: Arrow gives each of them the fields of all, as null."""
    if not isinstance(row, dict):
        return row
    made = {}
    for key, value in row.items():
        if key in DEFINITIONS:
            value = _without_nulls(value)
        elif isinstance(value, list) and any(isinstance(turn, dict) and turn.get("tool_calls") for turn in value):
            value = [{**turn, "tool_calls": _without_nulls(turn.get("tool_calls"))} for turn in value]
        made[key] = value
    return made


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str) and value.strip():
        value = _parsed(value)
    return [] if value in (None, "", [], {}) else list(value) if isinstance(value, list) else [value]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (RecursionError, ValueError):
        raise ValueError("no JSON") from None
