"""Text that is not UTF-8: where it shows, and what it probably is."""

import re
from collections.abc import Iterable
from pathlib import Path

from charset_normalizer import from_bytes
from charset_normalizer.utils import identify_sig_or_bom

from kit.common.errors import KitError

# What rows come in besides UTF-8. Among all it knows, charset-normalizer takes French for an old Mac's encoding.
LIKELY = ["gb18030", "big5", "shift_jis", "cp1252"]
ENOUGH = 100_000  # bytes that are looked at to name an encoding
# Which of the first four bytes are NUL when the text begins with ASCII, as JSON and most tables do.
NULS = {"x0x0": "UTF-16LE", "0x0x": "UTF-16BE", "x000": "UTF-32LE", "000x": "UTF-32BE"}
CUT = "unexpected end of data"  # what the decoder says when a text ends within a character


def refuse_utf16(path: Path) -> None:
    """KitError for a text file whose first bytes are those of UTF-16 or UTF-32."""
    with path.open("rb") as file:
        head = file.read(4)
    by_mark = identify_sig_or_bom(head)[0] or ""
    name = (by_mark.upper().replace("_", "-") if by_mark in ("utf_16", "utf_32") else
            NULS.get("".join("x" if byte else "0" for byte in head)))
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
                rest = line + file.read(ENOUGH)
                if b"\0" in rest:
                    return KitError(f"{path}: no text, but binary data", "name a file of rows")
                name = _encoding(rest)
                return KitError(f"{path}: not UTF-8 (byte {offset + error.start + 1}, line {number})"
                                + (f"; it reads as {name}" if name else ""),
                                f"iconv -f {name} -t UTF-8 OLD > NEW" if name else "save the file as UTF-8")
            offset += len(line)
    return KitError(f"{path}: not UTF-8", "save the file as UTF-8")


def _encoding(data: bytes) -> str | None:
    # Cut behind a byte that is no part of a longer character in any of these encodings.
    whole = re.match(rb"(?s).{,%d}[\x00-\x2f]" % ENOUGH, data)
    match = from_bytes(whole[0] if whole else data, cp_isolation=LIKELY, threshold=0.3).best()
    return match.encoding.upper() if match else None
