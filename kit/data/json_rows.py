"""JSON to rows, whatever the file's ending: a list, an object a line, or objects printed over several lines."""

import codecs
import itertools
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from kit.data.encodings import CUT, mostly_other, not_utf8
from kit.data.records import MEGABYTE, Line, Problem, Progress, Record, Rows, excerpt, lines

LARGEST = 2**27  # characters of an object; larger is none
BLANK = re.compile(r"[ \t\n\r]*")
TORN = "; the file was cut off here"


def read_json(path: Path, progress: Progress) -> Rows:
    """.json and .jsonl, whichever of the two it really is: one list of rows, or one object after another, each on a
    line or printed over several."""
    with path.open("rb") as file:
        head = file.read(MEGABYTE).removeprefix(codecs.BOM_UTF8).lstrip()
    listed = head.startswith(b"[") and not _a_list_a_line(head)
    yield from (_listed if listed else _one_by_one)(path, progress)


def _a_list_a_line(head: bytes) -> bool:
    first, _, others = head.partition(b"\n")
    try:
        return bool(others.strip() and json.loads(first) is not None)
    except (RecursionError, ValueError):
        return False


class _Lines(Iterator[Line]):
    """Lines of which some can be put back."""

    def __init__(self, coming: Iterator[Line]) -> None:
        self._coming, self._back = coming, deque[Line]()

    def __next__(self) -> Line:
        return self._back.popleft() if self._back else next(self._coming)

    def put_back(self, taken: Iterable[Line]) -> None:
        self._back.extendleft(reversed(list(taken)))


def _one_by_one(path: Path, progress: Progress) -> Rows:
    """A broken row is a problem; reading goes on behind it."""
    filled = (line.raw for line in lines(path, Progress(0, None)) if line.raw.strip())
    if mostly_other(itertools.islice(filled, 100)):
        raise not_utf8(path)
    row, coming = 0, _Lines(lines(path, progress))
    for line in coming:
        if line.raw.strip():
            row += 1
            yield _of_line(line, coming, row)


def _of_line(line: Line, coming: _Lines, row: int) -> Record | Problem:
    number, raw, last = line
    try:
        text = raw.decode()
        value = json.loads(text)
    except UnicodeDecodeError as error:
        torn = last and error.reason == CUT
        around = excerpt(raw.decode(errors="replace"), len(raw[: error.start].decode()))
        return Problem("torn_line" if torn else "wrong_encoding",
                       f"line {number}: not UTF-8 at byte {error.start + 1}: {around}{TORN * torn}", row, number)
    except (RecursionError, ValueError) as error:
        if _ran_out(text, error) and text.lstrip().startswith("{"):
            return _printed(line, coming, row)
        if isinstance(error, json.JSONDecodeError) and text[error.pos:].strip() == "," and error.msg == "Extra data":
            return _whole_text(json.loads(text[: error.pos]), text, row, number)  # a comma as in a list
        return _not_json(error, text, row, number, last)
    return _whole_text(value, text, row, number)


def _printed(first: Line, coming: _Lines, row: int) -> Record | Problem:
    """The object that begins in this line and may go on in others."""
    taken = [first]
    while True:
        taken += (ahead := list(itertools.islice(coming, len(taken))))
        text = _joined(taken)
        try:
            value, end = json.JSONDecoder().raw_decode(text, _skip(text, 0))
        except (RecursionError, ValueError) as error:
            if ahead and _ran_out(text, error) and len(text) < LARGEST:
                continue
            return _broken(taken, coming, row)
        used, behind = text.count("\n", 0, end), text[end:].partition("\n")[0].strip().removeprefix(",")
        coming.put_back([taken[used]._replace(raw=behind.encode(errors="surrogateescape")), *taken[used + 1:]])
        if not text.isascii() and re.search("[\udc80-\udcff]", text[:end]):
            return Problem("wrong_encoding", f"line {first.number}: not UTF-8 in the object that begins there", row,
                           first.number)
        return _whole_text(value, text[:end], row, first.number)


def _broken(taken: list[Line], coming: _Lines, row: int) -> Problem:
    """What is wrong with the object in the first of these lines; it ends where a line begins as that one does."""
    first = taken[0]
    left = first.raw[: len(first.raw) - len(first.raw.lstrip())]
    begins = (left + b"{", left + b"[")
    length = next((k for k, line in enumerate(taken) if k and line.raw.startswith(begins)), len(taken))
    following = taken[length:]
    if not following:
        following = [*itertools.islice(itertools.dropwhile(lambda line: not line.raw.startswith(begins), coming), 1)]
    coming.put_back(following)
    text = _joined(taken[:length])
    try:
        json.JSONDecoder().raw_decode(text, _skip(text, 0))
    except (RecursionError, ValueError) as error:
        return _not_json(error, text, row, first.number, not following and (length > 1 or first.last))
    raise AssertionError("it would have been read")


def _joined(taken: list[Line]) -> str:
    return b"\n".join(line.raw for line in taken).decode(errors="surrogateescape")


def _not_json(error: Exception, text: str, row: int, line: int, at_the_end: bool) -> Problem:
    torn = at_the_end and _ran_out(text, error)
    why = _why(error, text, partial(_place, text, line))
    return Problem("torn_line" if torn else "invalid_json", why + TORN * torn, row, line)


