"""Tables and highlighted tokens: HTML in a notebook, text everywhere else."""

import html
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from kit.common.notebook import in_kernel
from kit.common.processes import is_main
from kit.common.progress import kind
from kit.common.secrets import redacted

TEXT_WIDTH = 110  # characters of a table
# What a token is to the training, with its looks in a terminal and in a notebook.
TOKEN_STYLES = {
    "masked": ("dim", "color:#777"),
    "special": ("magenta", "color:#6a1b9a;border:1px solid #ce93d8;border-radius:3px"),  # control token, not trained
    "trained": ("black on green", "background:#c8e6c9;color:#1b5e20"),
    "stop": ("bold white on dark_green", "background:#2e7d32;color:#fff;border-radius:3px"),  # control token, trained
    "lost": ("red strike", "color:#b71c1c;text-decoration:line-through"),  # beyond max_seq_length
}


class Table:
    """Rows under headings; in text, long cells are wrapped. Where there are more rows (`of`), the title says so."""

    def __init__(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "", of: int = 0) -> None:
        self.columns = list(columns)
        self.rows = [[f"{cell:,}" if type(cell) is int else str(cell) for cell in row] for row in rows]
        part = f"{len(self.rows):,} of {of:,} rows" if of > len(self.rows) else ""
        self.title = ": ".join(filter(None, (title, part)))

    def as_json(self) -> list[dict[str, str]]:
        """A row each: {heading: cell}."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def __repr__(self) -> str:
        # Here, as it takes 0.1 s and most processes show no table.
        from rich import box, console, table
        from rich.text import Text

        grid = table.Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        for column in self.columns:
            grid.add_column(Text(column), overflow="fold")
        for row in self.rows:
            grid.add_row(*map(Text, row))
        text = io.StringIO()
        console.Console(file=text, width=TEXT_WIDTH, color_system=None, force_jupyter=False).print(grid)
        lines = [self.title] if self.title else []
        return "\n".join([*lines, *map(str.rstrip, text.getvalue().splitlines())])

    def _repr_html_(self) -> str:
        style = "text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere;padding:4px 12px"
        head = "".join(f"<th style='{style}'>{html.escape(c)}</th>" for c in self.columns)
        body = "".join("<tr>" + "".join(f"<td style='{style}'>{html.escape(c)}</td>" for c in row) + "</tr>"
                       for row in self.rows)
        title = f"<caption style='text-align:left'><b>{html.escape(self.title)}</b></caption>" if self.title else ""
        return f"<table>{title}<tr>{head}</tr>{body}</table>"


@dataclass(repr=False)
class MarkedText:
    """Text in stretches (kind, text): marked by colour in a notebook and a terminal, else by brackets."""

    title: str
    spans: list[tuple[str, str]]

    def __repr__(self) -> str:
        brackets = {"trained": "⟦⟧", "stop": "⟦⟧", "lost": "⟪⟫"}
        text = ""
        for pair, group in groupby(self.spans, lambda span: brackets.get(span[0], "")):
            text += pair[:1] + "".join(part for _, part in group) + pair[1:]
        lost = ", ⟪ ⟫ are lost" if any(kind == "lost" for kind, _ in self.spans) else ""
        return f"{self.title} (⟦ ⟧{lost})\n{text}"

    def __rich__(self) -> Any:
        from rich.text import Text

        kinds = [(f" {kind} ", style) for kind, (style, _) in TOKEN_STYLES.items()]
        legend = Text.assemble((self.title, "bold"), "  ", *kinds)
        return legend + "\n" + Text.assemble(*((text, TOKEN_STYLES[kind][0]) for kind, text in self.spans))

    def _repr_html_(self) -> str:
        def span(kind: str, text: str) -> str:
            return f"<span title='{kind}' style='{TOKEN_STYLES[kind][1]}'>{html.escape(text)}</span>"

        legend = " ".join(span(kind, kind) for kind in TOKEN_STYLES)
        text = "".join(span(kind, text) for kind, text in self.spans)
        return f"<b>{html.escape(self.title)}</b>  {legend}<pre style='white-space:pre-wrap'>{text}</pre>"


class Tokens(MarkedText):
    """One formatted row (`input_ids` and `labels`): what is trained, what is masked, what max_seq_length cuts off."""

    def __init__(self, tokenizer: Any, row: dict[str, Any], max_seq_length: int | None = None) -> None:
        labels = row["labels"]
        super().__init__(f"{sum(label != -100 for label in labels):,} of {len(labels):,} tokens are trained",
                         spans(tokenizer, row["input_ids"], labels, max_seq_length))


def spans(tokenizer: Any, ids: list[int], labels: list[int],
          max_seq_length: int | None = None) -> list[tuple[str, str]]:
    """A row's text in stretches of one kind, a key of TOKEN_STYLES; each control token is a stretch of its own."""
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
    is_figure = hasattr(thing, "savefig")
    if in_kernel():
        from IPython.display import Image, display

        if is_figure:  # made without pyplot, it has no picture of its own in a notebook
            picture = io.BytesIO()
            thing.savefig(picture, format="png", dpi=100)
            thing = Image(data=picture.getvalue())
        display(thing)
    elif sys.stdout.isatty() and hasattr(thing, "__rich__"):
        import rich

        rich.print(thing)
    else:
        print(thing.get_label() if is_figure else thing)


def side_by_side(prompts: list[Any], references: list[str], limit: int = 3, **answers: list[Any]) -> Table:
    """The first prompts with the answers of each stage: `side_by_side(p, r, before=…, after=…)`.

    What looks like a secret is replaced by its kind: a model makes some up, and the notebook is passed on.
    """
    count = min([len(prompts), *map(len, answers.values())])
    rows = [[prompts[i][-1]["content"], *(redacted(column[i].text) for column in answers.values()), references[i]]
            for i in range(min(limit, count))]
    return Table(["prompt", *answers, "reference"], rows, of=count)


def scores(answered: dict[str, int] | None = None, /, **columns: dict[str, float]) -> Table:
    """Scores of several stages in per cent, one row per field.

    `answered` is how many rows each stage answered, and how many there are: the heading says of how many this is.
    """
    heading = "held-out score"
    if answered:
        count, total = min(answered.values()), max(answered.values())
        heading += f", first {count:,} of {total:,} rows" if count < total else f", {count:,} rows"
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = [["whole answer" if name == "exact" else name,
             *(f"{column[name]:.1%}" if name in column else "–" for column in columns.values())] for name in names]
    return Table([heading, *columns], rows) if rows else Table([heading], [["no rows held out, or metric: none"]])


def bar(total: int | None, what: str, unit: str, **options: Any) -> Any:
    """Progress as it suits where it is shown: a tqdm bar, to be closed or used by `with`; `options` are tqdm's.

    Of several processes the main one shows it.
    """
    return kind()(total=total, desc=what, unit=unit, disable=not is_main(),
                  **{"dynamic_ncols": True, "mininterval": 0.5, **options})


def duration(seconds: float) -> str:
    """Seconds for people: 41.2 s, 4.5 min, 2.3 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes for people: 1.2 GB (powers of 1000)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
