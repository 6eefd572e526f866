"""Parity: how far an artefact's next-token distributions are from those of the model that was trained.

KL is sum p (log p - log q) in nats per token, p the reference, q the artefact, over the reference's 256 likeliest
tokens and all others taken as one: never more than over the whole vocabulary, and on a trained model the same to five
digits. Top-1 is the share of places where both hold the same token the likeliest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import kit.common.unsloth

import numpy as np

from kit.common.show import bar
from kit.gguf.child import LlamaChild
from kit.gguf.formats import QUANTIZATIONS
from kit.runs.gates import Gates
from kit.verifying.reference import Engine, Reference, Said


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


def compare(reference: Reference, engine: Engine) -> Figures:
    """`engine` against the reference, over every row of it."""
    rows = reference.rows
    found = list(engine([row.ids for row in rows], [row.where for row in rows], reference.top_ids))
    held_out = [number for number, row in enumerate(rows) if row.held_out]
    kls = np.concatenate([_kl(reference.said[n].top, found[n].top) for n in held_out])
    same = np.concatenate([_agree(reference.top_ids[n], reference.said[n], found[n]) for n in held_out])
    nll = -np.concatenate([found[n].next for n in held_out])
    answers = {row.number: bool((said.best == [row.ids[place + 1] for place in row.where]).all())
               for row, said in zip(rows, found, strict=True) if row.own}
    return Figures(float(nll.mean()), float(kls.mean()), float(kls.max()), float(same.mean()), len(kls), answers)


def itself(reference: Reference) -> Figures:
    """The reference's own figures."""
    def again(*_: object) -> Iterator[Said]:
        yield from reference.said

    return compare(reference, again)


def gguf_engine(child: LlamaChild) -> Engine:
    """A GGUF in its child process (opened with logits=True) as an engine."""
    def said(ids: list[list[int]], where: list[list[int]], top_ids: list[np.ndarray]) -> Iterator[Said]:
        with bar(len(ids), f"reading rows with {child.gguf.name}", "row", leave=False, delay=2) as progress:
            for row, places, top in zip(ids, where, top_ids, strict=True):
                yield Said(*child.said(row, places, top))
                progress.update()

    return said


def judge(gates: Gates, name: str, figures: Figures, kind: str, precision: str, remark: str = "") -> bool:
    """Add the gate `parity <name>`; `kind` is a key of TOLERANCES. Returns whether it passed."""
    allowed = TOLERANCES[kind]
    kl, top1 = allowed.mean_kl, allowed.top1
    why = allowed.why
    if precision != "float32":
        kl, top1, why = kl + NOISE_16BIT.mean_kl, top1 and top1 - (NOISE_16BIT.top1 or 0), f"{why}; {NOISE_16BIT.why}"
    good = figures.mean_kl <= kl and (top1 is None or figures.top1 >= top1)
    said = f"mean KL ≤ {kl:g}" + ("" if top1 is None else f", top-1 ≥ {top1:.4g}" if top1 < 1 else ", top-1 100 %")
    detail = remark or why
    if not good:
        detail = (f"{name} does not predict what the trained model predicts: mean KL {_short(figures.mean_kl)} over "
                  f"{figures.tokens} answer tokens, likeliest token equal in {figures.top1:.1%}")
    return gates.check(f"parity {name}", good, str(figures), said, detail,
                       "" if good else "don't ship it: export again, and read the gates above for the cause")


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL (n) from log probabilities (n, k) of the same tokens, all others taken as one."""
    p, q = p.astype(np.float64), q.astype(np.float64)
    rest_p, rest_q = (np.maximum(1 - np.exp(x).sum(-1), REST) for x in (p, q))
    kl: np.ndarray = (np.exp(p) * (p - q)).sum(-1) + rest_p * np.log(rest_p / rest_q)
    return np.maximum(kl, 0)


def _agree(top_ids: np.ndarray, reference: Said, found: Said) -> np.ndarray:
    """Where (n) the artefact's likeliest token is the reference's, or as likely there within TIE."""
    ties = (top_ids == found.best[:, None]) & (reference.top >= reference.top.max(-1, keepdims=True) - TIE)
    agree: np.ndarray = ties.any(-1)
    return agree


def _short(value: float) -> str:
    return "0" if value < 1e-9 else f"{value:.2g}"  # not a number stays told as such
