"""The data check: what is in the rows, what would be trained, what is wrong and where."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from kit.common.errors import KitError
from kit.common.processes import world_size
from kit.common.secrets import secret
from kit.common.show import spans
from kit.data import text_checks as checks
from kit.data.disk_rows import batches
from kit.data.findings import KINDS, Findings
from kit.data.formatting import fit, rare_collections
from kit.data.lint_figures import Places, histogram, quantile, quantiles
from kit.data.lint_report import Report
from kit.data.masks import IGNORED, Encoded, Formatter, Located
from kit.data.near_duplicates import NearDuplicates
from kit.data.sources import HELDOUT, Place, Row, held_out_of_starter, mixed_shapes, rows_of
from kit.data.splits import held_out_rows, progress, prompt_key, repeated
from kit.models.fetch import model_label
from kit.models.template import Message, load_tokenizer
from kit.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES = 50  # rows kept to be looked at: so many of each finding, and so many without one
OUTLIER = 8  # times the 95th percentile of lengths

Found = list[tuple[str, str]]  # codes with details


def lint(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None = None) -> Report:
    """Check the recipe's data as this recipe would train on it.

    Reads rows one by one, in bounded memory. Raises KitError when a source can't be read at all; whatever is wrong
    with single rows is in the report.
    """
    check = _Check(recipe, tokenizer or load_tokenizer(recipe))
    with rare_collections():
        return check.run()


class _Check:
    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
        self.recipe, self.tokenizer = recipe, tokenizer
        self.formatter = Formatter(tokenizer, recipe)
        self.findings = Findings({"too_long": "error" if recipe.overlong_rows == "error" else "warning",
                                  "heldout_overlap": "error" if recipe.eval_overlap == "error" else "warning"})
        self.shapes: dict[str, Counter[str]] = {}  # of each file
        self.first: dict[tuple[str, str], Place] = {}
        self.file_lengths: dict[str, array[int]] = {}
        self.file_turns: dict[str, set[int]] = {}
        self.rows = 0
        self.ends: list[int] = []  # how many of the rows below each source brings the sum to
        self.places = Places()  # of the training rows that can be formatted; what follows is about these
        self.lengths = array("I")
        self.kept, self.kept_trained = array("I"), array("I")  # tokens that training sees; 0 for rows left out
        self.keys, self.answers = array("Q"), array("q")
        self.prompts: dict[int, int] = {}  # prompt → the first row with it
        self.whole: dict[int, int] = {}  # prompt and answer → the first row with both
        self.again: set[int] = set()
        self.near = NearDuplicates()
        self.thinking: dict[bool, list[Place]] = {True: [], False: []}
        self.thinks = 0
        self.samples: list[dict[str, Any]] = []
        self.sampled: Counter[tuple[str, str]] = Counter()

    def run(self) -> Report:
        sources = [(source, "train") for source in self.recipe.sources]
        if self.recipe.eval_dataset or held_out_of_starter(self.recipe):
            sources.append((self.recipe.eval_dataset or HELDOUT, "held-out"))
        for source, split in sources:
            self._source(source, split)
            self.ends.append(len(self.places))
        late = self._across_rows()
        for source, split in sources:
            self._sample_late(source, split, late)
        self.samples.sort(key=lambda row: (row["split"] != "train", row["file"], row["row"]))
        return Report(self._figures(), self.samples)

    def _source(self, source: str, split: str) -> None:
        with progress(f"checking {source}", source, self.recipe) as on_bytes:
            located = (self._locate(batch, split) for batch in batches(rows_of(source, self.recipe, on_bytes)))
            empty = True
            for found, encoded in self.formatter.encode_ahead(located):
                empty = False
                self._count_batch(found, encoded, split)
        if empty:
            raise KitError(f"dataset: {source} is empty", "it needs at least one row")

    def _locate(self, batch: list[Row], split: str) -> tuple[list[tuple[Row, Located, Found]], list[Located]]:
        """The rows that can be rendered, with what is wrong with their texts; the others are reported."""
        located: list[tuple[Row, Located, Found]] = []
        for row in batch:
            self.rows += split == "train"
            self.shapes.setdefault(row.place.file, Counter())[row.shape or "unknown"] += 1
            self.first.setdefault((row.place.file, row.shape or "unknown"), row.place)
            found = [(fault.code, fault.message) for fault in row.faults]
            if character := row.messages and self.formatter.lost_character(row.messages):
                found = [*self._text(row.messages), ("lost_character", f"U+{ord(character):04X}")]
            elif row.messages:
                found = self._text(row.messages)
                try:
                    located.append((row, self.formatter.locate(row.messages), found))
                    continue
                except KitError as error:
                    found.append(("template_refused", error.message))
            self._report(row, split, found)
        return located, [place for _, place, _ in located]

    def _count_batch(self, located: list[tuple[Row, Located, Found]], encoded: list[Encoded], split: str) -> None:
        numbers, texts = [], []
        for (row, place, found), (ids, labels) in zip(located, encoded, strict=True):
            found += [(remark, "") for remark in sorted(place.remarks)]
            found += self._tokens(place, ids, labels)
            self.file_lengths.setdefault(row.place.file, array("I")).append(len(ids))
            self.file_turns.setdefault(row.place.file, set()).add(sum(m["role"] != "system" for m in row.messages))
            if split == "train":
                numbers.append(len(self.places))
                texts.append("\n".join(m["content"] for m in row.messages if m["role"] != "system"))
                found += self._count(row, ids, labels, refused=any(KINDS[code][0] == "error" for code, _ in found))
            else:
                if not fit(self.formatter, row.messages, ids, labels).ids:
                    found.append(("too_long", f"{len(ids):,} tokens"))
                if prompt_key(row.messages) in self.prompts:
                    found.append(("heldout_overlap", self._as(row, self.prompts[prompt_key(row.messages)])))
            self._report(row, split, found, ids, labels)
        self.near.add(numbers, texts)

    def _text(self, messages: list[Message]) -> Found:
        """What is wrong with the contents as text."""
        found = []
        for code, check in (("control_character", checks.control_characters), ("mojibake", checks.mojibake),
                            ("secret", secret)):
            if detail := next((text for m in messages if (text := check(m["content"]))), None):
                found.append((code, detail))
        if any(checks.not_normalised(m["content"]) for m in messages):
            found.append(("not_normalised", ""))
        if typed := self.formatter.typed(messages):
            found.append(("special_token", ", ".join(dict.fromkeys(typed))))
        return found

    def _tokens(self, place: Located, ids: list[int], labels: list[int]) -> Found:
        """What is wrong with the tokens."""
        found = []
        stop, unknown = self.tokenizer.eos_token_id, self.tokenizer.unk_token_id
        if code := self.formatter.untrained(place, labels):
            found.append((code, repr(self.tokenizer.eos_token) if code == "stop_not_trained" else ""))
        if unknown not in (None, stop, self.tokenizer.bos_token_id) and unknown in ids:
            found.append(("unknown_token", f"{ids.count(unknown)} times"))
        return found

    def _count(self, row: Row, ids: list[int], labels: list[int], refused: bool) -> Found:
        """Add a training row to the figures; what is wrong with its length, or with it beside earlier rows."""
        found = []
        number = len(self.places)
        fitted = fit(self.formatter, row.messages, ids, labels)
        if not fitted.ids:
            found.append(("too_long", f"{fitted.length:,} tokens"))
        elif fitted.cut:
            found.append(("prompt_cut", f"{fitted.length:,} tokens, {fitted.cut:,} cut"))
        self.places.append(row.place)
        self.lengths.append(fitted.length)
        self.kept.append(0 if refused else len(fitted.ids))
        self.kept_trained.append(0 if refused else sum(label != IGNORED for label in fitted.labels))
        thinks = any("</think>" in m["content"] for m in row.messages if m["role"] == "assistant")
        self.thinks += thinks
        if len(self.thinking[thinks]) < SAMPLES:
            self.thinking[thinks].append(row.place)
        system = row.messages[0]["content"] if row.messages[0]["role"] == "system" else ""
        prompt, answer = prompt_key(row.messages), hash(row.messages[-1]["content"].strip())
        self.keys.append(prompt)
        self.answers.append(answer)
        same = self.whole.setdefault(hash((prompt, system, answer)), number)
        alike = self.prompts.setdefault(prompt, number)
        if same != number:
            self.again.add(number)
            found.append(("duplicate", self._as(row, same)))
        elif alike != number and self.answers[alike] != answer:
            found.append(("conflict", self._as(row, alike)))
        return found

    def _as(self, row: Row, number: int) -> str:
        """Names an earlier row, with its file where that is another one."""
        place = self.places[number]
        return f"as {place}" if place.file == row.place.file else f"as {place} of {place.file}"

    def _across_rows(self) -> dict[Place, Found]:
        """What shows only when all rows are known; the rows of it, to be looked at."""
        late: dict[Place, Found] = {}

        def add(code: str, place: Place, detail: str, rows: int = 1) -> None:
            self.findings.add(code, place, detail, rows)
            if self.sampled["", code] < SAMPLES:
                self.sampled["", code] += 1
                late.setdefault(place, []).append((code, detail))

        for file, shapes in self.shapes.items():
            known = Counter({shape: count for shape, count in shapes.items() if shape != "unknown"})
            if len(known) > 1:
                first = {shape: self.first[file, shape] for shape in known}
                rarest = min(known, key=lambda shape: known[shape])
                add("mixed_shapes", first[rarest], mixed_shapes(file, known, first))
        if 0 < self.thinks < len(self.places):
            fewer = self.thinks * 2 <= len(self.places)
            count = self.thinks if fewer else len(self.places) - self.thinks
            text = f"{self.thinks:,} with thinking, {len(self.places) - self.thinks:,} without"
            for k, place in enumerate(self.thinking[fewer]):
                add("mixed_thinking", place, text, 1 if k else count - len(self.thinking[fewer]) + 1)
        for later, earlier, share in self.near.pairs():
            if later not in self.again:
                place, other = self.places[later], self.places[earlier]
                of = "" if place.file == other.file else f" of {other.file}"
                add("near_duplicate", place, f"{share:.0%} as {other}{of}")
        if self.lengths:
            limit = max(OUTLIER * quantile(sorted(self.lengths), 0.95), 256)
            for number, length in enumerate(self.lengths):
                if length > limit:
                    add("outlier", self.places[number], f"{length:,} tokens")
        return late

    def _report(self, row: Row, split: str, found: Found, ids: list[int] | None = None,
                labels: list[int] | None = None) -> None:
        for code, detail in found:
            self.findings.add(code, row.place, detail)
        codes = [(split, code) for code, _ in found] or [(split, "")]
        if any(self.sampled[code] < SAMPLES for code in codes):
            self.sampled.update(codes)
            self._sample(row, split, found, ids, labels)

    def _sample(self, row: Row, split: str, found: Found, ids: list[int] | None, labels: list[int] | None) -> None:
        if ids is None or labels is None:
            parts = [("masked", "" if row.raw is None else str(row.raw)[:2000])]
            total = trained = lost = 0
        else:
            parts = spans(self.tokenizer, ids, labels, self.recipe.max_seq_length)
            total, trained = len(ids), sum(label != IGNORED for label in labels)
            lost = max(0, total - self.recipe.max_seq_length)
        self.samples.append({
            **row.place._asdict(), "split": split, "findings": [code for code, _ in found],
            "details": [detail for _, detail in found], "tokens": total, "trained": trained, "lost": lost,
            "spans": parts})

    def _sample_late(self, source: str, split: str, late: dict[Place, Found]) -> None:
        """Read again until the rows are found whose findings showed only at the end."""
        known = {(sample["file"], sample["row"]): sample for sample in self.samples}
        for place in [place for place in late if (place.file, place.row) in known]:
            for code, detail in late.pop(place):
                known[place.file, place.row]["findings"].append(code)
                known[place.file, place.row]["details"].append(detail)
        if not late:
            return
        with progress("looking up rows", source, self.recipe) as on_bytes:
            for row in rows_of(source, self.recipe, on_bytes):
                if row.place in late and row.messages:
                    [(ids, labels)] = self.formatter.encode([row.messages])
                    self._sample(row, split, late.pop(row.place), ids, labels)
                    if not late:
                        return

    def _figures(self) -> dict[str, Any]:
        recipe, order = self.recipe, sorted(self.lengths)
        batch = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps * world_size()
        rows, tokens, trained = self._epoch()
        lengths = {} if not order else {
            **quantiles(order), "mean": round(sum(order) / len(order), 1), "histogram": histogram(order),
            "keep": {name: quantile(order, int(name) / 100) for name in ("95", "99", "100")}}
        files = []
        for file, shapes in self.shapes.items():
            turns, tokens_of = self.file_turns.get(file, set()), sorted(self.file_lengths.get(file, []))
            several = "" if len(turns) < 2 else f"–{max(turns)}"
            files.append({"name": file, "rows": shapes.total(), "shape": ", ".join(shapes),
                          "turns": f"{min(turns)}{several}" if turns else None, **quantiles(tokens_of)})
        return {
            "title": ", ".join(str(source) for source in recipe.sources), "files": files,
            "tokenizer": model_label(recipe), "prompt_style": recipe.prompt_style,
            "max_seq_length": recipe.max_seq_length, "rows": self.rows,
            "usable_rows": sum(length > 0 for length in self.kept),
            "errors": self.findings.count("error"), "warnings": self.findings.count("warning"),
            "lengths": lengths,
            "trained_share": round(trained / tokens, 4) if tokens else None,
            "tokens_per_epoch": tokens, "trained_tokens_per_epoch": trained,
            "steps_per_epoch": math.ceil(rows / batch),
            "findings": [finding.as_dict() for finding in self.findings.all()]}

    def _epoch(self) -> tuple[int, int, int]:
        """Rows, tokens and trained tokens of an epoch: after held-out rows, weights and max_train_samples."""
        chosen: list[int] = []
        apart = held_out_rows(self.keys, self.recipe) if self.recipe.test_size and len(self.places) else None
        for passes, start, end in zip(self.recipe.sources.values(), [0, *self.ends], self.ends, strict=False):
            numbers = np.arange(start, end)
            if apart is not None:
                numbers = numbers[~apart[start:end]]
            chosen += numbers[repeated(len(numbers), passes, self.recipe.seed)].tolist()
        kept = [number for number in chosen[: self.recipe.max_train_samples] if self.kept[number]]
        return len(kept), sum(self.kept[k] for k in kept), sum(self.kept_trained[k] for k in kept)
