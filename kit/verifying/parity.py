"""Parity: how far an artefact's next-token distributions are from those of the model that was trained.

KL is sum p (log p - log q) in nats per token, p the reference, q the artefact, over the reference's 256 likeliest
tokens and all others taken as one: never more than over the whole vocabulary, and on a trained model the same to five
digits. Top-1 is the share of places where both hold the same token the likeliest.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import kit.common.unsloth

import numpy as np
import torch

from kit.common.show import bar
from kit.gguf.child import LlamaChild
from kit.gguf.formats import QUANTIZATIONS
from kit.models.load import reload
from kit.models.precision import in_float32
from kit.models.saved import saved_model
from kit.runs.gates import Gates
from kit.runs.provenance import RUN_AGAIN, export_again
from kit.verifying.reference import Evidence, Predictions, Reference, predict


class Tolerance(NamedTuple):
    """What a format may cost. `top1` is a share; None is not judged."""

    mean_kl: float
    top1: float | None
    why: str


TOLERANCES = {
    "adapter": Tolerance(1e-4, 0.999, "the same weights: only the order of additions may differ"),
    "merged": Tolerance(1e-3, 0.99, "weights rounded once to the base model's 16-bit format"),
    "merged from a quantised base": Tolerance(0.5, None, "trained on rounded weights, merged into the original ones"),
    "merged-4bit": Tolerance(0.3, None, "NF4, about 4.1 bits; reported"),
    **{name: Tolerance(one.mean_kl, one.top1, one.why) for name, one in QUANTIZATIONS.items()},
}
# A reference computed in 16-bit (on a GPU) has noise of its own: mean KL 0.0016 and 97 % top-1 against float32.
NOISE_16BIT = Tolerance(0.01, 0.04, "the reference was computed in 16-bit")
TIE = 0.01  # nats: two tokens this close at the reference are equally likely
DIFFERS = 1e-4  # mean KL; an adapter that changes less than this was not trained
REST = 1e-7  # least probability of all other tokens together: float32 sums are not more exact


class Figures(NamedTuple):
    """Means over `tokens` places: nll in nats, kl, top1 as a share; `answers[i]`: gives the reference's answer i."""

    nll: float
    mean_kl: float
    max_kl: float
    top1: float
    tokens: int
    answers: dict[int, bool]

    def __str__(self) -> str:
        return f"KL {_short(self.mean_kl)} (max {_short(self.max_kl)}), top-1 {self.top1:.1%}, NLL {self.nll:.4f}"


def compare(reference: Reference, predictions: Iterable[Predictions]) -> Figures:
    """Another model's predictions for the rows and tokens of the reference against the reference's own."""
    rows, compared = reference.rows, list(predictions)
    held_out = [number for number, row in enumerate(rows) if row.held_out]
    kls = np.concatenate([_kl(reference.predictions[n].top, compared[n].top) for n in held_out])
    same = np.concatenate([_agree(reference.predictions[n], compared[n]) for n in held_out])
    nll = -np.concatenate([compared[n].next for n in held_out])
    answers = {row.number: bool((predicted.best == [row.ids[place + 1] for place in row.where]).all())
               for row, predicted in zip(rows, compared, strict=True) if row.own}
    return Figures(float(nll.mean()), float(kls.mean()), float(kls.max()), float(same.mean()), len(kls), answers)


def check_adapter(gates: Gates, evidence: Evidence) -> None:
    """The adapter from disk against the one in memory, and, as a control, the base without it."""
    reference = evidence.reference
    model, _ = reload(evidence.trained, evidence.recipe)
    with in_float32(model):
        judge(gates, "adapter", _figures(reference, model), "adapter", reference.precision)
        with model.disable_adapter():
            base = _figures(reference, model)
    changed = base.mean_kl > DIFFERS
    gates.check("control: the base differs", changed, str(base), f"mean KL > {DIFFERS:g}", "" if changed else
                "the adapter changes nothing: the base model predicts the same", "train longer, or with a higher "
                "learning_rate; a loss that does not fall says the same")


def check_merged(gates: Gates, evidence: Evidence, folder: Path, kind: str) -> None:
    """The merged model or its 4-bit copy; `kind` is a key of TOLERANCES.

    An adapter trained on a quantised base and merged into the 16-bit one gives another model than was trained. Then
    what is made of the merged model is compared with that: its predictions become the reference.
    """
    reference = evidence.reference
    model = saved_model(folder, evidence.recipe.trust_remote_code, dtype="auto",
                        device_map="cuda" if torch.cuda.is_available() else "cpu")
    with in_float32(model) as precision:
        remark = "" if folder == evidence.merged else evidence.remark
        judge(gates, folder.name, _figures(reference, model), kind, reference.precision, remark)
        if evidence.recipe.quantised and folder == evidence.merged:
            evidence.reference = reference._replace(precision=precision, predictions=predict(model, reference.rows))


def _figures(reference: Reference, model: Any) -> Figures:
    """Of a model in memory; inside `in_float32`."""
    return compare(reference, predict(model, reference.rows, reference.predictions))


def gguf_predictions(child: LlamaChild, reference: Reference) -> Iterator[Predictions]:
    """What a GGUF predicts for the reference's rows and tokens, in a child process opened with logits=True."""
    with bar(len(reference.rows), f"reading rows with {child.gguf.name}", "row", leave=False, delay=2) as progress:
        for row, ours in zip(reference.rows, reference.predictions, strict=True):
            yield Predictions(ours.top_ids, *child.predictions(row.ids, row.where, ours.top_ids))
            progress.update()


def judge(gates: Gates, name: str, figures: Figures, kind: str, precision: str, remark: str = "") -> bool:
    """Add the gate `parity <name>`; `kind` is a key of TOLERANCES. Returns whether it passed."""
    kl, top1, why = TOLERANCES[kind]
    if precision != "float32":
        kl, top1, why = kl + NOISE_16BIT.mean_kl, top1 and top1 - (NOISE_16BIT.top1 or 0), f"{why}; {NOISE_16BIT.why}"
    passed = figures.mean_kl <= kl and (top1 is None or figures.top1 >= top1)
    allowed = f"mean KL ≤ {kl:g}" + ("" if top1 is None else f", top-1 ≥ {top1:.4g}" if top1 < 1 else ", top-1 100 %")
    cause = (f"{name} does not predict what the trained model predicts: mean KL {_short(figures.mean_kl)} over "
             f"{figures.tokens} answer tokens, likeliest token equal in {figures.top1:.1%}")
    return gates.check(f"parity {name}", passed, str(figures), allowed, (remark or why) if passed else cause,
                       "" if passed else f"don't ship it: {RUN_AGAIN if name == 'adapter' else export_again(name)}")


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


def _short(value: float) -> str:
    return "0" if value < 1e-9 else f"{value:.2g}"  # not a number is shown as such
