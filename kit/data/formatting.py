"""The data of a run: conversations to tokens and labels, of a length that can be trained."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from kit.common.errors import KitError
from kit.common.show import bar
from kit.data.disk_rows import BATCH, DiskRows, Example, turns_type
from kit.data.findings import KINDS
from kit.data.masks import Formatter, Located
from kit.data.sources import Place, refuse, where
from kit.data.splits import read_splits
from kit.models.template import Message
from kit.recipe.reading import MAX_ERRORS
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
    """The messages with `excess` tokens taken out of the middle of the longest user turn; None if it is too short.

    The middle, because the task stands at the beginning or at the end of a long prompt.
    """
    asked = [i for i, m in enumerate(messages) if m["role"] == "user"]
    longest = max(asked, key=lambda i: len(messages[i]["content"]))
    ids = formatter.tokenizer(messages[longest]["content"], add_special_tokens=False)["input_ids"]
    keep = max(len(ids) - excess - 2, 8)
    if keep >= len(ids) - 2:
        return None
    head, tail = formatter.tokenizer.decode(ids[: keep // 2]), formatter.tokenizer.decode(ids[len(ids) - keep // 2:])
    text = head.rstrip("\ufffd") + " … " + tail.lstrip("\ufffd")
    return [{**m, "content": text} if i == longest else m for i, m in enumerate(messages)]


def _format(rows: Sequence[Example], formatter: Formatter, what: str) -> Dataset:
    from datasets import Dataset
    from datasets.fingerprint import generate_random_fingerprint

    tables = [_table([]), *(_table(formatted) for formatted in _formatted(rows, formatter, what))]
    # Without a fingerprint of ours, `datasets` would serialise the whole table to make one.
    return Dataset(pa.concat_tables(tables), fingerprint=generate_random_fingerprint())


def _formatted(rows: Sequence[Example], formatter: Formatter, what: str) -> Iterator[list[Formatted]]:
    """Batches of rows that fit, with their tokens; says at the end how many were left out or shortened."""
    count = _Count(formatter.recipe)

    def located() -> Iterator[tuple[list[tuple[Example, Located]], list[Located]]]:
        for batch in _batches(rows, f"formatting {what} rows"):
            good = [(row, found) for row in batch if (found := _located(row, formatter, count))]
            yield good, [found for _, found in good]

    for batch, encoded in formatter.encode_ahead(located()):
        for (row, found), (_, labels) in zip(batch, encoded, strict=True):
            if code := formatter.untrained(found, labels):
                count.bad(row.place, KINDS[code][1])
        fitted = [fit(formatter, row.messages, *tokens) for (row, _), tokens in zip(batch, encoded, strict=True)]
        count.lengths([row for row, _ in batch], fitted)
        yield [row for row in fitted if row.ids]
    count.settle(len(rows), what)


def _located(row: Example, formatter: Formatter, count: _Count) -> Located | None:
    try:
        if typed := formatter.typed(row.messages):
            raise KitError(f"the text holds the control token {typed[0]!r}, which the model would take for its own")
        return formatter.locate(row.messages)
    except KitError as error:
        count.bad(row.place, error.message)
        return None


class _Count:
    """What became of rows that don't fit or can't be formatted."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.problems: list[str] = []
        self.refused = self.lost = self.shortened = self.cut = 0

    def bad(self, place: Place, message: str) -> None:
        self.refused += 1
        if len(self.problems) < MAX_ERRORS:
            self.problems.append(f"{where(place, self.recipe)}: {message}")

    def lengths(self, rows: list[Example], fitted: list[Formatted]) -> None:
        for row, tokens in zip(rows, fitted, strict=True):
            if not tokens.ids and self.recipe.overlong_rows == "error":
                self.bad(row.place, f"{tokens.length:,} tokens, more than max_seq_length: "
                                    f"{self.recipe.max_seq_length:,}")
            self.lost += not tokens.ids
            self.shortened += tokens.cut > 0
            self.cut += tokens.cut

    def settle(self, total: int, what: str) -> None:
        refuse(f"{what} rows that can't be formatted", self.problems, self.refused,
               "`kit lint` shows them with remedies; rows that are only too long: overlong_rows: drop")
        if self.shortened:
            print(f"{self.shortened:,} of {total:,} {what} rows were longer than max_seq_length: "
                  f"{self.recipe.max_seq_length} tokens; {self.cut:,} tokens were cut from the middle of their prompts")
        if self.lost:
            print(f"{self.lost:,} of {total:,} {what} rows are longer than max_seq_length: "
                  f"{self.recipe.max_seq_length} tokens and were left out")


