"""What can be wrong with a row's text, and rows that are nearly the same."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

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

SECRETS = {
    "private key": re.compile(r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----"),
    "AWS key": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})"),
    "Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"),
    "API key": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    "Google key": re.compile(r"\bAIza[0-9A-Za-z_-]{35}"),
    "Slack token": re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
    "signed token": re.compile(r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
    # No address: git@host, logo@2x.png, a matrix product q@k.mean(), and the domains for examples (RFC 2606).
    "e-mail address": re.compile(
        r"(?<![\w.+-])(?!git@)[\w.+-]+@(?!test\.|localhost)(?!\dx\.)(?!(?:[\w-]+\.)*example\.)"
        r"(?!(?:[\w-]+\.)+(?:example|test|invalid|localhost)\b)[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b(?!\()"),
}
# A search for these is ten times as fast as the expressions, which most texts then never meet.
_HINTS = ("@", "sk-", "eyJ", "hf_", "AKIA", "AIza", "xox", "PRIVATE KEY", "ghp_", "gho_", "ghu_", "ghs_", "ghr_",
          "github_pat_")


def control_characters(text: str) -> str | None:
    """The first control character, as U+001B."""
    if text.isprintable():
        return None
    found = CONTROL.search(text)
    return f"U+{ord(found[0]):04X}" if found else None


def mojibake(text: str) -> str | None:
    """A piece of text that was decoded with the wrong encoding, and what it should have been."""
    if text.isascii():
        return None
    if found := _TORN.search(text):
        return f"{found[0]!r}, characters lost in a conversion"
    for found in _MOJIBAKE.finditer(text):
        try:
            meant = b"".join(_byte(c) for c in found[0]).decode("utf-8")
        except UnicodeDecodeError:
            continue
        if _PLAUSIBLE.match(meant) and not (len(found[0]) > 2 and _TYPOGRAPHY.issuperset(found[0][1:])):
            return f"{found[0]!r} should be {meant!r}"
    return None


def _byte(character: str) -> bytes:
    try:
        return character.encode("cp1252")
    except UnicodeEncodeError:
        return character.encode("latin-1")


def secret(text: str, addresses: bool = True) -> str | None:
    """What kind of secret a text seems to hold, with its beginning only; `addresses` counts e-mail addresses too."""
    if not any(hint in text for hint in _HINTS):
        return None
    for kind, pattern in SECRETS.items():
        if (addresses or kind != "e-mail address") and (found := pattern.search(text)):
            return f"{kind} {found[0][:4]}…"
    return None


def not_normalised(text: str) -> bool:
    """Whether characters are composed otherwise than in NFC: tokenizers that normalise see another text."""
    return not text.isascii() and not unicodedata.is_normalized("NFC", text)


class NearDuplicates:
    """Rows whose texts share about three quarters of their five-character pieces, found in linear time.

    One-permutation MinHash (Li, Owen, Zhang 2012) with 64 bins and rotation for empty ones; rows that agree in one of
    16 bands of 4 bins are compared by the share of equal bins, an estimate of the Jaccard similarity with a standard
    error of 5 points. A changed word touches about ten pieces. Takes 128 bytes a row.
    """

    BINS, BANDS, WINDOW, SHORTEST, SIMILAR = 64, 16, 5, 80, 0.75

    def __init__(self) -> None:
        self._bands: list[np.ndarray[Any, Any]] = []
        self._bins: list[np.ndarray[Any, Any]] = []
        self._rows: list[int] = []

    def add(self, rows: list[int], texts: list[str]) -> None:
        """Numbers and texts of some rows; texts under 80 characters without their spaces are left out."""
        import numpy as np

        plain = [(row, "".join(text.lower().split())) for row, text in zip(rows, texts, strict=True)]
        plain = [(row, text) for row, text in plain if len(text) >= self.SHORTEST]
        if not plain:
            return
        points = np.frombuffer("".join(text for _, text in plain).encode("utf-32-le", "replace"), np.uint32)
        sizes = np.array([len(text) for _, text in plain])
        row_of: Any = np.repeat(np.arange(len(plain)), sizes)
        values = points.astype(np.uint64) + np.uint64(1)
        hashes: Any = np.zeros(len(points) - self.WINDOW + 1, np.uint64)
        for k in range(self.WINDOW):
            hashes = hashes * np.uint64(0x100000001B3) + values[k:k + len(hashes)]
        inside = row_of[: len(hashes)] == row_of[self.WINDOW - 1:]
        hashes, row_of = hashes[inside], row_of[: len(hashes)][inside]
        hashes = (hashes ^ (hashes >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        hashes ^= hashes >> np.uint64(32)
        bins: Any = np.full(len(plain) * self.BINS, np.iinfo(np.uint32).max, np.uint32)
        np.minimum.at(bins, row_of * self.BINS + (hashes >> np.uint64(58)).astype(np.int64),
                      (hashes & np.uint64(0xFFFFFFFF)).astype(np.uint32))
        bins = bins.reshape(len(plain), self.BINS)
        empty = bins == np.iinfo(np.uint32).max
        while empty.any():  # an empty bin takes its neighbour's value, changed so that it stands for itself
            bins = np.where(empty, np.roll(bins, 1, axis=1) * np.uint32(31) + np.uint32(7), bins)
            empty &= np.roll(empty, 1, axis=1)
        mixed: Any = bins.reshape(len(plain), self.BANDS, -1).astype(np.uint64)
        band = np.zeros(mixed.shape[:2], np.uint64)
        for k in range(mixed.shape[2]):
            band = (band ^ mixed[:, :, k]) * np.uint64(0x100000001B3)
        self._bands.append((band >> np.uint64(16)).astype(np.uint32))
        self._bins.append((bins & np.uint32(255)).astype(np.uint8))
        self._rows += [row for row, _ in plain]

    def pairs(self) -> list[tuple[int, int, float]]:
        """(row, earlier row it resembles, similarity), each row once, in order."""
        import numpy as np

        if not self._rows:
            return []
        bands, bins = np.concatenate(self._bands), np.concatenate(self._bins)
        best: dict[int, tuple[int, float]] = {}
        for k in range(self.BANDS):
            order = np.argsort(bands[:, k], kind="stable")
            same = bands[order[1:], k] == bands[order[:-1], k]
            starts = np.flatnonzero(np.diff(np.concatenate(([False], same)).astype(np.int8)) == 1)
            # Of a group that shares a band every row is compared with its neighbour before it and with the first.
            first = np.arange(len(order))
            if len(starts) or same[:1].any():
                marks = np.where(np.concatenate(([True], ~same)), np.arange(len(order)), 0)
                first = np.maximum.accumulate(marks)
            for earlier in (order[np.maximum(np.arange(len(order)) - 1, 0)], order[first]):
                later = order
                chosen = np.concatenate(([False], same)) & (earlier != later)
                share = (bins[later[chosen]] == bins[earlier[chosen]]).mean(axis=1)
                for i, j, s in zip(later[chosen].tolist(), earlier[chosen].tolist(), share.tolist(), strict=True):
                    if s >= self.SIMILAR and s > best.get(i, (0, 0.0))[1]:
                        best[i] = (j, s)
        return [(self._rows[i], self._rows[j], s) for i, (j, s) in sorted(best.items())]
