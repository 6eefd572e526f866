"""Tables and highlighted tokens: HTML in a notebook, text everywhere else."""

from __future__ import annotations

import html
import sys
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

# What a token is to the training, with its looks in a terminal and in a notebook.
KINDS = {
    "masked": ("dim", "color:#777"),
    "special": ("magenta", "color:#6a1b9a;border:1px solid #ce93d8;border-radius:3px"),  # control token, not trained
    "trained": ("black on green", "background:#c8e6c9;color:#1b5e20"),
    "stop": ("bold white on dark_green", "background:#2e7d32;color:#fff;border-radius:3px"),  # control token, trained
    "lost": ("red strike", "color:#b71c1c;text-decoration:line-through"),  # beyond max_seq_length
}


class Table:
    """Rows under headings; in text, long cells are wrapped."""

    def __init__(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
        self.columns = list(columns)
        self.rows = [[_cell(value) for value in row] for row in rows]
        self.title = title

    def __repr__(self) -> str:
        rooms = _rooms([self.columns, *self.rows])
        cells = [[_wrap(text, room) for text, room in zip(row, rooms, strict=True)]
                 for row in [self.columns, *self.rows]]
        widths = [max(len(line) for row in cells for line in row[i]) for i in range(len(self.columns))]
        lines = [self.title] if self.title else []
        for number, row in enumerate(cells):
            for k in range(max(len(cell) for cell in row)):
                parts = [(cell[k] if k < len(cell) else "").ljust(w) for cell, w in zip(row, widths, strict=True)]
                lines.append("  ".join(parts).rstrip())
            if number == 0:
                lines.append("  ".join("─" * width for width in widths))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        style = "text-align:left;vertical-align:top;white-space:pre-wrap;padding:4px 12px"
        head = "".join(f"<th style='{style}'>{html.escape(c)}</th>" for c in self.columns)
        body = "".join("<tr>" + "".join(f"<td style='{style}'>{html.escape(c)}</td>" for c in row) + "</tr>"
                       for row in self.rows)
        title = f"<caption style='text-align:left'><b>{html.escape(self.title)}</b></caption>" if self.title else ""
        return f"<table>{title}<tr>{head}</tr>{body}</table>"


class Tokens:
    """One formatted row, its kinds of tokens told apart: by colour in a notebook and a terminal, else by brackets."""

    def __init__(self, tokenizer: Any, row: dict[str, Any], max_seq_length: int | None = None) -> None:
        labels = row["labels"]
        self.title = f"{sum(label != -100 for label in labels):,} of {len(labels):,} tokens are trained"
        self.spans = spans(tokenizer, row["input_ids"], labels, max_seq_length)

    @classmethod
    def of(cls, title: str, spans: list[tuple[str, str]]) -> Tokens:
        """Of spans that are known already."""
        made = cls.__new__(cls)
        made.title, made.spans = title, spans
        return made

    def __repr__(self) -> str:
        groups: list[tuple[str, str]] = []  # (opening bracket, text)
        for kind, text in self.spans:
            bracket = {"trained": "⟦", "stop": "⟦", "lost": "⟪"}.get(kind, "")
            groups = [*groups[:-1], (bracket, groups[-1][1] + text)] if groups and groups[-1][0] == bracket else \
                [*groups, (bracket, text)]
        lost = ", ⟪ ⟫ are lost" if any(kind == "lost" for kind, _ in self.spans) else ""
        closing = {"⟦": "⟧", "⟪": "⟫", "": ""}
        return f"{self.title} (⟦ ⟧{lost})\n" + "".join(f"{b}{text}{closing[b]}" for b, text in groups)

    def __rich__(self) -> Any:
        from rich.text import Text

        kinds = [(f" {kind} ", style) for kind, (style, _) in KINDS.items()]
        legend = Text.assemble((self.title, "bold"), "  ", *kinds)
        return legend + "\n" + Text.assemble(*((text, KINDS[kind][0]) for kind, text in self.spans))

    def _repr_html_(self) -> str:
        def span(kind: str, text: str) -> str:
            return f"<span title='{kind}' style='{KINDS[kind][1]}'>{html.escape(text)}</span>"

        legend = " ".join(span(kind, kind) for kind in KINDS)
        text = "".join(span(kind, text) for kind, text in self.spans)
        return f"<b>{html.escape(self.title)}</b>  {legend}<pre style='white-space:pre-wrap'>{text}</pre>"


def spans(tokenizer: Any, ids: list[int], labels: list[int],
          max_seq_length: int | None = None) -> list[tuple[str, str]]:
    """A row's text in stretches of one kind, a key of KINDS; each control token is a stretch of its own."""
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    groups: list[tuple[str, list[int]]] = []
    for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if max_seq_length is not None and place >= max_seq_length:
            kind = "lost"
        elif token in special:
            kind = "special" if label == -100 else "stop"
        else:
            kind = "masked" if label == -100 else "trained"
        if not groups or groups[-1][0] != kind or kind in ("special", "stop"):
            groups.append((kind, []))
        groups[-1][1].append(token)
    for (_, before), (kind, tokens) in pairwise(groups):
        # A character that is cut in two is lost as a whole.
        while kind == "lost" and before and tokenizer.decode(before).endswith("\ufffd"):
            tokens.insert(0, before.pop())
    return [(kind, tokenizer.decode(tokens)) for kind, tokens in groups if tokens]


def show(thing: Any) -> None:
    """Display in a notebook, print elsewhere; of a figure, where it was saved."""
    figure = hasattr(thing, "savefig")
    if not in_notebook():
        if sys.stdout.isatty() and hasattr(thing, "__rich__"):
            import rich

            rich.print(thing)
        else:
            print(thing.get_label() if figure else thing)
        return
    from IPython.display import Image, display

    # A Figure made without pyplot has no picture of its own in a notebook.
    display(Image(data=_png(thing)) if figure else thing)


def _png(figure: Any) -> bytes:
    import io

    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this code (also under papermill)."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return getattr(get_ipython(), "kernel", None) is not None


def side_by_side(prompts: list[Any], references: list[str], limit: int = 3, **answers: list[Any]) -> Table:
    """The first prompts with the answers of each stage: `side_by_side(p, r, before=…, after=…)`."""
    rows = [[prompts[i][-1]["content"], *(column[i].text for column in answers.values()), references[i]]
            for i in range(min(limit, len(prompts)))]
    return Table(["prompt", *answers, "reference"], rows)


def scores(**columns: dict[str, float]) -> Table:
    """Scores of several stages in per cent, one row per field."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = [["whole answer" if name == "exact" else name,
             *(f"{column[name]:.1%}" if name in column else "–" for column in columns.values())] for name in names]
    return Table(["held-out score", *columns], rows) if rows else Table(["held-out score"], [["metric: none"]])


def bar(total: int | None, what: str, unit: str, **options: Any) -> Any:
    """A tqdm bar on standard error; where that is a file, a line every five seconds at most."""
    from tqdm import tqdm

    from kit.common.processes import is_main

    return tqdm(total=total, desc=what, unit=unit, file=sys.stderr, dynamic_ncols=True, disable=not is_main(),
                mininterval=0.5 if sys.stderr.isatty() else 5, **options)


def clock(seconds: float) -> str:
    """Seconds for people: 45 s, 2 min 10 s, 3 h 5 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(count: float) -> str:
    """Bytes for people: 1.2 GB (powers of 1000)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _rooms(rows: list[list[str]], total: int = 110, least: int = 16) -> list[int]:
    """Characters for each column: those that need less than their share leave the rest to the others."""
    needed = [max((len(line) for row in rows for line in row[i].splitlines()), default=1) for i in range(len(rows[0]))]
    rooms: dict[int, int] = {}
    for place in sorted(range(len(needed)), key=lambda i: needed[i]):
        share = (total - sum(rooms.values())) // (len(needed) - len(rooms))
        rooms[place] = min(needed[place], max(least, share))
    return [max(1, rooms[i]) for i in range(len(needed))]


def _wrap(text: str, width: int) -> list[str]:
    return [piece for line in text.splitlines() or [""] for piece in textwrap.wrap(line, width) or [""]]
