"""The order of the rooms: each imports only from those before it. Imports inside functions count."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
KIT = PROJECT / "kit"
# From the ground up; rooms of one line don't import from one another.
FLOORS = [["common"], ["gguf"], ["recipe"], ["models"], ["data"], ["runs"], ["training", "answering", "export"],
          ["verifying"], ["readiness"], ["plots", "batch", "cli", "lab", "__init__", "__main__"]]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(KIT.rglob("*.py"))


def name_of(file: Path) -> str:
    """kit/data/masks.py → data.masks; kit/data/__init__.py → data; kit/__init__.py → __init__."""
    parts = file.relative_to(KIT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(file): file for file in FILES}


def imports(file: Path) -> Iterator[str]:
    """The kit's modules that a file imports, wherever in it: 'data.masks'."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            named = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in named:
            inside = name.removeprefix("kit.")
            if name == inside and name != "kit":
                continue
            # `from kit.data.masks import Formatter` names a part of a module, `from kit.data import masks` a module.
            yield next((module for module in (inside, inside.rpartition(".")[0]) if module in MODULES), "__init__")


ARROWS = {name: set(imports(file)) - {name} for name, file in MODULES.items()}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def test_every_file_lives_in_a_room() -> None:
    assert {room_of(name) for name in MODULES} == set(FLOOR)


@pytest.mark.parametrize("module", sorted(ARROWS))
def test_imports_come_from_rooms_before(module: str) -> None:
    room = room_of(module)
    wrong = [other for other in sorted(ARROWS[module])
             if room_of(other) != room and FLOOR[room_of(other)] >= FLOOR[room] and FLOOR[room] < len(FLOORS) - 1]
    assert not wrong, f"kit/{module.replace('.', '/')}.py imports {', '.join(wrong)}: order of the rooms: {FLOORS}"


def test_no_circle_of_files() -> None:
    """Within a room too, and among the files above the rooms."""
    left = {name: set(arrows) for name, arrows in ARROWS.items()}
    while ready := [name for name, arrows in left.items() if not arrows & left.keys()]:
        for name in ready:
            del left[name]
    assert not left, f"these import one another: {left}"


def test_no_room_bears_a_public_name() -> None:
    import kit

    assert not {room_of(name) for name in MODULES} & set(kit.__all__)
