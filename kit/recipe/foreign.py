"""What other tools call things, and where that is here: foreign.yaml, and what is told from its names."""

import re
import shlex
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kit.common.errors import KitError
from kit.recipe.fields import Fields

TABLE = Path(__file__).with_name("foreign.yaml")
CODE = (".ipynb", ".py")  # suffixes that are read as Python
SHELL = (".sh", ".bash", ".zsh")
NAMES_ENOUGH = 3  # so many names of another tool make a whole file its file
# Words by which a text that is no YAML is known; the first that is found counts.
TEXTS = {"unsloth": r"FastLanguageModel|FastModel|from unsloth", "llamafactory": r"\bllamafactory\b",
         "swift": r"\bswift (?:sft|pt|rlhf|export)\b", "axolotl": r"\baxolotl\b",
         "finetune": r"\bfinetune\.(?:py|sh)\b|--q_lora\b|--use_lora\b",
         "torchrun": r"--dataset_name_or_path\b|--pretrained_model_name_or_path\b",
         "transformers": r"\b(?:torchrun|accelerate launch|deepspeed|python3?)\s.*\s--\w+|SFTTrainer|TrainingArguments"}

LISTED = re.compile(r"(?:`[^`]+`(?:, )?)*")  # words in code at the beginning of a cell


class Row(NamedTuple):
    """A line of a tool's options: the four cells, and the Chinese of the first."""

    option: str
    here: str
    remark: str
    remark_zh: str
    option_zh: str

    @property
    def names(self) -> set[str]:
        """What is called so: the words in code that the cell begins with, without dashes."""
        return {plain(name) for name in re.findall(r"`([^`]+)`", LISTED.match(self.option)[0])}  # type: ignore[index]

    @property
    def values(self) -> set[str]:
        """The values that the line stands for; of a line for any value none."""
        words = re.fullmatch(r" ([\w-]+(?:, [\w-]+)*)", LISTED.sub("", self.option, count=1))
        return set(words[1].lower().split(", ")) if words else set()

    @property
    def fields(self) -> list[tuple[str, Any]]:
        """(field, value) of the second cell; a value of None is the one given there."""
        found: list[tuple[str, Any]] = []
        for code in re.findall(r"`([^`]+)`", self.here):
            name, colon, value = code.partition(": ")
            if name in Fields.model_fields:
                found.append((name, yaml.safe_load(value) if colon else None))
        return found


class Tool(NamedTuple):
    """A tool of the table."""

    key: str
    name: str
    title: tuple[str, str]
    intro: tuple[str, str]
    signs: frozenset[str]
    based_on: str | None
    defaults: dict[str, Any]
    lora_defaults: dict[str, Any]
    script: dict[str, Any]
    unseen: str
    options: tuple[Row, ...]


@cache
def tools() -> dict[str, Tool]:
    """The table, in its order."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return {key: Tool(key, **{"intro": ("", ""), "based_on": None, "defaults": {}, "lora_defaults": {}, "script": {},
                              "unseen": "", **tool, "signs": frozenset(tool["signs"]),
                              "options": tuple(map(_row, tool["options"].splitlines()))})
            for key, tool in table.items()}


def _row(line: str) -> Row:
    option, here, *remarks = (cell.strip() for cell in line.split(" | "))
    remark, remark_zh = [*remarks, "", ""][:2]
    english, _, chinese = option.partition(" // ")
    return Row(english, here, remark, remark_zh, chinese or english)


def plain(name: str) -> str:
    """--lora-r → lora_r; dtype=None → dtype"""
    return re.split(r"[=(]", name.strip().lstrip("-"), maxsplit=1)[0].replace("-", "_")


def rows_named(name: str, among: Iterable[Tool] | None = None) -> Iterator[Row]:
    """The lines about an option, in the order of the tools."""
    for tool in tools().values() if among is None else among:
        yield from (row for row in tool.options if name in row.names)


def hint(name: str, value: Any = None) -> str:
    """What to write in place of an option of another tool, in a line; '' for a name that no tool has."""
    if isinstance(value, dict):
        return (f"a recipe has no groups: write the lines of {name} at the top level, or let "
                "`kit new NAME --from FILE` do it")
    general = tools()["transformers"]  # first: what it calls things, most tools call so
    rows = list(rows_named(plain(name).lower(), [general, *(tool for tool in tools().values() if tool != general)]))
    rows = [row for row in rows if str(value).lower() in row.values] or rows
    heres = dict.fromkeys(row.here for row in rows if row.fields)
    if heres:
        remark = next((f" ({row.remark})" for row in rows if row.fields and row.remark), "") if len(heres) == 1 else ""
        return f"here it is {' or '.join(list(heres)[:3])}{remark}".replace("`", "")
    if not rows:
        return ""
    here = "nothing here goes by it" if rows[0].here == "–" else f"here it is {rows[0].here}"
    return (f"{here} ({rows[0].remark})" if rows[0].remark else here).replace("`", "")


def tool_of(names: Collection[str]) -> str | None:
    """The tool whose file has such names, nested ones among them; None when there is no sign of any."""
    counts = {key: len(tool.signs & set(names)) for key, tool in tools().items()}
    best = max(counts, key=lambda key: counts[key])
    return best if counts[best] else None


def tool_of_text(text: str) -> str | None:
    """The tool that a script or a command line starts, or that a notebook's cells call."""
    return next((key for key, words in TEXTS.items() if re.search(words, text)), None)


def refuse_foreign(source: Any, text: str, values: dict[str, Any] | None) -> None:
    """KitError for another tool's file where a recipe is wanted; `values` are those of a file that is YAML."""
    known: list[str] = []
    key = None
    if values is None:
        key = tool_of_text(text)
    else:
        groups = [value for name, value in values.items() if name not in Fields.model_fields]
        inner = [name for group in groups if isinstance(group, dict) for name in group]
        strange = [name for name in (*values, *inner) if name not in Fields.model_fields]
        if len(strange) >= NAMES_ENOUGH:  # of a recipe's own names the table need not be read
            signs = frozenset().union(*(tool.signs for tool in tools().values()))
            known = [name for name in strange if next(rows_named(name), None) or name in signs]
            key = tool_of([*values, *inner]) if len(known) >= NAMES_ENOUGH else None
    if key:
        words = f" ({', '.join(known[:4])}, …)" if known else ""
        raise KitError(f"{source} is no recipe: it looks like a file of {tools()[key].name}{words}",
                       f"kit new NAME --from {shlex.quote(str(source))} makes a recipe of it")
