"""Rows that are nearly the same."""

from __future__ import annotations

from typing import Any

import numpy as np


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
