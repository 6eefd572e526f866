"""Which rows are trained on and which are held out: several sources, weights, no prompt on both sides.

With lazy_preprocess conversations lie on disk, where they may be larger than memory: one memory-mapped Arrow file.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from kit.common.errors import KitError
from kit.common.files import cache_dir, unwritable
from kit.data.rows import Place, Problems, Row, good_rows, progress, rows_of, where
from kit.data.sources import held_out_source, meant, weighted
from kit.gguf.messages import FOR_TOOLS, said
from kit.models.template import Message
from kit.recipe.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 1000  # rows handled at a time
T = TypeVar("T")


def batches(rows: Iterable[T]) -> Iterator[list[T]]:
    """The rows in lists of BATCH, as they come."""
    coming = iter(rows)
    while batch := list(itertools.islice(coming, BATCH)):
        yield batch


def turns_type(talks: Iterable[list[Message]] | None = None) -> pa.DataType:
    """A conversation's type in Arrow, with those of FOR_TOOLS that some message of `talks` has; by default with all."""
    found = FOR_TOOLS if talks is None else {key for messages in talks for message in messages for key in message}
    return pa.list_(pa.struct([(name, pa.string())
                               for name in ("role", "content", *(key for key in FOR_TOOLS if key in found))]))


class Example(NamedTuple):
    """A conversation and where it was read."""

    place: Place
    messages: list[Message]


class DiskRows:
    """Rows of an Arrow file, which goes with the last of these objects that has it."""

    def __init__(self, dataset: Dataset, *folders: tempfile.TemporaryDirectory[str]) -> None:
        self.dataset, self.folders = dataset, folders

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Example]:
        for row in self.dataset:
            yield Example(Place(row["file"], row["row"], row["line"]), without_nulls(row["messages"]))

    def __getitem__(self, part: slice) -> DiskRows:
        return self.select(range(len(self))[part])

    def select(self, places: Iterable[int]) -> DiskRows:
        """The rows at these places, in this order; nothing is copied."""
        return DiskRows(self.dataset.select(places), *self.folders)


Examples = list[Example] | DiskRows


def without_nulls(messages: list[Message]) -> list[Message]:
    """The messages as they were before Arrow gave each the fields of all."""
    return [{key: text for key, text in message.items() if text is not None} for message in messages]


def _on_disk(rows: Iterable[Row]) -> DiskRows:
    """Write every row as it comes; a thousand of them are in memory at a time."""
    from datasets import Dataset

    cache_dir().mkdir(parents=True, exist_ok=True)
    folder = tempfile.TemporaryDirectory(prefix="rows-", dir=cache_dir(), ignore_cleanup_errors=True)
    path = Path(folder.name) / "rows.arrow"
    turns = turns_type()
    schema = pa.schema([("messages", turns), ("prompt", turns), ("reference", pa.string()),
                        ("file", pa.string()), ("row", pa.int64()), ("line", pa.int64())])
    with unwritable(path, "lazy_preprocess keeps the rows there: free room, or set KIT_CACHE to another disk"), \
            pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for batch in batches(rows):
            talks = [row.messages for row in batch]
            stream.write_batch(pa.record_batch([
                pa.array(talks, turns), pa.array([talk[:-1] for talk in talks], turns),
                [talk[-1]["content"] for talk in talks], *zip(*(row.place for row in batch), strict=True)],
                schema=schema))
    return DiskRows(Dataset.from_file(str(path)), folder)


class Kept:
    """The rows of the training sources that `max_train_samples` leaves, and those that test_size holds out: only they
    are looked at, in a training and by the data check.

    They are the first rows, and reading stops behind them. Where test_size or weights draw from all rows, these are
    read once before, for their prompts; a row that can't be understood counts as one with a prompt of its own.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.left = recipe.max_train_samples
        self.drawn = self.left is not None and bool(recipe.test_size or weighted(recipe))
        self.train: list[Place] = []  # where they are drawn
        self.held_out: list[Place] = []
        if self.drawn:
            places, prompts, counts = list[Place](), array("Q"), list[int]()
            for source in recipe.sources:
                with progress(f"drawing from {source}", source, recipe) as on_bytes:
                    for row in rows_of(source, recipe, on_bytes, any_encoding=True):
                        places.append(row.place)
                        prompts.append(prompt_key(row.messages or [{"role": "user", "content": str(row.place)}] * 2))
                counts.append(len(places) - sum(counts))
            self.train, self.held_out = ([places[k] for k in part] for part in drawn(counts, prompts, recipe))
        self._places = {*self.train, *self.held_out}

    def rows(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Those of a source's rows, good and bad, that are looked at; called for one source after the other."""
        if self.drawn:
            yield from (row for row in rows if row.place in self._places)
        elif self.left is None:
            yield from rows
        elif self.left:
            for row in rows:
                self.left -= 1
                yield row
                if not self.left:
                    return

    @property
    def any_may_be_missing(self) -> bool:
        """Whether of the next source no row may be looked at, though it has some."""
        return self.drawn or self.left == 0


def drawn(counts: Sequence[int], prompts: Sequence[int], recipe: Recipe) -> tuple[list[int], list[int]]:
    """Numbers of the rows that an epoch trains on, before they are shuffled, and of those that test_size holds out.

    `counts` are how many rows each of the recipe's sources has, numbered through; `prompts` their `prompt_key`s, needed
    with test_size only.
    """
    apart = held_out_rows(prompts, recipe) if recipe.test_size else np.zeros(sum(counts), dtype=bool)
    train: list[int] = []
    start = 0
    for source, count in zip(recipe.sources, counts, strict=True):
        own: np.ndarray[Any, Any] = start + np.flatnonzero(~apart[start:start + count])
        train += own[np.array(repeated(source, len(own), recipe), dtype=int)].tolist()
        start += count
    return train[: recipe.max_train_samples], np.flatnonzero(apart).tolist()[: recipe.max_eval_samples]


