"""Figures of the data check: rows, lengths and turns, and what an epoch costs."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from typing import Any

import numpy as np

from kit.common.processes import world_size
from kit.data.formatting import Formatted
from kit.data.masks import IGNORED
from kit.data.rows import Place, Row, Shapes
from kit.data.splits import held_out_rows, prompt_key, repeated
from kit.models.fetch import model_label
from kit.recipe.recipe import Recipe

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


class Figures:
    """What is counted as rows pass; the arrays are about the training rows that can be formatted."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.read = self.rows = 0  # all rows, and those of training, good and bad
        self.shapes = Shapes()
        self.places = Places()
        self.lengths = array("I")
        self.prompts = array("Q")
        self._kept, self._trained = array("I"), array("I")  # tokens that training sees; 0 for rows left out
        self._ends: list[int] = []  # how many of the rows below each source brings the sum to
        self._lengths_of: dict[str, array[int]] = {}
        self._turns_of: dict[str, set[int]] = {}

    def add(self, row: Row, split: str) -> None:
        """Count a row, good or bad."""
        self.read += 1
        self.rows += split == "train"
        self.shapes.add(row)

    def add_formatted(self, row: Row, split: str, fitted: Formatted, refused: bool) -> None:
        """Count a row with its tokens, of which training sees none where it is refused."""
        self._lengths_of.setdefault(row.place.file, array("I")).append(fitted.length)
        self._turns_of.setdefault(row.place.file, set()).add(sum(m["role"] != "system" for m in row.messages))
        if split == "train":
            self.places.append(row.place)
            self.lengths.append(fitted.length)
            self.prompts.append(prompt_key(row.messages))
            self._kept.append(0 if refused else len(fitted.ids))
            self._trained.append(0 if refused else len(fitted.labels) - fitted.labels.count(IGNORED))

    def end_source(self) -> None:
        """What is added from here on is of the next source."""
        self._ends.append(len(self.places))

    def all(self, findings: list[dict[str, Any]]) -> dict[str, Any]:
        """What `--json` prints."""
        recipe, order = self.recipe, sorted(self.lengths)
        batch = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps * world_size()
        rows, tokens, trained = self._epoch()
        severities = Counter(finding["severity"] for finding in findings)
        lengths = {} if not order else {
            **quantiles(order), "mean": round(sum(order) / len(order), 1), "histogram": histogram(order),
            "keep": {name: quantile(order, int(name) / 100) for name in ("95", "99", "100")}}
        return {
            "title": ", ".join(str(source) for source in recipe.sources),
            "files": [self._file(file) for file in self.shapes.counts],
            "tokenizer": model_label(recipe), "prompt_style": recipe.prompt_style,
            "max_seq_length": recipe.max_seq_length, "rows": self.rows,
            "usable_rows": sum(length > 0 for length in self._kept),
            "errors": severities["error"], "warnings": severities["warning"],
            "lengths": lengths,
            "trained_share": round(trained / tokens, 4) if tokens else None,
            "tokens_per_epoch": tokens, "trained_tokens_per_epoch": trained,
            "steps_per_epoch": math.ceil(rows / batch),
            "findings": findings}

    def _file(self, file: str) -> dict[str, Any]:
        turns, shapes = sorted(self._turns_of.get(file, ())), self.shapes.counts[file]
        return {"name": file, "rows": shapes.total(), "shape": ", ".join(shapes),
                "turns": "–".join(map(str, dict.fromkeys((turns[0], turns[-1])))) if turns else None,
                **quantiles(sorted(self._lengths_of.get(file, ())))}

    def _epoch(self) -> tuple[int, int, int]:
        """Rows, tokens and trained tokens of an epoch: after held-out rows, weights and max_train_samples."""
        taken: list[int] = []
        apart = held_out_rows(self.prompts, self.recipe) if self.recipe.test_size and len(self.places) else None
        for source, start, end in zip(self.recipe.sources, [0, *self._ends], self._ends, strict=False):
            numbers = np.arange(start, end)
            if apart is not None:
                numbers = numbers[~apart[start:end]]
            taken += numbers[repeated(source, len(numbers), self.recipe)].tolist()
        kept = [number for number in taken[: self.recipe.max_train_samples] if self._kept[number]]
        return len(kept), sum(self._kept[k] for k in kept), sum(self._trained[k] for k in kept)


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
