"""A notebook in a real kernel, its cells run in the order people run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jupytext
import pytest
from jupyter_client.manager import start_new_kernel

from support.command import PROJECT

pytestmark = pytest.mark.slow


@pytest.fixture
def run_cell() -> Iterator[Callable[..., str]]:
    """`run_cell(source, "a")` runs it as JupyterLab runs the cell "a": what it printed, or its error as shown.

    With `stream`, what went to that one alone.
    """
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(PROJECT))
    said: list[str] = []
    wanted: list[str | None] = [None]

    def shown(message: Any) -> None:
        content = message["content"]
        if wanted[0] in (None, content.get("name")):
            said.append(content.get("text") or "\n".join(content.get("traceback", [])))

    def run(source: str, cell: str | None = None, stream: str | None = None) -> str:
        wanted[0] = stream
        said.clear()
        # JupyterLab sends the cell's id with what it runs.
        send = client.session.send

        def with_id(stream: Any, message: Any, *rest: Any, **options: Any) -> Any:
            if isinstance(message, dict) and cell:
                message["metadata"]["cellId"] = cell
            return send(stream, message, *rest, **options)

        client.session.send = with_id  # type: ignore[method-assign]
        try:
            client.execute_interactive(source, timeout=120, output_hook=shown)
        finally:
            client.session.send = send  # type: ignore[method-assign]
        return "".join(said).strip()

    yield run
    client.stop_channels()
    manager.shutdown_kernel(now=True)


GIVEN = "from kit import Recipe\nprint(Recipe.given(globals()))"


def test_a_deleted_line_and_a_corrected_slip_are_forgotten(run_cell: Callable[..., str]) -> None:
    run_cell("import kit", "imports")
    run_cell("learning_rate = 1e-3\nmax_steps = 5", "parameters")
    assert run_cell(GIVEN) == "{'learning_rate': 0.001, 'max_steps': 5}"
    run_cell("max_steps = 5", "parameters")
    assert run_cell(GIVEN) == "{'max_steps': 5}"
    run_cell("learning_rate = 2e-3", "another")
    assert run_cell(GIVEN) == "{'learning_rate': 0.002, 'max_steps': 5}", "it stands in another cell"
    run_cell("learning_rat = 2e-3", "another")
    assert "did you mean 'learning_rate'" in run_cell(GIVEN)
    run_cell("learning_rate = 3e-3", "another")
    assert run_cell(GIVEN) == "{'learning_rate': 0.003, 'max_steps': 5}"


def test_without_ids_all_variables_count(run_cell: Callable[..., str]) -> None:
    """As under papermill, where every kernel is new."""
    run_cell("import kit")
    run_cell("learning_rate = 1e-3")
    run_cell("max_steps = 5")
    assert run_cell(GIVEN) == "{'learning_rate': 0.001, 'max_steps': 5}"


def test_a_users_mistake_is_told_in_two_lines(run_cell: Callable[..., str]) -> None:
    said = run_cell("import kit\nkit.Recipe.load('nowhere.yaml')")
    lines = said.splitlines()
    assert len(lines) == 2 and lines[0].startswith("KitError: there is no recipe nowhere.yaml"), said
    assert lines[1].startswith("  → recipes here: ")
    assert "ZeroDivisionError" in run_cell("1 / 0") and "Traceback" in run_cell("1 / 0"), "others keep theirs"


def test_the_first_cell_stops_in_two_lines_where_it_may_not_install(run_cell: Callable[..., str]) -> None:
    first = next(cell.source for cell in jupytext.read(PROJECT / "notebooks" / "01_finetune.py").cells
                 if "install_packages" in cell.source)
    run_cell("import importlib.util\nfrom kit.common import packages\nreal = importlib.util.find_spec\n"
             "importlib.util.find_spec = lambda name, *rest: None if name == 'unsloth' else real(name, *rest)\n"
             "packages.environment, packages.has_gpu = (lambda: 'local'), (lambda: False)")
    lines = run_cell(first).splitlines()
    assert len(lines) == 2 and lines[0].startswith("KitError: unsloth: not installed") and "make lab" in lines[1], lines


PROGRESS = """
import importlib.util
import time
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "ipywidgets" else real(name, *rest)
import kit
from kit.common import progress, show
import tqdm.auto
progress.LINE_SECONDS = 0.1
for bar in (show.bar(100, "ours", "row"), tqdm.auto.tqdm(total=100, desc="theirs", disable=None)):
    with bar:
        for _ in range(100):
            time.sleep(0.005)
            bar.update()
"""


def test_progress_is_plain_lines_and_none_of_it_pink(run_cell: Callable[..., str]) -> None:
    """Without ipywidgets, and under papermill: what comes on standard error would be pink."""
    assert run_cell(PROGRESS, stream="stderr") == ""
    lines = run_cell(PROGRESS, "a", stream="stdout").splitlines()
    assert {line.partition(":")[0] for line in lines} == {"ours", "theirs"}
    assert 2 <= len(lines) <= 14, lines
    assert lines[-1].startswith("theirs: 100%") and not any("\r" in line for line in lines)


def test_a_front_end_with_widgets_gets_widgets(run_cell: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "ipywidgets.py").write_text("")
    run_cell(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport kit\nfrom kit.common import progress")
    assert run_cell("print(progress.shows_widgets())", "a") == "True"
    assert run_cell("print(progress.shows_widgets())") == "False", "papermill sends no cell's id"
