"""Parity: does an artefact predict what the trained model predicts, as far as its format can?

Judged are the spread of its logits (kit.verifying.noise) against what rounding to the format does to this model; every
place where it holds another token the likeliest, by how far the trained model had the two apart; and the share of what
training changed that is in it. Told are KL and top-1: KL is sum p (log p - log q) in nats per token, p the reference, q
the artefact, over the reference's 256 likeliest tokens and all others taken as one: never more than over the whole
vocabulary, and on a trained model the same to five digits. Top-1 is the share of places where both hold the same token
the likeliest.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import kit.common.unsloth

import numpy as np

from kit.common.show import bar
from kit.gguf.child import LlamaChild
from kit.gguf.formats import Header
from kit.models.load import reload
from kit.models.precision import in_float32
from kit.models.saved import placement, saved_model
from kit.recipe.recipe import Recipe
from kit.runs.gates import Gates
from kit.runs.provenance import RUN_AGAIN, export_again
from kit.verifying import noise
from kit.verifying.reference import Evidence, Predictions, Reference, Row, predict

# Times the spread that the format's rounding makes on this model; docs/gates.md has both error rates.
SPREAD = 2.0
# A flip is beyond rounding when the two tokens were further apart than so many allowed spreads.
FLIP = 6.0
# Rounding happens to point along or against what was trained by about this part of (its spread / the change's size).
ALONG = 0.15
SHARE = 0.1  # of what was trained may be missing, beside what rounding explains
UNTELLABLE = 0.5  # a share that rounding alone may take is not judged
TYPICAL = 30.0  # sensitivity in nats where it could not be measured: the adapter on a quantised base
TIE = 0.01  # nats: two tokens this close at the reference are equally likely
DIFFERS = 1e-4  # mean KL; an adapter that changes less than this was not trained
REST = 1e-7  # least probability of all other tokens together: float32 sums are not more exact


class End(NamedTuple):
    """A place where an answer ends: how much less likely (in nats) its stop token is than at the reference, and whether
    it is the likeliest token of the reference, and of the artefact."""

    loss: float
    sure: bool
    kept: bool


class Figures(NamedTuple):
    """Means over `tokens` places of held-out conversations: nll in nats, kl, top1 as a share; spread in nats.

    `answers[i]`: gives the reference's answer i, as far as it is compared. `flips` are the nats that the reference held
    between its likeliest token and the artefact's, of each place where they differ.
    """

    nll: float
    mean_kl: float
    max_kl: float
    top1: float
    tokens: int
    spread: float
    answers: dict[int, bool]
    flips: list[float]
    ends: list[End]

    def __str__(self) -> str:
        return (f"KL {_short(self.mean_kl)} (max {_short(self.max_kl)}), top-1 {self.top1:.1%}, NLL {self.nll:.4f}, "
                f"logits ± {_short(self.spread)}")


def compare(reference: Reference, predictions: Iterable[Predictions]) -> Figures:
    """Another model's predictions for the rows and tokens of the reference against the reference's own."""
    rows, compared = reference.rows, list(predictions)
    held_out = [number for number, row in enumerate(rows) if row.held_out]
    kls = np.concatenate([_kl(reference.predictions[n].top, compared[n].top) for n in held_out])
    same = np.concatenate([_agree(reference.predictions[n], compared[n]) for n in held_out])
    nll = -np.concatenate([compared[n].next for n in held_out])
    pairs = list(zip(reference.predictions, compared, strict=True))
    ends = [_end(row, *pair) for row, pair in zip(rows, pairs, strict=True) if row.ends]
    return Figures(float(nll.mean()), float(kls.mean()), float(kls.max()), float(same.mean()), len(kls),
                   noise.spread(reference.predictions, compared), _answers(rows, compared),
                   [gap for pair in pairs for gap in _flips(*pair)], ends)


def _answers(rows: list[Row], predictions: list[Predictions]) -> dict[int, bool]:
    """{held-out row: whether the likeliest tokens along the model's own answer are the answer's}."""
    return {row.number: bool((predicted.best == [row.ids[place + 1] for place in row.where]).all())
            for row, predicted in zip(rows, predictions, strict=True) if row.own}


def _flips(reference: Predictions, compared: Predictions) -> Iterator[float]:
    """How far the reference had the two likeliest tokens apart where they differ, in nats."""
    for place in np.flatnonzero(~_agree(reference, compared)):
        top = reference.top[place]
        there = np.flatnonzero(reference.top_ids[place] == compared.best[place])
        # A token that is not among those kept is no likelier than the least of them.
        yield float(top.max() - (top[there[0]] if len(there) else top.min()))


def _end(row: Row, reference: Predictions, compared: Predictions) -> End:
    stop = row.ids[row.where[-1] + 1]
    return End(float(reference.next[-1] - compared.next[-1]), reference.best[-1] == stop, compared.best[-1] == stop)


def check_adapter(gates: Gates, evidence: Evidence) -> None:
    """The adapter from disk against the one in memory, and, as a control, the base without it."""
    reference = evidence.reference
    model, _ = reload(evidence.trained, evidence.recipe)
    with in_float32(model):
        predictions = predict(model, reference.rows, reference.predictions)
        with model.disable_adapter():
            evidence.base = predict(model, reference.rows, reference.predictions)
        if not evidence.recipe.quantised:
            measure_sensitivity(evidence, model, predictions)
    judge(gates, "adapter", compare(reference, predictions), evidence, noise.ADDITIONS,
          "the same weights: only the order of additions differs")
    base = compare(reference, evidence.base)
    changed = base.mean_kl > DIFFERS
    gates.check("control: the base differs", changed, str(base), f"mean KL > {DIFFERS:g}", "" if changed else
                "the adapter changes nothing: the base model predicts the same", "train longer, or with a higher "
                "learning_rate; a loss that does not fall says the same")


def measure_sensitivity(evidence: Evidence, model: Any, before: list[Predictions]) -> None:
    """Shake the weights of a model that predicted `before`, for good, and set `evidence.sensitivity`.

    Call it inside `in_float32`.
    """
    noise.shake(model)
    after = predict(model, evidence.reference.rows, evidence.reference.predictions)
    evidence.sensitivity = noise.spread(before, after) / noise.JITTER


def of_its_base(recipe: Recipe) -> float:
    """The share by which the weights were rounded that were trained on."""
    return noise.NF4 if recipe.load_in_4bit else noise.INT8 if recipe.load_in_8bit else 0.0


def check_merged(gates: Gates, evidence: Evidence, folder: Path) -> None:
    """The merged model or its 4-bit copy.

    An adapter trained on a quantised base and merged into the 16-bit one gives another model than was trained. Then
    what is made of the merged model is compared with that: its predictions become the reference.
    """
    reference, recipe, own = evidence.reference, evidence.recipe, folder == evidence.merged
    model = saved_model(folder, recipe.trust_remote_code, **placement(folder))
    with in_float32(model) as precision:
        predictions = predict(model, reference.rows, reference.predictions)
        if own and evidence.sensitivity is None:
            measure_sensitivity(evidence, model, predictions)
    rounding, why = noise.MERGED, "weights rounded once to the base model's 16-bit format"
    if not own:
        rounding, why = noise.NF4, evidence.remark or "NF4, about 4.1 bits per weight"
    elif recipe.quantised:
        rounding, why = of_its_base(recipe), "trained on rounded weights, merged into the original ones"
    judge(gates, folder.name, compare(reference, predictions), evidence, rounding, why)
    if own:
        check_share(gates, folder.name, evidence, predictions, rounding)
        if recipe.quantised:
            evidence.reference = reference._replace(precision=precision, predictions=predictions)


def gguf_predictions(child: LlamaChild, reference: Reference) -> Iterator[Predictions]:
    """What a GGUF predicts for the reference's rows and tokens, in a child process opened with logits=True."""
    with bar(len(reference.rows), f"reading rows with {child.gguf.name}", "row", leave=False, delay=2) as progress:
        for row, ours in zip(reference.rows, reference.predictions, strict=True):
            yield Predictions(ours.top_ids, *child.predictions(row.ids, row.where, ours.top_ids))
            progress.update()


