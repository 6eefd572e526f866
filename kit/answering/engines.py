"""Which model answers `kit ask` and `kit answer`: a run's GGUF, merged folder, adapter or base, or a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kit.answering.infer import stream
from kit.common.errors import KitError, nearest
from kit.gguf.formats import check_gguf
from kit.models.template import Message
from kit.recipe.recipe import Recipe
from kit.runs.run import Run

ENGINES = ("gguf", "merged", "adapter", "base")


class Engine(NamedTuple):
    """What answers: one of ENGINES, with the recipe that brings template and sampling.

    `path` is the GGUF file or the folder of the merged model or adapter; None for the base model.
    """

    name: str
    recipe: Recipe
    path: Path | None

    def load(self) -> tuple[Any, Any]:
        """Model and tokenizer; a GGUF is loaded by kit.gguf.child instead."""
        from kit.models.load import load_model, reload

        return load_model(self.recipe) if self.path is None else reload(self.path, self.recipe)


def answers(what: str, engine: str | None) -> Callable[[list[Message]], Iterator[str]]:
    """A function that streams the answer to a conversation; the model is loaded once.

    Raises KitError when there is no such run, file or engine, or the file is damaged.
    """
    selected = choose(what, engine)
    model, tokenizer = (selected.path, None) if selected.name == "gguf" else selected.load()
    return lambda messages: stream(model, tokenizer, messages, selected.recipe)


def choose(what: str | Path, engine: str | None, **fields: Any) -> Engine:
    """The engine of a run (its name or folder), of a GGUF file, or the base model of a recipe file.

    `fields` are set on top of the run's recipe. Raises KitError when there is no such run, file or engine, or a GGUF
    is damaged.
    """
    if engine is not None and engine not in ENGINES:
        raise KitError(f"there is no engine {engine!r}{nearest(engine, ENGINES)}", f"engines: {', '.join(ENGINES)}")
    path = Path(what)
    if path.suffix in (".gguf", ".yaml", ".yml"):
        only = "gguf" if path.suffix == ".gguf" else "base"
        if engine not in (None, only):
            raise KitError(f"{what} has no {engine}", f"it can only be --engine {only}; name a run for the others")
        if only == "base":
            return Engine("base", Recipe.load(path, **fields), None)
        check_gguf(path)
        return Engine("gguf", Recipe.load({}, **fields), path)
    run = Run.open(what)
    recipe = Recipe.load(run.recipe, **fields)
    paths = _paths(run)
    if engine is None and list(paths) == ["base"]:
        raise KitError(f"{run.folder} holds no trained model yet ({run.result.get('status', 'not started')}"
                       f" at {run.result.get('stage', 'the start')})",
                       "finish the run, or ask the untrained model with --engine base")
    name = engine or next(iter(paths))
    if name not in paths:
        raise KitError(f"{run.folder} has no {engine}", f"it has: {', '.join(paths)}")
    if name == "gguf" and (file := paths[name]):
        check_gguf(file)
    return Engine(name, recipe, paths[name])


def _paths(run: Run) -> dict[str, Path | None]:
    """The engines that the run has, the lightest first, with the path of each; of several GGUFs the largest."""
    paths = {"gguf": max(run.gguf.glob("*.gguf"), key=lambda file: file.stat().st_size, default=None),
             "merged": run.merged if (run.merged / "config.json").is_file() else None,
             "adapter": run.adapter if (run.adapter / "adapter_config.json").is_file() else None}
    return {**{name: path for name, path in paths.items() if path}, "base": None}
