"""What ends an answer, how many held-out answers of each shipped file end by themselves, and their scores.

The stop contract: one token ends an answer, and everything that is shipped agrees on which.
"""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import kit.common.unsloth

from kit.answering.engines import answer
from kit.answering.replies import score
from kit.common.errors import KitError
from kit.gguf.formats import quantization_of, read_header
from kit.models.saved import saved_tokenizer
from kit.runs.gates import Gates
from kit.runs.provenance import RUN_AGAIN, export_again
from kit.verifying.reference import Evidence, greedy

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
    _check_rates(gates, rates, len(numbers), fits)
    if recipe.metric == "none":
        return {}
    scores = {name: score([answers[n][0] for n in numbers], expected, recipe.metric)
              for name, answers in replies.items()}
    least = scores["adapter"]["exact"] - max(POINTS, 1 / len(numbers)) - 1e-9  # one answer of a few is no trend
    low = [name for name in ("f16", "bf16", "q8_0") if name in scores and scores[name]["exact"] < least]
    gates.check("held-out score", not low,
                ", ".join(f"{name} {values['exact']:.1%}" for name, values in scores.items()),
                f"f16, bf16, q8_0: at most {100 * POINTS:.0f} points, or one answer, below the adapter",
                f"{len(numbers)} rows" + "".join(f"; {name} is below" for name in low),
                export_again(low[0]) if low else "")
    return scores


def _check_rates(gates: Gates, rates: dict[str, float], count: int, fits: bool) -> None:
    """The shares of `count` held-out answers that ended with the stop token.

    `fits` says whether any of the expected answers is shorter than max_new_tokens: none could end otherwise.
    """
    adapter, worst = rates["adapter"], min(rates, key=lambda name: rates[name])
    figure = ", ".join(f"{name} {rate:.0%}" for name, rate in rates.items())
    cause = ""
    if rates[worst] < adapter - max(FEWER, 1 / count) - 1e-9:  # one of a few is no trend
        cause = f"{worst} ends {rates[worst]:.0%} of its answers by itself, the adapter {adapter:.0%}"
    elif adapter == 0 and fits:
        cause = f"none of {count} answers ended before max_new_tokens"
    remark = "" if fits else "max_new_tokens is too small for every held-out answer: none could end by itself"
    gates.check("stops by itself", not cause if cause or fits else None, figure,
                f"as the adapter, at most {FEWER:.0%} or one fewer", cause or remark,
                "raise max_new_tokens if answers are cut off; train longer if they ramble" if adapter == 0 else
                f"its template or its stop token is not the trained one: {export_again(worst)}")


def check_stops(gates: Gates, evidence: Evidence) -> None:
    """Add the gates `labels` and `stop token` of a run and all it ships."""
    with gates.guard("stop token"):
        stop = check_labels(gates, evidence.tokenizer, evidence.encoded, not evidence.recipe.train_on_responses_only)
        name = partial(_name, evidence.tokenizer)
        declared = dict(_declared(evidence, stop))
        others = [f"{place} has {name(token)}" for place, token in declared.items() if token != stop]
        gates.check("stop token", not others and stop is not None,
                    f"{name(stop)} in {len(declared) - len(others)} of {len(declared)} places", "all",
                    f"{'; '.join(others)}, trained is {name(stop)}: answers would not end there" if others else "",
                    _write_stop_again([place for place, token in declared.items() if token != stop]))


def _write_stop_again(places: list[str]) -> str:
    """The command that writes the trained stop token into these places of `_declared`; '' for none."""
    if any("adapter" in place for place in places):
        return RUN_AGAIN
    folders = [name for name in ("merged", "merged-4bit") if any(f"{name}/" in place for place in places)]
    quants = dict.fromkeys(place.split()[-1] for place in places if place.startswith(("eos of ", "eot of ")))
    commands = [*map(export_again, folders), *([export_again(",".join(quants))] if quants else [])]
    return ", then ".join(commands) or (export_again() if places else "")


def _declared(evidence: Evidence, stop: int | None) -> Iterator[tuple[str, int | str | None]]:
    """What each artefact takes for the stop token: its id, or the texts of a Modelfile that lacks the trained one."""
    run = evidence.run
    for folder in (run.adapter, evidence.merged, run.merged_4bit):
        if folder and folder.is_dir():
            for path in (folder / "config.json", folder / "generation_config.json"):
                if path.is_file():
                    value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
                    yield f"{folder.name}/{path.name}", value[0] if isinstance(value, list) and value else value
            tokenizer = saved_tokenizer(folder, evidence.recipe.trust_remote_code)
            yield f"the tokenizer of {folder.name}/", tokenizer.eos_token_id
    for path in evidence.ggufs:
        with suppress(KitError):  # of a file that can't be read its own gate says what is wrong with it
            fields = read_header(path).fields
            yield f"eos of {quantization_of(path)}", fields.get("tokenizer.ggml.eos_token_id")
            if "tokenizer.ggml.eot_token_id" in fields:
                yield f"eot of {quantization_of(path)}", fields["tokenizer.ggml.eot_token_id"]
    if (run.gguf / "Modelfile").is_file():
        text = (run.gguf / "Modelfile").read_text(encoding="utf-8", errors="replace")
        stops = re.findall(r'^PARAMETER stop "(.*)"$', text, re.MULTILINE)
        word = None if stop in (None, -1) else evidence.tokenizer.convert_ids_to_tokens([stop])[0]
        yield "the Modelfile", stop if word in stops else ", ".join(stops) or None


def check_labels(gates: Gates, tokenizer: Any, encoded: list[tuple[list[int], list[int]]],
                 whole_rows: bool = False) -> int | None:
    """Add the gate `labels` over token ids and labels of some rows; returns the token that ends every trained answer.

    It is each row's last label; with `whole_rows`, where what follows the stop token is trained too, the last special
    one.
    """
    special = set(tokenizer.all_special_ids)
    ends = {next((label for label in reversed(labels) if label != -100 and (label in special or not whole_rows)), -1)
            for _, labels in encoded}
    stop = next(iter(ends)) if len(ends) == 1 else None
    names = ", ".join(_name(tokenizer, token) for token in sorted(ends))
    cause = ""
    if stop == -1:
        cause = "every label is masked: nothing was trained"
    elif stop is None:
        cause = f"answers end with {len(ends)} different tokens: {names}"
    elif stop == tokenizer.pad_token_id:
        cause = f"the pad token is the stop token {names}: whoever ignores padding never trains the stop"
    elif tokenizer.bos_token_id is not None and [tokenizer.bos_token_id] * 2 in [ids[:2] for ids, _ in encoded]:
        cause = f"rows begin with two BOS tokens ({tokenizer.bos_token})"
    elif stop not in special and stop not in tokenizer.added_tokens_decoder:
        cause = f"answers end with {names}, which is no special token"
    gates.check("labels", not cause, f"{len(encoded)} rows end with {names}", "one stop token, not the pad token",
                cause, f"the model has not learnt the token that is to end its answers: {RUN_AGAIN}")
    return stop


def _name(tokenizer: Any, token: int | str | None) -> str:
    if token is None or token == -1:
        return "none"
    return token if isinstance(token, str) else f"{tokenizer.convert_ids_to_tokens([token])[0]} ({token})"
