"""Findings that take more than one row: duplicates, conflicts, held-out prompts that are trained on, outliers."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np

from kit.data.lint_figures import Figures, quantile
from kit.data.rows import Place, Row
from kit.data.shapes import Fault
from kit.data.splits import prompt_key

OUTLIER = 8  # times the 95th percentile of lengths


class AcrossRows:
    """Compares the training rows that the figures hold, by their numbers there."""

    def __init__(self, figures: Figures) -> None:
        self.figures = figures
        self.near = NearDuplicates()
        self._answers, self._thinking = array("q"), array("b")
        self._prompts: dict[int, int] = {}  # prompt → the first row with it
        self._contents: dict[int, int] = {}  # prompt, system message and answer → the first row with them
        self._duplicates: set[int] = set()

    def add(self, row: Row) -> list[Fault]:
        """What is wrong with the training row that the figures got last, beside earlier ones."""
        number, prompt = len(self.figures.places) - 1, self.figures.prompts[-1]
        system = row.messages[0]["content"] if row.messages[0]["role"] == "system" else ""
        answer = hash(row.messages[-1]["content"].strip())
        self._answers.append(answer)
        self._thinking.append(any("</think>" in m["content"] for m in row.messages if m["role"] == "assistant"))
        same = self._contents.setdefault(hash((prompt, system, answer)), number)
        alike = self._prompts.setdefault(prompt, number)
        if same != number:
            self._duplicates.add(number)
            return [Fault("duplicate", self._as(row.place, same))]
        if alike != number and self._answers[alike] != answer:
            return [Fault("conflict", self._as(row.place, alike))]
        return []

    def held_out(self, row: Row) -> list[Fault]:
        """What is wrong with a held-out row beside those of the training."""
        trained = self._prompts.get(prompt_key(row.messages))
        return [] if trained is None else [Fault("heldout_overlap", self._as(row.place, trained))]

    def _as(self, place: Place, number: int) -> str:
        """Names another row, with its file where that is not this one's."""
        other = self.figures.places[number]
        return f"as {other}" if other.file == place.file else f"as {other} of {other.file}"

    def at_the_end(self) -> Iterator[tuple[Fault, Place]]:
        """What shows only when all rows are known."""
        places, thinking = self.figures.places, np.array(self._thinking, dtype=bool)
        for place, message in self.figures.shapes.mixed():
            yield Fault("mixed_shapes", message), place
        if 0 < (count := int(thinking.sum())) < len(places):
            text = f"{count:,} with thinking, {len(places) - count:,} without"
            for number in np.flatnonzero(thinking == (2 * count <= len(places))).tolist():  # the rarer ones
                yield Fault("mixed_thinking", text), places[number]
        for later, earlier, share in self.near.pairs():
            if later not in self._duplicates:
                yield Fault("near_duplicate", f"{share:.0%} {self._as(places[later], earlier)}"), places[later]
        limit = max(OUTLIER * quantile(sorted(self.figures.lengths), 0.95), 256) if len(places) else 0
        for number, length in enumerate(self.figures.lengths):
            if length > limit:
                yield Fault("outlier", f"{length:,} tokens"), places[number]


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
        if not self._rows:
            return []
        bands, bins = np.concatenate(self._bands), np.concatenate(self._bins)
        places = np.arange(len(bands))
        best: dict[int, tuple[int, float]] = {}
        for k in range(self.BANDS):
            order = np.argsort(bands[:, k], kind="stable")
            begins = np.concatenate(([True], bands[order[1:], k] != bands[order[:-1], k]))
            first = np.maximum.accumulate(np.where(begins, places, 0))
            # Of a group that shares a band every row is compared with its neighbour before it and with the first.
            for before in (np.maximum(places - 1, 0), first):
                later, earlier = order[~begins], order[before[~begins]]
                similar = (bins[later] == bins[earlier]).mean(axis=1)
                for i, j, share in zip(later.tolist(), earlier.tolist(), similar.tolist(), strict=True):
                    if share >= self.SIMILAR and share > best.get(i, (0, 0.0))[1]:
                        best[i] = (j, share)
        return [(self._rows[i], self._rows[j], share) for i, (j, share) in sorted(best.items())]
