"""The documents are true: each command is run somewhere, what they name exists, both READMEs say the same.

tests/docs/test_readme_commands.py runs the README's commands.
"""

from __future__ import annotations

import re
import runpy
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from support.command import PROJECT, kit
from support.documents import (
    DOCUMENTS,
    READMES,
    anchors,
    check_command,
    commands,
    links,
    pictures,
    scripts,
    text_of,
)

# Each command of the documents, by its beginning, and where it is run.
RUN_BY = {
    "make demo": (".ci/run", "make demo"),
    "make test": (".ci/run", "make test"),
    "make check": ("Makefile", "test: setup engines check"),
    "make setup": ("Makefile", "demo: setup"),
    "make lab": ("tests/docs/test_readme_commands.py", "exec /usr/bin/make"),
    "source .venv/bin/activate": ("tests/docs/test_readme_commands.py", "activate"),
    "cd runs/": ("tests/docs/test_readme_commands.py", "scripts("),
    "ollama ": ("tests/docs/test_readme_commands.py", "OLLAMA"),
    "export KIT_CACHE": ("tests/support/command.py", "**environment"),
    "kit ask quickstart": ("tests/whole/test_run.py", "test_ask_every_engine"),
    "kit run recipes/quickstart.yaml": ("tests/support/fixtures.py", '"run", "recipes/quickstart.yaml"'),
    "kit run recipes/qwen3-4b-alpaca.yaml": ("tests/whole/test_recipes.py", '"qwen3-4b-alpaca"'),
    "kit lint my-rows.csv": ("tests/docs/test_readme_commands.py", "my-rows.csv"),
    "kit lint data/messy-faq.csv": ("tests/docs/test_readme.py", "test_the_data_check_of_the_page"),
    "kit lint --recipe recipes/": ("tests/data/test_lint_command.py", "--recipe"),
    "kit list": ("tests/whole/test_cli.py", 'kit("list"'),
    "kit train recipes/quickstart.yaml": ("tests/whole/test_run.py", '"train", "recipes/quickstart.yaml"'),
    "kit doctor recipes/quickstart.yaml": (".ci/run", "kit doctor recipes/quickstart.yaml"),
    "kit verify quickstart": ("tests/whole/test_run.py", 'kit("verify"'),
    "torchrun --nproc_per_node 2 -m kit train": ("tests/training/test_processes.py", '"torch.distributed.run"'),
    "torchrun --nnodes 2": ("tests/training/test_processes.py", '"torch.distributed.run"'),
    "kit answer quickstart": ("tests/answering/test_answer_models.py", '"answer"'),
    "kit answer output/checkpoint-100": ("tests/answering/test_choosing.py", '"answer", str(foreign'),
    "kit answer runs/x/checkpoints": ("tests/answering/test_choosing.py", '"--against"'),
    "kit export quickstart": ("tests/export/test_merging.py", '"export"'),
    "kit export runs/quickstart/adapter": ("tests/export/test_merging.py", '"export"'),
    "kit download Qwen/Qwen2.5-0.5B --to": ("tests/models/test_download.py", "test_into_a_folder_and_only_a_part"),
    "kit download m-a-p/COIG-CQIA": ("tests/models/test_download.py", "test_into_a_folder_and_only_a_part"),
    "kit download Qwen/Qwen2.5-0.5B --hub": ("tests/models/test_modelscope.py", 'hub="modelscope"'),
    "kit push quickstart": ("tests/export/test_hub.py", '"push"'),
    "papermill notebooks/01_finetune.ipynb": ("tests/whole/test_run.py", "test_plain_papermill"),
}
# What a page calls a path, in code: of the project's folders, not those that a run makes.
PATH = re.compile(r"`((?:kit|tests|docs|recipes|notebooks|data|benchmarks|\.ci)/[\w./*-]*|"
                  r"(?:requirements|constraints)[\w-]*\.txt)`")
YOURS = re.compile(r"data/my-")


@pytest.mark.parametrize("page", DOCUMENTS)
def test_every_command_exists_and_is_run_by_a_test_or_by_ci(page: str) -> None:
    for words in commands(page):
        check_command(words)
        command = " ".join(words)
        [(path, said)] = {where for start, where in RUN_BY.items() if command.startswith(start)}
        assert said in (PROJECT / path).read_text(encoding="utf-8"), f"{command} is not run by {path}"


