"""JSON and JSON Lines to records, row by row, with the line of each mistake."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

from kit.common.errors import KitError
from kit.data.encodings import CUT, mostly_other, not_utf8
from kit.data.records import Problem, Record, Rows, _lines, _Progress

TORN = "; the file was cut off here"


def _jsonl(path: Path, progress: _Progress) -> Rows:
    filled = (raw for _, raw, _ in _lines(path, _Progress(0, None)) if raw.strip())
    if mostly_other(itertools.islice(filled, 100)):
        raise not_utf8(path)
    row = 0
    for number, line, last in _lines(path, progress):
        if not line.strip():
            continue
        row += 1
        try:
            text = line.decode()
            value = json.loads(text)
        except UnicodeDecodeError as error:
            torn = last and error.reason == CUT
            seen = _excerpt(line.decode(errors="replace"), len(line[: error.start].decode()))
            yield Problem("torn_line" if torn else "wrong_encoding",
                          f"line {number}: not UTF-8 at byte {error.start + 1}: {seen}{TORN * torn}", row, number)
        except (RecursionError, ValueError) as error:
            torn = last and isinstance(error, json.JSONDecodeError)
            yield Problem("torn_line" if torn else "invalid_json", _why(error, text, number) + TORN * torn, row, number)
        else:
            yield _whole_text(value, text, row, number)


def _json(path: Path, progress: _Progress) -> Rows:
    """One list, parsed row by row: so each row knows its line, and those before a mistake are not lost."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise not_utf8(path) from None
    start = _skip(text, 0)
    if start == len(text):
        return
    if text[start] != "[":
        raise _no_list(path, text, start)
    at, row, line, counted = _skip(text, start + 1), 0, 1, 0
    more, problem, torn = not text.startswith("]", at), "", False
    while more and not problem:
        row += 1
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = json.JSONDecoder().raw_decode(text, at)
        except (RecursionError, ValueError) as error:
            problem, torn = _why(error, text, line, at), _ran_out(text, error)
            if row == 1:
                raise KitError(f"{path}: not JSON: {problem}", "a .json file is one list of objects") from None
            break
        yield _whole_text(value, text[at:end], row, line)
        progress.at(progress.size * end // len(text))
        at = _skip(text, end)
        more = text.startswith(",", at)
        if more:
            at = _skip(text, at + 1)
        elif at == len(text):
            problem, torn = f"{_place(text, at)}: the list has no end", True
        elif text[at] != "]":
            problem = f"{_place(text, at)}: a comma or ] is missing before {_excerpt(text, at)}"
    else:
        row += 1
        if not problem and (at := _skip(text, at + 1)) < len(text):
            problem = f"{_place(text, at)}: text after the end of the list: {_excerpt(text, at)}"
    if problem:
        yield Problem("torn_line" if torn else "invalid_json", problem + TORN * torn, row,
                      line + text.count("\n", counted, at))


def _whole_text(value: Any, source: str, row: int, line: int) -> Record | Problem:
    """JSON can spell half of a surrogate pair, which is no text: no tokenizer and no file takes it."""
    if re.search(r"\\u[dD][89a-fA-F]", source):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            return Problem("invalid_json", f"line {line}: half of a surrogate pair ({half}) in a text", row, line)
        except RecursionError as error:
            return Problem("invalid_json", _why(error, source, line), row, line)
    return Record(value, row, line)


def _why(error: Exception, text: str, line: int, start: int = 0) -> str:
    """What json has against the row that starts in that line, at that place of the text."""
    if isinstance(error, json.JSONDecodeError):
        return f"{_place(text, error.pos, line, start)}: {error.msg}: {_excerpt(text, error.pos)}"
    # The other ValueError is Python's limit of 4300 digits.
    deep = isinstance(error, RecursionError)
    return f"line {line}: " + ("nested too deeply" if deep else "a whole number with too many digits")


def _ran_out(text: str, error: Exception) -> bool:
    """Whether the text ended where JSON would have gone on."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    rest = text[error.pos : error.pos + 20].strip()
    return (not rest or error.msg.startswith("Unterminated") or (error.msg.startswith("Invalid \\u") and len(rest) < 6)
            or any(word.startswith(rest) for word in ("true", "false", "null", "-0")))


def _no_list(path: Path, text: str, start: int) -> KitError:
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (RecursionError, ValueError) as error:
        return KitError(f"{path}: not JSON: {_why(error, text, 1)}", "a .json file is one list of objects")
    following = _skip(text, end)
    hint = "put the rows into [ … ]"
    if isinstance(value, dict) and text.startswith("{", following):
        hint += " with commas between them"
        if "\n" in text[end:following] and "\n" not in text[start:end]:
            hint = f"these are JSON Lines: rename it to {path.stem}.jsonl"
    what = {dict: "an object", str: "a text", bool: "true or false", type(None): "null"}.get(type(value), "a number")
    return KitError(f"{path}: a list of rows is needed, this is {what}", hint)


def _skip(text: str, position: int) -> int:
    found = re.compile(r"[ \t\n\r]*").match(text, position)
    return found.end() if found else position


def _place(text: str, position: int, line: int = 1, start: int = 0) -> str:
    line += text.count("\n", start, position)
    return f"line {line}, column {position - text.rfind(chr(10), 0, position)}"


def _excerpt(text: str, position: int) -> str:
    """What stands around a place in its line, without characters that would move the terminal's cursor."""
    first, last = text.rfind("\n", 0, position) + 1, text.find("\n", position) % (len(text) + 1)
    start, end = max(first, position - 15), min(last, position + 25)
    shown = "".join(character if character.isprintable() else "·" for character in text[start:end])
    return "…" * (start > first) + shown + "…" * (end < last)
