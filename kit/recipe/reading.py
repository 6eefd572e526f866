"""Where a recipe's values come from: a YAML file, the command line, a notebook's variables; and what is wrong there."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from kit.common.errors import KitError, nearest, one_line
from kit.common.paths import PROJECT
from kit.common.secrets import secret
from kit.recipe.fields import Fields

MAX_ERRORS = 20
F = TypeVar("F", bound=Fields)
# A parameter of such a name holds a secret, and everything a notebook is given is published with it.
SECRET_NAME = re.compile(r"(^|_)(token|secret|password|passwd|credentials?|(api|access|auth|private)_?key)$", re.I)
NO_SECRETS = "tokens come from the environment (HF_TOKEN) or the hub's own login (hf auth login), never from a recipe"


def _like_a_secret(name: str) -> bool:
    """Whether the name is that of a secret, and no slip of a field's (max_new_token)."""
    return bool(SECRET_NAME.search(name)) and not nearest(name, Fields.model_fields, cutoff=0.9)


def checked(kind: type[F], source: str | Path | dict[str, Any] | F, overrides: dict[str, Any]) -> F:
    """What `Recipe.load` promises; `kind` is the recipe's class."""
    lines: dict[str, int] = {}
    where = ""
    if isinstance(source, Fields):
        values = source.model_dump(exclude_unset=True)
    elif isinstance(source, dict):
        values = dict(source)
    else:
        path = _find(source)
        where = str(source)
        values, lines = _read_yaml(path)
        values.setdefault("run_name", path.stem)
    for asked, other in (("max_steps", "num_train_epochs"), ("num_train_epochs", "max_steps")):
        if overrides.get(asked) and other not in overrides:
            values.pop(other, None)  # the length asked for just now replaces the file's
    values.update(overrides)
    _refuse_secrets(values)
    try:
        return kind(**values)
    except ValidationError as error:
        found = [_explain(e, where, lines, overrides) for e in error.errors()[:MAX_ERRORS]]
        what = where or "the recipe"
        count = "1 problem" if len(found) == 1 else f"{len(found)} problems"
        raise KitError(f"{what}: {count}\n  " + "\n  ".join(found),
                       "every field with its bounds: docs/recipe.md") from None


def given(namespace: dict[str, Any]) -> dict[str, Any]:
    """What `Recipe.given` promises."""
    plain = (str, int, float, bool, list, dict, types.NoneType)
    taken = {}
    for name, value in namespace.items():
        if name.startswith("_") or not isinstance(value, plain):
            continue
        if value and (_like_a_secret(name) or (isinstance(value, str) and secret(value, addresses=False))):
            raise KitError(f"the notebook's parameter {name!r} looks like a secret, and papermill writes every "
                           "parameter into the notebook it makes", f"delete that notebook; {NO_SECRETS}")
        if name in Fields.model_fields:
            taken[name] = value
        elif len(name) > 4 and (close := nearest(name, Fields.model_fields, cutoff=0.8)):
            raise KitError(f"the notebook's parameter {name!r} is no recipe field{close}",
                           "correct its name, or rename the variable")
    return taken


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """['learning_rate=1e-4', 'gguf=[q8_0]'] → fields; each value is read as YAML."""
    values = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            told = secret(pair, addresses=False)  # not to be repeated in a log
            raise KitError(f"{told or repr(pair)} is not field=value", "for example learning_rate=1e-4 or gguf=[q8_0]")
        if _like_a_secret(name):
            raise KitError(f"{name!r} looks like a secret, and every field is written into the run", NO_SECRETS)
        if name not in Fields.model_fields:
            raise KitError(f"{name!r} is no recipe field{nearest(name, Fields.model_fields)}",
                           "every field with its bounds: docs/recipe.md")
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise KitError(f"{pair!r}: the value is not YAML: {one_line(error)}", "quote it") from None
    return values


def _refuse_secrets(values: dict[str, Any]) -> None:
    """KitError for a field named like a secret, or a value that looks like one; the value itself is not repeated."""
    for name, value in values.items():
        if _like_a_secret(name):
            raise KitError(f"{name!r} looks like a secret, and every field is written into the run", NO_SECRETS)
        if told := secret(json.dumps(value, ensure_ascii=False, default=str), addresses=False):
            raise KitError(f"{name} holds what looks like a secret ({told}), and every field is written into the run",
                           NO_SECRETS)


def _find(source: str | Path) -> Path:
    """The recipe file: as given, or below the project."""
    for path in (Path(source).expanduser(), PROJECT / source):
        if path.is_file():
            return path
        if path.is_dir():
            raise KitError(f"{source} is a folder, not a recipe", "name a .yaml file")
    known = sorted(p.name for p in (PROJECT / "recipes").glob("*.yaml"))
    raise KitError(f"there is no recipe {source}{nearest(Path(source).name, known)}",
                   "recipes here: " + ", ".join(f"recipes/{name}" for name in known))


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The file's fields and the line each stands on."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise KitError(f"{path}: not UTF-8 text (byte {error.start})", "save the recipe as UTF-8") from None
    except yaml.YAMLError as error:
        raise KitError(f"{path}: not YAML: {one_line(error)}", "a recipe is lines of `field: value`") from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise KitError(f"{path}: a recipe is lines of `field: value`, this is a {type(values).__name__}",
                       "see recipes/quickstart.yaml")
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if key.value in lines:
            raise KitError(f"{path}:{key.start_mark.line + 1}: {key.value} is set twice "
                           f"(first on line {lines[key.value]})", "keep one")
        lines[key.value] = key.start_mark.line + 1
    return {str(k): v for k, v in values.items()}, lines


def _explain(error: Any, where: str, lines: dict[str, int], overrides: dict[str, Any]) -> str:
    name = str(error["loc"][0]) if error["loc"] else ""
    place = f"{where}:{lines[name]}: " if name in lines and name not in overrides else ""
    if error["type"] == "extra_forbidden":
        return f"{place}{name!r} is no recipe field{nearest(name, Fields.model_fields)}"
    text = error["msg"].removeprefix("Value error, ")
    if not name:
        return text
    field = Fields.model_fields.get(name)
    about = f" ({field.description})" if field and field.description else ""
    return f"{place}{name}: {error['input']!r}: {text[:1].lower()}{text[1:]}{about}"
