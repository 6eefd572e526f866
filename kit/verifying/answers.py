"""What shipped files answer to held-out questions: how many answers stop by themselves, and the scores."""

from __future__ import annotations

from pathlib import Path

from kit.answering.infer import answer
from kit.answering.score import score
from kit.runs.gates import Gates
from kit.verifying.evidence import Evidence
from kit.verifying.reference import greedy

POINTS = 0.05  # by which a GGUF's held-out score may be below the adapter's
FEWER = 0.05  # share of held-out answers; a GGUF may stop that much more seldom than the adapter

Answer = tuple[str, bool]  # the text, and whether it stopped by itself


def gguf_answers(path: Path, evidence: Evidence, same: dict[int, bool]) -> dict[int, Answer]:
    """The GGUF's greedy answers to the reference's rows.

    Where `same` says that it gives the adapter's answer, that one; only the others are generated.
    """
    replies = {number: evidence.reference.answers[number] for number, equal in same.items() if equal}
    others = [number for number, equal in same.items() if not equal]
    if others:
        questions = [evidence.held_out[number][:-1] for number in others]
        generated = answer(path, None, questions, greedy(evidence.recipe))
        replies |= {number: (reply.text, reply.stopped) for number, reply in zip(others, generated, strict=True)}
    return replies


def check_answers(gates: Gates, evidence: Evidence,
                  shipped: dict[str, dict[int, Answer]]) -> dict[str, dict[str, float]]:
    """Add `stops by itself` and `held-out score` of adapter and GGUFs, `shipped` by quantisation; returns the scores.

    They count over the rows that the model in memory answered.
    """
    reference, recipe = evidence.reference, evidence.recipe
    numbers = sorted({row.number for row in reference.rows if row.own})
    if not numbers:
        return {}
    replies = {"adapter": {number: reference.answers[number] for number in numbers}, **shipped}
    expected = [evidence.held_out[number][-1]["content"] for number in numbers]
    fits = any(len(evidence.tokenizer(text, add_special_tokens=False)["input_ids"]) < recipe.max_new_tokens
               for text in expected)
    rates = {name: sum(answers[n][1] for n in numbers) / len(numbers) for name, answers in replies.items()}
    _check_rates(gates, rates.pop("adapter"), rates, len(numbers), fits)
    if recipe.metric == "none":
        return {}
    scores = {name: score([answers[n][0] for n in numbers], expected, recipe.metric)
              for name, answers in replies.items()}
    _check_scores(gates, scores, len(numbers))
    return scores


def _check_rates(gates: Gates, adapter: float, shipped: dict[str, float], count: int, fits: bool) -> None:
    """The shares of `count` held-out answers that ended with the stop token.

    `fits` says whether any of the expected answers is shorter than max_new_tokens: none could end otherwise.
    """
    worst = min(shipped, key=lambda name: shipped[name], default=None)
    figure = ", ".join(f"{name} {rate:.0%}" for name, rate in {"adapter": adapter, **shipped}.items())
    cause = ""
    if worst is not None and shipped[worst] < adapter - max(FEWER, 1 / count) - 1e-9:  # one of a few is no trend
        cause = f"{worst} ends {shipped[worst]:.0%} of its answers by itself, the adapter {adapter:.0%}"
    elif adapter == 0 and fits:
        cause = f"none of {count} answers ended before max_new_tokens"
    remark = "" if fits else "max_new_tokens is too small for every held-out answer: none could end by itself"
    gates.check("stops by itself", not cause if cause or fits else None, figure,
                f"as the adapter, at most {FEWER:.0%} or one fewer", cause or remark,
                "raise max_new_tokens if answers are cut off; train longer if they ramble" if adapter == 0 else
                "the template or the stop token of that file is not the trained one: export again")


def _check_scores(gates: Gates, scores: dict[str, dict[str, float]], count: int) -> None:
    least = scores["adapter"]["exact"] - max(POINTS, 1 / count) - 1e-9  # one answer of a few is no trend
    low = [name for name in ("f16", "bf16", "q8_0") if name in scores and scores[name]["exact"] < least]
    gates.check("held-out score", not low,
                ", ".join(f"{name} {values['exact']:.1%}" for name, values in scores.items()),
                f"f16, bf16, q8_0: at most {100 * POINTS:.0f} points, or one answer, below the adapter",
                f"{count} rows" + "".join(f"; {name} is below" for name in low),
                "export again; a k-quant that loses too much: q8_0" if low else "")
