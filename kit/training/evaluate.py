"""The held-out rows during training: loss, perplexity and token accuracy, in less memory than a training step."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from kit.common.padding import padded
from kit.common.processes import rank, total, world_size
from kit.data.masks import IGNORED

METRICS = ("loss", "perplexity", "token_accuracy")
CHUNK = 256  # tokens whose logits are there at once: 150 MB for a vocabulary of 150,000


def evaluate(model: Any, tokenizer: Any, rows: Any, batch_size: int) -> dict[str, float]:
    """`loss` (mean over the trained tokens, in nats), `perplexity` (its exponential) and `token_accuracy` (share).

    `rows` have `input_ids` and `labels`. Batches are of like length; logits are made for CHUNK trained tokens at a time
    and nothing is kept for a backward pass, so there is room wherever a training step of that batch size had room. No
    random number is drawn. Several processes take turns with the batches.
    """
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]["input_ids"]), i))
    batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    # Sharded layers meet in every pass: each process takes as many, the last ones perhaps without counting them.
    rounds = math.ceil(len(batches) / world_size())
    sums = [0.0, 0.0, 0.0]
    training = model.training
    model.eval()
    try:
        for number in range(rank(), rounds * world_size(), world_size()):
            batch = _sums(model, tokenizer, [rows[i] for i in batches[min(number, len(batches) - 1)]])
            if number < len(batches):
                sums = [a + b for a, b in zip(sums, batch, strict=True)]
    finally:
        model.train(training)
    loss, correct, tokens = total(*sums)
    mean = loss / max(tokens, 1)
    return {"loss": mean, "perplexity": math.exp(min(mean, 700)), "token_accuracy": correct / max(tokens, 1)}


def _sums(model: Any, tokenizer: Any, rows: list[dict[str, list[int]]]) -> tuple[float, float, float]:
    """(sum of the losses, correct tokens, tokens) of a batch, padded on the right as in training."""
    device = next(model.parameters()).device
    ids, mask = padded([row["input_ids"] for row in rows], tokenizer.pad_token_id or 0)
    labels = torch.tensor(padded([row["labels"] for row in rows], IGNORED)[0], device=device)[:, 1:]
    with torch.no_grad(), _head_in_chunks(model, labels) as sums:
        model(input_ids=torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device),
              use_cache=False)
    return sums[0], sums[1], float((labels != IGNORED).sum())


@contextmanager
def _head_in_chunks(model: Any, labels: Any) -> Iterator[list[float]]:
    """While this lasts, the output head answers with a stub; the list gets its summed losses and correct tokens.

    The head's own `forward` is replaced, not bypassed: where weights are sharded they are there only within its call.
    """
    head = model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    forward, sums = head.forward, [0.0, 0.0]

    def in_chunks(hidden: Any, *rest: Any) -> Any:
        trained = labels != IGNORED
        for states, targets in zip(hidden[:, :-1][trained].split(CHUNK), labels[trained].split(CHUNK), strict=True):
            logits = forward(states, *rest).float()
            if softcap:
                logits = torch.tanh(logits / softcap) * softcap
            sums[0] += float(cross_entropy(logits, targets, reduction="sum"))
            sums[1] += float((logits.argmax(-1) == targets).sum())
        return hidden[..., :1]

    head.forward = in_chunks
    try:
        yield sums
    finally:
        head.forward = forward


def since_best(losses: list[float], threshold: float) -> int:
    """How many evaluations ago the loss was last lower than ever before by more than `threshold`."""
    best, since = math.inf, 0
    for loss in losses:
        best, since = (loss, 0) if loss < best - threshold else (best, since + 1)
    return since
