"""What can be known to fail before anything is written: model, data, converter, disk."""

from __future__ import annotations

from pathlib import Path

from kit.common.processes import is_main
from kit.data.sources import files_of
from kit.data.splits import read_splits
from kit.gguf.convert import check_disk, merged_weights
from kit.gguf.formats import needed_bytes
from kit.gguf.setup import converter_dir
from kit.models.adapters import local_adapter, read_adapter_config
from kit.models.fetch import model_folder
from kit.recipe.recipe import Recipe
from kit.runs.folder import check_free
from kit.runs.run import Run

ADAPTER_SHARE = 0.1


def preflight(recipe: Recipe) -> None:
    """Raise KitError for what would stop the run later on. Writes nothing into the run folder, loads no weights.

    Of several processes the main one looks for all.
    """
    if not is_main():
        return
    check_free(Run.of(recipe).folder)
    folder = _model(recipe)
    _adapter(recipe)
    _data(recipe)
    if recipe.gguf:
        converter_dir()
    if folder is not None:
        _disk(recipe, folder)


def _model(recipe: Recipe) -> Path | None:
    """The model's folder when it is on this disk; a hub id is left to the loader."""
    there = recipe.model_name == "starter" or Path(recipe.model_name).expanduser().exists()
    if recipe.hub == "modelscope" and not there:
        return None
    name = Path(model_folder(recipe))
    return name if name.is_dir() else None


def _adapter(recipe: Recipe) -> None:
    """An adapter to train on that is not there; an id on the hub is left to the loader."""
    if recipe.adapter_name_or_path and (folder := local_adapter(recipe.adapter_name_or_path)):
        read_adapter_config(folder)


def _data(recipe: Recipe) -> None:
    """Read local data once, so that bad rows are known now and not after the model is loaded."""
    if all(files_of(source, recipe) is not None for source in (*recipe.sources, recipe.eval_dataset) if source):
        read_splits(recipe)


def _disk(recipe: Recipe, model: Path) -> None:
    parameters, _ = merged_weights(model)
    needed = int(2 * parameters * ADAPTER_SHARE)
    if recipe.save_merged != "none":
        needed += 2 * parameters + needed_bytes(parameters, recipe.gguf)
    check_disk(Path(recipe.output_dir), needed)
