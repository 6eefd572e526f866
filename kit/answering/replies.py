"""What every way of answering shares: a reply, sampling as the recipe asks for it, batches of like length, scores."""

import json
import re
from statistics import fmean
from typing import Any, NamedTuple

from kit.recipe.recipe import Recipe

# As Qwen3 and others write it, also around nothing.
THOUGHT = re.compile(r"^\s*<think>.*?</think>\s*", re.DOTALL)


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


def score(answers: list[str], references: list[str], metric: str) -> dict[str, float]:
    """Shares from 0 to 1: `exact` for the whole answer and, with metric `json`, one per field.

    `exact`: equal text, white space at the ends ignored. `json`: equal values, so spacing does not count; where no
    expected answer is a JSON object, as `exact`. Thinking before an answer does not count.
    """
    if metric == "none" or not references:
        return {}
    answers, references = ([THOUGHT.sub("", text) for text in texts] for texts in (answers, references))
    if metric == "exact" or not any(map(_object, references)):
        return {"exact": fmean([a.strip() == r.strip() for a, r in zip(answers, references, strict=True)])}
    pairs = [(_object(a), _object(r)) for a, r in zip(answers, references, strict=True)]
    fields = dict.fromkeys(name for _, reference in pairs for name in reference or {})
    scores = {"exact": fmean([answer is not None and _same(answer, reference) for answer, reference in pairs])}
    for name in fields:
        scores[name] = fmean([name in (answer or {}) and name in (reference or {})
                              and _same((answer or {})[name], (reference or {})[name]) for answer, reference in pairs])
    return scores


def score_stages(references: list[str], metric: str, **replies: list[Reply]) -> dict[str, dict[str, float]]:
    """{stage: its `score`} over the same rows for all stages: the first ones, as many as every stage answered."""
    count = min(map(len, replies.values()))
    return {stage: score([reply.text for reply in given[:count]], references[:count], metric)
            for stage, given in replies.items()}


def _same(a: Any, b: Any) -> bool:
    """Equal as JSON: unlike Python, 1 is not true there; the order of keys does not count."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
