"""Gate: prompts answered together, padded to one width, get what each gets alone.

With the starter model a wrong attention mask or side of padding shifts log probabilities by 10 nats and more, rounding
by 0.00005 in float32 and up to 0.9 in bfloat16: there the order in which a batch adds up decides near ties. Trained, 59
of 60 greedy answers are the same token for token in bfloat16; untrained, and sure of little, 35 of 60, and in float32
30 of 30. So what is compared is what the model computes in float32.
"""

from __future__ import annotations

from typing import Any

import kit.common.unsloth

import torch

from kit.answering.in_memory import generate
from kit.common.errors import GateError
from kit.models.precision import in_float32

ROWS, STEPS = 4, 4  # prompts compared, and tokens generated for each
LONGEST = 512  # tokens of a prompt that is compared, where there are two as short
TOP = 20  # likeliest tokens compared at each step
ALLOWED_FLOAT32, ALLOWED_16BIT = 0.01, 2.0  # nats between two log probabilities


def check_batching(model: Any, tokenizer: Any, prompts: list[list[int]]) -> str:
    """Compare greedy decoding of a few prompts (token ids) of different length in one batch and alone.

    Returns a sentence with the figures, or '' when all have one length and nothing is padded. On a CPU it is computed
    in float32. Raises GateError when the logits differ by more than rounding can make of them.
    """
    rows = _some(prompts)
    if len({len(ids) for ids in rows}) < 2:
        return ""
    with in_float32(model) as precision:
        together = _decode(model, tokenizer, rows)
        gaps = [_gap(_decode(model, tokenizer, [ids])[0], both) for ids, both in zip(rows, together, strict=True)]
    worst = float(torch.tensor(gaps).max())  # not a number if any is, and then it passes no comparison
    allowed = ALLOWED_FLOAT32 if precision == "float32" else ALLOWED_16BIT
    lengths = ", ".join(str(len(ids)) for ids in rows)
    if not worst <= allowed:
        raise GateError(f"prompts of {lengths} tokens get other answers in a batch than alone: log probabilities "
                        f"differ by {worst:.2g} nats in {precision}, allowed {allowed:g}; padding reaches the model",
                        "answer one at a time: --batch-size 1")
    return (f"in a batch as one at a time: {len(rows)} prompts of {lengths} tokens, log probabilities differ by at "
            f"most {worst:.2g} nats in {precision} (allowed {allowed:g})")


def _some(prompts: list[list[int]]) -> list[list[int]]:
    """A few prompts from the shortest to the longest."""
    order = sorted(prompts, key=len)
    order = [ids for ids in order if len(ids) <= LONGEST] or order[:2]
    places = sorted({round(i * (len(order) - 1) / (ROWS - 1)) for i in range(ROWS)})
    return [order[place] for place in places]


def _decode(model: Any, tokenizer: Any, rows: list[list[int]]) -> list[tuple[list[int], Any]]:
    """For each row its greedy tokens and, at each step, all log probabilities (steps, vocabulary)."""
    out = generate(model, tokenizer, rows, max_new_tokens=STEPS, do_sample=False, temperature=None, top_p=None,
                   top_k=None, output_logits=True, return_dict_in_generate=True)
    logprobs = torch.stack(out.logits, dim=1).float().log_softmax(-1)
    tokens = out.sequences[:, -logprobs.shape[1]:].tolist()
    return list(zip(tokens, logprobs, strict=True))


def _gap(alone: tuple[list[int], Any], together: tuple[list[int], Any]) -> float:
    """The largest difference of the likeliest tokens' log probabilities, up to the first token that differs."""
    pairs = enumerate(zip(alone[0], together[0], strict=True), 1)
    steps = next((step for step, (a, b) in pairs if a != b), len(alone[0]))
    top = alone[1][:steps].topk(TOP).indices
    return float((alone[1][:steps].gather(-1, top) - together[1][:steps].gather(-1, top)).abs().max())
