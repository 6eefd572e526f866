"""Read rows, bring them to messages, split, format: what goes into training, and what is held out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.errors import KitError, nearest
from kit.platforms import hub_hint
from kit.prompts import Formatter, Message, alpaca_turn
from kit.recipe import MAX_ERRORS, PROJECT

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

    from kit.recipe import Recipe

STARTER_TRAIN = PROJECT / "data" / "tickets-train.jsonl"
STARTER_HELDOUT = PROJECT / "data" / "tickets-heldout.jsonl"
ROLES = ("system", "user", "assistant")

Row = dict[str, Any]


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """The formatted data: splits `train` and `test` (held out, maybe empty).

    Columns: `messages`; `input_ids` and `labels` (lists of one length, -100 where nothing is trained);
    for the held-out rows `prompt` (messages before the last answer) and `reference` (that answer).
    Rows longer than max_seq_length are left out and counted. Raises KitError with up to 20 bad rows.
    """
    from datasets import DatasetDict

    train, held_out = read_splits(recipe)
    formatter = Formatter(tokenizer, recipe)
    data = DatasetDict(train=_format(train, formatter, recipe, "training"),
                       test=_format(held_out, formatter, recipe, "held-out"))
    if len(data["train"]) == 0:
        raise KitError(f"no training row fits into max_seq_length: {recipe.max_seq_length}", "raise max_seq_length")
    return data


def read_splits(recipe: Recipe) -> tuple[list[list[Message]], list[list[Message]]]:
    """Training and held-out conversations, before formatting."""
    if recipe.dataset == "starter":
        train, held_out = read_conversations(STARTER_TRAIN), read_conversations(STARTER_HELDOUT)
    else:
        train = read_conversations(recipe.dataset, recipe)
        held_out = read_conversations(recipe.eval_dataset, recipe) if recipe.eval_dataset else []
    if recipe.test_size and recipe.dataset != "starter":
        train, held_out = _hold_out(train, recipe)
    return train[: recipe.max_train_samples], held_out[: recipe.max_eval_samples]


def _hold_out(rows: list[list[Message]], recipe: Recipe) -> tuple[list[list[Message]], list[list[Message]]]:
    from datasets import Dataset

    size = int(recipe.test_size) if recipe.test_size > 1 else recipe.test_size
    if len(rows) < 2 or size >= len(rows):
        raise KitError(f"test_size: {recipe.test_size:g} leaves nothing to train on: {recipe.dataset} has "
                       f"{len(rows)} rows", "lower test_size")
    order = Dataset.from_dict({"row": list(range(len(rows)))}).train_test_split(test_size=size, seed=recipe.seed)
    return [rows[i] for i in order["train"]["row"]], [rows[i] for i in order["test"]["row"]]


def read_conversations(source: str | Path, recipe: Recipe | None = None) -> list[list[Message]]:
    """Rows of a .json or .jsonl file, a data set's folder or a hub id, as lists of messages."""
    path = local_path(source)
    if path is None:
        return _to_messages(_from_hub(str(source), recipe), str(source))
    if path.is_dir():
        return _to_messages(_from_hub(str(path), recipe), str(source))
    if path.suffix not in (".json", ".jsonl"):
        raise KitError(f"dataset: {source}: unknown kind of file {path.suffix or '(no ending)'}",
                       "use .jsonl (one JSON object a line) or .json (a list of them)")
    rows = _read_jsonl(path) if path.suffix == ".jsonl" else _read_json(path)
    return _to_messages(rows, str(source))


def local_path(source: str | Path) -> Path | None:
    """The file or folder meant, or None when it can only be a hub id."""
    for path in (Path(source).expanduser(), PROJECT / source):
        if path.exists():
            return path
    path = Path(source)
    if path.suffix or path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") != 1:
        folder = path.parent if path.parent.is_dir() else PROJECT / "data"
        near = nearest(path.name, [p.name for p in folder.iterdir()])
        raise KitError(f"dataset: there is no {source}{near}", "a path is looked up from the folder you are in")
    return None


def _read_jsonl(path: Path) -> list[tuple[int, Any]]:
    rows, problems = [], []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            problems.append(f"line {number}, column {error.colno}: {error.msg}")
    _raise(problems, path, "not JSON", "each line is one complete JSON object")
    return rows


def _read_json(path: Path) -> list[tuple[int, Any]]:
    text = _text(path)
    if not text.strip():
        return []
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise KitError(f"{path}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}",
                       "a .json file is one list of objects; with an object a line, name it .jsonl") from None
    if not isinstance(rows, list):
        raise KitError(f"{path}: a list of rows is needed, this is a {type(rows).__name__}",
                       "put the rows into [ … ]")
    return list(enumerate(rows, 1))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise KitError(f"{path}: not UTF-8 text (byte {error.start})", "save the file as UTF-8") from None


