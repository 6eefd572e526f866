"""`kit new`: a recipe of another tool's file, or a copy of one of ours, with fields on top."""

import re
from pathlib import Path
from typing import Any

import yaml

from kit.common.errors import KitError
from kit.common.files import PROJECT, unwritable, write_text
from kit.recipe.convert import Converted, convert
from kit.recipe.fields import Fields
from kit.recipe.foreign_files import read_foreign
from kit.recipe.foreign_values import printed, short
from kit.recipe.reading import PlainLoader
from kit.recipe.recipe import Recipe

EXPLAINED = "recipes/qwen3-4b-alpaca.yaml"  # every line of it says why: what a recipe begins as
WIDTH = 34  # of `field: value` before its comment


def new(name: str, source: str | None, fields: dict[str, Any]) -> None:
    """Write NAME.yaml, or the path given, and print what has no counterpart. KitError when it is there already, or the
    source can't be read."""
    path = _path(name)
    if own := _own(source or EXPLAINED):
        text = _with_fields(own.read_text(encoding="utf-8-sig"), fields).replace(f"recipes/{own.name}", str(path))
        lost: list[str] = []
        told, following = f"{path}: a copy of {own}", ""
    else:
        done = convert(read_foreign(str(source)))
        text, lost = _page(path, str(source), done, fields)
        told = f"{path}: {len(done.values)} fields from {short(source)} ({done.tool.name})"
        following = printed(done.merging)
    _check(path, text)
    with unwritable(path, "name another place"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    print(told)
    for line in lost:
        print(f"  {line}")
    print("next:", following or (f"kit doctor {path}" if " " not in str(path) else f"kit doctor '{path}'"))


def _path(name: str) -> Path:
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = path.parent / f"{path.name}.yaml"
    if not re.fullmatch(r"[\w+-][\w.+-]*", path.stem):
        raise KitError(f"{path.stem!r} can't be a run's name, which is that of its recipe",
                       "letters, digits and . _ + -, no spaces")
    if path.exists():
        raise KitError(f"{path} is there already, and is not overwritten", "choose another name, or remove it first")
    return path


def _own(source: str) -> Path | None:
    """The file, when it is a recipe of ours."""
    for path in (Path(source).expanduser(), PROJECT / source):
        if path.suffix in (".yaml", ".yml") and path.is_file():
            try:
                values = yaml.load(path.read_text(encoding="utf-8-sig"), PlainLoader)
            except (yaml.YAMLError, ValueError):
                return None
            ours = isinstance(values, dict) and values and set(map(str, values)) <= set(Fields.model_fields)
            return path if ours else None
    return None


def _check(path: Path, text: str) -> None:
    """That the recipe can be read; the same refusals as when it is run."""
    Recipe.load({"run_name": path.stem, **(yaml.load(text, PlainLoader) or {})})


def line_of(name: str, value: Any) -> str:
    """`field: value` on one line."""
    options: dict[str, Any] = {"default_flow_style": True, "allow_unicode": True, "width": 10**6, "sort_keys": False}
    written = yaml.safe_dump(value, **options)
    if not written.removesuffix("...\n").strip().isprintable():  # a text of several lines
        written = yaml.safe_dump(value, default_style='"', **options)
    return f"{name}: " + written.removesuffix("...\n").strip()


def _page(path: Path, source: str, done: Converted, fields: dict[str, Any]) -> tuple[str, list[str]]:
    """The recipe's text, and what has no counterpart, as it is also printed."""
    for name, value in fields.items():
        done.values[name], done.origins[name] = value, "set with kit new"
    if "max_steps" in fields and "num_train_epochs" not in fields:
        done.values.pop("num_train_epochs", None)
    rows = [f"# From {short(source)} ({done.tool.name}). A comment says what the line is called there, or whose "
            "default it is.", "# It merges and trains nothing: a run needs a dataset." if done.merging else
            f"#   kit run {path}", ""]
    for name in Fields.model_fields:
        if name in done.values:
            rows.append(f"{line_of(name, done.values[name]):<{WIDTH}} # {short(done.origins[name])}")
    merging = [f"merging: {done.merging}"] if done.merging else []
    others = [f"{what} – {why.replace('RECIPE', str(path))}" if why else what for what, why in done.lost]
    lost = merging + (["No counterpart here, or done otherwise:", *(f"- {line}" for line in others)] if others else [])
    lost = [printed(line) for line in lost]
    return "\n".join([*rows, "", *(f"# {line}" for line in lost)]).rstrip() + "\n", lost


def _with_fields(text: str, fields: dict[str, Any]) -> str:
    """A recipe's text with these fields set: where a line has one its value is replaced, its comment kept."""
    for name, value in fields.items():
        node = yaml.compose(text, Loader=PlainLoader)
        pair = next((pair for pair in node.value if pair[0].value == name), None) if node else None
        if pair:
            text = text[:pair[0].start_mark.index] + line_of(name, value) + text[_end(pair[1]):]
        else:
            text = f"{text.rstrip()}\n{line_of(name, value)}\n"
    return text


def _end(node: yaml.Node) -> int:
    """Where a value's last word ends; what follows it may be a comment."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)
