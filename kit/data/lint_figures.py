"""Figures of the data check: quantiles, the histogram, and places that take little memory."""

from __future__ import annotations

import math
from array import array
from collections import Counter

from kit.data.sources import Place

BARS = 24  # of the histogram


class Places:
    """Places by number, in 9 bytes each."""

    def __init__(self) -> None:
        self._files: list[str] = []
        self._numbers: dict[str, int] = {}
        self._file, self._row, self._line = array("H"), array("I"), array("I")

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, number: int) -> Place:
        return Place(self._files[self._file[number]], self._row[number], self._line[number] or None)

    def append(self, place: Place) -> None:
        if place.file not in self._numbers:
            self._numbers[place.file] = len(self._files)
            self._files.append(place.file)
        self._file.append(self._numbers[place.file])
        self._row.append(place.row)
        self._line.append(place.line or 0)


def quantile(order: list[int], share: float) -> int:
    """The smallest value that at least this share of the values does not exceed (nearest rank)."""
    return order[max(0, math.ceil(share * len(order)) - 1)]


def quantiles(order: list[int]) -> dict[str, int]:
    """Half, 95 % and 99 % of the values do not exceed these; none without values."""
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    return {name: quantile(order, share) for name, share in shares.items()} if order else {}


def histogram(order: list[int]) -> list[dict[str, int]]:
    """Rows by length, up to BARS bars; the last one holds everything beyond the 99th percentile."""
    top = quantile(order, 0.99)
    width = max(1, math.ceil((top - order[0] + 1) / BARS))
    starts = range(order[0] - order[0] % width, top + 1, width)
    counts = Counter(min((length - starts[0]) // width, len(starts)) for length in order)
    bars = [{"from": start, "to": start + width - 1, "rows": counts[k]} for k, start in enumerate(starts)]
    if counts[len(starts)]:
        bars.append({"from": starts[-1] + width, "to": order[-1], "rows": counts[len(starts)]})
    return bars
