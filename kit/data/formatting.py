"""The data of a run: conversations to tokens and labels, of a length that can be trained."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from kit.common.errors import KitError
from kit.common.show import bar
from kit.data.disk_rows import BATCH, TURNS, DiskRows, Example
from kit.data.findings import FINDINGS
from kit.data.masks import Formatter, Located
from kit.data.rows import Place, Problems, where
from kit.data.shapes import longest_user_turn
from kit.data.splits import read_splits
from kit.models.template import Message
from kit.recipe.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

CUTS = 8  # rounds of shortening a prompt before a row is given up


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """The formatted data: splits `train` and `test` (held out, maybe empty).

    Columns: `messages`; `input_ids` and `labels` (lists of one length, -100 where nothing is trained);
    `prompt` (messages before the last answer) and `reference` (that answer). With lazy_preprocess the training rows
    stay on disk and their tokens are made when a row is taken. Raises KitError with up to 20 bad rows.
    """
    from datasets import DatasetDict

    with rare_collections():
        train, held_out = read_splits(recipe)
        formatter = Formatter(tokenizer, recipe)
        made = lazy_dataset(train, formatter) if isinstance(train, DiskRows) else _format(train, formatter, "training")
        data = DatasetDict(train=made, test=_format(held_out, formatter, "held-out"))
    if len(data["train"]) == 0:
        raise KitError(f"no training row fits into max_seq_length: {recipe.max_seq_length}", "raise max_seq_length")
    return data


@contextmanager
def rare_collections() -> Iterator[None]:
    """Let Python look for garbage in cycles seldom: many small lists without any cycle cost it a fifth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(1_000_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


class Formatted(NamedTuple):
    """Tokens of a row, and how many of its prompt were cut to make it fit; `ids` is empty for a row left out."""

    messages: list[Message]
    ids: list[int]
    labels: list[int]
    length: int  # tokens before anything was done about it
    cut: int


def fit(formatter: Formatter, messages: list[Message], ids: list[int], labels: list[int]) -> Formatted:
    """What overlong_rows makes of a row that was tokenised whole."""
    recipe, length = formatter.recipe, len(ids)
    if length <= recipe.max_seq_length:
        return Formatted(messages, ids, labels, length, 0)
    if recipe.overlong_rows == "truncate_prompt":
        for _ in range(CUTS):
            shorter = _shortened(formatter, messages, len(ids) - recipe.max_seq_length)
            if shorter is None:
                break
            messages = shorter
            [(ids, labels)] = formatter.encode([messages])
            if len(ids) <= recipe.max_seq_length:
                return Formatted(messages, ids, labels, length, length - len(ids))
    return Formatted(messages, [], [], length, 0)


def _shortened(formatter: Formatter, messages: list[Message], excess: int) -> list[Message] | None:
    """The messages with `excess` tokens less in the longest user turn; None if it is too short."""
    text, with_ends = longest_user_turn(messages)
    ids = formatter.tokenizer(text, add_special_tokens=False)["input_ids"]
    keep = max(len(ids) - excess - 2, 8)
    if keep >= len(ids) - 2:
        return None
    head, tail = formatter.tokenizer.decode(ids[: keep // 2]), formatter.tokenizer.decode(ids[len(ids) - keep // 2:])
    return with_ends(head.rstrip("\ufffd"), tail.lstrip("\ufffd"))


def _format(rows: Sequence[Example], formatter: Formatter, what: str) -> Dataset:
    from datasets import Dataset
    from datasets.fingerprint import generate_random_fingerprint

    batches = _fitting(rows, formatter, what)
    tables = [_table([]), *(_table([tokens for _, tokens in fitted]) for _, fitted in batches)]
    # Without a fingerprint of ours, `datasets` would serialise the whole table to make one.
    return Dataset(pa.concat_tables(tables), fingerprint=generate_random_fingerprint())


def lazy_dataset(rows: DiskRows, formatter: Formatter) -> Dataset:
    """Rows on disk with `input_ids` and `labels` made when a row is taken. Every mask is proven now."""
    kept: list[int] = []
    for short, fitted in _fitting(rows, formatter, "training", lazily=True):
        kept += sorted([*short, *(number for number, _ in fitted)])
    rows = rows.select(kept)

    # The transform holds the rows, and with them the file, which goes when they do.
    def tokens_of(batch: dict[str, list[Any]], _files: DiskRows = rows) -> dict[str, list[Any]]:
        located = [formatter.locate(messages) for messages in batch["messages"]]
        encoded = formatter.encode_located(located)
        fitted = [fit(formatter, messages, *tokens)
                  for messages, tokens in zip(batch["messages"], encoded, strict=True)]
        wrong = {formatter.untrained(row, labels) for row, (_, labels) in zip(located, encoded, strict=True)} - {None}
        if wrong or not all(row.ids for row in fitted):
            what = FINDINGS[wrong.pop() or ""][1] if wrong else "a row is longer than max_seq_length"
            raise KitError(f"lazy_preprocess: {what}, which shows only in the tokens", "`kit lint` names the row")
        return _table(fitted).to_pydict()

    return rows.dataset.select_columns(["messages", "prompt", "reference"]).with_transform(tokens_of)


def _fitting(rows: Sequence[Example], formatter: Formatter, what: str,
             lazily: bool = False) -> Iterator[tuple[list[int], list[tuple[int, Formatted]]]]:
    """Batches of the rows that fit, by their places in `rows`; prints at the end how many were left out or shortened.

    The first list is empty, or lazily has the rows that fit in any case; the second has the others with their tokens.
    Raises KitError at the end with up to 20 rows that can't be formatted.
    """
    outcome = _Outcome(formatter.recipe)
    for (short, others), encoded in formatter.encode_ahead(_located(rows, formatter, outcome, what, lazily)):
        fitted = []
        for (number, row, located), (ids, labels) in zip(others, encoded, strict=True):
            if code := formatter.untrained(located, labels):
                outcome.refuse(row.place, FINDINGS[code][1])
            tokens = fit(formatter, row.messages, ids, labels)
            outcome.count(row.place, tokens)
            if tokens.ids:
                fitted.append((number, tokens))
        yield short, fitted
    outcome.settle(len(rows), what)


def _located(rows: Sequence[Example], formatter: Formatter, outcome: _Outcome, what: str,
             lazily: bool) -> Iterator[tuple[tuple[list[int], list[tuple[int, Example, Located]]], list[Located]]]:
    limit = formatter.recipe.max_seq_length
    with bar(len(rows), f"formatting {what} rows", "row", unit_scale=True, leave=False, delay=2) as progress:
        for start in range(0, len(rows), BATCH):
            short, others = [], []
            for number, row in enumerate(rows[start:start + BATCH], start):
                try:
                    if typed := formatter.typed(row.messages):
                        raise KitError(f"the text holds the control token {typed[0]!r}, which the model would take for "
                                       "its own")
                    located = formatter.locate(row.messages)
                except KitError as error:
                    outcome.refuse(row.place, error.message)
                    continue
                # A token is at least one byte.
                if lazily and sum(len(text.encode()) for text, _ in located.segments) <= limit:
                    short.append(number)
                else:
                    others.append((number, row, located))
            yield (short, others), [located for _, _, located in others]
            progress.update(min(BATCH, len(rows) - start))


class _Outcome:
    """What became of rows that don't fit or can't be formatted."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.problems = Problems()
        self.lost = self.shortened = self.cut = 0

    def refuse(self, place: Place, message: str) -> None:
        self.problems.add(f"{where(place, self.recipe)}: {message}")

    def count(self, place: Place, tokens: Formatted) -> None:
        if not tokens.ids and self.recipe.overlong_rows == "error":
            self.refuse(place, f"{tokens.length:,} tokens, more than max_seq_length: {self.recipe.max_seq_length:,}")
        self.lost += not tokens.ids
        self.shortened += tokens.cut > 0
        self.cut += tokens.cut

    def settle(self, total: int, what: str) -> None:
        self.problems.refuse(f"{what} rows that can't be formatted", "`kit lint` shows them with remedies; rows that "
                             "are only too long: overlong_rows: drop")
        limit = f"max_seq_length: {self.recipe.max_seq_length} tokens"
        if self.shortened:
            print(f"{self.shortened:,} of {total:,} {what} rows were longer than {limit}; {self.cut:,} tokens were cut "
                  "from the middle of their prompts")
        if self.lost:
            print(f"{self.lost:,} of {total:,} {what} rows are longer than {limit} and were left out")


def _table(rows: Sequence[Formatted]) -> pa.Table:
    """Filled column by column, with types: from rows as dicts Arrow would have to guess and to convert."""
    tokens = pa.list_(pa.int32())
    return pa.table({
        "messages": pa.array([row.messages for row in rows], TURNS),
        "input_ids": pa.array([row.ids for row in rows], tokens),
        "labels": pa.array([row.labels for row in rows], tokens),
        "prompt": pa.array([row.messages[:-1] for row in rows], TURNS),
        "reference": pa.array([row.messages[-1]["content"] for row in rows], pa.string())})
