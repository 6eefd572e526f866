"""The figures that verdicts are made of: KL, spread, what training changed, flips, ends, the sign test."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.slow


def test_kl_is_torchs_and_over_the_likeliest_tokens_never_more() -> None:
    import torch

    from kit.verifying.parity import _kl, kl_divergence

    p, q = torch.randn(2, 50, 1000, generator=torch.Generator().manual_seed(0)).mul(3).log_softmax(-1)
    expected = torch.nn.functional.kl_div(q.double(), p.double(), reduction="none", log_target=True).sum(-1).numpy()
    assert kl_divergence(p.numpy(), q.numpy()) == pytest.approx(expected, rel=1e-9)
    top, places = p.topk(64)
    shortened = _kl(top.numpy(), q.gather(-1, places).numpy())
    assert (shortened <= expected + 1e-6).all() and (shortened > 0).all()
    assert kl_divergence(p.numpy(), p.numpy()) == pytest.approx(0)


def predictions(logits: np.ndarray, following: list[int], top_ids: np.ndarray | None = None) -> Any:
    """Predictions of made logits (n, vocabulary)."""
    from kit.verifying.reference import Predictions

    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-log_probs, axis=-1)[:, :64] if top_ids is None else top_ids
    return Predictions(ids, np.take_along_axis(log_probs, ids, -1), log_probs.argmax(-1),
                       log_probs[np.arange(len(logits)), following])


def made(places: int = 40, seed: int = 0) -> tuple[Any, np.ndarray, Any]:
    """A reference of one held-out row that ends, its logits, and a random generator."""
    from kit.verifying.reference import Reference, Row

    dice = np.random.default_rng(seed)
    logits = dice.normal(size=(places, 200)) * 2
    ids = [0, *logits.argmax(-1).tolist()]
    row = Row(0, ids, list(range(places)), held_out=True, own=True, whole=True, ends=True)
    return Reference("float32", [row], [("", True)], [[]], [""], [], [predictions(logits, ids[1:])]), logits, dice


def test_the_spread_is_that_of_the_noise_however_sure_the_model_is() -> None:
    from kit.verifying.noise import spread

    _, logits, dice = made(400)
    off = dice.normal(size=logits.shape) * 0.1
    for sure in (1, 30):  # with 30 the likeliest token has nearly all of the probability
        before = predictions(logits * sure, logits.argmax(-1).tolist())
        after = predictions(logits * sure + off, logits.argmax(-1).tolist(), before.top_ids)
        assert spread([before], [after]) == pytest.approx(0.1, rel=0.1)
    assert spread([before], [before]) == 0


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, -1.0])
def test_what_is_missing_of_the_training(share: float) -> None:
    from kit.verifying.noise import lost

    reference, logits, dice = made(100)
    following, top_ids = logits.argmax(-1).tolist(), reference.predictions[0].top_ids
    change = dice.normal(size=logits.shape)
    base = predictions(logits + change, following, top_ids)
    artefact = predictions(logits + share * change + 0.1 * dice.normal(size=logits.shape), following, top_ids)
    missing, size = lost(reference.predictions, [artefact], [base])
    assert missing == pytest.approx(share, abs=0.02) and size == pytest.approx(1, rel=0.1)


def test_near_ties_are_flips_with_a_small_gap() -> None:
    from kit.verifying.parity import compare

    reference, logits, _ = made(3)
    following, top_ids = logits.argmax(-1).tolist(), reference.predictions[0].top_ids
    changed = logits.copy()
    first, second = top_ids[0, :2]
    changed[0, second] = changed[0, first] + 0.01
    unknown = next(token for token in range(200) if token not in top_ids[2])  # not among the tokens kept
    changed[2, unknown] = 99
    figures = compare(reference, [predictions(changed, following, top_ids)])
    near, far = figures.flips
    assert near == pytest.approx(float(logits[0, first] - logits[0, second]), abs=1e-5)
    assert far > near and figures.answers == {0: False}
    [end] = figures.ends
    assert end.sure and not end.kept and end.loss > 50


@pytest.mark.parametrize("worse, better, fails", [(0, 0, False), (3, 2, False), (8, 0, False), (9, 0, True),
                                                  (20, 12, False), (30, 5, True)])
def test_the_sign_test(worse: int, better: int, fails: bool) -> None:
    from kit.verifying.answers import ALPHA, _chance_of_worse

    count = worse + better + 3
    before = {n: n < worse or n >= worse + better for n in range(count)}
    after = {n: n >= worse for n in range(count)}
    chance = _chance_of_worse(before, after)
    assert 0 < chance <= 1 and (chance < ALPHA) == fails


@pytest.mark.parametrize("answered, passed", [(12, True), (3, None), (0, None)])
def test_a_gguf_that_answered_few_rows_is_not_judged_by_them(answered: int, passed: bool | None) -> None:
    from types import SimpleNamespace

    from kit.runs.gates import Gates
    from kit.verifying.answers import Shipped, check_scores
    from kit.verifying.reference import Reference, Row

    rows = [Row(n, [0, 1], [0], held_out=True, own=True, whole=True, ends=True) for n in range(12)]
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]
    reference = Reference("float32", rows, [("yes", True)] * 12, [talk] * 12, [""] * 12, [], [])
    evidence: Any = SimpleNamespace(reference=reference, recipe=SimpleNamespace(metric="exact", holds_out=True))
    gates = Gates("")
    figures: Any = None
    check_scores(gates, evidence, {"q8_0": Shipped(figures, 0.1, dict.fromkeys(range(answered), "yes"))})
    [gate] = gates.gates
    assert gate.passed is passed and ("too few to judge: 3" in gate.detail) == (answered == 3)


def test_a_file_of_many_types_is_rounded_as_its_matrices_are_on_average() -> None:
    from kit.gguf.formats import FLOAT32, Q4_K, Q8_0, Header, Tensor
    from kit.verifying.noise import ACTIVATIONS, ROUNDING, rounding_of

    def header(*kinds: int) -> Header:
        return Header({}, [Tensor("norm", (8,), FLOAT32, 0), *(Tensor("w", (8, 8), kind, 0) for kind in kinds)], 0, 0)

    eight, four = (np.hypot(ROUNDING[kind], ACTIVATIONS) for kind in (Q8_0, Q4_K))
    assert rounding_of(header(Q8_0)) == pytest.approx(eight)
    assert rounding_of(header(Q8_0, Q4_K)) == pytest.approx(np.sqrt((eight ** 2 + four ** 2) / 2))
    assert rounding_of(header(99)) >= four  # a type that is not known is taken for the coarsest
    assert rounding_of(header()) == 0


@pytest.mark.parametrize("name, finer", [("q4_k_m", "q8_0"), ("q8_0", "f16"), ("f16", ""), ("merged", "")])
def test_a_format_that_fails_again_is_told_with_the_next_finer_one(name: str, finer: str) -> None:
    from kit.verifying.parity import _remedy

    assert f"kit export RUN --{'save-merged 16bit' if name == 'merged' else f'gguf {name}'}" in _remedy(name)
    assert _remedy(name).endswith(f"too coarse for this model: --gguf {finer}") == bool(finer)


def test_long_conversations_are_compared_only_where_there_are_too_few_short_ones(
        monkeypatch: pytest.MonkeyPatch) -> None:
    from kit.answering.replies import Reply
    from kit.recipe.recipe import Recipe
    from kit.verifying import reference

    def chosen(lengths: list[int]) -> list[int]:
        rows = [{"input_ids": [1] * length, "labels": [-100] * (length - 4) + [1] * 4, "prompt": []}
                for length in lengths]
        replies = [Reply("", True, (2, 2)) for _ in lengths]
        monkeypatch.setattr(reference, "prompt_ids", lambda tokenizer, prompt, recipe: [1] * 6)
        tokenizer = type("Tokenizer", (), {"eos_token_id": 3})
        found = reference._rows_compared(tokenizer, rows, replies, Recipe.load({}), reference.COMPARED)
        assert found == sorted(found, key=lambda row: row.number)
        return sorted({row.number for row in found})

    # 16 short ones hold too few tokens, so the first of the long ones follow; in order, until there are enough.
    assert chosen([900, 100] * 16) == [*range(15), *range(15, 32, 2)]
    assert chosen([1000] * 4 + [400] * 28) == list(range(4, 25))
    assert chosen([1000, 900] * 16) == list(range(1, 20, 2))
