"""What the data check counts as rows pass: lengths, turns, an epoch's cost; and what takes more than one row to see."""

import math
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kit.common.processes import world_size
from kit.data.formatting import Formatted
from kit.data.masks import IGNORED
from kit.data.rows import Place, Row, Shapes
from kit.data.shapes import Fault
from kit.data.sources import meant
from kit.data.splits import Kept, drawn, prompt_key
from kit.gguf.messages import said
from kit.models.fetch import model_label
from kit.recipe.recipe import Recipe

OUTLIER = 8  # times the 95th percentile of lengths
BARS = 24  # of the histogram


class Places:
    """Places by number, in 16 bytes each."""

    def __init__(self) -> None:
        self._files: list[str] = []
        self._rows, self._lines = array("I"), array("I")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Place:
        return Place(self._files[number], self._rows[number], self._lines[number] or None)

    def append(self, place: Place) -> None:
        self._files.append(place.file)
        self._rows.append(place.row)
        self._lines.append(place.line or 0)


class Figures:
    """What is counted as rows pass; the arrays are about the training rows that can be formatted."""

    def __init__(self, recipe: Recipe, kept: Kept) -> None:
        self.recipe, self.kept = recipe, kept
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
            "tokenizer": model_label(recipe),
            "prompt_style": Path(recipe.chat_template).name if recipe.chat_template else recipe.prompt_style,
            "max_seq_length": recipe.max_seq_length,
            "max_train_samples": recipe.max_train_samples, "rows": self.rows,
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
        if self.kept.drawn:
            number = {self.places[k]: k for k in range(len(self.places))}
            taken = [number[place] for place in self.kept.train if place in number]
        else:
            ends = self._ends[: len(self.recipe.sources)]
            counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
            taken, _ = drawn(counts, self.prompts, self.recipe) if self.places else ([], [])
        kept = [k for k in taken if self._kept[k]]
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


class AcrossRows:
    """Duplicates, conflicts, held-out prompts that are trained on, outliers, among the rows that the figures hold."""

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
        answer = hash(said(row.messages[-1]).strip())
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
        recipe = self.figures.recipe
        for columns in [meant(source, recipe).recipe.columns for source in recipe.sources]:
            for place, message in self.figures.shapes.misnamed(columns):
                yield Fault("misnamed_field", message), place
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
