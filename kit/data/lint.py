"""The data check, `kit lint`: what is in the rows, what would be trained, what is wrong and where."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.common.errors import KitError
from kit.common.secrets import address, secret
from kit.common.show import show
from kit.data.findings import FINDINGS, Findings, control_characters, mojibake, not_normalised
from kit.data.formatting import fit, rare_collections
from kit.data.leftovers import makers_of, other_assistant, placeholder
from kit.data.lint_figures import AcrossRows, Figures
from kit.data.lint_report import Report, Samples
from kit.data.masks import Encoded, Formatter, Located
from kit.data.repair import Repairs, check_out, fix
from kit.data.rows import Row, empty, progress, rows_of
from kit.data.segments import ToolsNotShown
from kit.data.shapes import Fault
from kit.data.sources import files_of, held_out_source
from kit.data.splits import Kept, batches
from kit.gguf.messages import said, texts
from kit.models.template import Message, load_tokenizer
from kit.recipe.reading import parse_overrides
from kit.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def lint(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None = None, any_encoding: bool = False) -> Report:
    """Check the recipe's data as this recipe would train on it.

    Reads rows one by one, in bounded memory. Raises KitError when a source can't be read at all; whatever is wrong
    with single rows is in the report. `any_encoding` reads what a training refuses, files in another encoding than
    UTF-8, as `--fix` does.
    """
    with rare_collections():
        return _Check(recipe, tokenizer or load_tokenizer(recipe), any_encoding).run()


class _Check:
    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, any_encoding: bool) -> None:
        self.recipe, self.tokenizer, self.any_encoding = recipe, tokenizer, any_encoding
        self.formatter = Formatter(tokenizer, recipe)
        self.findings = Findings({"too_long": "error" if recipe.overlong_rows == "error" else "warning",
                                  "heldout_overlap": "error" if recipe.eval_overlap == "error" else "warning"})
        self.makers = makers_of(recipe.model_name, tokenizer.chat_template)
        self.kept = Kept(recipe)
        self.figures = Figures(recipe, self.kept)
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
            self.samples.look_up(source, split, self.any_encoding)
        rows = sorted(self.samples.rows, key=lambda row: (row["split"] != "train", row["file"], row["row"]))
        return Report(self.figures.all(self.findings.all()), rows, self.findings.bad_rows)

    def _source(self, source: str, split: str) -> None:
        read, may_be_empty = self.figures.read, split == "train" and self.kept.any_may_be_missing
        with progress(f"checking {source}", source, self.recipe) as on_bytes:
            rows = rows_of(source, self.recipe, on_bytes, self.any_encoding)
            coming = batches(self.kept.rows(rows) if split == "train" else rows)
            for batch, encoded in self.formatter.encode_ahead(self._locate(batch, split) for batch in coming):
                self._count(batch, encoded, split)
        if self.figures.read == read and not may_be_empty:
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
                    code = "tools_not_shown" if isinstance(error, ToolsNotShown) else "template_refused"
                    faults.append(Fault(code, error.message))
            self._report(row, split, faults, None)
        return located, [place for _, place, _ in located]

    def _count(self, batch: list[tuple[Row, Located, list[Fault]]], encoded: list[Encoded], split: str) -> None:
        numbers, talks = [], []
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
                talks.append("\n".join(said(m) for m in row.messages if m["role"] != "system"))
                faults += self.across.add(row)
            else:
                faults += self.across.held_out(row)
            self._report(row, split, faults, (ids, labels))
        self.across.near.add(numbers, talks)

    def _text(self, messages: list[Message]) -> list[Fault]:
        """What is wrong with the contents as text."""
        faults = []
        for code, check in (("control_character", control_characters), ("mojibake", mojibake),
                            ("secret", secret), ("personal_address", address)):
            if detail := next(filter(None, map(check, texts(messages))), None):
                faults.append(Fault(code, detail))
        if any(map(not_normalised, texts(messages))):
            faults.append(Fault("not_normalised", ""))
        for code, leftover in (("placeholder", placeholder(messages)),
                               ("other_assistant", other_assistant(messages, self.makers))):
            if leftover:
                faults.append(Fault(code, leftover))
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


def recipe_of(data: str | None, recipe: str | None, fields: dict[str, Any]) -> Recipe:
    """The recipe whose data is checked, with `data` for its dataset. Raises KitError for what is neither."""
    if data is not None and "=" in data and not Path(data).exists():
        if recipe is None:
            raise KitError(f"{data!r} is no data: the first argument is what to check", "kit lint DATA FIELD=VALUE …")
        fields = {**parse_overrides([data]), **fields}
        data = None
    if data is None and recipe is None:
        raise KitError("nothing to check", "kit lint DATA, or kit lint --recipe RECIPE")
    return Recipe.load(recipe or {}, **{**fields, **({} if data is None else {"dataset": data})})


def check(recipe: Recipe, html: Path | None, copy: Path | None, as_json: bool, rows: int, defaults: bool) -> int:
    """Print what the data check says; exit code 0 without findings of severity error, 1 with.

    Writes the page to `html` and the repaired rows to `copy`; shows so many `rows` token by token. `defaults` says
    that no recipe was named.
    """
    for path in (html, copy):
        if path is not None and not path.parent.is_dir():
            raise KitError(f"{path}: there is no folder {path.parent}", "make it first")
    first, *others = recipe.sources
    for source in recipe.sources:
        files_of(source, recipe)  # a missing file is reported before anything is loaded
    if copy and others:
        raise KitError("--fix takes one source", "kit lint DATA --fix OUT for each of them")
    if copy:
        check_out(first, copy, recipe)
    # Only the JSON goes to standard output, so that it can be piped; whatever libraries print goes beside it.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        report = lint(recipe, any_encoding=copy is not None)
    if as_json:
        print(json.dumps(report.figures, ensure_ascii=False, indent=2))
    else:
        show(report)
        if defaults:
            print(f"checked as the default recipe trains (tokens of {report.figures['tokenizer']}); for your model: "
                  "--recipe RECIPE")
        for tokens in report.examples(rows):
            print()
            show(tokens)
    if html:
        report.save(html)
        print(f"page: {html}", file=sys.stderr)
    repairs = _repair(first, copy, recipe) if copy else Repairs()
    return 1 if report.errors or repairs.encodings else 0


def _repair(source: str, copy: Path, recipe: Recipe) -> Repairs:
    repairs = fix(source, copy, recipe)
    print(f"repaired copy: {copy}", file=sys.stderr)
    for file, name in repairs.encodings.items():
        print(f"  {file}: read as {name}, written as UTF-8: look whether its texts are right", file=sys.stderr)
    for what, count in repairs.most_common():
        places = ", ".join(map(str, repairs.places.get(what, [])))
        more = ", …" if count > len(repairs.places.get(what, [])) else ""
        print(f"  {count:,} × {what}" + (f": {places}{more}" if places else ""), file=sys.stderr)
    return repairs
