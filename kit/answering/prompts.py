"""Answers to a list of prompts, `kit.answer`: all of them, or as many as a given time allows.

Rows that are left out for want of time are always the last ones, whatever their length and answers.
"""

from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from time import monotonic
from typing import Any

from kit.answering.engines import opened
from kit.answering.replies import Reply, by_length, gguf_sampling
from kit.common.show import bar
from kit.models.template import Message, prompt_ids, with_system
from kit.recipe.recipe import Recipe

LEAST = 20  # rows that are answered whatever the time: one batch, and enough for a verdict


def answer(model: Any, tokenizer: Any, prompts: list[list[Message]], recipe: Recipe,
           batch_size: int = 20, seconds: float | None = None, least: int = LEAST) -> list[Reply]:
    """Answers in the order of `prompts`, with a progress bar; a model in memory answers a batch of like length at once.

    `model` and `tokenizer` are those of `stream`. Where all would take longer than `seconds`, only the first prompts
    are answered, as many as fit and `least` at least; a line says so.
    """
    began = monotonic()
    if isinstance(model, (str, Path)):
        replies = _from_gguf(model, prompts, recipe, seconds, least)
    else:
        from kit.models.lora import whole

        with whole(model, recipe) as complete:
            replies = _from_memory(complete, tokenizer, prompts, recipe, batch_size, seconds, least)
    if len(replies) < len(prompts):
        print(f"answered the first {len(replies):,} of {len(prompts):,} rows in {monotonic() - began:.0f} s "
              f"of at most {seconds:g}; the others are neither shown nor scored")
    return replies


def _from_gguf(gguf: str | Path, prompts: list[list[Message]], recipe: Recipe, seconds: float | None,
               least: int) -> list[Reply]:
    replies: list[Reply] = []
    with opened(gguf, recipe) as child, bar(len(prompts), f"answering with {child.gguf.name}", "row") as progress:
        began = monotonic()
        for messages in prompts:
            if seconds is not None and len(replies) >= least and monotonic() - began > seconds:
                break
            text = "".join(child.stream(with_system(messages, recipe), **gguf_sampling(recipe)))
            replies.append(Reply(text, child.finish_reason == "stop"))
            progress.update()
    return replies


def _from_memory(model: Any, tokenizer: Any, prompts: list[list[Message]], recipe: Recipe, batch_size: int,
                 seconds: float | None, least: int) -> list[Reply]:
    from kit.answering.in_memory import answer_batch

    replies: dict[int, Reply] = {}
    rows = {number: prompt_ids(tokenizer, messages, recipe) for number, messages in enumerate(prompts)}
    with bar(len(rows), "answering", "row") as progress:
        for batch in _batches(rows, batch_size, seconds, least, progress):
            replies |= zip(batch, answer_batch(model, tokenizer, [rows[i] for i in batch], recipe), strict=True)
            progress.update(len(batch))
    return [replies[number] for number in takewhile(replies.__contains__, rows)]


def _batches(rows: dict[int, list[int]], batch_size: int, seconds: float | None, least: int,
             progress: Any) -> Iterator[list[int]]:
    """The keys of `rows` in batches of like length, the longest first.

    By the time that batch takes it is decided how many fit into `seconds`: all, in the same batches as without a limit,
    or the first rows, put into batches again.
    """
    batches = by_length(rows, batch_size)
    began = monotonic()
    yield from batches[:1]
    taken = monotonic() - began
    if seconds is not None and taken * len(batches) > seconds:
        fitting = max(least, batch_size * (int(seconds / taken) - 1))  # the first batch has had its part
        left = {number: rows[number] for number in list(rows)[:fitting] if number not in batches[0]}
        batches[1:] = by_length(left, batch_size)
        progress.total = len(batches[0]) + len(left)
    yield from batches[1:]
