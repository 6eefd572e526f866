"""What recipes and pages say of memory is what the forecast says."""

from __future__ import annotations

import re
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kit.readiness.forecast import STEP, Forecast, forecast_on
from kit.recipe.recipe import Recipe
from support.command import PROJECT
from support.documents import READMES, text_of

pytestmark = pytest.mark.slow  # transformers makes the models' shapes
RECIPES = {path.stem: path for path in (PROJECT / "recipes").glob("*.yaml")}
FULL = RECIPES["qwen2-7b-full"].read_text(encoding="utf-8")


@cache
def make() -> dict[str, Any]:
    return runpy.run_path(str(PROJECT / "docs" / "make.py"))


@cache
def model(name: str) -> Any:
    return make()["model_of"](name)


def full(**fields: Any) -> Forecast:
    """Of all weights of Qwen2-7B on one GPU, rows of 512 tokens."""
    recipe = Recipe.load(RECIPES["qwen2-7b-full"], max_seq_length=512, **fields)
    return forecast_on(make()["GPU"], recipe, model=model(recipe.model_name))


@pytest.mark.parametrize("fields, each", [
    ({}, 12), ({"optim": "adamw_torch"}, 18), ({"dtype": "bfloat16"}, 6),
    ({"dtype": "bfloat16", "optim": "adamw_torch"}, 8)])
def test_bytes_of_each_weight_in_full_finetuning(fields: dict[str, Any], each: int) -> None:
    """The 16-bit copy of float32 weights is in the step, which has activations besides."""
    found, weights = full(**fields), model("Qwen/Qwen2-7B").parameters
    kept = sum(found.memory_gb[part] for part in ("weights", "adapter and optimiser"))
    copy = found.memory_gb[STEP] - full(dtype="bfloat16").memory_gb[STEP]
    embedding = 152064 * 3584 / weights  # its moments are not in 8-bit: as many bytes as without
    whole = {12: 18, 6: 8}.get(each, each)
    assert (kept + copy) * 1e9 / weights == pytest.approx(each + embedding * (whole - each), abs=0.01)
    said = FULL.split("# Time:")[0].replace("\n# ", " ")
    assert re.search(rf"\b{each} (bytes|and)", said) or f"({each} and" in said
    assert f"{round(found.peak_memory_gb or 0)} GB" in said


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("qwen3") and name != "qwen3-4b-alpaca"])
def test_a_recipe_fits_the_card_it_names(name: str) -> None:
    """A card's GB are 2^30 bytes, of which the driver takes some: 3% are left for it."""
    [card] = re.findall(r"for a card of (\d+) GB\.", RECIPES[name].read_text(encoding="utf-8"))
    _, _, long = make()["forecasts"]()[name]
    assert long.peak_memory_gb < int(card) * 2**30 / 1e9 * 0.97


def test_every_recipe_is_in_the_table_of_memory_and_every_model_in_the_readmes() -> None:
    def rows(document: str) -> list[str]:
        return [Path(line.split("](")[1].split(")")[0]).stem for line in text_of(document).splitlines()
                if line.startswith("| [")]

    assert {*rows("docs/memory.md"), "quickstart"} == set(RECIPES)
    for readme in READMES:
        shown = rows(readme)
        models = [Recipe.load(RECIPES[name]).model_name for name in shown]
        assert len(models) == len(set(models))
        assert set(models) == {Recipe.load(path).model_name for path in RECIPES.values()}
