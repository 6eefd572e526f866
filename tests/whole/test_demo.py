"""The figures `make demo` must reach. CI runs it first; elsewhere these are skipped until runs/quickstart exists."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kit.recipe.recipe import Recipe
from kit.runs.run import read_result
from support.command import PROJECT

pytestmark = pytest.mark.slow
DEMO = PROJECT / "runs" / "quickstart"


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    result = read_result(DEMO)
    if result.get("status") != "finished":
        pytest.skip("make demo has not been run here")
    if Recipe.load(DEMO / "recipe.yaml") != Recipe.load(PROJECT / "recipes" / "quickstart.yaml"):
        pytest.skip("runs/quickstart was made with other settings")
    return result


def test_the_skill_was_learnt(result: dict[str, Any]) -> None:
    scores = result["scores"]
    assert scores["before"]["exact"] < 0.10
    assert scores["after"]["exact"] >= 0.80
    assert abs(scores["q8_0"]["exact"] - scores["after"]["exact"]) <= 0.02
    assert result["stopped_after"] >= 0.98


def test_memory(result: dict[str, Any]) -> None:
    assert result["peak_memory_gb"] < 6


def test_the_verdict_and_its_time(result: dict[str, Any]) -> None:
    verdict = json.loads((DEMO / "verify.json").read_text(encoding="utf-8"))
    assert verdict["passed"], verdict["verdict"]
    # 36 and 7 s on two free cores; a shared machine may take twice the 60 s that are promised there.
    assert verdict["seconds"] < 120 and result["seconds"]["rehearsal"] < 60
