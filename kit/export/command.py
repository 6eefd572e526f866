"""`kit export`: the merged model and GGUFs of a run, or of an adapter that was trained elsewhere."""

from pathlib import Path

from kit.common.errors import KitError
from kit.common.files import write_text
from kit.common.show import Table, size
from kit.export.adapter import merge, merge_adapter, save_4bit
from kit.export.modelfile import modelfile_of
from kit.gguf.convert import export_gguf
from kit.gguf.formats import check_quantizations
from kit.models.fetch import base_folder, model_label, read_adapter_config
from kit.recipe.recipe import Recipe
from kit.runs.provenance import about, seal
from kit.runs.run import Run


def export(what: str, base: str | None, gguf: list[str], save_merged: str | None, out: Path | None) -> int:
    """Make what is asked for, say what was made, with sizes; returns the exit code 0."""
    check_quantizations(gguf)
    if (Path(what).expanduser() / "adapter_config.json").is_file():
        folder, made = _export_adapter(Path(what).expanduser(), base, gguf, save_merged, out)
    else:
        folder, made = _export_run(Run.open(what), base, gguf, save_merged, out)
    rows = [[path.name, size(sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file()))]
            for path in made]
    print(Table(["made", "size"], rows, str(folder)) if made else
          f"{folder} has it all already: delete what is to be made again")
    return 0


def _export_run(run: Run, base: str | None, gguf: list[str], save_merged: str | None,
                out: Path | None) -> tuple[Path, list[Path]]:
    """What the run's recipe and the options ask for and the run does not have yet, sealed as the run's own."""
    if base or out:
        raise KitError(f"{'--base' if base else '--out'} is for an adapter: {run.folder} is a run, which knows its "
                       "base and keeps its files itself", "kit export RUN, or kit export RUN/adapter --out FOLDER")
    if run.result.get("status") == "running":
        raise KitError(f"{run.folder} is in use by a run at work (process {run.result.get('pid')})", "wait for it")
    recipe = run.recipe
    save_merged = save_merged or ("16bit" if recipe.save_merged == "none" else recipe.save_merged)
    recipe = Recipe.load(recipe, gguf=gguf or recipe.gguf, save_merged=save_merged)
    adapter = run.adapter if (run.adapter / "adapter_config.json").is_file() else run.merged
    if not adapter.is_dir():
        raise KitError(f"{run.folder} holds no trained model yet", "finish the run first")
    made = []
    if not run.merged.is_dir():
        merge(adapter, run, Recipe.load(recipe, save_merged="16bit"))
        made.append(run.merged)
    made += _make_missing(run, recipe, model_label(recipe), about(run))
    if made:
        seal(run)
    return run.folder, made


def _export_adapter(adapter: Path, base: str | None, gguf: list[str], save_merged: str | None,
                    out: Path | None) -> tuple[Path, list[Path]]:
    """A new folder with the merged model and what else is asked for."""
    if out is None:
        raise KitError(f"{adapter} is an adapter: where to?", "name a folder: --out FOLDER")
    if out.exists() and any(out.iterdir()):
        raise KitError(f"{out} is not empty", "name a new folder")
    name = base or read_adapter_config(adapter).get("base_model_name_or_path")
    if not name:
        raise KitError(f"{adapter}/adapter_config.json does not name its base model", "name it: --base MODEL")
    recipe = Recipe.load({"model_name": name, "gguf": gguf, "save_merged": save_merged or "16bit"})
    run = Run(out)
    merge_adapter(base_folder(recipe), adapter, run.merged)
    return out, [run.merged, *_make_missing(run, recipe, out.resolve().name, out.resolve().name)]


def _make_missing(run: Run, recipe: Recipe, name: str, description: str) -> list[Path]:
    """Make merged-4bit/, the GGUFs and their Modelfile where they are asked for and not there; returns what was made.

    `name` and `description` are those of the GGUFs.
    """
    from transformers import AutoTokenizer  # not at the top: unsloth, which must come before it, is not needed here

    made = []
    if recipe.save_merged == "4bit" and not run.merged_4bit.is_dir():
        save_4bit(run.merged, run.merged_4bit, recipe)
        made.append(run.merged_4bit)
    missing = [quant for quant in recipe.gguf if not (run.gguf / f"{name}-{quant}.gguf").is_file()]
    files = export_gguf(run.merged, run.gguf, missing, name, description) if missing else []
    if files:
        try:
            modelfile = modelfile_of(recipe, AutoTokenizer.from_pretrained(run.merged))
            write_text(run.gguf / "Modelfile", modelfile.text(files[-1].name))
            files.append(run.gguf / "Modelfile")
        except KitError as error:
            print(f"no Modelfile: {error}")
    return made + files
