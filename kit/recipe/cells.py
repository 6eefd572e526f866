"""What a notebook's cells say now: a line that was deleted from a cell no longer sets anything, though its variable
stays in the kernel."""

import ast
import importlib
from contextlib import suppress
from typing import Any

from kit.common.notebook import in_kernel, ipython

_assigned: dict[str, set[str]] = {}  # what the latest version of each cell assigns, by the cell's id
_deleted: set[str] = set()


def watch() -> None:
    """In a notebook, remember from now on what each cell assigns; front ends that give cells no id are not watched."""
    shell = ipython()
    if shell is not None and _remember not in shell.events.callbacks["pre_run_cell"]:
        shell.events.register("pre_run_cell", _remember)
        if in_kernel():
            with suppress(ImportError):  # before the first cell has installed anything
                importlib.import_module("kit.common.progress").take_over()


def deleted() -> set[str]:
    """The variables whose assignment was deleted from a cell that was run again, and stands in no other."""
    return _deleted.difference(*_assigned.values())


def _remember(cell: Any) -> None:
    if not cell.cell_id:
        return
    names = names_assigned(cell.raw_cell)
    _deleted.update(_assigned.get(cell.cell_id, set()) - names)
    _assigned[cell.cell_id] = names


def names_assigned(source: str) -> set[str]:
    """The names that a cell assigns at its top level; of one that is no Python (a magic), none."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return set()
    targets = [target for line in body if isinstance(line, ast.Assign) for target in line.targets]
    targets += [line.target for line in body if isinstance(line, ast.AnnAssign)]
    return {target.id for target in targets if isinstance(target, ast.Name)}
