"""How the tools name their data and its form, each in a way of its own: `dataset`, `columns`, `prompt_style`."""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

Rule = Callable[[Any, Any, str, dict[str, Any], Path], None]  # (Converted, value, told, all options, folder)
PLAIN_TEMPLATES = ("default", "default-generation", "vanilla", "empty", "fewshot")
DATA_FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".xlsx", ".txt")


def found(name: str, folder: Path) -> str:
    """A relative path as it can be opened from here: itself, or below the file's folder or one above it."""
    path = Path(name).expanduser()
    with suppress(OSError, ValueError):
        if not path.is_absolute() and not path.exists():
            for above in (folder, *list(folder.resolve().parents)[:4]):
                if (above / path).exists():
                    return str(above / path)
    return name


def _names(value: Any) -> list[str]:
    names = value if isinstance(value, list) else str(value).split(",")
    return [str(name).strip() for name in names if str(name).strip()]


def _one_or_list(names: list[str]) -> Any:
    names = list(dict.fromkeys(names))
    return names[0] if len(names) == 1 else names


def _llamafactory(field: str) -> Rule:
    """Names of dataset_info.json in dataset_dir, as data/dataset_info.json#identity."""
    def rule(done: Any, value: Any, told: str, given: dict[str, Any], folder: Path) -> None:
        where = str(given.get("dataset_dir", "data"))
        if where.lower().startswith(("online", "remote")):
            names = [name for name in _names(value)]
        else:
            info = found(where if where.endswith(".json") else f"{where.rstrip('/')}/dataset_info.json", folder)
            names = [found(name, folder) if name.endswith(DATA_FILES) else f"{info}#{name}" for name in _names(value)]
        if field == "eval_dataset" and len(names) > 1:
            done.lost.append((told, "one file of held-out rows: put them together"))
        else:
            done.put(field, _one_or_list(names), told)

    return rule


def _swift(field: str) -> Rule:
    """hf::id:subset#count, several of them."""
    def rule(done: Any, value: Any, told: str, given: dict[str, Any], folder: Path) -> None:
        names, subsets, counts = [], set(), []
        for name in _names(value):
            match = re.fullmatch(r"(?:(?:hf|ms)::)?(.+?)(?::([\w/-]+))?(?:#(\d+))?", name, re.IGNORECASE)
            source, subset, count = match.groups() if match else (name, None, None)
            names.append(found(str(source), folder))
            subsets |= {subset} - {None}
            counts.append(count)
        done.put(field, names[0] if field == "eval_dataset" else _one_or_list(names), told)
        if len(names) == 1 and field == "dataset":
            done.put("dataset_config", next(iter(subsets), None), told)
            done.put("max_train_samples", int(counts[0]) if counts[0] else None, f"{told}, any of them there")
        elif subsets or any(counts) or (len(names) > 1 and field == "eval_dataset"):
            done.lost.append((told, "of several sources neither a subset nor a number of rows is taken; weights: "
                                    "dataset: {a.jsonl: 2, b.jsonl: 0.5}"))

    return rule