def _from_hub(name: str, recipe: Recipe | None) -> Iterable[tuple[int, Any]]:
    from datasets import DownloadConfig, load_dataset

    split = recipe.dataset_split if recipe else "train"
    offline = bool(recipe and recipe.local_files_only)
    if recipe and recipe.hub == "modelscope" and not Path(name).is_dir():
        raise KitError(f"dataset: {name}: data sets are not read from ModelScope yet",
                       "download it and name the file, or set hub: huggingface")
    try:
        dataset = load_dataset(name, split=split, download_config=DownloadConfig(local_files_only=offline))
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise KitError(f"dataset: {name}: {type(error).__name__}: {reason}", hub_hint()) from None
    return enumerate(dataset, 1)


def _to_messages(rows: Iterable[tuple[int, Any]], source: str) -> list[list[Message]]:
    conversations, problems, count = [], [], 0
    for number, row in rows:
        count += 1
        try:
            conversations.append(_conversation(row))
        except KitError as error:
            problems.append(f"row {number}: {error.message}")
    if not count:
        raise KitError(f"dataset: {source} is empty", "it needs at least one row")
    _raise(problems, source, "bad rows", "Alpaca rows have instruction, input, output; chats have messages")
    return conversations


def _conversation(row: Any) -> list[Message]:
    if not isinstance(row, dict):
        raise KitError(f"a {type(row).__name__} where an object is needed")
    if "messages" in row:
        return _checked(row["messages"])
    if "instruction" in row and "output" in row:
        texts = {key: row.get(key) for key in ("instruction", "input", "output", "system")}
        for key, value in texts.items():
            if value is not None and not isinstance(value, str):
                raise KitError(f"{key} is a {type(value).__name__}, not text")
        turns = [{"role": "user", "content": alpaca_turn(texts["instruction"] or "", texts["input"])},
                 {"role": "assistant", "content": texts["output"] or ""}]
        system = [{"role": "system", "content": texts["system"]}] if texts["system"] else []
        return _checked(system + turns)
    found = ", ".join(list(row)[:8]) or "none"
    raise KitError(f"no fields messages, or instruction and output (found: {found})")


def _checked(messages: Any) -> list[Message]:
    """System first if at all, then user and assistant in turn, the assistant last."""
    if not isinstance(messages, list) or not messages:
        raise KitError("messages is no list of turns")
    clean = []
    for turn in messages:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise KitError("a turn without text in content")
        if turn.get("role") not in ROLES:
            raise KitError(f"role {turn.get('role')!r}{nearest(str(turn.get('role')), ROLES)}; there are: "
                           f"{', '.join(ROLES)}")
        clean.append({"role": turn["role"], "content": turn["content"]})
    roles = [m["role"] for m in clean]
    talk = roles[1:] if roles[0] == "system" else roles
    if talk != ["user", "assistant"] * (len(talk) // 2) or not talk:
        raise KitError(f"turns must alternate user, assistant and end with the assistant, these are: "
                       f"{', '.join(roles)}")
    if not clean[-1]["content"].strip():
        raise KitError("the answer is empty")
    return clean


def _raise(problems: list[str], source: str | Path, what: str, hint: str) -> None:
    if problems:
        more = f"\n  … and {len(problems) - MAX_ERRORS} more" if len(problems) > MAX_ERRORS else ""
        raise KitError(f"dataset: {source}: {what} ({len(problems)}):\n  " + "\n  ".join(problems[:MAX_ERRORS]) + more,
                       hint)


def _format(conversations: list[list[Message]], formatter: Formatter, recipe: Recipe, what: str) -> Dataset:
    from datasets import Dataset

    rows = []
    for messages, (ids, labels) in zip(conversations, formatter.encode(conversations), strict=True):
        if len(ids) <= recipe.max_seq_length:
            rows.append({"messages": messages, "input_ids": ids, "labels": labels,
                         "prompt": messages[:-1], "reference": messages[-1]["content"]})
    lost = len(conversations) - len(rows)
    if lost:
        print(f"{lost} of {len(conversations)} {what} rows are longer than max_seq_length: "
              f"{recipe.max_seq_length} tokens and were left out")
    columns = ("messages", "input_ids", "labels", "prompt", "reference")
    return Dataset.from_list(rows) if rows else Dataset.from_dict({name: [] for name in columns})
