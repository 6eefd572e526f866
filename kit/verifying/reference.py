"""What the trained model in memory holds of held-out conversations, kept in the run folder to compare artefacts with.

`reference.safetensors` has, for each place where an answer's token is predicted, the 256 likeliest tokens with their
log probabilities, the likeliest one, and that of the token that follows. Next to the conversations lie the model's own
greedy answers: an artefact whose likeliest tokens along such an answer are the answer's gives that answer too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
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

# (token ids, places whose next token is looked at, tokens of interest there (n, TOP)) → `Said`
Engine = Callable[[list[list[int]], list[list[int]], list["np.ndarray"]], Iterator["Said"]]


class Said(NamedTuple):
    """At n places: log probabilities (n, TOP) of the tokens asked for, the likeliest token (n), and the log
    probability (n) of the token that follows there. Natural logarithms, float32."""

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
    """`top_ids` and `said` belong to `rows`; `answers[i]` are text and whether it stopped, of held-out row i."""

    precision: str
    rows: list[Row]
    answers: list[tuple[str, bool]]
    top_ids: list[np.ndarray]
    said: list[Said]

    def save(self, path: Path) -> None:
        """One safetensors file, whole or not at all."""
        about = {"precision": self.precision, "rows": [row._asdict() for row in self.rows], "answers": self.answers}
        tensors = {"top_ids": np.concatenate(self.top_ids).astype(np.int32),
                   "top": np.concatenate([said.top for said in self.said]),
                   "best": np.concatenate([said.best for said in self.said]).astype(np.int32),
                   "next": np.concatenate([said.next for said in self.said])}
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
                arrays = {name: file.get_tensor(name) for name in ("top_ids", "top", "best", "next")}
            rows = [Row(**row) for row in about["rows"]]
            ends = np.cumsum([len(row.where) for row in rows])[:-1]
            parts = {name: np.split(array, ends) for name, array in arrays.items()}
            said = [Said(*three) for three in zip(parts["top"], parts["best"], parts["next"], strict=True)]
            return cls(about["precision"], rows, [(text, stopped) for text, stopped in about["answers"]],
                       parts["top_ids"], said)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise KitError(f"{path} is damaged: {error}", "run the recipe again") from None


def record(model: Any, tokenizer: Any, data: Any, replies: list[Reply], recipe: Recipe, run: Run) -> Path:
    """Write the run's reference: what `model`, in memory, holds of the first held-out conversations.

    `replies` are its answers to all of them, in order; where the recipe samples, greedy ones are made instead. On a
    CPU everything is computed in float32, on a GPU in the model's own format (the file says which).
    """
    if greedy(recipe) != recipe:
        split = data["test" if len(data["test"]) else "train"]
        replies = answer(model, tokenizer, split[: min(ROWS, len(replies))]["prompt"], greedy(recipe))
    rows = rows_of(tokenizer, data, replies, recipe)
    replies = replies[: 1 + max(row.number for row in rows)]
    top_ids, said = [], []
    with in_float32(model) as precision:
        for best_ids, found in _likeliest(model, rows):
            top_ids.append(best_ids)
            said.append(found)
    path = run.folder / "reference.safetensors"
    Reference(precision, rows, [(reply.text, reply.stopped) for reply in replies], top_ids, said).save(path)
    return path


def greedy(recipe: Recipe) -> Recipe:
    """The recipe whose answers are each time the likeliest token: only those can be compared token by token."""
    return recipe.model_copy(update={"temperature": 0.0, "repetition_penalty": 1.0})


def reread(model: Any, reference: Reference) -> Reference:
    """The same rows as another model in memory holds them; call it inside `in_float32`."""
    found = list(_likeliest(model, reference.rows))
    return reference._replace(top_ids=[top for top, _ in found], said=[said for _, said in found])


def rows_of(tokenizer: Any, data: Any, replies: list[Reply], recipe: Recipe) -> list[Row]:
    """Rows to compare: conversations of at most LONGEST tokens, and the own answers that differ from theirs."""
    split = data["test" if len(data["test"]) else "train"]
    rows = []
    for number in range(min(ROWS, len(replies))):
        ids, labels = split[number]["input_ids"], split[number]["labels"]
        where = [place for place in range(len(ids) - 1) if labels[place + 1] != -100]
        ids = ids[: where[-1] + 2] if where else ids  # what a template writes behind the stop token is of no account
        asked = prompt_ids(tokenizer, split[number]["prompt"], recipe)
        answer = [*replies[number].ids, *([tokenizer.eos_token_id] if replies[number].stopped else [])]
        both = [Row(number, ids, where, held_out=True, own=False),
                Row(number, asked + answer, list(range(len(asked) - 1, len(asked + answer) - 1)), False, own=True)]
        if both[0][1:3] == both[1][1:3]:
            both = [both[0]._replace(own=True)]
        rows += [row for row in both if row.where and len(row.ids) <= LONGEST]
    if not any(row.held_out for row in rows):
        raise KitError(f"all of the first {ROWS} held-out conversations are longer than {LONGEST} tokens",
                       "hold out some shorter ones (eval_dataset), so that exported models can be compared on them")
    return rows


def torch_engine(model: Any) -> Engine:
    """A model in memory as an engine; call it inside `in_float32`."""
    def said(ids: list[list[int]], where: list[list[int]], top_ids: list[np.ndarray]) -> Iterator[Said]:
        found: dict[int, Said] = {}
        for number, logprobs in _logprobs(model, ids, where):
            top = logprobs.gather(-1, torch.as_tensor(top_ids[number], dtype=torch.int64, device=logprobs.device))
            found[number] = _said(logprobs, ids[number], where[number], top)
        yield from (found[number] for number in range(len(ids)))

    return said


def _likeliest(model: Any, rows: list[Row]) -> Iterator[tuple[np.ndarray, Said]]:
    found = {}
    for number, logprobs in _logprobs(model, [row.ids for row in rows], [row.where for row in rows]):
        top, top_ids = logprobs.topk(min(TOP, logprobs.shape[-1]), dim=-1)
        found[number] = (top_ids.cpu().numpy(), _said(logprobs, rows[number].ids, rows[number].where, top))
    yield from (found[number] for number in range(len(rows)))


def _said(logprobs: Any, ids: list[int], where: list[int], top: Any) -> Said:
    following = torch.tensor([ids[place + 1] for place in where], device=logprobs.device)
    return Said(top.cpu().numpy(), logprobs.argmax(-1).cpu().numpy(),
                logprobs.gather(-1, following[:, None])[:, 0].cpu().numpy())


def _logprobs(model: Any, ids: list[list[int]], where: list[list[int]]) -> Iterator[tuple[int, Any]]:
    """(number of the row, its log probabilities (len(where), vocabulary)); rows of like length in one pass.

    Padding stands on the right, where a causal model does not see it.
    """
    model.eval()
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    with torch.no_grad(), bar(len(ids), "reading held-out rows", "row", leave=False, delay=2) as progress:
        while order:
            width = len(ids[order[-1]])
            count = max(1, BATCH_TOKENS // width)
            batch, order = order[-count:], order[:-count]
            rows, mask = padded([ids[n] for n in batch], 0)
            logits = model(input_ids=torch.tensor(rows, device=model.device),
                           attention_mask=torch.tensor(mask, device=model.device), use_cache=False).logits
            for place, number in enumerate(batch):
                yield number, torch.log_softmax(logits[place, where[number]].float(), -1)
            progress.update(len(batch))
