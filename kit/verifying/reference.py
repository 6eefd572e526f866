"""What artefacts are compared with: predictions of the trained model in memory, its tokenizer, held-out conversations.

`reference.safetensors` has, for each place where an answer's token is predicted, the 256 likeliest tokens with their
log probabilities, the likeliest one, and that of the token that follows. Next to the conversations lie the model's own
greedy answers: an artefact whose likeliest tokens along such an answer are the answer's gives that answer too. The
conversations themselves lie there as well, so that a run can be verified where its data is not.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import kit.common.unsloth

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kit.answering.prompts import answer
from kit.answering.replies import Reply
from kit.common.errors import KitError
from kit.common.files import whole_file
from kit.common.padding import padded
from kit.common.show import bar
from kit.data.masks import Formatter
from kit.data.splits import without_nulls
from kit.models.fetch import base_folder
from kit.models.load import make_room
from kit.models.precision import in_float32
from kit.models.saved import saved_tokenizer
from kit.models.template import Message, prompt_ids
from kit.recipe.recipe import Recipe
from kit.runs.provenance import RUN_AGAIN
from kit.runs.run import Run
from kit.verifying.template import Case, cases

ROWS, FEWEST = 32, 8  # conversations compared
LONGEST = 1024  # tokens of a conversation that is compared
PLACES, OWN_PLACES = 64, 128  # tokens compared of an answer that the data has, and of the model's own
# Tokens compared in all, once there are FEWEST conversations: on two cores a model of SMALL weights reads them in about
# ten seconds. A larger one reads fewer on a CPU, so that the verdict takes minutes there too.
COMPARED, LEAST_COMPARED, SMALL = 8192, 2048, 150e6
TOP = 256  # likeliest tokens kept at each place
BATCH_TOKENS = 1024
TRAINING_ROWS = 32  # whose labels are made again and looked at


class Predictions(NamedTuple):
    """At n places: k tokens of interest (n, k) with their log probabilities, the likeliest token (n), and the log
    probability (n) of the token that follows there. Natural logarithms, float32."""

    top_ids: np.ndarray
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
    whole: bool  # whether every token of the answers is compared
    ends: bool  # whether the last of `where` is followed by the token that ends an answer


class Reference(NamedTuple):
    """Of each row the predictions for its TOP likeliest tokens.

    `answers[i]` are the text of the answer to held-out row i and whether it stopped, `held_out[i]` is that row's
    conversation and `expected[i]` its answer; `trained` are some of the training rows' conversations.
    """

    precision: str
    rows: list[Row]
    answers: list[tuple[str, bool]]
    held_out: list[list[Message]]
    expected: list[str]
    trained: list[list[Message]]
    predictions: list[Predictions]

    def save(self, path: Path) -> None:
        """One safetensors file, whole or not at all."""
        about = {"precision": self.precision, "rows": [row._asdict() for row in self.rows], "answers": self.answers,
                 "held_out": self.held_out, "expected": self.expected, "trained": self.trained}
        top_ids, top, best, following = map(np.concatenate, zip(*self.predictions, strict=True))
        tensors = {"top_ids": top_ids.astype(np.int32), "top": top, "best": best.astype(np.int32), "next": following}
        with whole_file(path) as partial:
            save_file(tensors, partial, metadata={"reference": json.dumps(about, ensure_ascii=False)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises KitError when there is none, or it is damaged."""
        if not path.is_file():
            raise KitError(f"no {path.name} in {path.parent}: what the model in memory answered was not kept",
                           f"{RUN_AGAIN}; `kit verify` needs what kit.record wrote after training")
        try:
            with safe_open(path, framework="np") as file:
                about = json.loads((file.metadata() or {})["reference"])
                tensors = [file.get_tensor(name) for name in Predictions._fields]
            rows = [Row(**row) for row in about["rows"]]
            ends = np.cumsum([len(row.where) for row in rows])[:-1]
            parts = zip(*(np.split(tensor, ends) for tensor in tensors), strict=True)
            return cls(about["precision"], rows, [(text, stopped) for text, stopped in about["answers"]],
                       about["held_out"], about["expected"], about["trained"],
                       [Predictions(*of_row) for of_row in parts])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise KitError(f"{path} is damaged, or of an earlier version of the kit: {type(error).__name__}: {error}",
                           RUN_AGAIN) from None


