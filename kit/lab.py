"""`make lab`: what JupyterLab writes of the project's notebooks stays what git holds, and what they showed is kept."""

import copy
import time
from pathlib import Path
from typing import Any

from kit.common.files import PROJECT, read_json, write_json

NOTEBOOKS = PROJECT / "notebooks"
SHOWN = PROJECT / "runs" / "notebooks"  # outputs: git ignores runs/
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
KEPT = ("tags", "cellView")  # of a cell's metadata, as jupytext is told in the notebook's own


def before_saving(model: dict[str, Any], path: str, contents_manager: Any, **_: Any) -> None:
    """Jupyter's pre_save_hook. A notebook with a .py beside it is saved without what a machine adds.

    With its outputs it is written to runs/notebooks/, a file a day; one that showed more is kept beside it.
    """
    file = Path(contents_manager.root_dir).expanduser().resolve() / path.strip("/")
    if model["type"] != "notebook" or not file.is_relative_to(NOTEBOOKS) or not file.with_suffix(".py").is_file():
        return
    notebook = model["content"]
    if _showing(notebook):
        SHOWN.mkdir(parents=True, exist_ok=True)
        kept = SHOWN / f"{file.stem}.{time.strftime('%Y-%m-%d')}.ipynb"
        if _showing(read_json(kept)) > _showing(notebook):  # a second Run All stopped early, say
            kept.rename(kept.with_stem(f"{kept.stem}.until-{time.strftime('%H-%M-%S')}"))
        write_json(kept, notebook)
    # Shift+Enter on the last cell adds an empty one; jupytext writes the .py from this same list.
    while notebook["cells"] and not notebook["cells"][-1]["source"].strip():
        notebook["cells"].pop()
    model["content"] = published(notebook)


def _showing(notebook: dict[str, Any]) -> int:
    """How many cells of a notebook show something."""
    return sum(bool(cell.get("outputs")) for cell in notebook.get("cells", []))


def published(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook as git holds it: its cells without outputs, and which kernel it is for."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook["cells"]:
        cell["metadata"] = {name: value for name, value in cell["metadata"].items() if name in KEPT}
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
    notebook["metadata"] = {"kernelspec": KERNEL, **{
        name: value for name, value in notebook["metadata"].items() if name == "jupytext"}}
    return notebook