def _listed(path: Path, progress: Progress) -> Rows:
    """The rows of one list, parsed row by row: so each knows its line, those before a mistake are not lost, and the
    file may be larger than memory. A comma behind the last row does no harm."""
    with path.open("rb") as file:
        text, row = _Text(path, file), 1
        text.take("[")
        while not text.take("]"):
            if row > 1 and not text.take(","):
                yield text.problem(f"a comma or ] is missing before {text.excerpt()}" if text.coming() else
                                   "the list has no end", row)
                return
            if row > 1 and text.take("]"):
                break
            text.coming()
            text.mark()
            line = text.line
            try:
                value, source = text.value()
            except (RecursionError, ValueError) as error:
                yield text.problem(error, row)
                return
            yield _whole_text(value, source, row, line)
            row += 1
            progress.at(file.tell())
        if text.coming():
            yield text.problem(f"text after the end of the list: {text.excerpt()}", row)


class _Text:
    """The text of a file, a megabyte or one value of it in memory; `at` is the place in it that reading has come to."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.text, self.at, self._cut, self._ended = "", 0, b"", False
        self.line, self.column, self._marked = 1, 1, 0  # of the place marked last
        self._more()
        self.text = self.text.removeprefix("﻿")

    def _more(self) -> bool:
        """Whether more could be read; what has been passed is let go."""
        if self._ended:
            return False
        self.mark()
        data = self.file.read(max(MEGABYTE, len(self.text) - self.at))
        self._ended = not data
        try:
            text, used = codecs.utf_8_decode(self._cut + data, "strict", self._ended)
        except UnicodeDecodeError:
            raise not_utf8(self.path) from None
        self._cut = (self._cut + data)[used:]
        self.text, self.at, self._marked = self.text[self.at:] + text, 0, 0
        return True

    def mark(self) -> None:
        """Know the line and the column of `at`, so that they are not counted from further back."""
        (self.line, self.column), self._marked = self._place(self.at), self.at

    def _place(self, position: int) -> tuple[int, int]:
        end = self.text.rfind("\n", self._marked, position)
        return (self.line + self.text.count("\n", self._marked, position),
                position - end if end >= 0 else self.column + position - self._marked)

    def coming(self) -> str:
        """The next character that is no space, '' at the end."""
        self.at = _skip(self.text, self.at)
        while self.at == len(self.text) and self._more():
            self.at = _skip(self.text, self.at)
        return self.text[self.at : self.at + 1]

    def take(self, character: str) -> bool:
        """Go on behind this character, if it is the next."""
        found = self.coming() == character
        self.at += found
        return found

    def value(self) -> tuple[Any, str]:
        """The next value and its source. Raises what json raises."""
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except (RecursionError, ValueError) as error:
                if not _ran_out(self.text, error) or not self._more():
                    raise
                continue
            if end == len(self.text) and self._more():
                continue  # a number may go on
            source, self.at = self.text[self.at : end], end
            return value, source

    def excerpt(self) -> str:
        return excerpt(self.text, self.at)

    def problem(self, what: Exception | str, row: int) -> Problem:
        """A problem of the row or the character at `at`."""
        line, column = self._place(self.at)
        if isinstance(what, str):
            torn, message = not self.coming(), f"line {line}, column {column}: {what}"
        else:
            torn, message = _ran_out(self.text, what), _why(what, self.text, self._place)
        return Problem("torn_line" if torn else "invalid_json", message + TORN * torn, row, line)


def _whole_text(value: Any, source: str, row: int, line: int) -> Record | Problem:
    """JSON can spell half of a surrogate pair, which is no text: no tokenizer and no file takes it."""
    if re.search(r"\\u[dD][89a-fA-F]", source):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            return Problem("invalid_json", f"line {line}: half of a surrogate pair ({half}) in a text", row, line)
        except RecursionError as error:
            return Problem("invalid_json", _why(error, source, partial(_place, source, line)), row, line)
    return Record(value, row, line)


def _why(error: Exception, text: str, place: Callable[[int], tuple[int, int]]) -> str:
    """What json has against the row; `place` gives the line and the column of a position in the text."""
    if isinstance(error, json.JSONDecodeError):
        line, column = place(error.pos)
        return f"line {line}, column {column}: {error.msg}: {excerpt(text, error.pos)}"
    # The other ValueError is Python's limit of 4300 digits.
    return f"line {place(0)[0]}: " + ("nested too deeply" if isinstance(error, RecursionError) else
                                      "a whole number with too many digits")


def _ran_out(text: str, error: Exception) -> bool:
    """Whether the text ended where JSON would have gone on."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    rest = text[error.pos : error.pos + 20].strip()
    return (not rest or error.msg.startswith("Unterminated") or (error.msg.startswith("Invalid \\u") and len(rest) < 6)
            or any(word.startswith(rest) for word in ("true", "false", "null", "-Infinity", "NaN", "Infinity", "-0")))


def _skip(text: str, position: int) -> int:
    blank = BLANK.match(text, position)
    return blank.end() if blank else position


def _place(text: str, line: int, position: int) -> tuple[int, int]:
    return line + text.count("\n", 0, position), position - text.rfind("\n", 0, position)
