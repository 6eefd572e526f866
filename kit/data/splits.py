"""Which rows are trained on and which are held out: several sources, weights, no prompt on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from kit.common.errors import KitError
from kit.data.disk_rows import DiskRows, Example
from kit.data.rows import Problems, good_rows, progress, where
from kit.data.sources import held_out_source
from kit.models.template import Message
from kit.recipe.recipe import Recipe


def read_splits(recipe: Recipe) -> tuple[Sequence[Example], Sequence[Example]]:
    """Training and held-out conversations, before formatting.

    With test_size, rows that share a prompt go to the same side. Raises KitError when rows of eval_dataset ask what
    is trained on (`eval_overlap`).
    """
    sources = {source: _read(source, recipe) for source in recipe.sources}
    train: Sequence[Example] = []
    held_out: Sequence[Example] = []
    if recipe.test_size:
        apart = held_out_rows([prompt_key(row.messages) for rows in sources.values() for row in rows], recipe)
        start = 0
        for source, rows in sources.items():
            of_source = apart[start:start + len(rows)]
            start += len(rows)
            held_out = _joined(held_out, _picked(rows, of_source.nonzero()[0].tolist()))
            sources[source] = _picked(rows, (~of_source).nonzero()[0].tolist())
    for source, passes in recipe.sources.items():
        rows = sources[source]
        train = _joined(train, rows if passes == 1 else _picked(rows, repeated(source, len(rows), recipe)))
    if apart_source := held_out_source(recipe):
        held_out = _without_overlap(train, _read(apart_source, recipe), recipe)
    return train[: recipe.max_train_samples], held_out[: recipe.max_eval_samples]


def _read(source: str, recipe: Recipe) -> Sequence[Example]:
    with progress(f"reading {source}", source, recipe) as on_bytes:
        rows = good_rows(source, recipe, on_bytes)
        return DiskRows.write(rows) if recipe.lazy_preprocess else [Example(row.place, row.messages) for row in rows]


def prompt_key(messages: list[Message]) -> int:
    """64 bits that two conversations share when they ask the same, but for spaces and the system message."""
    text = "\0".join(m["role"] + "\0" + " ".join(m["content"].split())
                     for m in messages[:-1] if m["role"] != "system")
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
    passes = recipe.sources[source]
    extra = np.random.default_rng(recipe.seed).permutation(count)[: round(passes % 1 * count)]
    places = [*list(range(count)) * int(passes), *sorted(extra.tolist())]
    if count and not places:
        raise KitError(f"dataset: {source}: a weight of {passes:g} takes none of its {count:,} rows",
                       "raise the weight, or leave the source out")
    return places


def _without_overlap(train: Sequence[Example], held_out: Sequence[Example], recipe: Recipe) -> Sequence[Example]:
    """The held-out rows, after those that ask what is trained on have been refused, dropped or kept."""
    if recipe.eval_overlap == "keep":
        return held_out
    trained, problems, new = {prompt_key(row.messages) for row in train}, Problems(), []
    for number, row in enumerate(held_out):
        if prompt_key(row.messages) in trained:
            problems.add(f"{where(row.place, recipe)}: {_excerpt(row)}")
        else:
            new.append(number)
    if problems and recipe.eval_overlap == "drop":
        print(f"{problems.total:,} of {len(held_out):,} held-out rows ask what is trained on; left out")
        return _picked(held_out, new)
    problems.refuse(f"{recipe.eval_dataset or 'the held-out rows'}: prompts that are also trained on, so the held-out "
                    "score would count what was learnt by heart",
                    "take them out of one of the files, or set eval_overlap: drop (or keep)")
    return held_out


def _excerpt(row: Example) -> str:
    text = " ".join(next(m["content"] for m in row.messages if m["role"] == "user").split())
    return text[:80] + ("…" if len(text) > 80 else "")


def _joined(one: Sequence[Example], other: Sequence[Example]) -> Sequence[Example]:
    if isinstance(other, DiskRows):
        return other.behind(one) if isinstance(one, DiskRows) else other
    return [*one, *other] if one else other


def _picked(rows: Sequence[Example], places: list[int]) -> Sequence[Example]:
    return rows.select(places) if isinstance(rows, DiskRows) else [rows[i] for i in places]
