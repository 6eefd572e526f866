"""The README is true: its commands are run somewhere, its files exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from support.command import PROJECT, kit

README = (PROJECT / "README.md").read_text(encoding="utf-8")
# Each command of the README, by its beginning, and where it is run.
RUN_BY = {
    "make demo": (".ci/run", "make demo"),
    "make test": (".ci/run", "make test"),
    "kit ask quickstart": ("tests/whole/test_run.py", "test_ask_every_engine"),
    "kit ask try --engine adapter": ("tests/whole/test_run.py", "test_ask_every_engine"),
    "kit run recipes/quickstart.yaml": ("tests/support/fixtures.py", '"run", "recipes/quickstart.yaml"'),
    "kit lint data/messy-faq.csv": ("tests/docs/test_readme.py", "test_the_data_check_of_the_readme"),
    "kit lint --recipe recipes/": ("tests/data/test_lint_command.py", "--recipe"),
    "kit train recipes/quickstart.yaml": ("tests/whole/test_run.py", '"train", "recipes/quickstart.yaml"'),
    "kit doctor recipes/quickstart.yaml": ("tests/readiness/test_doctor.py", "recipes/quickstart.yaml"),
    "kit verify quickstart": ("tests/whole/test_run.py", 'kit("verify"'),
    "torchrun --nproc_per_node 2 -m kit train": ("tests/training/test_processes.py", '"torch.distributed.run"'),
    "kit answer quickstart": ("tests/answering/test_answer_models.py", '"answer"'),
    "kit export quickstart": ("tests/export/test_merging.py", '"export"'),
    "kit push quickstart": ("tests/export/test_hub.py", '"push"'),
    "papermill notebooks/01_finetune.ipynb": ("tests/whole/test_run.py", "test_plain_papermill"),
}


def test_every_command_is_run_by_a_test_or_by_ci() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    commands = [line for line in lines if re.match(r"(make|kit|papermill|python|torchrun) ", line)]
    assert len(commands) >= 6
    for command in commands:
        [(path, words)] = [where for start, where in RUN_BY.items() if command.startswith(start)]
        assert words in (PROJECT / path).read_text(encoding="utf-8"), f"{command} is not run by {path}"


@pytest.mark.slow
def test_the_data_check_of_the_readme(tmp_path: Path) -> None:
    done = kit("lint", "data/messy-faq.csv", "columns={prompt: 问题, completion: 答案}",
               "--html", str(tmp_path / "page.html"), "--fix", str(tmp_path / "fixed.jsonl"))
    assert done.returncode == 1 and "row 7 (line 8): the answer is empty" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "page.html").is_file() and (tmp_path / "fixed.jsonl").is_file()


def test_pages_made_from_the_code_are_current() -> None:
    for name, page in runpy.run_path(str(PROJECT / "docs" / "make.py"))["PAGES"].items():
        assert (PROJECT / "docs" / name).read_text(encoding="utf-8") == page(), f"docs/{name}: run `make docs`"


def test_every_file_it_names_exists() -> None:
    for link in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (PROJECT / link).exists(), link
    tree = README.split("## Where things are")[1].split("```")[1]
    for line in tree.strip().splitlines():
        folder = ""
        for name in re.split(r"\s{2,}", line)[:-1]:
            folder = name.rpartition("/")[0] or folder
            found = list(PROJECT.glob(name.rstrip("/") + ("" if "." in name or "*" in name else "*")))
            assert found or list((PROJECT / folder).glob(name + "*")), name


def test_fields_it_names_exist() -> None:
    from kit.recipe.recipe import Recipe

    for name in re.findall(r"`(\w+): ", README):
        assert name in Recipe.model_fields, name


@pytest.mark.parametrize("page", ["changing.md", "tests.md"])
def test_every_file_these_pages_name_exists(page: str) -> None:
    names = re.findall(r"`((?:kit|tests)/[\w./*]+)`", (PROJECT / "docs" / page).read_text(encoding="utf-8"))
    assert len(names) > 20
    for name in names:
        assert (PROJECT / name).exists(), name
