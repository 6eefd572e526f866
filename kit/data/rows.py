"""Rows of a source, good and bad: each with its place, its shape, and its messages or its faults."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from kit.common.errors import KitError, nearest
from kit.common.show import bar
from kit.data.encodings import in_utf8
from kit.data.readers import read_rows
from kit.data.records import Problem, Record
from kit.data.shapes import NAMES, SHAPES, UNTRAINED, Fault, renamed, shape_of, to_messages
from kit.data.sources import HELDOUT, fetched, files_of, hub_rows, meant
from kit.data.tools import DEFINITIONS, unfilled
from kit.models.template import Message
from kit.recipe.fields import ROLE_WORDS, ROW_FIELDS, Columns
from kit.recipe.reading import MAX_ERRORS
from kit.recipe.recipe import Recipe

MISSING = ("missing_field", "misnamed_field")
OPTIONAL = ("input", "system", "history")  # fields that a row can do without
MOST_COLUMNS = 1000  # that are remembered of a file


class Place(NamedTuple):
    """Where a row stands: `row` counts from 1; `line` is the file's, None where a file has no lines."""

    file: str
    row: int
    line: int | None

    def __str__(self) -> str:
        return f"row {self.row}" if self.line in (None, self.row) else f"row {self.row} (line {self.line})"


class Row(NamedTuple):
    """A row as it was read, its shape, and its messages or its faults."""

    place: Place
    raw: Any
    shape: str | None
    messages: list[Message]
    faults: list[Fault]


def rows_of(source: str | Path, recipe: Recipe, on_bytes: Callable[[int], object] | None = None,
            any_encoding: bool = False) -> Iterator[Row]:
    """Every row of a file, a folder, a hub's data set or `starter`, good and bad.

    `on_bytes` is called with how many further bytes of the files have been read. With `any_encoding` files in another
    encoding than UTF-8 are read by what they look like. Raises KitError for what can't be read at all.
    """
    told = fetched(meant(source, recipe))
    recipe = told.recipe
    columns = {*ROW_FIELDS, *UNTRAINED, *DEFINITIONS, *filter(None, recipe.columns.values())}  # those looked at
    files = files_of(told.place, recipe)
    if files is None:
        for number, value in enumerate(hub_rows(told), 1):
            yield _row(Place(str(source), number, None), unfilled(value), recipe)
    for path, item in _items(files or (), on_bytes, any_encoding):
        place = Place(str(source) if len(files or ()) == 1 else str(path), item.row, item.line)
        if isinstance(item, Problem):
            yield Row(place, None, None, [], [Fault(item.code, item.message)])
        elif lost := [name for name in item.unsaved if name in columns]:
            shape = shape_of(renamed(item.value, recipe.columns))
            yield Row(place, None, shape, [], [Fault("unsaved_formula", ", ".join(lost))])
        elif not item.only_formulas(columns):
            yield _row(place, unfilled(item.value) if path.suffix.lower() == ".parquet" else item.value, recipe)


def _items(files: Iterable[Path], on_bytes: Callable[[int], object] | None, any_encoding: bool,
           ) -> Iterator[tuple[Path, Record | Problem]]:
    for path in files:
        with in_utf8(path) if any_encoding else nullcontext(path) as readable:
            for item in read_rows(readable, on_bytes):
                yield path, item


@contextmanager
def progress(what: str, source: str | Path, recipe: Recipe) -> Iterator[Callable[[int], object]]:
    """A bar over the bytes of a source's files, shown when reading takes more than two seconds; yields `on_bytes`.

    Around the loop over the rows, so that the bar is gone before an error is printed.
    """
    total = sum(path.stat().st_size for path in files_of(source, recipe) or ())
    with bar(total or None, what, "B", unit_scale=True, leave=False, delay=2) as shown:
        yield shown.update


def _row(place: Place, raw: Any, recipe: Recipe) -> Row:
    row = Row(place, raw, *to_messages(renamed(raw, recipe.columns)))
    if any(fault.code in MISSING for fault in row.faults) and (wrong := _not_there(row, recipe.columns)):
        row = row._replace(faults=wrong + [fault for fault in row.faults if fault.code not in MISSING])
    return row


