"""`kit ask`: what its arguments mean; its conversation, where what is typed is asked, but for /commands."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from kit.common.errors import KitError, nearest
from kit.data.shapes import is_blank
from kit.models.template import Message
from kit.recipe.fields import Fields
from kit.recipe.reading import parse_overrides

COMMANDS = {"/reset": "forget the conversation; the system message stays",
            "/system": "begin anew with a system message: /system TEXT; without TEXT with the recipe's own",
            "/help": "show this; Ctrl-D ends"}
Ask = Callable[[list[Message]], Iterable[str]]


def question_and_fields(words: list[str]) -> tuple[str | None, dict[str, Any]]:
    """The question among the arguments of `kit ask`, and the fields that are set.

    What begins with a field's name and `=`, or is a name and `=` without a space, sets a field; the other is the
    question. Raises KitError for two questions, an empty one, and a name that is no field.
    """
    def sets_a_field(word: str) -> bool:
        name, equals, value = word.partition("=")
        return bool(equals) and (name in Fields.model_fields or (name.isidentifier() and not re.search(r"\s", value)))

    pairs = [word for word in words if sets_a_field(word)]
    questions = [word for word in words if word not in pairs]
    if len(questions) > 1:
        raise KitError(f"the question is one argument, not {len(questions)}: {', '.join(map(repr, questions[:3]))}",
                       "put it in quotes: kit ask RUN 'a whole question'")
    if questions and is_blank(questions[0]):
        raise KitError("the question is empty", "kit ask RUN 'a question', or without one for a conversation")
    try:
        return (questions[0] if questions else None), parse_overrides(pairs)
    except KitError as error:
        raise KitError(error.message, f"{error.hint}; to ask it as it is, begin with a space") from None


def chat(ask: Ask, lines: Iterable[str] | None = None) -> None:
    """Ask each line, with the turns before it, and print the answer as it comes; lines are typed where none are given.

    A KitError, of a template that takes no system message for example, is told where a person types, else raised.
    """
    typed = lines is None and sys.stdin.isatty()
    system: list[Message] = []
    turns: list[Message] = []
    for line in _typed() if lines is None else lines:
        if line.startswith("/"):
            system, turns = _command(line, system, turns)
        elif line.strip():
            question = {"role": "user", "content": line.strip()}
            try:
                answer = say(ask([*system, *turns, question]))
            except KitError as error:
                if not typed:
                    raise
                print(error)
            else:
                turns += [question, {"role": "assistant", "content": answer}]


def _command(line: str, system: list[Message], turns: list[Message]) -> tuple[list[Message], list[Message]]:
    """The system message and the turns that a command leaves."""
    word, _, text = line.strip().partition(" ")
    if word == "/reset":
        print("a new conversation")
        return system, []
    if word == "/system":
        print("a new conversation, " + ("with that system message" if text.strip() else "with the recipe's own system "
                                        "message, if it has one"))
        return [{"role": "system", "content": text.strip()}] if text.strip() else [], []
    if word != "/help":
        print(f"there is no {word}{nearest(word, COMMANDS)}; to ask it as it is, begin with a space")
    print("\n".join(f"  {name:<8} {what}" for name, what in COMMANDS.items()))
    return system, turns


def say(pieces: Iterable[str]) -> str:
    """Print an answer as it comes; the whole of it."""
    text = ""
    try:
        for piece in pieces:
            text += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print()
        raise
    print()
    return text


def _typed() -> Iterator[str]:
    """The lines of standard input, until its end."""
    with suppress(EOFError):
        while True:
            yield input("› " if sys.stdin.isatty() else "")
