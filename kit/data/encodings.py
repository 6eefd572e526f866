"""Text that is not UTF-8: where it shows, and what it probably is."""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from kit.common.errors import KitError

MEGABYTE = 1_000_000
# Each of these decodes most bytes without an error, so the one whose often-used characters turn up wins:
# GB 2312, the frequent characters of Big5, kana and frequent kanji, accented letters that stand alone.
USUAL = {"gb18030": rb"[\xa1-\xd7][\xa1-\xfe]", "big5": rb"[\xa1-\xc6][\x40-\xfe]",
         "shift_jis": rb"[\x81-\x97][\x40-\xfc]", "cp1252": rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])"}
# Which of the first four bytes are NUL when the text begins with ASCII, as JSON and most tables do.
NULS = {"x0x0": "UTF-16LE", "0x0x": "UTF-16BE", "x000": "UTF-32LE", "000x": "UTF-32BE"}
MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",  # before UTF-16, whose mark begins the same
         codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
CUT = "unexpected end of data"  # what the decoder says when a text ends within a character


def refuse_utf16(path: Path) -> None:
    """KitError for a text file whose first bytes are those of UTF-16 or UTF-32."""
    with path.open("rb") as file:
        head = file.read(4)
    name = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
    name = name or NULS.get("".join("x" if byte else "0" for byte in head))
    if name:
        raise KitError(f"{path}: this is {name}, not UTF-8", f"iconv -f {name} -t UTF-8 OLD > NEW")


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
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                data = line + file.read(MEGABYTE)
                if b"\0" in data:
                    return KitError(f"{path}: no text, but binary data", "name a file of rows")
                name = _encoding(data)
                return KitError(f"{path}: not UTF-8 (byte {offset + error.start + 1}, line {number})"
                                + (f"; it reads as {name}" if name else ""),
                                f"iconv -f {name} -t UTF-8 OLD > NEW" if name else "save the file as UTF-8")
            offset += len(line)
    return KitError(f"{path}: not UTF-8", "save the file as UTF-8")


def _encoding(data: bytes) -> str | None:
    best, likely = 0.5, None
    for name, usual in USUAL.items():
        try:
            text = codecs.getincrementaldecoder(name)().decode(data)  # may end within a character
        except UnicodeDecodeError:
            continue
        wide = Counter(character for character in text if not character.isascii())
        good = len(re.findall(usual, data)) if name == "cp1252" else sum(
            count for character, count in wide.items() if re.fullmatch(usual, character.encode(name, "ignore")))
        if wide and good / wide.total() > best:
            best, likely = good / wide.total(), name.upper()
    return likely