def _axolotl(field: str) -> Rule:
    """A list of {path, type, name, split, …}; the first one's type and columns hold for all."""
    def rule(done: Any, value: Any, told: str, given: dict[str, Any], folder: Path) -> None:
        sources = [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
        names = [name for one in sources for name in _names(one.get("data_files") or one.get("path") or "")]
        if not names:
            return
        done.put(field, _one_or_list([found(name, folder) for name in names]) if field == "dataset" else
                 found(names[0], folder), f"{told[:8]}… path")
        if field == "dataset":
            _axolotl_kind(done, sources, given)

    return rule


def _axolotl_kind(done: Any, sources: list[dict[str, Any]], given: dict[str, Any]) -> None:
    first = sources[0]
    kind = first.get("type")
    kinds = {str(one.get("type")) for one in sources}
    if len(kinds) > 1:
        done.lost.append((f"type: {', '.join(sorted(kinds))}", "rows of all sources are written in one template here"))
    if str(kind).startswith(("alpaca", "gpteacher")):
        done.put("prompt_style", "alpaca", f"type: {kind}")
    elif "chatml" in (given.get("chat_template"), first.get("chat_template"), str(kind).partition(".")[0]):
        done.put("prompt_style", "chatml", "chat_template: chatml")
    elif str(kind).startswith(("completion", "pretrain", "input_output")):
        done.lost.append((f"type: {kind}", "text without questions and answers is not trained here"))
    done.put("dataset_config", first.get("name"), "name")
    done.put("dataset_split", first.get("split"), "split")
    columns = _axolotl_columns(first, kind if isinstance(kind, dict) else first)
    if columns:
        done.put("columns", columns, "field_messages, message_property_mappings, roles")


def _axolotl_columns(source: dict[str, Any], kind: dict[str, Any]) -> dict[str, str]:
    """{our name: the file's}, without those that are known anyway."""
    pairs = {ours: kind.get(f"field_{theirs}") for ours, theirs in
             (("instruction", "instruction"), ("input", "input"), ("output", "output"), ("system", "system"))}
    messages = source.get("field_messages")
    sharegpt = messages in (None, "conversations") and source.get("message_field_role", "from") == "from"
    mapping = source.get("message_property_mappings") or {}
    role = mapping.get("role") or source.get("message_field_role")
    content = mapping.get("content") or source.get("message_field_content")
    if messages == "conversations" or (sharegpt and role == "from"):
        pairs |= {"from": role, "value": content}
    else:
        pairs |= {"messages": messages, "role": role, "content": content}
    for ours, theirs in (source.get("roles") or {}).items() if isinstance(source.get("roles"), dict) else ():
        names = [name for name in _names(theirs) if name not in ("human", "user", "gpt", "assistant", "system", "tool")]
        pairs[str(ours)] = names[0] if names else None
    return {ours: theirs for ours, theirs in pairs.items() if isinstance(theirs, str) and theirs != ours}


def _per_epoch(field: str, other: str) -> Rule:
    def rule(done: Any, value: Any, told: str, given: dict[str, Any], folder: Path) -> None:
        if value and not given.get(other):
            done.put(field, "epoch", told)

    return rule


def _steps_from_rows(done: Any, value: Any, told: str, given: dict[str, Any], folder: Path) -> None:
    """axolotl's batch_size: rows per step in all."""
    rows = given.get("micro_batch_size") or 1
    if isinstance(value, int) and isinstance(rows, int) and not given.get("gradient_accumulation_steps"):
        done.put("gradient_accumulation_steps", max(1, value // rows), told)


def _columns(done: Any, value: Any, told: str, given: dict[str, Any], folder: Path) -> None:
    """ms-swift's columns, {the file's: its own}: query and response are prompt and completion here."""
    ours = {"query": "prompt", "response": "completion", "system": "system", "messages": "messages",
            "history": "history"}
    if isinstance(value, str):
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, dict):
        done.put("columns", {ours.get(str(name), str(name)): str(theirs) for theirs, name in value.items()}, told)


def _plain(field: str) -> Rule:
    def rule(done: Any, value: Any, told: str, given: dict[str, Any], folder: Path) -> None:
        names = [found(name, folder) for name in (value if isinstance(value, list) else [str(value)])]
        done.put(field, _one_or_list(names), told.partition(":")[0])

    return rule


def _template(done: Any, value: Any, told: str, given: dict[str, Any], folder: Path) -> None:
    """A template's name: the model's own, but for plain ones and those that leave thinking out."""
    done.put("prompt_style", value, told.partition(":")[0])
    if str(value).lower() in PLAIN_TEMPLATES:
        done.lost.append((told, "roles in plain words there; here the model's own template"))
    elif "nothink" in str(value).lower():
        done.put("enable_thinking", False, told)


def _nothing(done: Any, value: Any, told: str, given: dict[str, Any], folder: Path) -> None:
    """Said in another option."""


DATASETS: dict[tuple[str, str], Rule] = {
    ("llamafactory", "dataset"): _llamafactory("dataset"), ("llamafactory", "dataset_dir"): _nothing,
    ("llamafactory", "eval_dataset"): _llamafactory("eval_dataset"), ("llamafactory", "media_dir"): _nothing,
    ("swift", "dataset"): _swift("dataset"), ("swift", "val_dataset"): _swift("eval_dataset"),
    ("swift", "columns"): _columns,
    ("llamafactory", "template"): _template, ("swift", "template"): _template, ("swift", "template_type"): _template,
    ("axolotl", "datasets"): _axolotl("dataset"), ("axolotl", "test_datasets"): _axolotl("eval_dataset"),
    ("axolotl", "evals_per_epoch"): _per_epoch("eval_strategy", "eval_steps"),
    ("axolotl", "saves_per_epoch"): _per_epoch("save_strategy", "save_steps"),
    ("axolotl", "batch_size"): _steps_from_rows,
    ("torchrun", "dataset_name_or_path"): _plain("dataset"), ("pipeline", "dataset_path"): _plain("dataset"),
    ("finetune", "data_path"): _plain("dataset"), ("finetune", "eval_data_path"): _plain("eval_dataset"),
    ("unsloth", "dataset"): _plain("dataset"), ("transformers", "dataset"): _plain("dataset"),
}
