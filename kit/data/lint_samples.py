"""Rows that the data check keeps to be looked at, token by token."""

from __future__ import annotations

from collections import Counter
from typing import Any

from kit.common.show import spans
from kit.data.masks import IGNORED, Encoded, Formatter
from kit.data.rows import Place, Row, progress, rows_of
from kit.data.shapes import Fault

SAMPLES = 50  # of each finding, and so many without one


class Samples:
    """`rows` are what the page and the notebook show."""

    def __init__(self, formatter: Formatter) -> None:
        self.formatter, self.recipe = formatter, formatter.recipe
        self.rows: list[dict[str, Any]] = []
        self._counts: Counter[tuple[str, str]] = Counter()
        self._late: dict[Place, list[Fault]] = {}

    def offer(self, row: Row, split: str, faults: list[Fault], tokens: Encoded | None) -> None:
        """Keep the row while there are few like it; `tokens` is None where it can't be formatted."""
        codes = [(split, fault.code) for fault in faults] or [(split, "")]
        if any(self._counts[code] < SAMPLES for code in codes):
            self._counts.update(codes)
            self._keep(row, split, faults, tokens)

    def offer_late(self, fault: Fault, place: Place) -> None:
        """Note a row whose fault showed when all had passed; `look_up` finds it."""
        if self._counts["", fault.code] < SAMPLES:
            self._counts["", fault.code] += 1
            self._late.setdefault(place, []).append(fault)

    def look_up(self, source: str, split: str) -> None:
        """Add what was noted late, reading the source again as far as rows are missing that were not kept."""
        kept = {Place(row["file"], row["row"], row["line"]): row for row in self.rows}
        for place in self._late.keys() & kept:
            faults = self._late.pop(place)
            kept[place]["findings"] += [fault.code for fault in faults]
            kept[place]["details"] += [fault.message for fault in faults]
        if not self._late:
            return
        with progress("looking up rows", source, self.recipe) as on_bytes:
            for row in rows_of(source, self.recipe, on_bytes):
                if row.place in self._late and row.messages:
                    self._keep(row, split, self._late.pop(row.place), self.formatter.encode([row.messages])[0])
                    if not self._late:
                        return

    def _keep(self, row: Row, split: str, faults: list[Fault], tokens: Encoded | None) -> None:
        ids, labels = tokens or ([], [])
        limit = self.recipe.max_seq_length
        self.rows.append({
            **row.place._asdict(), "split": split, "findings": [fault.code for fault in faults],
            "details": [fault.message for fault in faults], "tokens": len(ids),
            "trained": len(labels) - labels.count(IGNORED), "lost": max(0, len(ids) - limit),
            "spans": spans(self.formatter.tokenizer, ids, labels, limit) if tokens else
            [("masked", "" if row.raw is None else str(row.raw)[:2000])]})
