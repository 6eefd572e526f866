"""The options that a file of another tool sets: YAML, JSON, shell scripts and command lines. Nothing is executed."""

import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kit.common.errors import KitError, one_line
from kit.recipe.foreign import CODE, SHELL, plain, tool_of, tool_of_text, tools
from kit.recipe.foreign_code import code_options
from kit.recipe.reading import DEEPEST, AnchorLoader, PlainLoader

LARGEST = 20_000_000  # bytes of a file: a notebook may hold pictures
FIRST, LAST = "\ue000", "\ue001"  # around the name of a variable that is not known
PROGRAMS = re.compile(r"(?:.*/)?(?:torchrun|python[\d.]*|accelerate|deepspeed|swift|llamafactory-cli|axolotl|bash|sh)$")
# What is quoted stays; shlex would also take the # of rows.jsonl#500 for a comment.
COMMENT = re.compile(r"""'[^']*'|"(?:\\.|[^"\\])*"|(?:^|(?<=\s))\#[^\n]*""", re.MULTILINE)
# Of a line of shell: what is kept as it is, then where output goes, then what ends a command.
SHELL_PARTS = re.compile(
    r"""('[^']*'|"(?:\\.|[^"\\])*"|\\.|\$\([^)]*\)|`[^`]*`)"""
    r"""|(?:^|(?<=\s))(?:\d|&)?>{1,2}\s*(?:&\s*[\d-]|[^\s;|&<>]+)|(?<=\s)<\s+\S+"""
    r"""|(;|&&|\|\||\||&)""", re.DOTALL)
END = "\ue002"
ANSWERS = re.compile(r"\b(?:swift|llamafactory-cli) (?:infer|chat|webchat|api|deploy|eval|app)\b|"
                     r"--(?:question_file|lora_path|infer_backend)\b")
WHOLE = re.compile(r"kwargs|_dict|columns|roles|tokens|fsdp|loftq|mapping|deepspeed")  # mappings that are one value
CONFIGS = (".yaml", ".yml", ".json")


Chain = tuple[Path, ...]  # files of which each names the next


class Option(NamedTuple):
    """An option of another tool: its name without dashes and groups, its value, and how the file writes its name."""

    name: str
    value: Any
    shown: str


class Source(NamedTuple):
    """What a file sets. `notes`: what of it could not be read; `folder`: where paths may begin;
    `trainer`: the tool whose training defaults count, if another's."""

    tool: str
    options: list[Option]
    notes: list[str]
    folder: Path
    trainer: str = ""


def read_foreign(given: str) -> Source:
    """The options of a file, or of a command line given in its place; KitError when no tool's are found."""
    path = Path(given).expanduser()
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # a command line is no name of a file
        is_file = False
    if is_file:
        return _read_file(path)
    words = re.sub(r"^(?:\s*\w+=\S*\s)+", "", given).split()
    if len(words) > 2 and PROGRAMS.match(words[0]):
        return _shell(given, Path(), "the command line")
    if path.is_dir():
        raise KitError(f"{given} is a folder", "name the file that a run was started with")
    raise KitError(f"there is no file {given[:200]}", "name a file of another tool, one of your recipes, or a whole "
                                                      "command line in quotes")


def _read_file(path: Path, by: Chain = ()) -> Source:
    """The options of a file; `by` are those whose commands name it."""
    if path.stat().st_size > LARGEST:
        raise KitError(f"{path}: more than {LARGEST // 1_000_000} MB: no file that starts a run", "name that one")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise KitError(f"{path}: not UTF-8 text (byte {error.start})", "save it as UTF-8") from None
    except OSError as error:
        raise KitError(f"{path} can't be read: {error.strerror}", "name a file that you may read") from None
    if not text.strip() or "\0" in text:
        raise KitError(f"{path} is {'no text' if text.strip() else 'empty'}", "name a file that starts a run")
    if path.suffix in CODE:
        tool, found, notes, trainer = code_options(path, text)
        return Source(tool, [Option(*option) for option in found], notes, path.parent, trainer)
    if path.suffix in CONFIGS or (path.suffix not in SHELL and not tool_of_text(text)):
        return _yaml(path, text, by)
    return _shell(text, path.parent, str(path), (*by, path.resolve()))


