"""What the documents say: their commands, links, pictures, and whether a command is one."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

import typer
import yaml

from kit.cli import app
from kit.recipe.reading import parse_overrides
from kit.recipe.recipe import Recipe
from support.command import PROJECT

READMES = ("README.md", "README.zh.md")
DOCUMENTS = (*READMES, *(f"docs/{path.name}" for path in sorted((PROJECT / "docs").glob("*.md"))))
SUBCOMMANDS = {str(command.name or command.callback.__name__) for command in app.registered_commands
               if command.callback}
TORCHRUN = {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port", "--rdzv_backend",
            "--rdzv_endpoint", "--rdzv_id"}
MAKEFILE = (PROJECT / "Makefile").read_text(encoding="utf-8")


def text_of(document: str) -> str:
    return (PROJECT / document).read_text(encoding="utf-8")


def scripts(document: str) -> list[str]:
    """The blocks of shell commands, as they stand there."""
    return re.findall(r"^```bash\n(.*?)^```", text_of(document), re.DOTALL | re.MULTILINE)


def commands(document: str) -> list[list[str]]:
    """The words of each command in these blocks: comments gone, continued and quoted lines joined."""
    return [words for script in scripts(document) for line in _whole_lines(script) for words in _simple(line)]


def _whole_lines(script: str) -> Iterator[str]:
    pending = ""
    for line in script.replace("\\\n", " ").splitlines():
        pending += line + "\n"
        try:
            shlex.split(pending, comments=True)
        except ValueError:  # a quote is still open
            continue
        yield pending
        pending = ""
    assert not pending, f"a quote is never closed: {pending}"


def _simple(line: str) -> Iterator[list[str]]:
    """'a && b' → a, b"""
    words: list[str] = []
    for word in [*shlex.split(line, comments=True), "&&"]:
        if word != "&&":
            words.append(word)
        elif words:
            yield words
            words = []


def links(document: str) -> list[str]:
    """Targets of links and pictures, in their order."""
    return re.findall(r"\]\(([^)\s]+)\)", text_of(document))


def pictures(document: str) -> list[str]:
    return re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text_of(document))


def anchors(document: str) -> set[str]:
    """What the headings of a page are linked by."""
    heads = re.findall(r"^#+ (.+)$", text_of(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def check_command(words: list[str]) -> None:
    """That a command exists, with these options, fields and files."""
    match words:
        case ["make", *verbs]:
            names = [re.sub(r"^(\w+)=.*", r"$(\1)", verb) for verb in verbs]  # VARIABLE=value, or a verb
            assert names and all(name in MAKEFILE if name[0] == "$" else
                                 re.search(rf"^{name}:", MAKEFILE, re.MULTILINE) for name in names), words
        case ["kit", "--help" | "--version"]:
            pass
        case ["kit" | "torchrun", *_]:
            check_kit(kit_words(words))
        case ["papermill", notebook, _, *parameters]:
            assert (PROJECT / notebook).is_file() and set(parameters[::3]) == {"-p"}, words
            assert set(parameters[1::3]) <= {"recipe", *Recipe.model_fields}, words
        case ["python", "-m", module]:
            assert importlib.util.find_spec(module), words
        case ["python", script, *_] | ["sbatch", script, *_]:
            assert (PROJECT / script).is_file(), words
        case ["ollama", "create", _, "-f", "Modelfile"] | ["ollama", "run", _] | ["cd", _]:
            pass
        case ["source", ".venv/bin/activate"] | ["export", _]:
            pass
        case _:
            raise AssertionError(f"{words} is no command that is known here")


def check_kit(words: list[str]) -> None:
    """Recipe and files that a subcommand names are there, and its fields are accepted."""
    fields = parse_overrides([word for word in words[1:] if re.match(r"\w+=", word)])
    named = [word for word in words[1:] if re.match(r"(recipes|data)/", word)]
    assert all((PROJECT / word).exists() for word in named), words
    recipe = Recipe.load(next((word for word in named if word.endswith(".yaml")), {}), **fields)
    assert recipe.deepspeed is None or (PROJECT / recipe.deepspeed).is_file(), words


def kit_words(command: list[str]) -> list[str]:
    """What a command gives to `kit`: its subcommand, which exists with these options, and the rest."""
    if command[0] == "torchrun":
        start = command.index("-m")
        assert set(command[1:start:2]) <= TORCHRUN, command
        command = command[start + 1:]
        assert command[:2] == ["kit", "train"], "kit run is one process"
    assert command[0] == "kit" and command[1] in SUBCOMMANDS, command
    for word in command[2:]:
        if word.startswith("-") and word != "--debug":  # an option of every verb
            assert word in _options(command[1]), f"kit {command[1]} has no {word}"
    return command[1:]


def _options(command: str) -> Iterable[str]:
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    return {option for parameter in parameters for option in parameter.opts}


def check_name(name: str, variables: Iterable[str] = ()) -> None:
    """A field, `field: value` that is accepted, a command, a verb of the Makefile or one of the variables."""
    if name in variables or name in Recipe.model_fields:
        return
    if name.partition(" ")[0] in ("make", "kit", "torchrun"):
        check_command(name.split("[")[0].split() if name.startswith("make") else shlex.split(name))
        return
    fields = yaml.safe_load(name)
    assert isinstance(fields, dict), name
    recipe = Recipe.load(fields if "eval_dataset" in fields else {"test_size": 2, **fields})
    assert recipe.deepspeed is None or Path(PROJECT / recipe.deepspeed).is_file(), name
