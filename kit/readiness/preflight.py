"""What can be known to fail before anything is written: model, data, converter, disk."""

from __future__ import annotations

from pathlib import Path

from kit.common.processes import is_main
from kit.data.readers import check_file
from kit.data.sources import files_of
from kit.gguf.convert import check_disk, merged_weights
from kit.gguf.formats import needed_bytes
from kit.gguf.setup import converter_dir
from kit.models.adapters import read_adapter_config
from kit.models.fetch import local_folder, model_folder
from kit.recipe.recipe import Recipe
from kit.runs.run import Run, check_free

ADAPTER_SHARE = 0.1  # of the model's weights, generously


def preflight(recipe: Recipe) -> None:
    """Raise KitError for what would stop the run later on. Writes nothing into the run folder, loads no weights.

    Of several processes the main one looks for all.
    """
    if not is_main():
        return
    check_free(Run.of(recipe).folder)
    # A model or an adapter that is an id on a hub is left to the loader.
    on_disk = recipe.model_name == "starter" or local_folder(recipe.model_name) is not None
    folder = Path(model_folder(recipe)) if on_disk else None
    if recipe.adapter_name_or_path and (adapter := local_folder(recipe.adapter_name_or_path, bare_ids=False)):
        read_adapter_config(adapter)
    # Rows are read by the data check, which tells bad ones before the model is loaded.
    for source in filter(None, (*recipe.sources, recipe.eval_dataset)):
        for path in files_of(source, recipe) or ():
            check_file(path)
    if recipe.gguf:
        converter_dir()
    if folder is not None:
        parameters, _ = merged_weights(folder)
        needed = int(2 * parameters * ADAPTER_SHARE)
        if recipe.save_merged != "none":
            needed += 2 * parameters + needed_bytes(parameters, recipe.gguf)
        check_disk(Path(recipe.output_dir), needed)