def _yaml(path: Path, text: str, by: Chain) -> Source:
    try:
        values = yaml.load(text, AnchorLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if tool_of_text(text):
            return _shell(text, path.parent, str(path), (*by, path.resolve()))
        raise KitError(f"{path}: not YAML: {one_line(error, 200)}", "a file for another tool was expected") from None
    if not isinstance(values, dict):
        raise KitError(f"{path}: a {type(values).__name__}, where lines of `name: value` are needed",
                       "name the file that a run was started with")
    options = list(_leaves(values))
    return Source(_tool(str(path), {*(option.name for option in options), *map(str, values)}), options, [], path.parent)


def _leaves(values: dict[str, Any], group: str = "", depth: int = 0) -> Iterator[Option]:
    """The options of a mapping; one in a group is shown as group.name. A value that is a mapping itself stays one."""
    if depth > DEEPEST:
        raise KitError(f"more than {DEEPEST} groups in one another", "a file for another tool was expected")
    for key, value in values.items():
        name, shown = plain(str(key)), f"{group}{key}"
        if isinstance(value, dict) and not WHOLE.search(name):
            yield Option(name, {}, shown)  # for the sake of its name
            yield from _leaves(value, f"{shown}.", depth + 1)
        else:
            yield Option(name, value, shown)


def _tool(place: str, names: set[str], found: str | None = None) -> str:
    if tool := found or tool_of(names):
        return tool
    known = ", ".join(tool.name for tool in tools().values())
    raise KitError(f"{place}: no option of a known tool in it (found: {', '.join(sorted(names)[:6]) or 'none'})",
                   f"known are {known}; write the recipe by docs/options.md")


# ── Shell ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _shell(text: str, folder: Path, place: str, by: Chain = ()) -> Source:
    """The command of a script that sets most options, its variables put in; a YAML it names is read first."""
    variables: dict[str, str] = {}
    commands: list[list[str]] = []
    for line in (command for whole in _lines(text) for command in _commands(whole)):
        try:
            words = shlex.split(line)
        except ValueError:  # a quote that is never closed
            continue
        while words and (assigned := re.fullmatch(r"(\w+)=(.*)", words[0], re.DOTALL)):
            unknown = f"{FIRST}${assigned[1]}{LAST}"  # what another program prints, or the script is given
            value = unknown if re.search(r"\$\(|`|\$[0-9@*]", assigned[2]) else _filled(assigned[2], variables)
            variables.setdefault(assigned[1], value)
            words = words[1:]
        if words and words[0] in ("export", "local"):
            pairs = [word.partition("=") for word in words[1:] if "=" in word]
            variables |= {name: _filled(value, variables) for name, _, value in pairs if name not in variables}
        elif any(PROGRAMS.match(word) for word in words[:3]):
            commands.append([part for word in words for part in _parts(word, variables)])
    if not commands:
        raise KitError(f"{place}: no command that starts a training", "name the script that calls torchrun, python, "
                       "swift or llamafactory-cli")
    command = max(commands, key=lambda words: sum(word.startswith("-") for word in words))
    base, options, notes = _command(command, folder, by)
    base += _own_values(command, folder, by)
    if ANSWERS.search(" ".join(command)):
        raise KitError(f"{place} answers questions and trains nothing", "kit answer RUN FILE or kit ask RUN")
    if option := variables.get("NPROC_PER_NODE"):
        options.append(Option("nproc_per_node", option, "NPROC_PER_NODE"))
    names = {option.name for option in (*base, *options)}
    tool = _tool(place, names, _by_program(" ".join(command), names) if names else None)
    return Source(tool, [*base, *options], notes, folder)


def _lines(text: str) -> Iterator[str]:
    """Logical lines: those continued by a backslash or an open quote are joined, comments and fences left out."""
    pending = ""
    text = re.sub(r"\\[ \t]*(?:#[^\n]*)?\n", " ", text.replace("\r\n", "\n"))
    for line in COMMENT.sub(lambda match: "" if match[0].startswith("#") else match[0], text).splitlines():
        line = re.sub(r"^\s*(?:\$ |!|%%bash|```.*)", "", line) if not pending else line
        pending += line + "\n"
        try:
            shlex.split(pending)
        except ValueError:
            if len(pending) < 10_000:
                continue
        yield pending
        pending = ""
    if pending:
        yield pending


def _commands(line: str) -> list[str]:
    """The commands of a logical line, without where their output goes."""
    return SHELL_PARTS.sub(lambda part: part[1] or (END if part[2] else " "), line).split(END)


def _filled(text: str, variables: dict[str, str]) -> str:
    """The text with $NAME, ${NAME} and ${NAME:-default}; what is not known stays marked."""
    def put(match: re.Match[str]) -> str:
        name, default = match[1] or match[3] or "", match[2]
        return variables.get(name) or default or f"{FIRST}${name}{LAST}"

    text = re.sub(r"\$\([^()]*(?:\([^()]*\)[^()]*)*\)|`[^`]*`", f"{FIRST}$(…){LAST}", text)
    return re.sub(r"\$\{(\w+)(?::?-([^}]*))?\}|\$(\w+)", put, text)


def _parts(word: str, variables: dict[str, str]) -> list[str]:
    """A word with its variables; one that is nothing but a variable may be several words."""
    filled = _filled(word, variables)
    if re.fullmatch(r"\$\{?\w+\}?", word) and filled.lstrip().startswith("-"):
        return filled.replace("\\", " ").split()
    return [filled]


def _by_program(line: str, names: set[str]) -> str | None:
    """The tool by its command; a script of anybody's is taken for a known one by two of its options."""
    found = tool_of_text(line)
    if found in ("llamafactory", "swift", "axolotl") or ".sh" in line:
        return found
    by_names = tool_of(names)
    sure = by_names and len(tools()[by_names].signs & names) > 1 and by_names != "axolotl"
    return by_names if sure or not by_names else "transformers"


def _command(words: list[str], folder: Path, by: Chain) -> tuple[list[Option], list[Option], list[str]]:
    """Options of a YAML that the command names, its own options, and what could not be read."""
    base: list[Option] = []
    options: list[Option] = []
    notes: list[str] = []
    values: list[str] = []
    name = ""
    for word in [*words, "--"]:
        if re.match(r"\[-|[^\[]*\]$", word):
            word = word.strip("[]")  # a manual's brackets around what may be left out
        is_option = re.match(r"--?[A-Za-z]|--$", word)
        if not is_option:
            if not name and (pair := re.fullmatch(r"([a-z]\w+)=(.*)", word)):
                options.append(Option(pair[1], yaml.safe_load(pair[2]), pair[1]))  # of llamafactory-cli train x.yaml
            elif name in ("", "-m") and word.endswith(CONFIGS):
                base += _named_file(word, folder, notes, by)
            else:
                values.append(word)
            continue
        if name:
            _add(name, values, options, notes)
        if name == "--config" and values:
            base += _named_file(values[0], folder, notes, by)
        name, equals, value = word.partition("=") if word != "--" else ("", "", "")
        values = [value] if equals else []
    return base, [option for option in options if option.name != "config"], notes


def _own_values(words: list[str], folder: Path, by: Chain) -> list[Option]:
    """What a script sets that the command starts: read where it lies there, known of Qwen's finetune.sh."""
    scripts = [word for word in words if word.endswith((".sh", ".bash", ".py"))]
    for path in (folder / script for script in scripts):
        if path.is_file() and path.resolve() not in by:
            with suppress(KitError):  # a script that shows no options
                return [option._replace(shown=f"{path.name}: {option.shown}")
                        for option in _read_file(path, by).options]
    if any(script.endswith("finetune.sh") for script in scripts):
        return [Option(name, value, "finetune.sh's own value") for name, value in tools()["finetune"].script.items()]
    return []


def _named_file(name: str, folder: Path, notes: list[str], by: Chain) -> list[Option]:
    for path in (Path(name), folder / name):
        if path.is_file() and path.resolve() not in by:
            return _read_file(path, by).options
    notes.append(f"{name}: not found, so nothing of it is here")
    return []


def _add(name: str, values: list[str], options: list[Option], notes: list[str]) -> None:
    """An option of the command; a script that it stands before is no value of it."""
    if values and values[-1].endswith(".py"):
        values = values[:-1]
    if values and re.fullmatch(r"<.*>|/?path/to/.*|PATH.TO.*", values[0]):
        notes.append(f"{name} {values[0]}: a placeholder")
        return
    if any(FIRST in value for value in values):
        written = " ".join(values).replace(FIRST, "").replace(LAST, "")
        notes.append(f"{name} {written}: not known before the script runs")
        return
    if name == "-m" and values and "." in values[0] and "/" not in values[0]:
        return  # python -m package.module
    short = {"-m": "model_name_or_path", "-d": "data_path"}.get(name, plain(name))
    read = [_scalar(value) for value in values]
    options.append(Option(short, read[0] if len(read) == 1 else read or True, name))


def _scalar(text: str) -> Any:
    """A value as it was written on a command line: a number, a truth value, JSON, else text."""
    try:
        return yaml.load(text, PlainLoader)
    except (yaml.YAMLError, ValueError):
        return text
