"""An Ollama Modelfile read back: the inverse of kit.modelfile, so that a file on disk can be checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from kit.common.errors import KitError
from kit.export.modelfile import END, Joints, Message, fill, go_template

_TEXT = r'\{\{ "((?:[^"\\]|\\.)*)" \}\}'
_PAIR = re.compile(r'^\{\{- (?:else )?if and \(eq \$previous "(\w*)"\) \(eq \.Role "(\w+)"\) \}\}'
                   r'(?:\{\{ if eq \(len \(slice \$\.Messages \$i\)\) 1 \}\}' + _TEXT + r'\{\{ else \}\})?' + _TEXT)
_OPENING = re.compile(r'^\{\{- if eq \$previous "user" \}\}' + _TEXT)
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|U([0-9a-f]{8})|(.))")
# A comment, a text between triple quotes (the closing ones stand at a line's end), a word, a parameter; or nothing.
_COMMAND = re.compile(r'(?:(?P<comment>#) ?(?P<note>.*)|(?P<block>TEMPLATE|SYSTEM) """(?P<text>(?s:.*?))"""|'
                      r'(?P<word>FROM|PARAMETER) (?P<value>.*\S)|)[ \t]*(?:\n|\Z)')
ONCE = ("FROM", "TEMPLATE", "SYSTEM")
WRITE_AGAIN = "write it again: kit.write_modelfile, or kit run of the recipe"


class Modelfile(NamedTuple):
    """`gguf` is the file's name in FROM, `notes` are the comments on top, `joints` the template's texts."""

    gguf: str
    joints: Joints
    system: str
    stops: list[str]
    notes: list[str]

    def prompt(self, messages: list[Message]) -> str:
        """What Ollama sends to the model for these messages, without the BOS it may add."""
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return fill(self.joints, messages)


def read_modelfile(path: Path) -> Modelfile:
    """Raises KitError for a missing file, and for one that sends something else than what the kit writes can send."""
    try:
        text = path.read_bytes().decode("utf-8")  # carriage returns are sent to the model too
    except (OSError, UnicodeDecodeError) as error:
        raise KitError(f"{path} can't be read: {error}", WRITE_AGAIN) from None
    commands = _commands(path, text)
    notes = [value for name, value in commands if name == "#"]
    found = {name: value for name, value in commands if name in ONCE}
    for name in ("FROM", "TEMPLATE"):
        if name not in found:
            raise KitError(f"{path} has no {name}: Ollama would guess one", WRITE_AGAIN)
    parameters = [value.partition(" ") for name, value in commands if name == "PARAMETER"]
    stops = [value.removeprefix('"').removesuffix('"') for name, _, value in parameters if name == "stop"]
    return Modelfile(found["FROM"].removeprefix("./"), _joints(path, found["TEMPLATE"]), found.get("SYSTEM", ""), stops,
                     notes)


def _commands(path: Path, text: str) -> list[tuple[str, str]]:
    """[(command, or # for a comment, its value)]; KitError for a line that Ollama might read in another way."""
    commands: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        found = _COMMAND.match(text, at)
        part = found.groupdict(default="") if found else {}
        name = part.get("comment") or part.get("block") or part.get("word") or ""
        if not found or (name in ONCE and name in dict(commands)):
            line = text[at:].partition("\n")[0]
            why = "there is one already" if found else "it is not of a form that the kit writes"
            raise KitError(f"{path}: line {text.count(chr(10), 0, at) + 1}, {line[:80]!r}: {why}, so what Ollama sends "
                           "to the model is not known", WRITE_AGAIN)
        if name:
            commands.append((name, part["note"] or part["text"] or part["value"]))
        at = found.end()
    return commands


def _joints(path: Path, template: str) -> Joints:
    """The texts between neighbours that `go_template` wrote as this template."""
    joints: Joints = {}
    for line in template.splitlines():
        if found := _PAIR.match(line):
            joints[found[1], found[2]] = _unquoted(found[4])
        elif found := _OPENING.match(line):
            joints["user", END] = _unquoted(found[1])
    # A text or a space anywhere else in the template would be sent to the model too.
    written = go_template(joints) if ("user", END) in joints else ""
    if written != template:
        at = next((i for i, (a, b) in enumerate(zip(written, template, strict=False)) if a != b),
                  min(len(written), len(template)))
        around = template[max(0, at - 20):at + 20]
        raise KitError(f"{path}: its TEMPLATE is not one that the kit writes, from {around!r} on, so what it sends to "
                       "the model is not known", WRITE_AGAIN)
    return joints


def _unquoted(text: str) -> str:
    named = {"n": "\n", "t": "\t", "r": "\r"}
    return _ESCAPE.sub(lambda m: chr(int(m[1] or m[2], 16)) if m[1] or m[2] else named.get(m[3], m[3]), text)
