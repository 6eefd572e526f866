"""The data of a run: conversations to tokens and labels, of a length that can be trained."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from kit.common.errors import KitError
from kit.common.secrets import secret
from kit.common.show import bar
from kit.data.findings import FINDINGS
from kit.data.masks import Formatter, Located
from kit.data.rows import Problems, where
from kit.data.shapes import longest_user_turn
from kit.data.splits import DiskRows, Example, Examples, batches, read_splits, turns_type, without_nulls
from kit.gguf.messages import texts
from kit.models.template import Message, render
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
    reference: str  # the last answer, as an answer of the model reads


def fit(formatter: Formatter, messages: list[Message], ids: list[int], labels: list[int]) -> Formatted:
    """What overlong_rows makes of a row that was tokenised whole."""
    length, limit = len(ids), formatter.recipe.max_seq_length
    rounds = CUTS if formatter.recipe.overlong_rows == "truncate_prompt" else 0
    while len(ids) > limit and rounds and (shorter := _shortened(formatter, messages, len(ids) - limit)):
        messages, rounds = shorter, rounds - 1
        [(ids, labels)] = formatter.encode([messages])
    if len(ids) > limit:
        return Formatted(messages, [], [], length, 0, "")
    return Formatted(messages, ids, labels, length, length - len(ids), _reference(formatter, messages))


def _reference(formatter: Formatter, messages: list[Message]) -> str:
    """The last answer's text; of calls what the template makes of them, without control tokens, as in an answer."""
    if not messages[-1].get("tool_calls"):
        return messages[-1]["content"]
    tokenizer, recipe = formatter.tokenizer, formatter.recipe
    asked = render(tokenizer, messages[:-1], recipe, add_generation_prompt=True)
    answer = render(tokenizer, messages, recipe).removeprefix(asked).partition(str(tokenizer.eos_token))[0]
    return str(tokenizer.decode(tokenizer(answer, add_special_tokens=False)["input_ids"], skip_special_tokens=True))


