"""Conversations on disk: a sequence of rows that may be larger than memory, as one memory-mapped Arrow file."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

import pyarrow as pa

from kit.common.errors import KitError
from kit.common.files import cache_dir
from kit.data.rows import Place, Row
from kit.models.template import Message

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 1000  # rows handled at a time
TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))  # a conversation's type in Arrow
T = TypeVar("T")


def batches(rows: Iterable[T]) -> Iterator[list[T]]:
    """The rows in lists of BATCH, as they come."""
    coming = iter(rows)
    while batch := list(itertools.islice(coming, BATCH)):
        yield batch


class Example(NamedTuple):
    """A conversation and where it was read."""

    place: Place
    messages: list[Message]


class DiskRows(Sequence[Example]):
    """Rows of an Arrow file; the file goes with the process that wrote it."""

    def __init__(self, dataset: Dataset, *folders: tempfile.TemporaryDirectory[str]) -> None:
        self.dataset, self._folders = dataset, folders

    @classmethod
    def write(cls, rows: Iterable[Row]) -> DiskRows:
        """Write every row as it comes; a thousand of them are in memory at a time."""
        from datasets import Dataset

        cache_dir().mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="rows-", dir=cache_dir(), ignore_cleanup_errors=True)
        path = Path(folder.name) / "rows.arrow"
        try:
            _write(path, rows)
        except OSError as error:
            raise KitError(f"lazy_preprocess: {path} can't be written: {error}",
                           "free room, or set KIT_CACHE to another disk") from None
        return cls(Dataset.from_file(str(path)), folder)

    def __len__(self) -> int:
        return len(self.dataset)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> DiskRows: ...
    def __getitem__(self, index: int | slice) -> Example | DiskRows:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        return _example(self.dataset[index])

    def __iter__(self) -> Iterator[Example]:
        return map(_example, self.dataset)

    def select(self, places: Iterable[int]) -> DiskRows:
        """The rows at these places, in this order; nothing is copied."""
        return DiskRows(self.dataset.select(places), *self._folders)

    def behind(self, first: DiskRows) -> DiskRows:
        """The rows of `first`, then these."""
        from datasets import concatenate_datasets

        return DiskRows(concatenate_datasets([first.dataset, self.dataset]), *first._folders, *self._folders)


def _write(path: Path, rows: Iterable[Row]) -> None:
    schema = pa.schema([("messages", TURNS), ("prompt", TURNS), ("reference", pa.string()),
                        ("file", pa.string()), ("row", pa.int64()), ("line", pa.int64())])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for batch in batches(rows):
            talks = [row.messages for row in batch]
            stream.write_batch(pa.record_batch([
                pa.array(talks, TURNS), pa.array([talk[:-1] for talk in talks], TURNS),
                [talk[-1]["content"] for talk in talks], *zip(*(row.place for row in batch), strict=True)],
                schema=schema))


def _example(row: dict[str, Any]) -> Example:
    return Example(Place(row["file"], row["row"], row["line"]), row["messages"])
