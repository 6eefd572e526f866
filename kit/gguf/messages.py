"""Messages as the kit holds them, and as a chat template takes them.

A message is a role and a content, both text. Where a model may call tools there are further texts, with OpenAI's names:
`tools`, the definitions, on a conversation's first message; `tool_calls` on the assistant's; `tool_call_id` and `name`
on a result's. Definitions and calls are JSON in a text: so every table, file and process can hold them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Message = dict[str, str]
FOR_TOOLS = ("tools", "tool_calls", "tool_call_id", "name")


def for_template(messages: Sequence[Mapping[str, str]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools (None without any) as transformers' `apply_chat_template` takes them."""
    tools = next((json.loads(text) for message in messages if (text := message.get("tools"))), None)
    return [{key: json.loads(value) if key == "tool_calls" else value for key, value in message.items()
             if value is not None and key != "tools"} for message in messages], tools


def texts(messages: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Every text of the messages that a template writes: contents, and tools and calls as JSON."""
    for message in messages:
        yield message["content"]
        for key in ("tools", "tool_calls"):
            if text := message.get(key):
                yield text


def said(message: Mapping[str, str]) -> str:
    """What a turn says: its content, with the calls it makes as JSON behind."""
    return message["content"] + (message.get("tool_calls") or "")
