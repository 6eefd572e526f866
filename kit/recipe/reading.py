"""Where a recipe's values come from: a YAML file, the command line, a notebook's variables; and what is wrong there."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kit.common import hosts
from kit.common.errors import KitError, nearest, one_line
from kit.common.files import PROJECT
from kit.common.secrets import secret
from kit.recipe.cells import deleted
from kit.recipe.fields import Fields
from kit.recipe.foreign import CODE, SHELL, hint, refuse_foreign

MAX_ERRORS = 20
LONGEST = 200  # characters of a value in an error
DEEPEST = 20  # lists and mappings in one another
MOST = 10_000  # values of a file with aliases, counted as often as they are used
# A parameter of such a name holds a secret, and everything a notebook is given is published with it.
SECRET_NAME = re.compile(r"(^|_)(token|secret|password|passwd|credentials?|(api|access|auth|private)_?key)$", re.I)
NO_SECRETS = "tokens come from the environment (HF_TOKEN) or the hub's own login (hf auth login), never from a recipe"
ALL_FIELDS = "every field with its bounds: docs/recipe.md"


class PlainLoader(yaml.SafeLoader):
    """YAML's plain part: a file that nests without end, refers to itself, or grows by aliases is refused, and so are
    tags and a key that is there twice, of which the last would count."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            raise yaml.MarkedYAMLError(problem="a recipe has no aliases (*name): write the value out",
                                       problem_mark=event.start_mark)
        if getattr(event := self.peek_event(), "tag", None) not in (None, "!"):
            raise yaml.MarkedYAMLError(problem=f"no tags are read ({event.tag}): write the value in quotes, if it "
                                       "is a text", problem_mark=event.start_mark)
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"more than {DEEPEST} lists or mappings in one another",
                                       problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.MappingNode) and self.depth:
            known: set[str] = set()
            for key, _ in node.value:
                if str(key.value) in known:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} is there twice", problem_mark=key.start_mark)
                known.add(str(key.value))
        return node


class AnchorLoader(PlainLoader):
    """YAML with anchors, which recipes don't have: their values count as often as they are used, up to MOST."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            node = self.anchors.get(event.anchor)
            if node is None or id(node) not in self.sizes:
                raise yaml.MarkedYAMLError(problem=f"*{event.anchor} refers to nothing before it",
                                           problem_mark=event.start_mark)
            return node
        node = super().compose_node(parent, index)
        parts: list[Any] = list(node.value) if isinstance(node, yaml.CollectionNode) else []
        children = [child for part in parts for child in (part if isinstance(part, tuple) else (part,))]
        size = 1 + sum(self.sizes.get(id(child), 1) for child in children)
        if size > MOST:
            raise yaml.MarkedYAMLError(problem=f"more than {MOST} values")
        self.sizes[id(node)] = size
        return node


def read_values(source: str | Path | dict[str, Any] | Fields,
                overrides: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A recipe's values with `overrides` on top, not checked yet; and where in a file each stands (`file:line: `)."""
    places: dict[str, str] = {}
    if isinstance(source, Fields):
        values = source.model_dump(exclude_unset=True)
    elif isinstance(source, dict):
        values = dict(source)
    else:
        path = _find(source)
        values, lines = _read_yaml(path)
        values.setdefault("run_name", path.stem)
        places = {name: f"{source}:{line}: " for name, line in lines.items() if name not in overrides}
    for length, other in (("max_steps", "num_train_epochs"), ("num_train_epochs", "max_steps")):
        if overrides.get(length) not in (None, -1) and other not in overrides:
            values.pop(other, None)  # the length asked for just now replaces the file's
    values.update(overrides)
    for name, value in values.items():
        _refuse_secret(name, value)
    return values, places