def record(model: Any, tokenizer: Any, data: Any, replies: list[Reply], recipe: Recipe, run: Run) -> Path:
    """Write the run's reference: what `model`, in memory, predicts in the first held-out conversations.

    `replies` are its answers to all of them or the first ones, in order; where the recipe samples, greedy ones are made
    instead. On a CPU everything is computed in float32, on a GPU in the model's own format (the file says which).
    """
    split = data["test" if len(data["test"]) else "train"]
    if greedy(recipe) != recipe:
        replies = answer(model, tokenizer, split[: min(ROWS, len(replies))]["prompt"], greedy(recipe))
    rows = _rows_compared(tokenizer, split, replies, recipe, _tokens_compared(model))
    count = 1 + max(row.number for row in rows)
    path = run.folder / "reference.safetensors"
    with in_float32(model) as precision:
        Reference(precision, rows, [(reply.text, reply.stopped) for reply in replies[:count]],
                  [without_nulls(talk) for talk in split[:count]["messages"]], split[:count]["reference"],
                  [without_nulls(talk) for talk in data["train"][:TRAINING_ROWS]["messages"]],
                  predict(model, rows)).save(path)
    return path


def greedy(recipe: Recipe) -> Recipe:
    """The recipe whose answers are each time the likeliest token: only those can be compared token by token."""
    return recipe.model_copy(update={"temperature": 0.0, "repetition_penalty": 1.0})


def _tokens_compared(model: Any) -> int:
    """How many tokens of conversations are compared."""
    share = SMALL / model.num_parameters() if model.device.type == "cpu" else 1
    return int(max(LEAST_COMPARED, COMPARED * min(share, 1)))


def _rows_compared(tokenizer: Any, split: Any, replies: list[Reply], recipe: Recipe, tokens: int) -> list[Row]:
    """Rows to compare, of about `tokens` tokens: conversations, and the own answers that differ from theirs."""
    rows: list[Row] = []
    compared, count = 0, min(ROWS, len(replies))
    # In their order, but the long ones last, so that FEWEST conversations and their answers have room.
    share = tokens // (2 * FEWEST)
    for number in sorted(range(count), key=lambda number: max(share, len(split[number]["input_ids"]))):
        row, reply = split[number], replies[number]
        ids, labels = row["input_ids"], row["labels"]
        where = [place for place in range(len(ids) - 1) if labels[place + 1] != -100]
        ids = ids[: where[-1] + 2] if where else ids  # what a template writes behind the stop token is of no account
        prompt = prompt_ids(tokenizer, row["prompt"], recipe)
        answered = [*prompt, *reply.ids, *([tokenizer.eos_token_id] if reply.stopped else [])]
        own = Row(number, answered, list(range(len(prompt) - 1, len(answered) - 1)), held_out=False, own=True,
                  whole=True, ends=reply.stopped)
        both = [Row(number, ids, where, held_out=True, own=own[1:3] == (ids, where), whole=True, ends=True), own]
        fitting = [cut for cut in map(_beginning, both[:1] if both[0].own else both)
                   if cut.where and len(cut.ids) <= LONGEST]
        rows += fitting
        compared += sum(len(cut.ids) for cut in fitting)
        if compared > tokens and len({row.number for row in rows}) >= FEWEST:
            break
    rows.sort(key=lambda row: row.number)
    if not any(row.held_out for row in rows):
        raise KitError(f"all of the first {count} held-out conversations are longer than {LONGEST} tokens",
                       "hold out some shorter ones (eval_dataset), so that exported models can be compared on them")
    return rows


