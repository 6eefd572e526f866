"""The data check's result: as text, in a notebook, as JSON, as a page; and the rows it keeps to be looked at."""

import base64
import hashlib
import html
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit.common.errors import GateError
from kit.common.files import write_text
from kit.common.secrets import redacted
from kit.common.show import MarkedText, Table, spans
from kit.data.masks import IGNORED, Encoded, Formatter
from kit.data.rows import Place, Row, progress, rows_of
from kit.data.shapes import Fault

PLACES = 5  # shown of each finding
SAMPLES = 50  # rows kept of each finding, and so many without one
PAGE = Path(__file__).with_name("lint_page.html")
# What could end the script element, is no part of a JavaScript line, or (half a surrogate pair) of UTF-8.
UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")
SIGNS = {"error": "✗", "warning": "!", "info": "·"}


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

    def look_up(self, source: str, split: str, any_encoding: bool) -> None:
        """Add what was noted late, reading the source again as far as rows are missing that were not kept."""
        kept = {Place(row["file"], row["row"], row["line"]): row for row in self.rows}
        for place in self._late.keys() & kept:
            faults = self._late.pop(place)
            kept[place]["findings"] += [fault.code for fault in faults]
            kept[place]["details"] += [fault.message for fault in faults]
        if not self._late:
            return
        with progress("looking up rows", source, self.recipe) as on_bytes:
            for row in rows_of(source, self.recipe, on_bytes, any_encoding):
                if row.place in self._late and row.messages:
                    self._keep(row, split, self._late.pop(row.place), self.formatter.encode([row.messages])[0])
                    if not self._late:
                        return

    def _keep(self, row: Row, split: str, faults: list[Fault], tokens: Encoded | None) -> None:
        ids, labels = shown = tokens or ([], [])
        limit = self.recipe.max_seq_length
        messages = [{key: redacted(text) for key, text in m.items()} for m in row.messages]
        if tokens and messages != row.messages:  # the page is passed on
            [shown] = self.formatter.encode([messages])
        self.rows.append({
            **row.place._asdict(), "split": split, "findings": [fault.code for fault in faults],
            "details": [fault.message for fault in faults], "tokens": len(ids),
            "trained": len(labels) - labels.count(IGNORED), "lost": max(0, len(ids) - limit),
            "spans": spans(self.formatter.tokenizer, *shown, limit) if tokens else
            [("masked", "" if row.raw is None else redacted(str(row.raw))[:2000])]})


@dataclass(frozen=True)
class Report:
    """`figures` are what `--json` prints; `rows` are some rows of each finding and some without, to be looked at.

    `bad_rows` has every row with an error, by file and from 1: of each finding the figures name the first 100.
    """

    figures: dict[str, Any]
    rows: list[dict[str, Any]]
    bad_rows: dict[str, set[int]] = field(default_factory=dict)

    @property
    def errors(self) -> int:
        """How many findings are of severity error."""
        return int(self.figures["errors"])

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
        """One HTML page; it asks the network for nothing, and no text of a row can become markup."""
        template = PAGE.read_text(encoding="utf-8")
        data = json.dumps({"report": self.figures, "rows": self.rows}, ensure_ascii=False, allow_nan=False,
                          separators=(",", ":"))
        data = UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", data)
        # The policy names the page's one script by its digest, so that no other could run.
        script = template.split("<script>")[1].split("</script>")[0]
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        return template.replace("SCRIPT-DIGEST", digest).replace("PAGE-DATA", data)

    def save(self, path: Path) -> None:
        """Write the page, whole or not at all."""
        write_text(path, self.page())

    def examples(self, count: int = 3) -> list[MarkedText]:
        """Some rows as tokens: those with the gravest findings first."""
        levels = {finding["code"]: list(SIGNS).index(finding["severity"]) for finding in self.figures["findings"]}
        order = sorted((row for row in self.rows if row["tokens"]),
                       key=lambda row: min((levels[code] for code in row["findings"]), default=len(SIGNS)))
        return [MarkedText(_title(row), row["spans"]) for row in order[:count]]

    def __repr__(self) -> str:
        return f"{self._summary()}\n\n{self._details()}"

    def _repr_html_(self) -> str:
        return f"{self._summary()._repr_html_()}<pre style='white-space:pre-wrap'>" \
               f"{html.escape(self._details())}</pre>"

    @property
    def verdict(self) -> str:
        f = self.figures
        if f["errors"]:
            return f"{_count(f['errors'], 'kind')} of error: a run would stop at these rows"
        warnings = f", {_count(f['warnings'], 'kind')} of warning" if f["warnings"] else ""
        return f"{f['usable_rows']:,} of {f['rows']:,} rows can be trained{warnings}"

    def _summary(self) -> Table:
        f, lengths = self.figures, self.figures["lengths"]
        looked_at = "" if f["max_train_samples"] is None else f" (max_train_samples: {f['max_train_samples']:,})"
        rows = [["rows", f"{f['rows']:,}, of which {f['usable_rows']:,} are trained{looked_at}"],
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

    def _details(self) -> str:
        bars = [self._bars()] if self.figures["lengths"] else []
        return "\n\n".join([*bars, *map(self._finding, self.figures["findings"]), self.verdict])

    def _bars(self) -> str:
        bars = self.figures["lengths"]["histogram"]
        most = max(bar["rows"] for bar in bars)
        lines = ["tokens          rows"]
        for bar in bars:
            eighths = round(bar["rows"] / most * 40 * 8)
            drawn = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]
            lines.append(f"{bar['from']:>6,}–{bar['to']:<7,} {bar['rows']:>7,} {drawn}".rstrip())
        return "\n".join(lines)

    def _finding(self, finding: dict[str, Any]) -> str:
        """The finding, its first places, a line each, and the remedy."""
        several = len(self.figures["files"]) > 1
        head = f"{SIGNS[finding['severity']]} {finding['severity']} {finding['code']}: {finding['message']} " \
               f"({_count(finding['count'], 'row')})"
        places = [_where(place, several) + (f": {place['detail'][:200]}" if place["detail"] else "")
                  for place in finding["places"][:PLACES]]
        more = finding["count"] - len(places)
        return "\n    ".join([head, *places, *([f"and {more:,} more"] if more > 0 else []), f"→ {finding['remedy']}"])


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
    findings = f" – {', '.join(row['findings'])}" if row["findings"] else ""
    return f"{_where(row, False)}: {row['trained']:,} of {row['tokens']:,} tokens are trained{findings}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
