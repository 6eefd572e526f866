"""`make lab`: what JupyterLab saves of the project's notebooks is what git holds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jupytext
import nbformat
import pytest

from kit import lab
from support.command import PROJECT

SOURCES = sorted((PROJECT / "notebooks").glob("*.py"))
EACH = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
MANAGER = SimpleNamespace(root_dir=str(PROJECT))


def opened(source: Path) -> Any:
    """As JupyterLab has it once its kernel has said what it is."""
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    notebook.metadata.kernelspec.display_name = "Python 3 (ipykernel)"
    notebook.metadata.language_info = {"name": "python", "version": "3.11.9", "file_extension": ".py"}
    return notebook


def executed(source: Path) -> Any:
    """With outputs, counts, folded cells, and the empty cell that Shift+Enter adds."""
    notebook = opened(source)
    for number, cell in enumerate(notebook.cells):
        cell.metadata["scrolled"] = True
        if cell.cell_type == "code":
            cell.execution_count = number
            cell.outputs = [nbformat.v4.new_output("stream", text=f"shown by {number}, 中文\n")]
    notebook.cells.append(nbformat.v4.new_code_cell(""))
    return notebook


@EACH
@pytest.mark.parametrize("make", [opened, executed], ids=["opened", "executed"])
def test_saving_leaves_the_pair_as_it_is(source: Path, make: Any, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "SHOWN", tmp_path / "shown")
    model = {"type": "notebook", "content": make(source)}
    shown = copy.deepcopy(model["content"])
    lab.before_saving(model=model, path=f"notebooks/{source.stem}.ipynb", contents_manager=MANAGER)
    saved = nbformat.from_dict(model["content"])
    assert nbformat.writes(saved) + "\n" == source.with_suffix(".ipynb").read_text(encoding="utf-8")
    files = list((tmp_path / "shown").glob("*"))
    assert len(files) == (make is executed), "what was not run does not replace what was"
    for kept in files:
        assert kept.name.startswith(f"{source.stem}.20") and kept.suffix == ".ipynb"
        outputs = [cell.get("outputs") for cell in json.loads(kept.read_text(encoding="utf-8"))["cells"]]
        assert outputs == [cell.get("outputs") for cell in shown.cells]


def test_what_was_shown_outlives_a_second_run_that_shows_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "SHOWN", tmp_path / "shown")
    whole = executed(SOURCES[0])
    early = copy.deepcopy(whole)
    for cell in early.cells[4:]:
        cell.pop("outputs", None)
    for notebook in (whole, early, early):
        model = {"type": "notebook", "content": copy.deepcopy(notebook)}
        lab.before_saving(model=model, path=f"notebooks/{SOURCES[0].stem}.ipynb", contents_manager=MANAGER)
    shown = [sum(bool(cell.get("outputs")) for cell in json.loads(file.read_text(encoding="utf-8"))["cells"])
             for file in sorted((tmp_path / "shown").iterdir())]
    assert len(shown) == 2 and max(shown) == sum(bool(cell.get("outputs")) for cell in whole.cells)


@EACH
def test_jupytext_writes_the_py_that_is_there(source: Path) -> None:
    """Its header too: no line with a version, no other name of the kernel."""
    assert jupytext.writes(opened(source), "py:percent") == source.read_text(encoding="utf-8")


def test_other_notebooks_are_left_alone(tmp_path: Path) -> None:
    notebook = executed(SOURCES[0])
    for path, manager in (("mine.ipynb", MANAGER), ("notebooks/mine.ipynb", MANAGER),
                          (f"notebooks/{SOURCES[0].stem}.ipynb", SimpleNamespace(root_dir=str(tmp_path)))):
        model = {"type": "notebook", "content": copy.deepcopy(notebook)}
        lab.before_saving(model=model, path=path, contents_manager=manager)
        assert model["content"] == notebook, path
    text = {"type": "file", "format": "text", "content": "x"}
    lab.before_saving(model=text, path=f"notebooks/{SOURCES[0].stem}.py", contents_manager=MANAGER)
    assert text["content"] == "x"
