"""Tables and highlighted tokens: HTML in a notebook, text everywhere else."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from typing import Any

TRAINED = "background:#c8e6c9;color:#1b5e20"
MASKED = "color:#777"


class Table:
    """Rows under headings; in text, long cells are wrapped."""

    def __init__(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
        self.columns = list(columns)
        self.rows = [[_cell(value) for value in row] for row in rows]
        self.title = title

    def __repr__(self) -> str:
        room = max(16, 100 // max(1, len(self.columns)))
        cells = [[_wrap(text, room) for text in row] for row in [self.columns, *self.rows]]
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
    """One formatted row with the tokens the loss sees highlighted; in text they stand in ⟦ ⟧."""

    def __init__(self, tokenizer: Any, row: dict[str, Any]) -> None:
        self.total = len(row["input_ids"])
        self.trained = sum(label != -100 for label in row["labels"])
        self.groups: list[tuple[bool, list[int]]] = []
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            if not self.groups or self.groups[-1][0] != (label != -100):
                self.groups.append((label != -100, []))
            self.groups[-1][1].append(token)
        self.texts = [(trained, tokenizer.decode(ids)) for trained, ids in self.groups]
        self.title = f"{self.trained} of {self.total} tokens are trained (⟦ ⟧ or green)"

    def __repr__(self) -> str:
        return self.title + "\n" + "".join(f"⟦{text}⟧" if trained else text for trained, text in self.texts)

    def _repr_html_(self) -> str:
        spans = "".join(f"<span style='{TRAINED if trained else MASKED}'>{html.escape(text)}</span>"
                        for trained, text in self.texts)
        return f"<b>{html.escape(self.title)}</b><pre style='white-space:pre-wrap'>{spans}</pre>"


def show(thing: Any) -> None:
    """Display in a notebook, print elsewhere; of a figure, where it was saved."""
    figure = hasattr(thing, "savefig")
    if not in_notebook():
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


def size(count: float) -> str:
    """Bytes for people: 1.2 GB (powers of 1000)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _wrap(text: str, width: int) -> list[str]:
    return [piece for line in text.splitlines() or [""] for piece in textwrap.wrap(line, width) or [""]]