def _beginning(row: Row) -> Row:
    """The row with the first of its answers' places, and the last one where an answer of the data is not too long."""
    places = OWN_PLACES if row.own else PLACES
    if len(row.where) <= places:
        return row
    if row.held_out and len(row.ids) <= LONGEST:
        return row._replace(where=[*row.where[: places - 1], row.where[-1]], whole=False)
    where = row.where[:places]
    return row._replace(ids=row.ids[: where[-1] + 2], where=where, whole=False, ends=False)


def predict(model: Any, rows: list[Row], like: list[Predictions] | None = None) -> list[Predictions]:
    """What a model in memory predicts in each row; call it inside `in_float32`.

    The tokens of interest are those of `like`, by default the TOP that the model finds likeliest.
    """
    predictions = {}
    for number, log_probs in _log_probs(model, rows):
        if like is None:
            top, ids = log_probs.topk(min(TOP, log_probs.shape[-1]), dim=-1)
        else:
            ids = torch.as_tensor(like[number].top_ids, dtype=torch.int64, device=log_probs.device)
            top = log_probs.gather(-1, ids)
        row = rows[number]
        following = torch.tensor([row.ids[place + 1] for place in row.where], device=log_probs.device)
        parts = ids, top, log_probs.argmax(-1), log_probs.gather(-1, following[:, None])[:, 0]
        predictions[number] = Predictions(*(part.cpu().numpy() for part in parts))
    return [predictions[number] for number in range(len(rows))]


def _log_probs(model: Any, rows: list[Row]) -> Iterator[tuple[int, Any]]:
    """(number of the row, log probabilities (n, vocabulary) at its n places); rows of like length in one pass."""
    model.eval()
    make_room(model, max(len(row.ids) for row in rows))
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


@dataclass
class Evidence:
    """`trained` is adapter/, or merged/ where all weights were trained: the trained tokenizer lies there.

    `encoded` are token ids and labels of some training and held-out rows, as that tokenizer makes them. What is found
    on the way: `base`, the predictions of the model without its adapter, and `sensitivity` (kit.verifying.noise).
    """

    run: Run
    recipe: Recipe
    trained: Path
    reference: Reference
    tokenizer: Any
    encoded: list[tuple[list[int], list[int]]]
    cases: list[Case]
    base: list[Predictions] | None = None
    sensitivity: float | None = None
    tokenizers: dict[Path, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, run: Run, trained: Path) -> Self:
        """Raises KitError when the reference is missing or damaged."""
        recipe, reference = run.recipe, Reference.load(run.folder / "reference.safetensors")
        tokenizer = saved_tokenizer(trained, recipe.trust_remote_code)
        encoded = list(Formatter(tokenizer, recipe).encode(reference.trained + reference.held_out))
        return cls(run, recipe, trained, reference, tokenizer, encoded,
                   list(cases(tokenizer, recipe, reference.held_out)), tokenizers={trained: tokenizer})

    def tokenizer_in(self, folder: Path) -> Any:
        """The tokenizer that lies in a folder of the run; read once, as a vocabulary takes seconds."""
        if folder not in self.tokenizers:
            self.tokenizers[folder] = saved_tokenizer(folder, self.recipe.trust_remote_code)
        return self.tokenizers[folder]

    @property
    def merged(self) -> Path | None:
        """The folder of the merged model, if there is one."""
        return self.run.merged if (self.run.merged / "config.json").is_file() else None

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the merged model, or of the base, which is of the same shape, where merged/ is gone."""
        folder = self.merged or base_folder(self.recipe)
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))

    @property
    def ggufs(self) -> list[Path]:
        return sorted(self.run.gguf.glob("*.gguf"))

    @property
    def remark(self) -> str:
        """What files made of a quantised base's merge are compared with."""
        return "against merged, whose base was quantised in training" if self.recipe.quantised else ""