def _not_there(row: Row, columns: Columns) -> list[Fault]:
    """What `columns` names and a row does not have, in the file's own words; what it says for other shapes only where
    a column has nearly that name."""
    faults = []
    names = [str(name) for name in row.raw] if isinstance(row.raw, dict) else []
    others = [name for name in names if name not in columns.values()]
    for ours, theirs in columns.items():
        if theirs is None or {ours, theirs} & {*names} or (ours in ROLE_WORDS and ours != "system"):
            continue
        near = nearest(theirs, others)
        if near or ours in SHAPES.get(row.shape or "", NAMES):
            found = near or f" (found: {', '.join(names[:8]) or 'none'})"
            faults.append(Fault("misnamed_field" if near else "missing_field",
                                f"columns: {ours}: there is no {theirs!r}{found}"))
    return faults


class Shapes:
    """How many rows of each file have which shape, and where each shape is first seen; and the columns there are."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self._first: dict[tuple[str, str], Place] = {}
        self._columns: dict[str, Place] = {}

    def add(self, row: Row) -> None:
        shape = row.shape or "unknown"
        if isinstance(row.raw, dict) and len(self._columns) < MOST_COLUMNS:
            for name in row.raw:
                self._columns.setdefault(str(name), row.place)
        self.counts.setdefault(row.place.file, Counter())[shape] += 1
        self._first.setdefault((row.place.file, shape), row.place)

    def mixed(self) -> Iterator[tuple[Place, str]]:
        """For each file that mixes shapes, the first row of the rarest and a message with the count of each."""
        for file, counts in self.counts.items():
            known = [(shape, count) for shape, count in counts.most_common() if shape != "unknown"]
            if len(known) > 1:
                parts = [f"{shape} {count:,} (first: {self._first[file, shape]})" for shape, count in known]
                rarest = min(known, key=lambda item: item[1])[0]
                yield self._first[file, rarest], f"dataset: {file} mixes shapes: {', '.join(parts)}"


    def misnamed(self, columns: Columns) -> Iterator[tuple[Place, str]]:
        """Columns for fields that a row can do without, which no row has, where another name is nearly theirs."""
        others = [name for name in self._columns if name not in columns.values()]
        for ours, theirs in columns.items():
            if theirs and ours in OPTIONAL and theirs not in self._columns \
                    and (near := nearest(theirs, others, cutoff=0.75)):
                yield next(iter(self._columns.values())), f"columns: {ours}: there is no {theirs!r}{near}"


class Problems(list[str]):
    """The first 20 things that are wrong with rows, and how many there are."""

    total = 0

    def add(self, problem: str) -> None:
        self.total += 1
        if len(self) < MAX_ERRORS:
            self.append(problem)

    def refuse(self, what: str, hint: str) -> None:
        """KitError that lists them; nothing when there is none."""
        if self:
            more = f"\n  … and {self.total - len(self):,} more" if self.total > len(self) else ""
            raise KitError(f"{what} ({self.total:,}):\n  " + "\n  ".join(self) + more, hint)


def good_rows(source: str | Path, recipe: Recipe, on_bytes: Callable[[int], object] | None = None,
              only: Callable[[Iterator[Row]], Iterator[Row]] = iter, may_be_empty: bool = False) -> Iterator[Row]:
    """The rows of a source; KitError at the end with up to 20 bad ones, or when a file mixes shapes.

    `only` passes on those that are looked at.
    """
    problems, shapes = Problems(), Shapes()
    for row in only(rows_of(source, recipe, on_bytes)):
        shapes.add(row)
        if row.faults:
            file = "" if row.place.file == str(source) else f"{Path(row.place.file).name} "
            problems.add(f"{file}{row.place}: {'; '.join(fault.message for fault in row.faults)}")
        elif not problems:
            yield row
    for _, message in shapes.mixed():
        raise KitError(message, "bring all rows of a file to one shape, or put each shape into a file of its own")
    for _, message in shapes.misnamed(meant(source, recipe).recipe.columns):
        raise KitError(f"dataset: {source}: {message}", "correct the name in columns")
    problems.refuse(f"dataset: {source}: bad rows",
                    f"`kit lint {source}` shows all of them with remedies; known shapes: Alpaca (instruction, output), "
                    "messages, conversations, prompt and completion, question and answer, others through columns")
    if not shapes.counts and not may_be_empty:
        raise empty(source)


def empty(source: str | Path) -> KitError:
    return KitError(f"dataset: {source} is empty", "it needs at least one row")


def where(place: Place, recipe: Recipe) -> str:
    """The place, with its file's name unless the recipe has only one file it can be in."""
    unmistakable = place.file in (recipe.eval_dataset, HELDOUT) or [place.file] == list(recipe.sources)
    return str(place) if unmistakable else f"{Path(place.file).name} {place}"
