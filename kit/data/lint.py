"""The data check: what is in the rows, what would be trained, what is wrong and where."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kit.common.errors import KitError
from kit.common.secrets import secret
from kit.data import text_checks
from kit.data.disk_rows import batches
from kit.data.findings import FINDINGS, Findings
from kit.data.formatting import fit, rare_collections
from kit.data.lint_across import AcrossRows
from kit.data.lint_figures import Figures
from kit.data.lint_report import Report
from kit.data.lint_samples import Samples
from kit.data.masks import Encoded, Formatter, Located
from kit.data.rows import Row, empty, progress, rows_of
from kit.data.shapes import Fault
from kit.data.sources import held_out_source
from kit.models.template import Message, load_tokenizer
from kit.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        self.figures = Figures(recipe)
        self.across = AcrossRows(self.figures)
        self.samples = Samples(self.formatter)

    def run(self) -> Report:
        sources = [(source, "train") for source in self.recipe.sources]
        if held_out := held_out_source(self.recipe):
            sources.append((held_out, "held-out"))
        for source, split in sources:
            self._source(source, split)
            self.figures.end_source()
        for fault, place in self.across.at_the_end():
            self.findings.add(fault, place)
            self.samples.offer_late(fault, place)
        for source, split in sources:
            self.samples.look_up(source, split)
        rows = sorted(self.samples.rows, key=lambda row: (row["split"] != "train", row["file"], row["row"]))
        return Report(self.figures.all(self.findings.all()), rows)

    def _source(self, source: str, split: str) -> None:
        read = self.figures.read
        with progress(f"checking {source}", source, self.recipe) as on_bytes:
            rows = batches(rows_of(source, self.recipe, on_bytes))
            for batch, encoded in self.formatter.encode_ahead(self._locate(batch, split) for batch in rows):
                self._count(batch, encoded, split)
        if self.figures.read == read:
            raise empty(source)

    def _locate(self, batch: list[Row], split: str) -> tuple[list[tuple[Row, Located, list[Fault]]], list[Located]]:
        """The rows that can be rendered, with what is wrong with their texts; the others are reported."""
        located: list[tuple[Row, Located, list[Fault]]] = []
        for row in batch:
            self.figures.add(row, split)
            faults = [*row.faults, *self._text(row.messages)]
            if character := self.formatter.lost_character(row.messages):
                faults.append(Fault("lost_character", f"U+{ord(character):04X}"))
            elif row.messages:
                try:
                    located.append((row, self.formatter.locate(row.messages), faults))
                    continue
                except KitError as error:
                    faults.append(Fault("template_refused", error.message))
            self._report(row, split, faults, None)
        return located, [place for _, place, _ in located]

    def _count(self, batch: list[tuple[Row, Located, list[Fault]]], encoded: list[Encoded], split: str) -> None:
        numbers, texts = [], []
        for (row, located, faults), (ids, labels) in zip(batch, encoded, strict=True):
            faults += [Fault(remark, "") for remark in sorted(located.remarks)]
            faults += self._tokens(located, ids, labels)
            refused = any(FINDINGS[fault.code][0] == "error" for fault in faults)
            fitted = fit(self.formatter, row.messages, ids, labels)
            if not fitted.ids:
                faults.append(Fault("too_long", f"{fitted.length:,} tokens"))
            elif fitted.cut and split == "train":
                faults.append(Fault("prompt_cut", f"{fitted.length:,} tokens, {fitted.cut:,} cut"))
            self.figures.add_formatted(row, split, fitted, refused)
            if split == "train":
                numbers.append(len(self.figures.places) - 1)
                texts.append("\n".join(m["content"] for m in row.messages if m["role"] != "system"))
                faults += self.across.add(row)
            else:
                faults += self.across.held_out(row)
            self._report(row, split, faults, (ids, labels))
        self.across.near.add(numbers, texts)

    def _text(self, messages: list[Message]) -> list[Fault]:
        """What is wrong with the contents as text."""
        faults = []
        for code, check in (("control_character", text_checks.control_characters), ("mojibake", text_checks.mojibake),
                            ("secret", secret)):
            if detail := next((text for m in messages if (text := check(m["content"]))), None):
                faults.append(Fault(code, detail))
        if any(text_checks.not_normalised(m["content"]) for m in messages):
            faults.append(Fault("not_normalised", ""))
        if typed := self.formatter.typed(messages):
            faults.append(Fault("special_token", ", ".join(dict.fromkeys(typed))))
        return faults

    def _tokens(self, located: Located, ids: list[int], labels: list[int]) -> list[Fault]:
        """What is wrong with the tokens."""
        faults = []
        stop, unknown = self.tokenizer.eos_token_id, self.tokenizer.unk_token_id
        if code := self.formatter.untrained(located, labels):
            faults.append(Fault(code, repr(self.tokenizer.eos_token) if code == "stop_not_trained" else ""))
        if unknown not in (None, stop, self.tokenizer.bos_token_id) and unknown in ids:
            faults.append(Fault("unknown_token", f"{ids.count(unknown)} times"))
        return faults

    def _report(self, row: Row, split: str, faults: list[Fault], tokens: Encoded | None) -> None:
        for fault in faults:
            self.findings.add(fault, row.place)
        self.samples.offer(row, split, faults, tokens)
