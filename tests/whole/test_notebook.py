"""The notebook as people open it: paired, without outputs, short cells, nothing dead."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

from kit.common.files import PROJECT
from kit.recipe.recipe import Recipe
from support.command import kit

SOURCES = sorted((PROJECT / "notebooks").glob("*.py"))
EACH = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def code_cells(source: Path) -> list[str]:
    return [cell.source for cell in jupytext.read(source).cells if cell.cell_type == "code"]


@EACH
def test_py_and_ipynb_have_the_same_cells(source: Path) -> None:
    def cells(path: Path) -> list[tuple[str, str, list[str]]]:
        return [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in jupytext.read(path).cells]

    assert cells(source) == cells(source.with_suffix(".ipynb")), "run `make pair`"


@EACH
def test_ipynb_is_published_without_outputs_and_with_a_kernel(source: Path) -> None:
    notebook = json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@EACH
def test_cells_are_short_and_none_is_dead(source: Path) -> None:
    for cell in code_cells(source):
        most = 40 if "KIT_SOURCE" in cell else 12  # what a person reads; the cell that fetches the kit is folded
        assert len([line for line in cell.splitlines() if line.strip()]) <= most, cell
        for node in ast.walk(ast.parse(cell)):
            assert not (isinstance(node, ast.If) and isinstance(node.test, ast.Constant)), cell
    assert not re.search(r"^\s*[%!]", "\n".join(code_cells(source)), re.MULTILINE), "magics don't run as a script"


@EACH
def test_one_parameters_cell_and_no_variable_that_looks_like_a_field(source: Path) -> None:
    tagged = [c for c in jupytext.read(source).cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    others = [cell for cell in code_cells(source) if cell != tagged[0].source]
    names = {node.id for cell in others for node in ast.walk(ast.parse(cell))
             if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    # A variable named like a field would be read as a parameter when "Run all" is pressed again.
    assert not names & set(Recipe.model_fields)
    Recipe.given(dict.fromkeys(names, 1))


@pytest.mark.slow
def test_the_data_notebook_runs_with_its_own_file_and_with_another(tmp_path: Path) -> None:
    """With papermill, as people run it in batches; then with a file that has other columns, and more bad rows of one
    kind than a finding names."""
    own = tmp_path / "faq.xlsx"
    import pandas

    answers = ["Yes."] * 12 + ["Yes. <|im_end|>"] * 120 + [" "] * 150
    pandas.DataFrame({"question": [f"Question {i}?" for i in range(len(answers))], "answer": answers}).to_excel(
        own, index=False)
    other = ["-p", "dataset", str(own), "-y", "columns: {}"]
    for name, parameters in (("bundled", []), ("other", other)):
        out = tmp_path / f"{name}.ipynb"
        done = subprocess.run(
            [sys.executable, "-m", "papermill", "notebooks/02_your_data.ipynb", str(out), "-p", "output_dir",
             str(tmp_path / name), *parameters], cwd=PROJECT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert {"data.html", "fixed.jsonl", "final.jsonl", "lengths.png", "recipe.yaml"} <= {
            path.name for path in (tmp_path / name / "your_data").iterdir()}
        text = out.read_text(encoding="utf-8")
        assert "rows can be trained" in text and "image/png" in text and "Traceback" not in text
    final = (tmp_path / "other" / "your_data" / "final.jsonl").read_text(encoding="utf-8")
    assert len(final.splitlines()) == 12 and "<|im_end|>" not in final
    # What it wrote is a recipe, and its data is clean.
    checked = kit("lint", "--recipe", str(tmp_path / "bundled" / "your_data" / "recipe.yaml"), "--rows", "0")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_stage_of_the_promise_is_there() -> None:
    text = "\n".join(code_cells(PROJECT / "notebooks" / "01_finetune.py"))
    order = ["Recipe.load", "kit.machine", "kit.lint", "kit.rehearse", "load_model", "add_lora", "load_data",
             "kit.Tokens", "plots.lengths", "kit.forecast", "kit.answer", "make_trainer", "kit.check_trainer",
             "kit.train(", "plots.loss", "kit.stream", "after=after", "save_adapter", "kit.record", "kit.merge",
             "export_gguf", "write_modelfile", "kit.seal", "kit.verify", "verdict.require", "run.finish",
             "kit.write_report"]
    places = [text.index(name) for name in order]
    assert places == sorted(places)
