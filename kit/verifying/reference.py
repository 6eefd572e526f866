"""What the trained model in memory predicts in held-out conversations, kept to compare artefacts with.

`reference.safetensors` has, for each place where an answer's token is predicted, the 256 likeliest tokens with their
log probabilities, the likeliest one, and that of the token that follows. Next to the conversations lie the model's own
greedy answers: an artefact whose likeliest tokens along such an answer are the answer's gives that answer too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import kit.common.unsloth

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kit.answering.infer import Reply, answer
from kit.common.errors import KitError
from kit.common.files import whole_file
from kit.common.padding import padded
from kit.common.show import bar
from kit.models.precision import in_float32
from kit.models.template import prompt_ids
from kit.recipe.recipe import Recipe
from kit.runs.run import Run

ROWS = 32  # conversations compared: about 600 answer tokens on the demo, where q8_0's top-1 has an error of 0.2 points
LONGEST = 1024  # tokens of a conversation that is compared
TOP = 256  # likeliest tokens kept at each place
BATCH_TOKENS = 1024
TENSORS = ("top_ids", "top", "best", "next")


class Predictions(NamedTuple):
    """At n places: log probabilities (n, k) of k tokens of interest, the likeliest token (n), and the log probability
    (n) of the token that follows there. Natural logarithms, float32."""

    top: np.ndarray
    best: np.ndarray
    next: np.ndarray


class Row(NamedTuple):
    """Token ids of a held-out conversation, or of its prompt with the model's own greedy answer; often it is both."""

    number: int  # of the held-out row
    ids: list[int]
    where: list[int]  # places whose next token belongs to an answer or is its stop token
    held_out: bool
    own: bool