def read_parameters(variables: dict[str, Any]) -> dict[str, Any]:
    """The recipe fields among a notebook's variables (`Recipe.given`): what papermill or a person set there.

    A variable that is nearly a field's name is taken for a slip and refused. One whose line was deleted from its cell
    does not count, nor an empty text: a form's field that was left empty. What the set-up cell decided comes first.
    """
    fields, gone = dict[str, Any](hosts.fields), deleted()
    for name, value in variables.items():
        if name in gone or name.startswith("_") or value == "" or \
                not isinstance(value, (str, int, float, bool, list, dict, type(None))):
            continue
        if value:
            _refuse_secret(name, value if isinstance(value, str) else "",
                           "papermill writes every parameter into the notebook it makes",
                           f"delete that notebook; {NO_SECRETS}")
        if name in Fields.model_fields:
            fields[name] = value
        elif len(name) > 4 and (close := nearest(name, Fields.model_fields, cutoff=0.8)):
            said = f": {other}" if (other := hint(name)) else close
            raise KitError(f"the notebook's parameter {name!r} is no recipe field{said}",
                           "correct its name, or rename the variable")
    return fields


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """['learning_rate=1e-4', 'gguf=[q8_0]'] → fields; each value is read as YAML."""
    values = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            shown = secret(pair) or repr(pair)  # a secret is not to be repeated in a log
            raise KitError(f"{shown} is not field=value", "for example learning_rate=1e-4 or gguf=[q8_0]")
        _refuse_secret(name, text)
        try:
            value = yaml.load(text, PlainLoader)
        except (yaml.YAMLError, ValueError) as error:
            raise KitError(f"{pair!r:.200}: the value is not YAML: {one_line(error, 200)}", "quote it") from None
        if name not in Fields.model_fields:
            raise KitError(_no_field(name, value), ALL_FIELDS)
        values[name] = value
    return values


def _no_field(name: str, value: Any) -> str:
    """What is said of a name that no field has: where another tool's option is here, else the nearest field."""
    said = hint(name, value)
    return f"{_short(repr(name))} is no recipe field" + (f": {said}" if said else
                                                         nearest(name[:LONGEST], Fields.model_fields))


def _refuse_secret(name: str, value: Any, why: str = "every field is written into the run",
                   remedy: str = NO_SECRETS) -> None:
    """KitError for a name or a value that looks like a secret; the value is not repeated."""
    # A slip of a field's name is none (max_new_token).
    if SECRET_NAME.search(name) and not nearest(name, Fields.model_fields, cutoff=0.9):
        raise KitError(f"{name!r} looks like a secret, and {why}", remedy)
    if kind := secret(json.dumps(value, ensure_ascii=False, default=str)):
        raise KitError(f"{name} holds what looks like a secret ({kind}), and {why}", remedy)


def _find(source: str | Path) -> Path:
    """The recipe file: as given, or below the project."""
    for path in (Path(source).expanduser(), PROJECT / source):
        if path.is_file():
            return path
        if path.is_dir():
            raise KitError(f"{source} is a folder, not a recipe", "name a .yaml file")
    known = sorted(f"recipes/{p.name}" for p in (PROJECT / "recipes").glob("*.yaml"))
    raise KitError(f"there is no recipe {source}{nearest(f'recipes/{Path(source).name}', known)}",
                   f"recipes here: {', '.join(known)}")


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The file's fields and the line each stands on."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix in (*CODE, *SHELL):
            refuse_foreign(path, text, None)
        node = yaml.compose(text, Loader=PlainLoader)
        values = yaml.load(text, PlainLoader)
    except UnicodeDecodeError as error:
        raise KitError(f"{path}: not UTF-8 text (byte {error.start})", "save the recipe as UTF-8") from None
    except (yaml.YAMLError, ValueError) as error:
        refuse_foreign(path, text, dict.fromkeys(re.findall(r"^\s*(\w+):", text, re.MULTILINE)))
        raise KitError(f"{path}: not YAML: {one_line(error, 200)}", "a recipe is lines of `field: value`") from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise KitError(f"{path}: a recipe is lines of `field: value`, this is a {type(values).__name__}",
                       "see recipes/quickstart.yaml")
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if first := lines.get(key.value):
            raise KitError(f"{path}:{line}: {key.value} is set twice (first on line {first})", "keep one")
        lines[key.value] = line
    refuse_foreign(path, text, values)
    return {str(name): value for name, value in values.items()}, lines


def refusal(error: ValidationError, source: Any, places: dict[str, str]) -> KitError:
    """pydantic's problems, up to MAX_ERRORS, each with its place and what the field does."""
    problems = [_explain(problem, places) for problem in error.errors()[:MAX_ERRORS]]
    recipe = source if isinstance(source, (str, Path)) else "the recipe"
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return KitError(f"{recipe}: {count}\n  " + "\n  ".join(problems), ALL_FIELDS)


def _explain(problem: Any, places: dict[str, str]) -> str:
    name = str(problem["loc"][0]) if problem["loc"] else ""
    place = places.get(name, "")
    if problem["type"] == "extra_forbidden":
        return place + _no_field(name, problem["input"])
    text = _short(problem["msg"].removeprefix("Value error, "))
    if not name:
        return text
    description = Fields.model_fields[name].description
    return f"{place}{name}: {_short(repr(problem['input']))}: {text[:1].lower()}{text[1:]} ({description})"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"
