"""What there is in Chinese says the same as in English: recipes field by field, troubleshooting section by section."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from kit.recipe.recipe import Recipe
from support.command import PROJECT
from support.documents import commands, kit_words, links, text_of

RECIPES = {path.stem: path for path in sorted((PROJECT / "recipes").glob("*.yaml"))}
CHINESE = re.compile("[一-鿿]")
FIELD = re.compile(r"^(\w+: .*?)(?: +# (.*))?$|^# (\w+: \S.*?) +# (.*)$")  # set, or to be set in place of its comment


def twin(name: str) -> Path:
    return PROJECT / "recipes" / "zh" / f"{name}.yaml"


def fields(path: Path) -> list[tuple[str, str]]:
    """(field: value, comment) of each line that has one, in their order; also of those that are commented out."""
    found = [FIELD.match(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(match[1] or f"# {match[3]}", match[2] or match[4] or "") for match in found if match]


def shell(path: Path) -> list[str]:
    """The lines of the commands in its header."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#   ")]


def test_every_recipe_has_a_twin() -> None:
    assert [path.stem for path in sorted((PROJECT / "recipes" / "zh").iterdir())] == list(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_twin_has_the_same_fields_and_values(name: str) -> None:
    english, chinese = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in (RECIPES[name], twin(name)))
    assert list(english.items()) == list(chinese.items())
    assert Recipe.load(RECIPES[name]) == Recipe.load(twin(name))  # with the run's name
    assert [field for field, _ in fields(RECIPES[name])] == [field for field, _ in fields(twin(name))]


@pytest.mark.parametrize("name", RECIPES)
def test_its_comments_are_there_in_chinese(name: str) -> None:
    for line in twin(name).read_text(encoding="utf-8").splitlines():
        _, sign, comment = line.partition("# ")
        assert not sign or CHINESE.search(comment) or line.startswith("#   ") or not comment.strip(), line
    for (field, english), (_, chinese) in zip(fields(RECIPES[name]), fields(twin(name)), strict=True):
        assert bool(english) == bool(chinese), field
        assert set(re.findall(r"\d[\d.e-]*\b", english)) <= set(re.findall(r"\d[\d.e-]*\b", chinese)), (field, chinese)


@pytest.mark.parametrize("name", RECIPES)
def test_its_commands_are_those_with_the_twin(name: str) -> None:
    def with_twin(line: str) -> str:
        return re.sub(rf"recipes/{re.escape(name)}\.yaml", f"recipes/zh/{name}.yaml", line)

    assert [with_twin(line) for line in shell(RECIPES[name])] == shell(twin(name)) and shell(twin(name))
    assert kit_words(shell(twin(name))[0].removeprefix("#   ").split()) == ["run", f"recipes/zh/{name}.yaml"]


# options.md and its twin are made from one table.
PAGES = {f"docs/{path.name}": f"docs/{path.stem}.zh.md" for path in (PROJECT / "docs").glob("*.md")
         if path.with_suffix(".zh.md").is_file() and path.stem != "options"}


def sections(page: str) -> list[str]:
    return re.split(r"^## ", text_of(page), flags=re.MULTILINE)


def code(line: str) -> list[str]:
    return re.findall(r"`([^`]+)`", line)


def test_the_pages_that_have_a_twin() -> None:
    assert "docs/troubleshooting.md" in PAGES
    for english, chinese in PAGES.items():
        assert links(english)[0] == Path(chinese).name and links(chinese)[0] == Path(english).name


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_the_same_sections_rows_commands_and_links(page: str) -> None:
    english, chinese = sections(page), sections(PAGES[page])
    assert len(english) == len(chinese) and len(english) > 3
    for ours, theirs in zip(english, chinese, strict=True):
        assert CHINESE.search(theirs.splitlines()[0])
        kinds = [[line for line in part.splitlines() if re.match(r"\||\d+\. ", line)] for part in (ours, theirs)]
        assert len(kinds[0]) == len(kinds[1]), theirs.splitlines()[0]
        for row, twin_row in zip(*kinds, strict=True):
            assert sorted(code(row)) == sorted(code(twin_row)), twin_row
            assert CHINESE.search(twin_row) or not re.search("[a-z]", re.sub(r"`[^`]*`", "", twin_row)), twin_row
        assert sorted(code(ours)) == sorted(code(theirs)), theirs.splitlines()[0]
    def plain(page: str) -> list[str]:
        return [link.replace(".zh.md", ".md").replace("recipes/zh/", "recipes/") for link in links(page)[1:]]

    assert plain(page) == plain(PAGES[page]) and commands(page) == commands(PAGES[page])
