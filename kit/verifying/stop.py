"""The stop contract: one token ends an answer, and everything that is shipped agrees on which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kit.common.unsloth

from transformers import AutoTokenizer

from kit.runs.gates import Gates

TRAIN_AGAIN = "train again: the model has not learnt the token that is to end its answers"
NAMES = ("config.json", "generation_config.json")
FEWER = 0.05  # share of held-out answers; a GGUF may stop that much more seldom than the adapter


class Stops:
    """Collects what each artefact takes for the stop token; `trained` is the id that ends every trained answer."""

    def __init__(self, tokenizer: Any, encoded: list[tuple[list[int], list[int]]], whole_rows: bool = False) -> None:
        self.tokenizer = tokenizer
        self.whole_rows = whole_rows  # what a template writes behind the stop token is trained too
        self.encoded = encoded
        self.found: dict[str, int | str | None] = {}

    def trained(self) -> set[int]:
        """The last trained token of every row; where whole rows are trained, the last special one."""
        special = set(self.tokenizer.all_special_ids)
        return {next((label for label in reversed(labels) if label != -100
                      and (label in special or not self.whole_rows)), -1) for _, labels in self.encoded}

    def name(self, token: int | str | None) -> str:
        if token is None or token == -1:
            return "none"
        if isinstance(token, str):
            return token
        text = self.tokenizer.convert_ids_to_tokens([token])[0]
        return f"{text} ({token})"

    def add_folder(self, folder: Path) -> None:
        """A Hugging Face folder: the eos of its config, generation_config and tokenizer."""
        for name in NAMES:
            path = folder / name
            if path.is_file():
                value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
                self.found[f"{folder.name}/{name}"] = value[0] if isinstance(value, list) and value else value
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.found[f"the tokenizer of {folder.name}/"] = tokenizer.eos_token_id

    def add_gguf(self, name: str, fields: dict[str, Any]) -> None:
        """A GGUF's own fields; eot is compared where the file has one."""
        self.found[f"eos of {name}"] = fields.get("tokenizer.ggml.eos_token_id")
        if "tokenizer.ggml.eot_token_id" in fields:
            self.found[f"eot of {name}"] = fields["tokenizer.ggml.eot_token_id"]

    def add_modelfile(self, stops: list[str]) -> None:
        """The Modelfile's stop parameters: the trained token must be one of them."""
        [expected] = self.trained() if len(self.trained()) == 1 else [None]
        word = self.tokenizer.convert_ids_to_tokens([expected])[0] if expected is not None else None
        self.found["the Modelfile"] = expected if word in stops else ", ".join(stops) or None

    def check(self, gates: Gates) -> bool:
        """Add the gates `labels` and `stop token`; returns whether both passed."""
        trained = self.trained()
        starts = [ids[:2] for ids, _ in self.encoded]
        twice = self.tokenizer.bos_token_id is not None and [self.tokenizer.bos_token_id] * 2 in starts
        pad = self.tokenizer.pad_token_id
        cause = ""
        if trained == {-1}:
            cause = "every label is masked: nothing was trained"
        elif len(trained) != 1:
            cause = f"answers end with {len(trained)} different tokens: {', '.join(map(self.name, sorted(trained)))}"
        elif pad in trained:
            cause = (f"the pad token is the stop token {self.name(pad)}: whoever ignores padding never trains the stop")
        elif twice:
            cause = f"rows begin with two BOS tokens ({self.tokenizer.bos_token})"
        elif any(stop not in self.tokenizer.all_special_ids and stop not in self.tokenizer.added_tokens_decoder
                 for stop in trained):
            cause = f"answers end with {self.name(next(iter(trained)))}, which is no special token"
        good = gates.check("labels", not cause, f"{len(self.encoded)} rows end with "
                           f"{', '.join(map(self.name, sorted(trained)))}", "one stop token, not the pad token", cause,
                           TRAIN_AGAIN)
        stop = next(iter(trained)) if len(trained) == 1 else None
        others = {where: token for where, token in self.found.items() if token != stop}
        told = "; ".join(f"{where} has {self.name(token)}" for where, token in others.items())
        return gates.check("stop token", not others and stop is not None,
                           f"{self.name(stop)} in {len(self.found) - len(others)} of {len(self.found)} places", "all",
                           f"{told}, trained is {self.name(stop)}: answers would not end there" if others else "",
                           "export again, so that the trained tokenizer's stop token is written") and good


def check_rates(gates: Gates, adapter: float, shipped: dict[str, float], count: int, fits: bool) -> None:
    """Add `stops by itself`: the shares of `count` held-out answers that ended with the stop token.

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
