"""docs/coverage.md: what each row names is there, and so is the test that shows it."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from kit.recipe.recipe import Recipe
from support.command import PROJECT
from support.documents import check_name, text_of

PAGE = "docs/coverage.md"
ROWS = [line.strip("| ").split(" | ") for line in text_of(PAGE).splitlines() if re.match(r"\| (?!there \|)", line)]
COMMAND = re.compile(r"(kit|make|torchrun) |\w+: ")


@cache
def functions(path: str) -> set[str]:
    return {node.name for node in ast.walk(ast.parse((PROJECT / path).read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef)}


def test_each_set_up_of_the_options_has_its_rows() -> None:
    def heads(page: str) -> list[str]:
        return re.findall(r"^## (.+)$", text_of(page), re.MULTILINE)

    assert set(heads(PAGE)) <= set(heads("docs/options.md")) and len(heads(PAGE)) == 5
    for part in text_of(PAGE).split("\n## ")[1:]:
        assert len(re.findall(r"^\| (?!there \|)", part, re.MULTILINE)) >= 12, part.splitlines()[0]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_what_a_row_names_exists(row: list[str]) -> None:
    there, here, shown = row
    assert there and here
    for name in re.findall(r"`([^`]+)`", here):
        if COMMAND.match(name):
            check_name(name)
        else:
            field, equals, _ = name.partition("=")
            assert field in Recipe.model_fields or (not equals and (PROJECT / name).exists()), name
    if shown == "–":
        return
    [test] = re.findall(r"`([^`]+)`", shown)
    path, _, function = test.partition("::")
    assert (PROJECT / path).is_file() and function.startswith("test_") and function in functions(path), test


def test_nearly_every_row_is_shown_by_a_test() -> None:
    assert sum(row[2] == "–" for row in ROWS) <= 3


def test_no_row_is_there_twice() -> None:
    parts = text_of(PAGE).split("\n## ")[1:]
    for part in parts:
        named = re.findall(r"^\| (.+?) \|", part, re.MULTILINE)
        assert len(named) == len(set(named))
