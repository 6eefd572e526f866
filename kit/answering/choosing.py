"""What `kit ask` and `kit answer` are pointed at: a run, a GGUF file, a recipe, an adapter, a checkpoint, a model."""

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from kit.common.errors import KitError, nearest
from kit.common.files import read_json
from kit.gguf.formats import check_gguf
from kit.models.fetch import TOKENIZER_FILES, adapter_base, fetched, local_folder, model_folder
from kit.recipe.fields import Fields
from kit.recipe.recipe import Recipe
from kit.runs.own import CHECKPOINT, MANIFEST, MODELS
from kit.runs.provenance import unlike_sealed
from kit.runs.run import Run

ENGINES = ("gguf", "merged", "adapter", "base")
KINDS = ("a run's name or folder, a .gguf, a recipe, the folder of an adapter, a checkpoint or a model, or a hub id")


class Engine(NamedTuple):
    """What answers: one of ENGINES, with the recipe that brings template, base model and sampling.

    `path` is the GGUF file or the folder of the merged model or adapter; None for the base model. Of what lies in no
    run (not `own`) the base is the one the recipe names, and the tokenizer is not settled yet.
    """

    name: str
    recipe: Recipe
    path: Path | None
    own: bool = True

    def load(self) -> tuple[Any, Any]:
        """Model and tokenizer; a GGUF is loaded by kit.gguf.child instead."""
        from kit.models.load import load_model, reload
        from kit.models.template import prepare_tokenizer

        if self.path is None:
            return load_model(self.recipe)
        model, tokenizer = reload(self.path, self.recipe, on_its_base=not self.own)
        return model, tokenizer if self.own else prepare_tokenizer(tokenizer, self.recipe)

    @property
    def label(self) -> str:
        """What to call it where several answer: the end of its path, or the model's name."""
        parts = Path(self.recipe.model_name if self.path is None else self.path).parts
        return "/".join(parts[-3 if parts[-2:-1] == ("checkpoints",) else -2:])


def choose(what: str | Path, engine: str | None = None, base: str | None = None, **fields: Any) -> Engine:
    """What KINDS names. `engine` is for a run, `base` for an adapter: the folder or hub id of its base model.

    `fields` are set on top of the recipe: a run's own, for what lies in a run; a checkpoint's own values; else the
    defaults. trust_remote_code counts only if it is among them. Raises KitError when there is no such thing or engine,
    an adapter's base is not known, or a GGUF is damaged.
    """
    if engine is not None and engine not in ENGINES:
        raise KitError(f"there is no engine {engine!r}{nearest(engine, ENGINES)}", f"engines: {', '.join(ENGINES)}")
    folder = _folder(what)
    if Path(what).suffix in (".gguf", ".yaml", ".yml"):
        chosen = _file(Path(what), fields)
    elif (folder / "recipe.yaml").is_file():
        _refuse_base(base, what)
        return _of_run(Run.open(folder), engine, fields)
    elif (folder / "adapter_config.json").is_file():
        return _only(what, engine, _adapter(folder, base, fields))
    elif (folder / "config.json").is_file():
        chosen = _model(folder, fields)
    elif folder.exists() or not _may_be_id(str(what)):
        raise _unknown(what, folder)
    else:
        return _only(what, engine, _of_hub(str(what), base, fields))
    _refuse_base(base, what)
    return _only(what, engine, chosen)


def second(what: str, engine: str | None = None, base: str | None = None, **fields: Any) -> Engine:
    """`choose` for what is compared with another: `engine` and `base` count where they apply to it too."""
    folder = _folder(what)
    return choose(what, engine if (folder / "recipe.yaml").is_file() else None,
                  base if (folder / "adapter_config.json").is_file() else None, **fields)


def _folder(what: str | Path) -> Path:
    """The folder that is meant: as given, or below runs/ where only that one holds something."""
    path = Path(what).expanduser()
    marks = ("recipe.yaml", "adapter_config.json", "config.json")
    return next((folder for folder in (path, Path("runs") / what) if any((folder / mark).is_file() for mark in marks)),
                path)


def _only(what: str | Path, engine: str | None, chosen: Engine) -> Engine:
    if engine not in (None, chosen.name):
        raise KitError(f"{what} has no {engine}", f"it can only be --engine {chosen.name}; name a run for the others")
    return chosen


def _refuse_base(base: str | None, what: str | Path) -> None:
    if base is not None:
        raise KitError(f"--base is for an adapter, and {what} is none", "of a run that was moved, name its adapter: "
                       "kit ask RUN/adapter --base FOLDER")


def _file(path: Path, fields: dict[str, Any]) -> Engine:
    if path.suffix != ".gguf":
        return Engine("base", Recipe.load(path, **fields), None)
    check_gguf(path)
    return Engine("gguf", Recipe.load({}, **fields), path)


