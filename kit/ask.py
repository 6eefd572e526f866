"""Which model answers `kit ask`: a run's GGUF, merged folder, adapter or base, or a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from kit.errors import KitError, nearest
from kit.prompts import Message
from kit.runs import Run

ENGINES = ("gguf", "merged", "adapter", "base")


def answers(what: str, engine: str | None) -> Callable[[list[Message]], Iterator[str]]:
    """A function that streams the answer to a conversation; the model is loaded once.

    Raises KitError when there is no such run, file or engine, or the file is damaged.
    """
    from kit.gguf_file import check_gguf
    from kit.infer import stream
    from kit.recipe import Recipe

    if what.endswith(".gguf"):
        check_gguf(Path(what))
        return lambda messages: stream(what, None, messages, Recipe.load({}))
    run = Run.open(what)
    recipe = run.recipe
    chosen = _engine(run, engine)
    if chosen == "gguf":
        path = sorted(run.gguf.glob("*.gguf"), key=lambda file: file.stat().st_size)[-1]
        check_gguf(path)
        return lambda messages: stream(path, None, messages, recipe)
    from kit.model import load_model, reload

    model, tokenizer = load_model(recipe) if chosen == "base" else \
        reload(run.adapter if chosen == "adapter" else run.merged, recipe)
    return lambda messages: stream(model, tokenizer, messages, recipe)


def _engine(run: Run, engine: str | None) -> str:
    """The engine asked for, or the lightest the run has."""
    there = [name for name, found in (("gguf", any(run.gguf.glob("*.gguf"))),
                                      ("merged", (run.merged / "config.json").is_file()),
                                      ("adapter", (run.adapter / "adapter_config.json").is_file()),
                                      ("base", True)) if found]
    if engine is None:
        if there == ["base"]:
            raise KitError(f"{run.folder} holds no trained model yet ({run.result.get('status', 'not started')}"
                           f" at {run.result.get('stage', 'the start')})",
                           "finish the run, or ask the untrained model with --engine base")
        return there[0]
    if engine not in ENGINES:
        raise KitError(f"there is no engine {engine!r}{nearest(engine, ENGINES)}", f"engines: {', '.join(ENGINES)}")
    if engine not in there:
        raise KitError(f"{run.folder} has no {engine}", f"it has: {', '.join(there)}")
    return engine
