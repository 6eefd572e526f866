"""Optimiser steps, tokens and time of a training, before it and after its first two steps; without torch."""

import math
from typing import Any

import pyarrow.compute as pc

from kit.common.processes import world_size
from kit.recipe.recipe import Recipe


def token_counts(rows: Any) -> list[int]:
    """Tokens of each row; [] where rows are tokenised only when they are taken."""
    if "input_ids" not in rows.column_names or not len(rows):
        return []
    return list(pc.list_value_length(rows.with_format("arrow")["input_ids"][:]).to_pylist())


def steps_of(recipe: Recipe, rows: int) -> int:
    """Optimiser steps of a run over `rows` rows, as transformers' Trainer counts them.

    Trainer.set_initial_training_values: batches of a pass (rounded up; each process takes its share of them, rounded
    up) over gradient_accumulation_steps (rounded up, at least 1), times num_train_epochs, rounded up.
    """
    return recipe.max_steps or math.ceil((recipe.num_train_epochs or 1.0) * _steps_a_pass(recipe, rows))


def _steps_a_pass(recipe: Recipe, rows: int) -> int:
    batches = math.ceil(math.ceil(rows / recipe.per_device_train_batch_size) / world_size())
    return max(1, math.ceil(batches / recipe.gradient_accumulation_steps))


def tokens_of(recipe: Recipe, rows: Any, steps: int) -> int | None:
    """Tokens without padding that `steps` steps over these rows read; None for rows tokenised when they are taken."""
    if not (lengths := token_counts(rows)):
        return None
    passes, rest = divmod(steps, _steps_a_pass(recipe, len(rows)))
    batch = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps * world_size()
    rows_read = passes * len(rows) + min(rest * batch, len(rows))  # the last step of a pass may be a short one
    return round(rows_read * sum(lengths) / len(rows))


def seconds_of(steps: int, tokens: float | None, first: tuple[float, int], second: tuple[float, int]) -> float:
    """Seconds of a whole training, from the (seconds, tokens without padding) of its first two steps.

    The rest is taken to cost per token what the second step costs: the first one warms up, and with
    train_sampling_strategy: group_by_length the first steps have the longest rows, so steps would not do. Where tokens
    are not known beforehand (`tokens` None, as with lazy_preprocess) steps have to do.
    """
    per_step, read = second
    rest = per_step / read * max(0.0, tokens - first[1] - read) if tokens and read else per_step * (steps - 2)
    return round(first[0] + per_step + rest, 1)
