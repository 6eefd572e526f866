"""What the gates of a run compare with: recorded predictions, the trained tokenizer, the held-out conversations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import kit.common.unsloth

from transformers import AutoTokenizer

from kit.data.formatting import fit
from kit.data.masks import Formatter
from kit.data.splits import read_splits
from kit.models.template import Message
from kit.recipe.recipe import Recipe
from kit.runs.run import Run
from kit.verifying.reference import Reference
from kit.verifying.template import Case, cases

TRAINING_ROWS = 200  # whose labels are made again and looked at


@dataclass
class Evidence:
    """`trained` is adapter/, or merged/ where all weights were trained: the trained tokenizer lies there.

    `encoded` are token ids and labels of some training and held-out rows, as that tokenizer makes them.
    """

    run: Run
    recipe: Recipe
    trained: Path
    reference: Reference
    tokenizer: Any
    held_out: list[list[Message]]
    encoded: list[tuple[list[int], list[int]]]
    cases: list[Case]

    @classmethod
    def load(cls, run: Run, trained: Path) -> Self:
        """Raises KitError when the reference is missing or damaged."""
        recipe, reference = run.recipe, Reference.load(run.folder / "reference.safetensors")
        tokenizer = AutoTokenizer.from_pretrained(trained)
        formatter = Formatter(tokenizer, recipe)
        train, held_out = read_splits(recipe)
        first = [row.messages for row in train[:TRAINING_ROWS]]
        numbered = _kept(formatter, [row.messages for row in held_out]) or _kept(formatter, first)
        encoded = list(formatter.encode(first + numbered[:TRAINING_ROWS]))
        return cls(run, recipe, trained, reference, tokenizer, numbered, encoded,
                   list(cases(tokenizer, recipe, numbered)))

    @property
    def merged(self) -> Path | None:
        """The folder of the merged model, if there is one."""
        return self.run.merged if (self.run.merged / "config.json").is_file() else None

    @property
    def ggufs(self) -> list[Path]:
        return sorted(self.run.gguf.glob("*.gguf"))

    @property
    def remark(self) -> str:
        """What files made of a quantised base's merge are compared with."""
        return "against merged, whose base was quantised in training" if self.recipe.quantised else ""


def _kept(formatter: Formatter, conversations: list[list[Message]]) -> list[list[Message]]:
    """As kit.load_data numbers them: without those that are too long, or shortened."""
    encoded = zip(conversations, formatter.encode(conversations), strict=True)
    fitted = (fit(formatter, messages, *tokens) for messages, tokens in encoded)
    return [row.messages for row in fitted if row.ids]