def allowed_spread(evidence: Evidence, rounding: float) -> float:
    """The largest spread, in nats, that rounding the weights by this share explains."""
    computed = 0.0 if evidence.reference.precision == "float32" else noise.COMPUTED_16BIT
    return SPREAD * (evidence.sensitivity or TYPICAL) * math.hypot(rounding, computed)


def judge(gates: Gates, name: str, figures: Figures, evidence: Evidence, rounding: float, why: str) -> bool:
    """Add the gate `parity <name>` of an artefact whose format rounds weights by this share; whether it passed."""
    allowed = allowed_spread(evidence, rounding)
    beyond = [gap for gap in figures.flips if gap > FLIP * allowed]
    cause = ""
    if not figures.spread <= allowed:  # not a number is no pass
        cause = (f"{name} does not predict what the trained model predicts: its logits are {_short(figures.spread)} "
                 f"nats apart, {figures.spread / allowed:.1f} times what its format explains on this model")
    elif beyond:
        cause = (f"{name} holds another token the likeliest in {len(beyond)} places where the trained model was sure: "
                 f"{_short(max(beyond))} nats apart, where its format explains "
                 f"{_short(FLIP * allowed)}")
    return gates.check(f"parity {name}", not cause, str(figures), f"logits ± {_short(allowed)} nats", cause or why,
                       "" if not cause else _remedy(name))


