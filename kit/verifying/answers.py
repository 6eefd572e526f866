"""What ends an answer, whether every shipped file ends its answers there, and the scores of its answers.

The stop contract: one token ends an answer, and everything that is shipped agrees on which.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import kit.common.unsloth

from kit.answering.prompts import answer
from kit.answering.replies import score
from kit.common.errors import KitError
from kit.gguf.formats import quantization_of, read_header
from kit.runs.gates import Gates
from kit.runs.provenance import RUN_AGAIN, export_again
from kit.verifying.parity import Figures
from kit.verifying.reference import Evidence, greedy

# Chance of a false alarm in one comparison of scores, and how many rows it takes to come below it.
ALPHA = 1 / 500
ENOUGH = math.ceil(math.log2(1 / ALPHA))
JUDGED = ("f16", "bf16", "q8_0")  # whose held-out score has to be the adapter's
SECONDS = 60  # for the answers of one GGUF that have to be generated
ENDS = 3.0  # times the allowed spread by which a stop token may be less likely, on average


class Shipped(NamedTuple):
    """A GGUF as it was compared: its figures, the spread in nats that its format explains, and its answers."""

    figures: Figures
    allowed: float
    answers: dict[int, str]


def gguf_answers(path: Path, evidence: Evidence, same: dict[int, bool]) -> dict[int, str]:
    """The GGUF's greedy answers to the reference's rows; without a metric none, as they would settle nothing.

    Where `same` says that it gives the adapter's whole answer, that one; only the others are generated, as many as
    there is time for.
    """
    if evidence.recipe.metric == "none":
        return {}
    reference, recipe = evidence.reference, greedy(evidence.recipe)
    whole = {row.number for row in reference.rows if row.own and row.whole}
    replies = {number: reference.answers[number][0] for number, equal in same.items() if equal and number in whole}
    others = [number for number in same if number not in replies]
    questions = [reference.held_out[number][:-1] for number in others]
    generated = answer(path, None, questions, recipe, seconds=SECONDS, least=1) if questions else []
    return replies | {number: reply.text for number, reply in zip(others, generated, strict=False)}


def check_ends(gates: Gates, evidence: Evidence, shipped: dict[str, Shipped]) -> None:
    """Add `stops by itself`: each GGUF holds the stop token as likely as the trained model where answers end.

    Nothing has to be generated for that, and answers that were cut off by max_new_tokens do not count.
    """
    if not shipped:
        return
    ends = {name: one.figures.ends for name, one in shipped.items()}
    places = next(iter(ends.values()))
    sure = sum(end.sure for end in places)
    kept = ", ".join(f"{name} {sum(end.sure and end.kept for end in each)}" for name, each in ends.items())
    figure = f"of {len(places)} ends the trained model is sure of {sure}, of those {kept}"
    tolerance = f"at most {ENDS:g} times the spread less likely"
    if not places:
        gates.check("stops by itself", None, "no end", tolerance,
                    "too few to judge: no answer that is compared comes to its end, 1 would do")
        return
    loss = {name: fmean(end.loss for end in each) for name, each in ends.items()}
    low = [name for name, one in shipped.items() if not loss[name] <= ENDS * one.allowed]
    cause = "; ".join(f"{name} holds the stop token {loss[name]:.2g} nats less likely than the trained model"
                      for name in low)
    remark = "" if sure else "the trained model itself would go on in each: train longer if its answers ramble"
    gates.check("stops by itself", not low, figure, tolerance, cause or remark, export_again(low[0]) if low else "")


def check_scores(gates: Gates, evidence: Evidence, shipped: dict[str, Shipped]) -> dict[str, dict[str, float]]:
    """Add `held-out score`, where there is a metric; returns the scores of adapter and GGUFs.

    A GGUF is compared with the adapter on the rows that both answered, by a sign test: rounding changes an answer for
    the better about as often as for the worse.
    """
    reference, metric = evidence.reference, evidence.recipe.metric
    numbers = sorted({row.number for row in reference.rows if row.own})
    if metric == "none" or not numbers or not evidence.recipe.holds_out:
        return {}
    answers = {"adapter": {number: reference.answers[number][0] for number in numbers},
               **{name: one.answers for name, one in shipped.items()}}
    expected = reference.expected
    scores = {name: score([each[n] for n in sorted(each)], [expected[n] for n in sorted(each)], metric)
              for name, each in answers.items() if each}
    right = {name: {n: score([text], [expected[n]], metric)["exact"] == 1 for n, text in each.items()}
             for name, each in answers.items()}
    # Where time ran out a GGUF answered fewer rows than the adapter: the test knows its own.
    judged = [name for name in JUDGED if right.get(name)]
    count = min((len(right[name]) for name in judged), default=len(numbers))
    chances = {name: _chance_of_worse(right["adapter"], right[name]) for name in judged}
    low = [name for name, chance in chances.items() if chance < ALPHA]
    passed = not low if judged and count >= ENOUGH else None
    remark = f"{count} rows" if count >= ENOUGH else f"too few to judge: {count}, {ENOUGH} would do"
    cause = "".join(f"; {name} answers fewer rows as expected than the adapter, by chance once in "
                    f"{1 / chances[name]:,.0f} runs" for name in low)
    figure = ", ".join(f"{name} {values['exact']:.1%} of {len(answers[name])}" for name, values in scores.items())
    gates.check("held-out score", passed, figure,
                f"{', '.join(JUDGED)}: as the adapter, but for chance", remark + cause,
                export_again(low[0]) if low else "")
    return scores


def _chance_of_worse(before: dict[int, bool], after: dict[int, bool]) -> float:
    """The sign test: how likely as many of the rows that changed got worse, if each way were as likely."""
    worse = sum(before[n] and not after[n] for n in after)
    better = sum(after[n] and not before[n] for n in after)
    changed = worse + better
    return sum(math.comb(changed, k) for k in range(worse, changed + 1)) / 2 ** changed


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
            yield f"the tokenizer of {folder.name}/", evidence.tokenizer_in(folder).eos_token_id
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