def read_splits(recipe: Recipe) -> tuple[Examples, Examples]:
    """Training and held-out conversations, before formatting.

    With test_size, rows that share a prompt go to the same side. Raises KitError when rows of eval_dataset ask what
    is trained on (`eval_overlap`).
    """
    kept = Kept(recipe)
    sources = [_read(source, recipe, kept) for source in recipe.sources]
    train: Examples = []
    held_out: Examples = []
    for rows in sources:
        train = _joined(train, rows)
    if kept.drawn:
        number = {row.place: i for i, row in enumerate(train)}
        train, held_out = (_picked(train, [number[place] for place in part]) for part in (kept.train, kept.held_out))
    elif recipe.test_size or weighted(recipe):
        prompts = [prompt_key(row.messages) for row in train] if recipe.test_size else []
        train, held_out = (_picked(train, part) for part in drawn([len(rows) for rows in sources], prompts, recipe))
    if apart_source := held_out_source(recipe):
        held_out = _without_overlap(train, _read(apart_source, recipe), recipe)
    return train, held_out[: recipe.max_eval_samples]


def _read(source: str, recipe: Recipe, kept: Kept | None = None) -> Examples:
    with progress(f"reading {source}", source, recipe) as on_bytes:
        rows = good_rows(source, recipe, on_bytes, *((kept.rows, kept.any_may_be_missing) if kept else ()))
        return _on_disk(rows) if recipe.lazy_preprocess else [Example(row.place, row.messages) for row in rows]


def prompt_key(messages: list[Message]) -> int:
    """64 bits that two conversations share when they ask the same, but for spaces and the system message, and may call
    the same tools."""
    text = "\0".join(m["role"] + "\0" + " ".join(said(m).split())
                     for m in messages[:-1] if m["role"] != "system") + (messages[0].get("tools") or "")
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def held_out_rows(prompts: Sequence[int], recipe: Recipe) -> np.ndarray[Any, Any]:
    """Which rows test_size holds out, from the `prompt_key` of each: an array of booleans.

    Raises KitError when nothing would be left to train on.
    """
    wanted = int(recipe.test_size) if recipe.test_size > 1 else round(recipe.test_size * len(prompts))
    different, group = np.unique(np.array(prompts, dtype=np.uint64), return_inverse=True)
    sizes = np.bincount(group, minlength=len(different))
    picked, room = [], max(wanted, 1)
    for number in np.random.default_rng(recipe.seed).permutation(len(different)).tolist():
        if sizes[number] <= room:  # rows with one prompt stay together: a prompt that has too many is passed over
            picked.append(number)
            room -= sizes[number]
        if not room:
            break
    apart = np.isin(group, picked or [int(sizes.argmin())])
    if len(prompts) < 2 or wanted >= len(prompts) or apart.all():
        raise KitError(f"test_size: {recipe.test_size:g} leaves nothing to train on: there are {len(prompts):,} rows "
                       f"with {len(different):,} different prompts", "lower test_size")
    return apart


def repeated(source: str, count: int, recipe: Recipe) -> list[int]:
    """The places of a source's rows, each as often as its weight says; of a fraction, a seeded choice.

    Raises KitError for a weight that takes none of the rows.
    """
    samples = meant(source, recipe).samples
    passes = recipe.sources[source] * (samples / count if samples and count else 1)
    extra = np.random.default_rng(recipe.seed).permutation(count)[: round(passes % 1 * count)]
    places = [*list(range(count)) * int(passes), *sorted(extra.tolist())]
    if count and not places:
        raise KitError(f"dataset: {source}: a weight of {passes:g} takes none of its {count:,} rows",
                       "raise the weight, or leave the source out")
    return places


def _without_overlap(train: Examples, held_out: Examples, recipe: Recipe) -> Examples:
    """The held-out rows, after those that ask what is trained on have been refused, dropped or kept."""
    if recipe.eval_overlap == "keep":
        return held_out
    trained, problems, new = {prompt_key(row.messages) for row in train}, Problems(), []
    for number, row in enumerate(held_out):
        if prompt_key(row.messages) in trained:
            asked = " ".join(next(m["content"] for m in row.messages if m["role"] == "user").split())
            problems.add(f"{where(row.place, recipe)}: {asked[:80]}{'…' * (len(asked) > 80)}")
        else:
            new.append(number)
    if problems and recipe.eval_overlap == "drop":
        print(f"{problems.total:,} of {len(held_out):,} held-out rows ask what is trained on; left out")
        return _picked(held_out, new)
    problems.refuse(f"{recipe.eval_dataset or 'the held-out rows'}: prompts that are also trained on, so the held-out "
                    "score would count what was learnt by heart",
                    "take them out of one of the files, or set eval_overlap: drop (or keep)")
    return held_out


def _joined(one: Examples, other: Examples) -> Examples:
    if isinstance(one, DiskRows) and isinstance(other, DiskRows):
        from datasets import concatenate_datasets

        return DiskRows(concatenate_datasets([one.dataset, other.dataset]), *one.folders, *other.folders)
    return [*one, *other] if one else other


def _picked(rows: Examples, places: list[int]) -> Examples:
    return rows.select(places) if isinstance(rows, DiskRows) else [rows[i] for i in places]