class Reference(NamedTuple):
    """Of each row the TOP likeliest tokens, `top_ids` (n, TOP), and the predictions for them.

    `answers[i]` are the text of the answer to held-out row i and whether it stopped.
    """

    precision: str
    rows: list[Row]
    answers: list[tuple[str, bool]]
    top_ids: list[np.ndarray]
    predictions: list[Predictions]

    def save(self, path: Path) -> None:
        """One safetensors file, whole or not at all."""
        about = {"precision": self.precision, "rows": [row._asdict() for row in self.rows], "answers": self.answers}
        top, best, following = map(np.concatenate, zip(*self.predictions, strict=True))
        tensors = {"top_ids": np.concatenate(self.top_ids).astype(np.int32), "top": top,
                   "best": best.astype(np.int32), "next": following}
        with whole_file(path) as partial:
            save_file(tensors, partial, metadata={"reference": json.dumps(about, ensure_ascii=False)})

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Raises KitError when there is none, or it is damaged."""
        if not path.is_file():
            raise KitError(f"no {path.name} in {path.parent}: what the model in memory answered was not kept",
                           "run the recipe again; `kit verify` needs what kit.record wrote after training")
        try:
            with safe_open(path, framework="np") as file:
                about = json.loads((file.metadata() or {})["reference"])
                arrays = {name: file.get_tensor(name) for name in TENSORS}
            rows = [Row(**row) for row in about["rows"]]
            ends = np.cumsum([len(row.where) for row in rows])[:-1]
            top_ids, *parts = (np.split(arrays[name], ends) for name in TENSORS)
            return cls(about["precision"], rows, [(text, stopped) for text, stopped in about["answers"]],
                       top_ids, [Predictions(*of_row) for of_row in zip(*parts, strict=True)])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise KitError(f"{path} is damaged: {error}", "run the recipe again") from None


def record(model: Any, tokenizer: Any, data: Any, replies: list[Reply], recipe: Recipe, run: Run) -> Path:
    """Write the run's reference: what `model`, in memory, predicts in the first held-out conversations.

    `replies` are its answers to all of them, in order; where the recipe samples, greedy ones are made instead. On a
    CPU everything is computed in float32, on a GPU in the model's own format (the file says which).
    """
    if greedy(recipe) != recipe:
        split = data["test" if len(data["test"]) else "train"]
        replies = answer(model, tokenizer, split[: min(ROWS, len(replies))]["prompt"], greedy(recipe))
    rows = _rows_compared(tokenizer, data, replies, recipe)
    answers = [(reply.text, reply.stopped) for reply in replies[: 1 + max(row.number for row in rows)]]
    with in_float32(model) as precision:
        reference = Reference(precision, rows, answers, *predict(model, rows))
    path = run.folder / "reference.safetensors"
    reference.save(path)
    return path


def greedy(recipe: Recipe) -> Recipe:
    """The recipe whose answers are each time the likeliest token: only those can be compared token by token."""
    return recipe.model_copy(update={"temperature": 0.0, "repetition_penalty": 1.0})


def _rows_compared(tokenizer: Any, data: Any, replies: list[Reply], recipe: Recipe) -> list[Row]:
    """Rows to compare: conversations of at most LONGEST tokens, and the own answers that differ from theirs."""
    split = data["test" if len(data["test"]) else "train"]
    rows = []
    for number in range(min(ROWS, len(replies))):
        row, reply = split[number], replies[number]
        ids, labels = row["input_ids"], row["labels"]
        where = [place for place in range(len(ids) - 1) if labels[place + 1] != -100]
        ids = ids[: where[-1] + 2] if where else ids  # what a template writes behind the stop token is of no account
        prompt = prompt_ids(tokenizer, row["prompt"], recipe)
        answered = [*prompt, *reply.ids, *([tokenizer.eos_token_id] if reply.stopped else [])]
        both = [Row(number, ids, where, held_out=True, own=False),
                Row(number, answered, list(range(len(prompt) - 1, len(answered) - 1)), held_out=False, own=True)]
        if both[0][1:3] == both[1][1:3]:
            both = [both[0]._replace(own=True)]
        rows += [compared for compared in both if compared.where and len(compared.ids) <= LONGEST]
    if not any(row.held_out for row in rows):
        raise KitError(f"all of the first {ROWS} held-out conversations are longer than {LONGEST} tokens",
                       "hold out some shorter ones (eval_dataset), so that exported models can be compared on them")
    return rows


def predict(model: Any, rows: list[Row],
            top_ids: list[np.ndarray] | None = None) -> tuple[list[np.ndarray], list[Predictions]]:
    """Token ids (n, k) of each row and what a model in memory predicts for them; call it inside `in_float32`.

    The tokens are `top_ids`, by default the TOP that the model finds likeliest.
    """
    tokens, predictions = {}, {}
    for number, log_probs in _log_probs(model, rows):
        if top_ids is None:
            top, ids = log_probs.topk(min(TOP, log_probs.shape[-1]), dim=-1)
        else:
            ids = torch.as_tensor(top_ids[number], dtype=torch.int64, device=log_probs.device)
            top = log_probs.gather(-1, ids)
        row = rows[number]
        following = torch.tensor([row.ids[place + 1] for place in row.where], device=log_probs.device)
        parts = top, log_probs.argmax(-1), log_probs.gather(-1, following[:, None])[:, 0]
        tokens[number] = ids.cpu().numpy()
        predictions[number] = Predictions(*(part.cpu().numpy() for part in parts))
    return [tokens[number] for number in range(len(rows))], [predictions[number] for number in range(len(rows))]


def _log_probs(model: Any, rows: list[Row]) -> Iterator[tuple[int, Any]]:
    """(number of the row, log probabilities (n, vocabulary) at its n places); rows of like length in one pass."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda number: len(rows[number].ids))
    with torch.no_grad(), bar(len(rows), "reading held-out rows", "row", leave=False, delay=2) as progress:
        while order:
            count = max(1, BATCH_TOKENS // len(rows[order[-1]].ids))
            batch, order = order[-count:], order[:-count]
            ids, mask = padded([rows[number].ids for number in batch], 0)
            logits = model(input_ids=torch.tensor(ids, device=model.device),
                           attention_mask=torch.tensor(mask, device=model.device), use_cache=False).logits
            for place, number in enumerate(batch):
                yield number, torch.log_softmax(logits[place, rows[number].where].float(), -1)
            progress.update(len(batch))
