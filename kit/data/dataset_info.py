"""LLaMA-Factory's dataset_info.json: its entries, each a source with columns, a split and so on of its own.

What an entry means: https://github.com/hiyouga/LLaMA-Factory, data/README.md and src/llamafactory/data/parser.py. As
there, a column that an entry has no word for is not read, and so `columns` says.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from kit.common.errors import KitError, nearest, one_line
from kit.data.encodings import not_utf8
from kit.data.shapes import TURNS, UNTRAINED
from kit.recipe.fields import Columns

NAME = "dataset_info.json"
PLACES = ("hf_hub_url", "ms_hub_url", "file_name", "script_url", "cloud_file_name")
# Its words for columns, ours, and the columns there are by default.
COLUMNS = {"alpaca": {"prompt": "instruction", "query": "input", "response": "output", "history": "history"},
           "sharegpt": {"messages": "conversations"}, "openai": {"messages": "messages"}}
DEFAULTS: dict[str, Columns] = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"}, "openai": {"messages": "messages"}}
BESIDES = {"system": "system", "tools": "tools"} | {name: name for name in UNTRAINED}
# Its words for the roles of turns, and ours.
ROLE_TAGS = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool",
             "function_tag": "function_call", "system_tag": "system"}


class Entry(NamedTuple):
    """`place` is a file, a folder or a hub's id; `fields` are the recipe's fields that it settles."""

    place: str
    fields: dict[str, Any]
    folder: str | None = None  # of a hub's repository, to which reading is confined
    samples: int | None = None  # rows drawn from it


def is_info(path: Path) -> bool:
    """Whether the file is such a description: `datasets` writes another one of this name."""
    if path.name != NAME:
        return False
    entries = _read(path)
    return any(isinstance(entry, dict) and any(place in entry for place in PLACES) for entry in entries.values())


def unnamed(path: Path) -> KitError:
    """What to say of a description without a name of an entry."""
    return KitError(f"dataset: {path} describes data sets: {_listed(_read(path))}", f"name one: {path}#NAME")


def read_entry(path: Path, name: str, hub: str) -> Entry:
    """The entry of that name. Raises KitError for one that is not there, or holds no answers to train on."""
    entries, source = _read(path), f"dataset: {path}#{name}"
    if name not in entries:
        raise KitError(f"dataset: {path} has no entry {name!r}{nearest(name, entries)}",
                       f"there are: {_listed(entries)}")
    entry = entries[name]
    if not isinstance(entry, dict):
        raise KitError(f"{source}: the entry is no object", f"it needs one of {', '.join(PLACES[:3])}")
    columns, tags = entry.get("columns"), entry.get("tags") or {}
    style = entry.get("formatting") or "alpaca"
    if style not in COLUMNS:
        raise KitError(f"{source}: formatting {style!r} is not known{nearest(str(style), COLUMNS)}",
                       f"there are: {', '.join(COLUMNS)}")
    for part, words in (("columns", columns or {}), ("tags", tags)):
        if not isinstance(words, dict) or not all(isinstance(word, str | None) for word in words.values()):
            raise KitError(f"{source}: {part} are no object of texts", "it gives the file's word for each of its own")
    columns = DEFAULTS[style] if columns is None else columns
    _refuse_untrainable(source, entry, columns, style)
    place, own_hub = _place(source, path, entry, hub)
    given = {"dataset_config": entry.get("subset"), "dataset_split": entry.get("split") or "train",
             "dataset_revision": entry.get("revision")} if own_hub else {"dataset_config": None}
    samples = entry.get("num_samples")
    if samples is not None and (not isinstance(samples, int) or samples < 1):
        raise KitError(f"{source}: num_samples is {samples!r}", "it is a whole number of rows")
    named = _alpaca(columns) if style == "alpaca" else _turns(source, columns, tags, style)
    return Entry(place, {"columns": named, "hub": own_hub or hub, **given}, entry.get("folder"), samples)


def _read(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise not_utf8(path) from None
    except (RecursionError, ValueError) as error:
        raise KitError(f"{path}: not JSON: {one_line(error, 100)}",
                       'one object in { … }, with "NAME": { … } for each data set') from None
    except OSError as error:
        raise KitError(f"{path}: {error.strerror or error}", "look at the file's permissions and its disk") from None
    if not isinstance(entries, dict):
        raise KitError(f"{path}: a description of data sets is an object", '{"NAME": {"file_name": …}, …}')
    return entries


def _listed(entries: dict[str, Any]) -> str:
    return ", ".join(list(entries)[:20]) + (f", … ({len(entries)} in all)" if len(entries) > 20 else "") or "none"


def _refuse_untrainable(source: str, entry: dict[str, Any], columns: dict[str, Any], style: str) -> None:
    if entry.get("ranking") or columns.get("chosen") or columns.get("rejected") or columns.get("kto_tag"):
        raise KitError(f"{source}: preference data, which trains by comparison (DPO, KTO): this trains on single "
                       "answers (SFT)", "keep the better answers alone, under a column of responses")
    if style == "alpaca" and not (columns.get("prompt") and columns.get("response")):
        raise KitError(f"{source}: its columns name no {'response' if columns.get('prompt') else 'prompt'}: rows to "
                       "pre-train on, and this trains on answers", "name both: prompt and response")


def _place(source: str, path: Path, entry: dict[str, Any], hub: str) -> tuple[str, str | None]:
    """What is read, and which hub has it (None for a file)."""
    on_hubs = {"huggingface": entry.get("hf_hub_url"), "modelscope": entry.get("ms_hub_url")}
    if any(on_hubs.values()):
        own_hub = hub if on_hubs.get(hub) else next(name for name, url in on_hubs.items() if url)
        return str(on_hubs[own_hub]), own_hub
    if "script_url" in entry or "cloud_file_name" in entry:
        raise KitError(f"{source} is read by a script or from a cloud's storage, which this does not do",
                       "download the rows, and name the file in file_name")
    if not isinstance(name := entry.get("file_name"), str) or not name:
        raise KitError(f"{source} says nothing about where its rows lie", f"it needs one of {', '.join(PLACES[:3])}")
    return str(path.parent / name), None


def _alpaca(columns: Columns) -> Columns:
    words = COLUMNS["alpaca"] | BESIDES
    return {"messages": None, "conversations": None} | {ours: columns.get(word) for word, ours in words.items()}


def _turns(source: str, columns: Columns, tags: Columns, style: str) -> Columns:
    """Where turns have one of ShareGPT's two keys they are read as ShareGPT's, else as OpenAI's."""
    field = COLUMNS[style]["messages"]
    keys = tags.get("role_tag") or TURNS[field][0], tags.get("content_tag") or TURNS[field][1]
    field = "conversations" if keys[0] == "from" or keys[1] == "value" else "messages"
    other = "messages" if field == "conversations" else "conversations"
    named = {other: None, field: columns.get("messages") or DEFAULTS[style]["messages"],
             **dict(zip(TURNS[field][:2], keys, strict=True)),
             **{ours: columns.get(word) for word, ours in BESIDES.items()}}
    for tag, ours in ROLE_TAGS.items():
        word = tags.get(tag)
        if word and word != ours:
            if named.get(ours):
                raise KitError(f"{source}: the system prompt is called {named[ours]!r} as a column and {word!r} as a "
                               "role", "rename one of them in the rows")
            named[ours] = word
    return named
