"""The data check's result: as text, in a notebook, as JSON, as a page."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.common.errors import GateError
from kit.common.files import write_text
from kit.common.show import Table, Tokens
from kit.data.lint_page import page
from kit.data.sources import Place

PLACES = 5  # shown of each finding
SIGNS = {"error": "✗", "warning": "!", "info": "·"}


@dataclass(frozen=True)
class Report:
    """`figures` are what `--json` prints; `rows` are some rows of each finding and some without, to be looked at."""

    figures: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def errors(self) -> int:
        """How many findings are of severity error."""
        return int(self.figures["errors"])

    def finding(self, code: str) -> dict[str, Any] | None:
        """The finding with this code, or None."""
        return next((f for f in self.figures["findings"] if f["code"] == code), None)

    def summary(self) -> dict[str, Any]:
        """The figures in short, for result.json."""
        names = ("rows", "usable_rows", "errors", "warnings", "trained_share", "tokens_per_epoch", "steps_per_epoch")
        return {name: self.figures[name] for name in names} | {
            "findings": {finding["code"]: finding["count"] for finding in self.figures["findings"]}}

    def require(self) -> None:
        """GateError when there are findings of severity error."""
        errors = [finding for finding in self.figures["findings"] if finding["severity"] == "error"]
        if errors:
            what = "; ".join(f"{finding['message']} ({_count(finding['count'], 'row')}, first "
                             f"{_where(finding['places'][0], True)})" for finding in errors)
            raise GateError(f"the data check failed: {what}", "`kit lint` lists every row with its remedy")

    def page(self) -> str:
        """One self-contained HTML page."""
        return page(self.figures, self.rows)

    def examples(self, count: int = 3) -> list[Tokens]:
        """Some rows as tokens: those with the gravest findings first."""
        levels = {finding["code"]: list(SIGNS).index(finding["severity"]) for finding in self.figures["findings"]}
        order = sorted((row for row in self.rows if row["tokens"]),
                       key=lambda row: min((levels[code] for code in row["findings"]), default=len(SIGNS)))
        return [Tokens.of(_title(row), row["spans"]) for row in order[:count]]

    def __repr__(self) -> str:
        parts = [repr(self._summary())]
        if self.figures["lengths"]:
            parts.append(self._bars())
        if self.figures["findings"]:
            parts += [self._block(finding) for finding in self.figures["findings"]]
        return "\n\n".join([*parts, self.verdict])

    def _repr_html_(self) -> str:
        tables = [self._summary(), *([self._findings()] if self.figures["findings"] else [])]
        bars = f"<pre>{html.escape(self._bars())}</pre>" if self.figures["lengths"] else ""
        return tables[0]._repr_html_() + bars + "".join(t._repr_html_() for t in tables[1:]) + \
            f"<p><b>{html.escape(self.verdict)}</b></p>"

    @property
    def verdict(self) -> str:
        f = self.figures
        if f["errors"]:
            return f"{_count(f['errors'], 'kind')} of error: these rows would not be trained as they are meant"
        warnings = f", {_count(f['warnings'], 'kind')} of warning" if f["warnings"] else ""
        return f"{f['usable_rows']:,} of {f['rows']:,} rows can be trained{warnings}"

    def _summary(self) -> Table:
        f, lengths = self.figures, self.figures["lengths"]
        rows = [["rows", f"{f['rows']:,}, of which {f['usable_rows']:,} are trained"],
                *[[file["name"], _about(file)] for file in f["files"]]]
        if lengths:
            keep = lengths["keep"]
            rows += [
                ["tokens of a row", f"median {lengths['p50']:,}, 95 % up to {lengths['p95']:,}, 99 % up to "
                 f"{lengths['p99']:,}, longest {lengths['max']:,} ({f['tokenizer']}, {f['prompt_style']})"],
                ["trained tokens", "–" if f["trained_share"] is None else f"{f['trained_share']:.1%}"],
                ["max_seq_length", f"{f['max_seq_length']:,}; {keep['95']:,} keeps 95 % of the rows whole, "
                 f"{keep['99']:,} 99 %, {keep['100']:,} all"],
                ["an epoch", f"{f['steps_per_epoch']:,} steps, {f['tokens_per_epoch']:,} tokens, "
                 f"{f['trained_tokens_per_epoch']:,} of them trained"]]
        return Table(["data check", f["title"]], rows)

    def _bars(self) -> str:
        bars = self.figures["lengths"]["histogram"]
        most = max(bar["rows"] for bar in bars)
        lines = ["tokens          rows"]
        for bar in bars:
            eighths = round(bar["rows"] / most * 40 * 8)
            drawn = "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")
            lines.append(f"{bar['from']:>6,}–{bar['to']:<7,} {bar['rows']:>7,} {drawn}".rstrip())
        return "\n".join(lines)

    def _findings(self) -> Table:
        rows = [[f"{SIGNS[finding['severity']]} {finding['code']}", finding["count"], finding["message"],
                 "\n".join(self._places(finding)), finding["remedy"]] for finding in self.figures["findings"]]
        return Table(["finding", "rows", "what", "where", "remedy"], rows)

    def _block(self, finding: dict[str, Any]) -> str:
        head = f"{SIGNS[finding['severity']]} {finding['severity']} {finding['code']}: {finding['message']} " \
               f"({_count(finding['count'], 'row')})"
        return "\n    ".join([head, *self._places(finding), f"→ {finding['remedy']}"])

    def _places(self, finding: dict[str, Any]) -> list[str]:
        """The first places, a line each."""
        several = len(self.figures["files"]) > 1
        lines = [_where(place, several) + (f": {place['detail'][:200]}" if place["detail"] else "")
                 for place in finding["places"][:PLACES]]
        more = finding["count"] - len(lines)
        return [*lines, *([f"and {more:,} more"] if more > 0 else [])]

    def save(self, path: Path) -> None:
        """Write the page, whole or not at all."""
        write_text(path, self.page())


def _about(file: dict[str, Any]) -> str:
    text = f"{file['rows']:,} rows, shape {file['shape']}"
    if file["turns"]:
        text += f", {file['turns']} turns, median {file['p50']:,} tokens, 95 % up to {file['p95']:,}, longest " \
                f"{file['max']:,}"
    return text


def _where(place: dict[str, Any], with_file: bool) -> str:
    file = f"{Path(place['file']).name} " if with_file else ""
    return f"{file}{Place(place['file'], place['row'], place['line'])}"


def _title(row: dict[str, Any]) -> str:
    found = f" – {', '.join(row['findings'])}" if row["findings"] else ""
    return f"{_where(row, False)}: {row['trained']:,} of {row['tokens']:,} tokens are trained{found}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
