"""What can be wrong with a row's text, and rows that are nearly the same."""

from __future__ import annotations

import re
import unicodedata

# C0 but tab and newline, DEL, C1, byte order marks inside a text, and the marks that turn its direction around.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\u202a-\u202e\u2066-\u2069]")

# UTF-8 read as Windows-1252: a lead byte's character followed by those of continuation bytes.
_CP1252 = "".join(bytes([b]).decode("cp1252", "ignore") or chr(b) for b in range(0x80, 0xC0))
_MOJIBAKE = re.compile(f"[\u00c2-\u00f4][{re.escape(_CP1252)}]{{1,3}}")
# What such a pair must mean to count: accented Latin letters, dashes and quotes, Chinese, Japanese, full-width forms.
_PLAUSIBLE = re.compile("[\u00a0-\u017f\u2010-\u203a\u20ac\u3000-\u30ff\u4e00-\u9fff\uff00-\uffef]")
# An accented letter before French quotes or a dash is text as people write it.
_TYPOGRAPHY = set("\u00a0«»‹›–—…‘’“”‚„")
_TORN = re.compile("\ufffd|锟斤拷|烫烫烫")


def control_characters(text: str) -> str | None:
    """The first control character, as U+001B."""
    if text.isprintable():
        return None
    match = CONTROL.search(text)
    return f"U+{ord(match[0]):04X}" if match else None


def mojibake(text: str) -> str | None:
    """A piece of text that was decoded with the wrong encoding, and what it should have been."""
    if text.isascii():
        return None
    if match := _TORN.search(text):
        return f"{match[0]!r}, characters lost in a conversion"
    for match in _MOJIBAKE.finditer(text):
        try:
            meant = bytes([ord(match[0][0]), *(0x80 + _CP1252.index(c) for c in match[0][1:])]).decode()
        except UnicodeDecodeError:
            continue
        if _PLAUSIBLE.match(meant) and not (len(match[0]) > 2 and _TYPOGRAPHY.issuperset(match[0][1:])):
            return f"{match[0]!r} should be {meant!r}"
    return None


def not_normalised(text: str) -> bool:
    """Whether characters are composed otherwise than in NFC: tokenizers that normalise see another text."""
    return not text.isascii() and not unicodedata.is_normalized("NFC", text)