def _shortened(formatter: Formatter, messages: list[Message], excess: int) -> list[Message] | None:
    """The messages with `excess` tokens less in the longest user turn; None if it is too short."""
    text, with_ends = longest_user_turn(messages)
    ids = formatter.tokenizer(text, add_special_tokens=False)["input_ids"]
    keep = max(len(ids) - excess - 2, 8)
    if keep >= len(ids) - 2:
        return None
    head, tail = formatter.tokenizer.decode(ids[: keep // 2]), formatter.tokenizer.decode(ids[len(ids) - keep // 2:])
    return with_ends(head.rstrip("\ufffd"), tail.lstrip("\ufffd"))


def _format(rows: Examples, formatter: Formatter, what: str) -> Dataset:
    from datasets import Dataset
    from datasets.fingerprint import generate_random_fingerprint

    fitting = _Fitting(rows, formatter, what).batches()
    turns = turns_type(row.messages for row in rows)
    tables = [_table([], turns), *(_table([tokens for _, tokens in fitted if tokens], turns) for fitted in fitting)]
    # Without a fingerprint of ours, `datasets` would serialise the whole table to make one.
    return Dataset(pa.concat_tables(tables), fingerprint=generate_random_fingerprint())


def lazy_dataset(rows: DiskRows, formatter: Formatter) -> Dataset:
    """Rows on disk with `input_ids` and `labels` made when a row is taken. Every mask is proven now."""
    rows = rows.select([number for fitted in _Fitting(rows, formatter, "training", lazily=True).batches()
                        for number, _ in fitted])

    # The transform holds the rows, and with them the file, which goes when they do.
    def tokens_of(batch: dict[str, list[Any]], _files: DiskRows = rows) -> dict[str, list[Any]]:
        talks = [without_nulls(messages) for messages in batch["messages"]]
        located = [formatter.locate(messages) for messages in talks]
        encoded = formatter.encode_located(located)
        fitted = [fit(formatter, messages, *tokens) for messages, tokens in zip(talks, encoded, strict=True)]
        wrong = {formatter.untrained(row, labels) for row, (_, labels) in zip(located, encoded, strict=True)} - {None}
        if wrong or not all(row.ids for row in fitted):
            what = FINDINGS[wrong.pop() or ""][1] if wrong else "a row is longer than max_seq_length"
            raise KitError(f"lazy_preprocess: {what}, which shows only in the tokens", "`kit lint` names the row")
        return _table(fitted, turns_type(talks)).to_pydict()

    return rows.dataset.select_columns(["messages", "prompt", "reference"]).with_transform(tokens_of)


class _Fitting:
    """Finds the rows that fit; what becomes of the others is said when all have passed."""

    def __init__(self, rows: Examples, formatter: Formatter, what: str, lazily: bool = False) -> None:
        self.rows, self.formatter, self.recipe = rows, formatter, formatter.recipe
        self.what, self.lazily = what, lazily
        self.problems = Problems()
        self.lost = self.shortened = self.cut = 0

    def batches(self) -> Iterator[list[tuple[int, Formatted | None]]]:
        """Places in `rows` of those that fit, with their tokens; lazily, without for a row that fits in any case.

        Raises KitError at the end with up to 20 rows that can't be formatted.
        """
        for batch, encoded in self.formatter.encode_ahead(self._located()):
            fitted: list[tuple[int, Formatted | None]] = []
            tokens_of = iter(encoded)
            for number, row, located in batch:
                tokens = self._tokens(row, located, *next(tokens_of)) if located else None
                if tokens is None or tokens.ids:
                    fitted.append((number, tokens))
            yield fitted
        self._settle()

    def _located(self) -> Iterator[tuple[list[tuple[int, Example, Located | None]], list[Located]]]:
        total = len(self.rows)
        with bar(total, f"formatting {self.what} rows", "row", unit_scale=True, leave=False, delay=2) as progress:
            for examples in batches(enumerate(self.rows)):
                batch: list[tuple[int, Example, Located | None]] = []
                for number, row in examples:
                    try:
                        if typed := self.formatter.typed(row.messages):
                            raise KitError(f"the text holds the control token {typed[0]!r}, which the model would take "
                                           "for its own")
                        if kind := next(filter(None, map(secret, texts(row.messages))), None):
                            raise KitError(f"the text holds what looks like a secret ({kind})")
                        located = self.formatter.locate(row.messages)
                    except KitError as error:
                        self._refuse(row, error.message)
                        continue
                    # A token is at least one byte.
                    fits = self.lazily and sum(len(text.encode()) for text, _ in located.segments) \
                        <= self.recipe.max_seq_length
                    batch.append((number, row, None if fits else located))
                yield batch, [located for _, _, located in batch if located]
                progress.update(len(examples))

    def _tokens(self, row: Example, located: Located, ids: list[int], labels: list[int]) -> Formatted:
        if code := self.formatter.untrained(located, labels):
            self._refuse(row, FINDINGS[code][1])
        tokens = fit(self.formatter, row.messages, ids, labels)
        if not tokens.ids and self.recipe.overlong_rows == "error":
            self._refuse(row, f"{tokens.length:,} tokens, more than max_seq_length: {self.recipe.max_seq_length:,}")
        self.lost += not tokens.ids
        self.shortened += tokens.cut > 0
        self.cut += tokens.cut
        return tokens

    def _refuse(self, row: Example, message: str) -> None:
        self.problems.add(f"{where(row.place, self.recipe)}: {message}")

    def _settle(self) -> None:
        self.problems.refuse(f"{self.what} rows that can't be formatted", "`kit lint` shows them with remedies; rows "
                             "that are only too long: overlong_rows: drop")
        total, limit = f"{len(self.rows):,} {self.what} rows", f"max_seq_length: {self.recipe.max_seq_length} tokens"
        if self.shortened:
            print(f"{self.shortened:,} of {total} were longer than {limit}; {self.cut:,} tokens were cut from the "
                  "middle of their prompts")
        if self.lost:
            print(f"{self.lost:,} of {total} are longer than {limit} and were left out")


def _table(rows: Sequence[Formatted], turns: pa.DataType) -> pa.Table:
    """Filled column by column, with types: from rows as dicts Arrow would have to guess and to convert."""
    tokens = pa.list_(pa.int32())
    return pa.table({
        "messages": pa.array([row.messages for row in rows], turns),
        "input_ids": pa.array([row.ids for row in rows], tokens),
        "labels": pa.array([row.labels for row in rows], tokens),
        "prompt": pa.array([row.messages[:-1] for row in rows], turns),
        "reference": pa.array([row.reference for row in rows], pa.string())})