def lazy_dataset(rows: DiskRows, formatter: Formatter) -> Dataset:
    """Rows on disk with `input_ids` and `labels` made when a row is taken.

    Every mask is proven now. Only rows that could be too long are tokenised now: a token is at least one byte.
    """
    kept, count = [], _Count(formatter.recipe)
    start = 0
    for batch in _batches(rows, "checking training rows"):
        long = []
        for place, row in enumerate(batch, start):
            if found := _located(row, formatter, count):
                if sum(len(text.encode()) for text, _ in found.segments) <= formatter.recipe.max_seq_length:
                    kept.append(place)
                else:
                    long.append((place, row, found))
        encoded = formatter.encode_located([found for _, _, found in long])
        fitted = [fit(formatter, row.messages, *tokens) for (_, row, _), tokens in zip(long, encoded, strict=True)]
        count.lengths([row for _, row, _ in long], fitted)
        kept += [place for (place, _, _), tokens in zip(long, fitted, strict=True) if tokens.ids]
        start += len(batch)
    count.settle(len(rows), "training")
    chosen = rows.select(sorted(kept))

    def tokens_of(batch: dict[str, list[Any]], _files: DiskRows = chosen) -> dict[str, list[Any]]:
        found = [formatter.locate(messages) for messages in batch["messages"]]
        encoded = formatter.encode_located(found)
        fitted = [fit(formatter, messages, *tokens) for messages, tokens in
                  zip(batch["messages"], encoded, strict=True)]
        wrong = {formatter.untrained(place, labels) for place, (_, labels) in zip(found, encoded, strict=True)} - {None}
        if wrong or not all(row.ids for row in fitted):
            what = KINDS[wrong.pop() or ""][1] if wrong else "a row is longer than max_seq_length"
            raise KitError(f"lazy_preprocess: {what}, which shows only in the tokens", "`kit lint` names the row")
        talks = [row.messages for row in fitted]
        return {"messages": talks, "prompt": [talk[:-1] for talk in talks],
                "reference": [talk[-1]["content"] for talk in talks],
                "input_ids": [row.ids for row in fitted], "labels": [row.labels for row in fitted]}

    return chosen.dataset.select_columns(["messages", "prompt", "reference"]).with_transform(tokens_of)


def _table(rows: Sequence[Formatted]) -> pa.Table:
    """Filled column by column, with types: from rows as dicts Arrow would have to guess and to convert."""
    turns, tokens = turns_type(), pa.list_(pa.int32())
    return pa.table({
        "messages": pa.array([row.messages for row in rows], turns),
        "input_ids": pa.array([row.ids for row in rows], tokens),
        "labels": pa.array([row.labels for row in rows], tokens),
        "prompt": pa.array([row.messages[:-1] for row in rows], turns),
        "reference": pa.array([row.messages[-1]["content"] for row in rows], pa.string())})


def _batches(rows: Sequence[Example], what: str) -> Iterator[Sequence[Example]]:
    with bar(len(rows), what, "row", unit_scale=True, leave=False, delay=2) as progress:
        for start in range(0, len(rows), BATCH):
            yield rows[start:start + BATCH]
            progress.update(min(BATCH, len(rows) - start))