def _of_run(run: Run, engine: str | None, fields: dict[str, Any]) -> Engine:
    recipe = Recipe.load(run.recipe, **fields)  # trust_remote_code among them is the caller's own word
    paths = _paths(run)
    if engine is None and list(paths) == ["base"]:
        place = Run.of(recipe).checkpoints if recipe.checkpoint_dir else run.checkpoints
        saved = max(_checkpoints(place), default=None)
        raise KitError(f"{run.folder} holds no trained model yet ({run.result.get('status', 'not started')}"
                       f" at {run.result.get('stage', 'the start')})",
                       (f"ask its newest checkpoint: {saved[1]}; " if saved else "finish the run, ")
                       + "or ask the untrained model with --engine base")
    name = engine or next(iter(paths))
    if name not in paths:
        raise KitError(f"{run.folder} has no {engine}", f"it has: {', '.join(paths)}")
    path = paths[name]
    if name == "gguf" and path:
        check_gguf(path)
    _note(run, path)
    return Engine(name, recipe, path)


def _note(run: Run, path: Path | None) -> None:
    """Say so where what will answer is not what the run sealed and `kit verify` looked at; checkpoints never are."""
    if path and not CHECKPOINT.fullmatch(path.name) and (other := unlike_sealed(run, path)):
        print(f"note: {other}: this is not what kit verify looked at", file=sys.stderr)


def _paths(run: Run) -> dict[str, Path | None]:
    """The engines that the run has, the lightest first, with the path of each; of several GGUFs the largest."""
    paths = {"gguf": max(run.gguf.glob("*.gguf"), key=lambda file: file.stat().st_size, default=None),
             "merged": run.merged if (run.merged / "config.json").is_file() else None,
             "adapter": run.adapter if (run.adapter / "adapter_config.json").is_file() else None}
    return {**{name: path for name, path in paths.items() if path}, "base": None}


def _home(folder: Path) -> Run | None:
    """The run that a folder of weights or a checkpoint lies in."""
    folder = folder.resolve()
    home = folder.parent if folder.name in MODELS else folder.parents[1] if CHECKPOINT.fullmatch(folder.name) else None
    return Run.open(home) if home and (home / "recipe.yaml").is_file() else None


def _trained_with(checkpoint: Path) -> dict[str, Any]:
    """The recipe's values that a checkpoint of the kit's holds, wherever it lies; {} for another tool's."""
    identity = read_json(checkpoint / MANIFEST).get("identity")
    return {name: value for name, value in identity.items() if name in Fields.model_fields} \
        if isinstance(identity, dict) else {}


def _adapter(folder: Path, base: str | None, fields: dict[str, Any]) -> Engine:
    run = _home(folder)
    recipe = Recipe.load(run.recipe if run else _trained_with(folder), **fields)
    named = base or ("model_name" in recipe.model_fields_set and recipe.model_name) or None
    recipe = recipe.model_copy(update={"model_name": adapter_base(folder, named)})
    if run:
        _note(run, folder)
    return Engine("adapter", recipe, folder, own=run is not None and base is None)


def _model(folder: Path, fields: dict[str, Any]) -> Engine:
    """Whole weights: merged, fully fine-tuned, or as they were published."""
    run = _home(folder)
    recipe = Recipe.load(run.recipe if run else _trained_with(folder), **fields)
    itself = recipe.model_copy(update={"model_name": str(folder)})
    model_folder(itself)  # says what a folder lacks
    if run:
        _note(run, folder)
    return Engine("merged", recipe if run else itself, folder, own=run is not None)


def _of_hub(name: str, base: str | None, fields: dict[str, Any]) -> Engine:
    """An adapter or a model of a hub: its small files say which. `revision` is of what is named, not of its base."""
    recipe = Recipe.load({"model_name": name}, **fields)
    if name == "starter":
        _refuse_base(base, name)
        return Engine("base", recipe, None)
    hub = "ModelScope" if recipe.hub == "modelscope" else "Hugging Face"
    folder = fetched("model", name, ["adapter_*", *TOKENIZER_FILES], recipe, recipe.revision, hub)
    if (folder / "adapter_config.json").is_file():
        return _adapter(folder, base, {**fields, "revision": None})
    _refuse_base(base, name)
    return Engine("base", recipe, None)


def _may_be_id(name: str) -> bool:
    """Whether a name can be a hub's: owner/name, and `owner` is no folder here (runs/quikstart is a slip)."""
    owner, slash, _ = name.partition("/")
    return name == "starter" or bool(slash and local_folder(name, bare_ids=False) is None
                                     and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(owner).exists())


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    return [(int(path.name.rpartition("-")[2]), path) for path in folder.glob("checkpoint-*")
            if path.name.rpartition("-")[2].isdigit()]


def _unknown(what: str | Path, folder: Path) -> KitError:
    if found := sorted(_checkpoints(folder)):
        return KitError(f"{what} is no model, but holds checkpoints: {', '.join(path.name for _, path in found)}",
                        f"name one of them: {found[-1][1]}")
    if folder.is_dir() and (pickles := sorted(folder.glob("*.bin"))):
        return KitError(f"{what} holds no config.json or adapter_config.json beside {pickles[0].name}",
                        "name the folder that save_pretrained wrote, with the weights as safetensors")
    try:
        Run.open(what)
    except KitError as error:
        return KitError(f"{error.message}, and no adapter or model", f"name {KINDS}; {error.hint}")
    raise AssertionError("a run has a recipe.yaml")
