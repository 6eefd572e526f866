"""Text that is not UTF-8: where it shows, and what it probably is."""

import itertools
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from charset_normalizer import from_bytes
from charset_normalizer.utils import identify_sig_or_bom

from kit.common.errors import KitError, one_line
from kit.common.files import unwritable

# What rows come in besides UTF-8. Among all it knows, charset-normalizer takes French for an old Mac's encoding.
LIKELY = ["gb18030", "big5", "shift_jis", "cp1252"]
FIXED = (".json", ".jsonl", ".csv", ".tsv", ".txt")  # of which `kit lint --fix` writes a copy
ENOUGH = 100_000  # bytes that are looked at to name an encoding
# Which of the first four bytes are NUL when the text begins with ASCII, as JSON and most tables do.
NULS = {"x0x0": "UTF-16LE", "0x0x": "UTF-16BE", "x000": "UTF-32LE", "000x": "UTF-32BE"}
CUT = "unexpected end of data"  # what the decoder says when a text ends within a character


def refuse_utf16(path: Path) -> None:
    """KitError for a text file whose first bytes are those of UTF-16 or UTF-32."""
    if name := _wide(path):
        raise KitError(f"{path}: this is {name}, not UTF-8", _remedy(path, name))


def _wide(path: Path) -> str | None:
    """UTF-16 or UTF-32, by a text's first bytes."""
    with path.open("rb") as file:
        head = file.read(4)
    by_mark = identify_sig_or_bom(head)[0] or ""
    return (by_mark.upper().replace("_", "-") if by_mark in ("utf_16", "utf_32") else
            NULS.get("".join("x" if byte else "0" for byte in head)))


def _remedy(path: Path, name: str) -> str:
    quoted = shlex.quote(str(path))
    return f"iconv -f {name} -t UTF-8 OLD > NEW" + (
        f"; rows to train on: kit lint {quoted} --fix NEW.jsonl" if path.suffix.lower() in FIXED else "")


def other_encoding(path: Path) -> str | None:
    """What a file of text is written in besides UTF-8, as far as that can be named; None for UTF-8."""
    if name := _wide(path):
        return name
    if path.suffix.lower() == ".jsonl":  # some broken lines are told one by one
        with path.open("rb") as file:
            if not mostly_other(itertools.islice(filter(bytes.strip, file), 100)):
                return None
    found = _first_other(path)
    return None if found is None or b"\0" in found[2] else _encoding(found[2])


@contextmanager
def in_utf8(path: Path) -> Iterator[Path]:
    """The file itself, or a copy in UTF-8 where it is in another encoding that can be named.

    Raises KitError where that is not the encoding throughout; errors that name the copy name the file.
    """
    name = other_encoding(path) if path.suffix.lower() in FIXED else None
    if name is None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="kit-utf8-") as folder:
        copy = Path(folder) / path.name
        try:
            with unwritable(copy, "free room, or set TMPDIR to a folder on another disk"), \
                    path.open(encoding=name, newline="") as text, copy.open("w", encoding="utf-8", newline="") as file:
                shutil.copyfileobj(text, file, 2**20)
        except UnicodeError as error:
            raise KitError(f"{path}: it reads as {name}, but not to its end: {one_line(error, 100)}",
                           "save the file as UTF-8") from None
        try:
            yield copy
        except KitError as error:
            error.message = error.message.replace(str(copy), str(path))
            raise


def mostly_other(lines: Iterable[bytes]) -> bool:
    """Whether most of the lines that can tell are not UTF-8: then it is another encoding, not some broken lines."""
    verdicts = []
    for raw in lines:
        try:
            verdicts += [] if raw.isascii() else [bool(raw.decode())]
        except UnicodeDecodeError as error:
            verdicts += [] if error.reason == CUT else [False]
    return verdicts.count(False) > verdicts.count(True)


def not_utf8(path: Path) -> KitError:
    """Where UTF-8 ends, and what the file looks like from there on."""
    if not (found := _first_other(path)):
        return KitError(f"{path}: not UTF-8", "save the file as UTF-8")
    number, byte, rest = found
    if b"\0" in rest:
        return KitError(f"{path}: no text, but binary data", "name a file of rows")
    name = _encoding(rest)
    return KitError(f"{path}: not UTF-8 (byte {byte}, line {number})" + (f"; it reads as {name}" if name else ""),
                    _remedy(path, name) if name else "save the file as UTF-8")


def _first_other(path: Path) -> tuple[int, int, bytes] | None:
    """The line and the byte, from 1, at which UTF-8 ends, and what stands from that line on; None where it does not."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return number, offset + error.start + 1, line + file.read(ENOUGH)
            offset += len(line)
    return None


def _encoding(data: bytes) -> str | None:
    # Cut behind a byte that is no part of a longer character in any of these encodings.
    whole = re.match(rb"(?s).{,%d}[\x00-\x2f]" % ENOUGH, data)
    match = from_bytes(whole[0] if whole else data, cp_isolation=LIKELY, threshold=0.3).best()
    return match.encoding.upper() if match else None
