"""Optimiser steps and tokens of a training, counted before it and paced after two steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from kit.common.processes import world_size
from kit.data.masks import IGNORED
from kit.recipe.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

def _lengths(rows: Dataset, column: str, trained: bool = False) -> list[int]:
    """Tokens of each row, or those the loss counts; [] where rows are tokenised only when they are taken."""
    if column not in rows.column_names or not len(rows):
        return []

    lists = rows.with_format("arrow")[column][:]
    lists = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
    if not trained:
        return list(pc.list_value_length(lists).to_pylist())
    whose = pc.list_parent_indices(lists).filter(pc.not_equal(pc.list_flatten(lists), IGNORED))
    return [count["counts"] for count in pc.value_counts(whose).to_pylist()]


def steps_of(recipe: Recipe, rows: int) -> int:
    """Optimiser steps of a run over `rows` rows, as transformers' Trainer counts them.

    Trainer.set_initial_training_values: batches of a pass (rounded up; each process takes its share of them, rounded
    up) over gradient_accumulation_steps (rounded up, at least 1), times num_train_epochs, rounded up.
    """
    return recipe.max_steps or math.ceil((recipe.num_train_epochs or 1.0) * _steps_a_pass(recipe, rows))


def _steps_a_pass(recipe: Recipe, rows: int) -> int:
    batches = math.ceil(math.ceil(rows / recipe.per_device_train_batch_size) / world_size())
    return max(1, math.ceil(batches / recipe.gradient_accumulation_steps))


def rows_seen(recipe: Recipe, rows: int, steps: int) -> int:
    """Rows that go through the model in `steps` steps; the last step of a pass may be a short one."""
    passes, rest = divmod(steps, _steps_a_pass(recipe, rows))
    batch = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps * world_size()
    return passes * rows + min(rest * batch, rows)


def tokens_of(recipe: Recipe, rows: Dataset, steps: int) -> int | None:
    """Tokens without padding that `steps` steps over these rows read; None for rows tokenised when they are taken."""
    lengths = _lengths(rows, "input_ids")
    return round(rows_seen(recipe, len(rows), steps) * sum(lengths) / len(rows)) if lengths else None


class Pace:
    """Training time from the first two steps: give `step` each step's seconds and tokens without padding.

    The rest of the run is taken to cost per token what the second step costs: the first one warms up, and with
    train_sampling_strategy: group_by_length the first steps have the longest rows, so steps would not do. Where tokens
    are not known beforehand (`tokens` None, as with lazy_preprocess) steps have to do.
    """

    def __init__(self, steps: int, tokens: float | None) -> None:
        self.steps, self.tokens = steps, tokens
        self._seen: list[tuple[float, int]] = []

    def step(self, seconds: float, tokens: int) -> float | None:
        """After the second step the seconds of the whole training, else None."""
        self._seen.append((seconds, tokens))
        if len(self._seen) != 2:
            return None
        (first, early), (second, now) = self._seen
        if self.tokens and now:
            return round(first + second + second / now * max(0.0, self.tokens - early - now), 1)
        return round(first + second * (self.steps - 1), 1)
