"""The names of transformers' Trainer that are not documented: which the kit uses, and that they still exist."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from kit.common.files import PROJECT

USES = PROJECT / "kit" / "training" / "trainer.py"
PRIVATE = re.compile(r"_[a-z]\w*")


def private_names(source: Path) -> set[str]:
    """Attributes with a leading underscore that a file takes of `trainer`, `self` or `super()`, and such methods."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            names |= {node.attr} if owner in ("trainer", "self.trainer", "super()") else set()
        elif isinstance(node, ast.ClassDef):
            names |= {part.name for part in node.body if isinstance(part, ast.FunctionDef)} if node.bases else set()
    return {name for name in names if PRIVATE.fullmatch(name)}


def trainer_of_transformers() -> ast.ClassDef:
    """Its Trainer as it is written; reading takes no import of torch."""
    spec = importlib.util.find_spec("transformers")
    assert spec and spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0]) / "trainer.py"
    return next(node for node in ast.parse(source.read_text(encoding="utf-8")).body
                if isinstance(node, ast.ClassDef) and node.name == "Trainer")


NAMES = sorted(private_names(USES))


def test_the_names_are_found() -> None:
    assert {"_tr_loss", "_load_best_model", "_save_checkpoint"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_trainer_still_has(name: str) -> None:
    trainer = trainer_of_transformers()
    methods = {part.name for part in trainer.body if isinstance(part, ast.FunctionDef)}
    attributes = {node.attr for node in ast.walk(trainer) if isinstance(node, ast.Attribute)
                  and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"}
    assert name in methods | attributes, f"the installed transformers' Trainer has no {name}: see {USES}"


def test_they_are_used_in_one_file_only() -> None:
    others = [path for path in (PROJECT / "kit").rglob("*.py") if path != USES]
    for path in others:
        assert not set(NAMES) & {node.attr for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                                 if isinstance(node, ast.Attribute)}, path
