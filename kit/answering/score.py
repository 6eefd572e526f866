"""Scores for held-out answers."""

from __future__ import annotations

import json
import re
from statistics import fmean
from typing import Any

# As Qwen3 and others write it, also around nothing.
THOUGHT = re.compile(r"^\s*<think>.*?</think>\s*", re.DOTALL)


def score(answers: list[str], references: list[str], metric: str) -> dict[str, float]:
    """Shares from 0 to 1: `exact` for the whole answer and, with metric `json`, one per field.

    `exact`: equal text, white space at the ends ignored. `json`: equal values, so spacing does not count. Thinking
    before an answer does not count.
    """
    if metric == "none" or not references:
        return {}
    answers, references = ([THOUGHT.sub("", text) for text in texts] for texts in (answers, references))
    if metric == "exact":
        return {"exact": fmean([a.strip() == r.strip() for a, r in zip(answers, references, strict=True)])}
    pairs = [(_object(a), _object(r)) for a, r in zip(answers, references, strict=True)]
    fields = dict.fromkeys(name for _, reference in pairs for name in reference or {})
    scores = {"exact": fmean([answer is not None and _same(answer, reference) for answer, reference in pairs])}
    for name in fields:
        scores[name] = fmean([answer is not None and name in answer and _same(answer[name], (reference or {})[name])
                               for answer, reference in pairs])
    return scores


def _same(a: Any, b: Any) -> bool:
    """Equal as JSON: unlike Python, 1 is not true there; the order of keys does not count."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