@pytest.mark.parametrize("page", [page for page in DOCUMENTS if "options" not in page])  # they name other tools'
def test_every_command_in_a_sentence_exists(page: str) -> None:
    for name in re.findall(r"`((?:make|kit|python|torchrun) [^`]+)`", text_of(page)):
        check_command(shlex.split(name.partition(" …")[0]))


@pytest.mark.parametrize("page", DOCUMENTS)
def test_every_link_resolves(page: str) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (PROJECT / page).parent / name if name else PROJECT / page
        assert "//" not in link and target.is_file(), link
        if anchor:
            assert anchor in anchors(str(target.resolve().relative_to(PROJECT))), link


@pytest.mark.parametrize("page", DOCUMENTS)
def test_every_path_it_names_exists(page: str) -> None:
    for name in PATH.findall(text_of(page)):
        stem = name.rstrip("/")
        assert YOURS.match(name) or list(PROJECT.glob(stem if "." in stem or stem != name else stem + ".*")), name


@pytest.mark.parametrize("page", DOCUMENTS)
def test_fields_it_names_exist(page: str) -> None:
    from kit.recipe.recipe import Recipe

    for name in re.findall(r"`(\w+): [^`]*`", text_of(page)):
        assert name in Recipe.model_fields, name


def test_both_readmes_have_the_same_commands_pictures_and_links() -> None:
    english, chinese = READMES
    assert commands(english) == commands(chinese) and len(commands(english)) >= 8
    assert pictures(english) == pictures(chinese) and pictures(english)
    there = [link.replace(".zh.md", ".md") for link in links(chinese)]  # a page may be there in Chinese, too
    assert links(english)[1:] == there[1:], "the first one leads to the other language"
    assert (links(english)[0], links(chinese)[0]) == (chinese, english)


@pytest.mark.parametrize("readme", READMES)
def test_a_newcomer_finds_things_in_this_order(readme: str) -> None:
    text = text_of(readme)
    order = [text.index(mark) for mark in ("## ", "![", "make demo", "kit lint my-rows.csv", "ollama create",
                                           "ollama run mine", "made by make docs", "docs/README.md")]
    assert order == sorted(order)


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").split()) <= 700


def test_every_page_is_in_the_list_of_pages() -> None:
    assert {f"docs/{link}" for link in links("docs/README.md") if "/" not in link} | {"docs/README.md", *READMES} == \
        set(DOCUMENTS)


@cache
def pages() -> dict[str, Any]:
    return runpy.run_path(str(PROJECT / "docs" / "make.py"))["PAGES"]


@pytest.mark.parametrize("page", [
    "docs/options.md", "docs/options.zh.md", "docs/recipe.md", "docs/findings.md", "docs/gates-measured.md",
    *(pytest.param(page, marks=pytest.mark.slow) for page in ("docs/memory.md", *READMES))])  # transformers
def test_pages_made_from_the_code_are_current(page: str) -> None:
    assert text_of(page) == pages()[page](), f"{page}: run `make docs`"


def test_no_page_made_from_the_code_is_forgotten_here() -> None:
    assert set(pages()) == {"docs/options.md", "docs/options.zh.md", "docs/recipe.md", "docs/findings.md",
                            "docs/gates-measured.md", "docs/memory.md", *READMES}


@pytest.mark.slow
def test_the_data_check_of_the_page(tmp_path: Path) -> None:
    done = kit("lint", "data/messy-faq.csv", "columns={prompt: 问题, completion: 答案}",
               "--html", str(tmp_path / "page.html"), "--fix", str(tmp_path / "fixed.jsonl"))
    assert done.returncode == 1 and "row 7 (line 8)" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "page.html").is_file() and (tmp_path / "fixed.jsonl").is_file()


@pytest.mark.parametrize("page", ["docs/changing.md", "docs/tests.md"])
def test_these_pages_lead_to_many_files(page: str) -> None:
    assert len(PATH.findall(text_of(page))) > 20


def test_scripts_are_marked_as_such() -> None:
    assert sum(len(scripts(page)) for page in DOCUMENTS) > 15
