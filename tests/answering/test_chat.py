"""The conversation of `kit ask RUN` and its commands."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from kit.answering.chat import COMMANDS, chat
from kit.common.errors import KitError


def sent(*lines: str) -> list[list[str]]:
    """What the model was asked, each conversation as ["role: content", …]; it answers "A1", "A2" and so on."""
    asked: list[list[str]] = []

    def ask(messages: list[dict[str, str]]) -> Iterable[str]:
        asked.append([f"{message['role']}: {message['content']}" for message in messages])
        return ["A", str(len(asked))]

    chat(ask, lines)
    return asked


def test_a_question_comes_with_the_turns_before_it() -> None:
    assert sent("Hi", "", "  why? ") == [["user: Hi"], ["user: Hi", "assistant: A1", "user: why?"]]


def test_reset_forgets_the_turns_and_keeps_the_system_message() -> None:
    assert sent("Hi", "/reset", "Hi")[1] == ["user: Hi"]
    assert sent("/system Be brief. 简短。", "Hi", "/reset", "Ho") == [
        ["system: Be brief. 简短。", "user: Hi"], ["system: Be brief. 简短。", "user: Ho"]]


def test_a_system_message_begins_anew_and_can_be_taken_back() -> None:
    assert sent("Hi", "/system Be brief.", "Ho", "/system", "Ha") == [
        ["user: Hi"], ["system: Be brief.", "user: Ho"], ["user: Ha"]]


def test_help_and_an_unknown_command_are_told_and_not_sent(capsys: pytest.CaptureFixture[str]) -> None:
    assert sent("/help") == []
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)
    assert sent("Hi", "/rest", " /etc/hosts?") == [["user: Hi"], ["user: Hi", "assistant: A1", "user: /etc/hosts?"]]
    assert "did you mean '/reset'" in capsys.readouterr().out


def test_an_error_is_told_to_a_person_and_ends_a_pipe(monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    def ask(messages: list[dict[str, str]]) -> Iterable[str]:
        if messages[0]["role"] == "system":
            raise KitError("no system messages here")
        return [str(len(messages))]

    lines = ["Hi", "/system x", "Hi", "/system", "Hi"]
    with pytest.raises(KitError):
        chat(ask, lines)
    left = iter(lines)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: next(left, None) or (_ for _ in ()).throw(EOFError))
    chat(ask)
    assert capsys.readouterr().out.splitlines()[-1] == "1", "the conversation goes on"