def check_share(gates: Gates, name: str, evidence: Evidence, predictions: list[Predictions], rounding: float) -> None:
    """Add `trained <name>`: how much of what training changed in the logits is in the artefact.

    Not judged where the format's rounding moves the logits about as much as training did, and not added where all
    weights were trained.
    """
    if evidence.base is None:
        return
    missing, size = noise.lost(evidence.reference.predictions, predictions, evidence.base)
    explained = SHARE + ALONG * allowed_spread(evidence, rounding) / size if size else math.inf
    figure = f"{1 - missing:.1%} of what training changed"
    if not explained < UNTELLABLE:
        gates.check(f"trained {name}", None, figure, "", f"not judged: training changed the logits by ± {_short(size)} "
                    "nats, which is no more than this format's rounding may")
        return
    low = not abs(missing) <= explained
    gates.check(f"trained {name}", not low, figure, f"100 ± {explained:.0%}",
                f"{name} holds {1 - missing:.0%} of what training changed" if low else "",
                _remedy(name) if low else "")


def judge_gguf(gates: Gates, name: str, header: Header, figures: Figures, predictions: list[Predictions],
               evidence: Evidence) -> float:
    """Add `parity <name>` and `trained <name>` of a GGUF; returns the spread in nats that its format explains."""
    # Without merged/ to compare with, it is the model on its quantised base.
    base = 0.0 if evidence.merged else of_its_base(evidence.recipe)
    rounding = math.hypot(noise.rounding_of(header), noise.MERGED, base)
    # An answer was made in the model's own format; where float32 breaks a tie in it otherwise, no file can give it.
    certain = [n for n, own in _answers(evidence.reference.rows, evidence.reference.predictions).items() if own]
    other = sum(not figures.answers[number] for number in certain)
    about = f"about one answer in {round(len(certain) / other)} differs" if other else "no answer differs"
    told = f"{about} from the trained model's, of {len(certain)} compared" if certain else ""
    remark = evidence.remark if evidence.merged else ""
    judge(gates, name, figures, evidence, rounding, "; ".join(filter(None, [told, remark])))
    check_share(gates, name, evidence, predictions, rounding)
    return allowed_spread(evidence, rounding)


def kl_divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p‖q) of each row (n) in nats, sum p (log p - log q), from natural log probabilities (n, vocabulary)."""
    # Row by row: a whole vocabulary in float64 is large.
    rows = ((a.astype(np.float64), b.astype(np.float64)) for a, b in zip(p, q, strict=True))
    return np.array([(np.exp(a) * (a - b)).sum() for a, b in rows])


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL (n) from log probabilities (n, k) of the same tokens, all others taken as one."""
    rest_p, rest_q = (np.maximum(1 - np.exp(x.astype(np.float64)).sum(-1), REST) for x in (p, q))
    return np.maximum(kl_divergence(p, q) + rest_p * np.log(rest_p / rest_q), 0)


def _agree(reference: Predictions, compared: Predictions) -> np.ndarray:
    """Where (n) the artefact's likeliest token is the reference's, or as likely there within TIE."""
    likeliest = reference.top >= reference.top.max(-1, keepdims=True) - TIE
    return ((reference.top_ids == compared.best[:, None]) & likeliest).any(-1)


def _remedy(name: str) -> str:
    finer = {"q8_0": "f16"}.get(name, "q8_0")
    again = f"; if it fails again, this format is too coarse for this model: --gguf {finer}" if name[0] == "q" else ""
    return f"don't ship it: {RUN_AGAIN if name == 'adapter' else export_again(name)}{again}"


def _short(value: float) -> str:
    return "0" if value < 1e-9 else f"{value:.2g}"  # not a number is shown as such
