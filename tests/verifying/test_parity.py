"""The Kullback-Leibler divergence that parity and rehearsal judge by."""

from __future__ import annotations

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
