"""An Ollama Modelfile read back: the inverse of kit.modelfile, so that a file on disk can be checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from kit.errors import KitError
from kit.modelfile import END, Joints, Message, fill, go_template

_TEXT = r'\{\{ "((?:[^"\\]|\\.)*)" \}\}'
_PAIR = re.compile(r'^\{\{- (?:else )?if and \(eq \$previous "(\w*)"\) \(eq \.Role "(\w+)"\) \}\}'
                   r'(?:\{\{ if eq \(len \(slice \$\.Messages \$i\)\) 1 \}\}' + _TEXT + r'\{\{ else \}\})?' + _TEXT)
_OPENING = re.compile(r'^\{\{- if eq \$previous "user" \}\}' + _TEXT)
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|U([0-9a-f]{8})|(.))")
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
    """Raises KitError for a missing file, one without FROM or TEMPLATE, and a template that the kit did not write."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KitError(f"{path} can't be read: {error}", WRITE_AGAIN) from None
    gguf = re.search(r"^FROM (?:\./)?(.+)$", text, re.MULTILINE)
    template = re.search(r'^TEMPLATE """(.*?)"""', text, re.MULTILINE | re.DOTALL)
    if not gguf or not template:
        raise KitError(f"{path} has no {'FROM' if not gguf else 'TEMPLATE'}: Ollama would guess one", WRITE_AGAIN)
    system = re.search(r'^SYSTEM """(.*?)"""', text, re.MULTILINE | re.DOTALL)
    return Modelfile(gguf[1].strip(), _joints(path, template[1]), system[1] if system else "",
                     re.findall(r'^PARAMETER stop "(.*)"$', text, re.MULTILINE),
                     re.findall(r"^# (.*)$", text[:gguf.start()], re.MULTILINE))


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
