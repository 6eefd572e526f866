"""What every way of answering shares: a reply, sampling as the recipe asks for it, batches of like length."""

from __future__ import annotations

from typing import Any, NamedTuple

from kit.recipe.recipe import Recipe


class Reply(NamedTuple):
    """An answer, whether the model stopped by itself (not cut off at max_new_tokens), and its token ids.

    The ids are without the stop token, and empty for an answer of llama.cpp.
    """

    text: str
    stopped: bool
    ids: tuple[int, ...] = ()


def sampling(recipe: Recipe) -> dict[str, Any]:
    """The recipe's inference fields as `generate` takes them; greedy at temperature 0."""
    # A model's own generation_config may carry these; greedy decoding has no use for them.
    keywords: dict[str, Any] = {"max_new_tokens": recipe.max_new_tokens, "do_sample": recipe.temperature > 0,
                                "temperature": None, "top_p": None, "top_k": None}
    if recipe.temperature > 0:
        keywords |= {"temperature": recipe.temperature, "top_p": recipe.top_p, "top_k": recipe.top_k}
        keywords |= {"min_p": recipe.min_p} if recipe.min_p else {}
    if recipe.repetition_penalty != 1:
        keywords["repetition_penalty"] = recipe.repetition_penalty
    return keywords


def gguf_sampling(recipe: Recipe) -> dict[str, Any]:
    """The same fields under llama-cpp-python's names."""
    return {"max_new_tokens": recipe.max_new_tokens, "temperature": recipe.temperature, "top_p": recipe.top_p,
            "top_k": recipe.top_k, "min_p": recipe.min_p, "repeat_penalty": recipe.repetition_penalty}


def by_length(rows: dict[int, list[int]], batch_size: int) -> list[list[int]]:
    """The keys of `rows` in batches of like length; the longest first, so that too little memory shows at once."""
    order = sorted(sorted(rows), key=lambda key: -len(rows[key]))
    return [order[start:start + batch_size] for start in range(0, len(order), batch_size)]
