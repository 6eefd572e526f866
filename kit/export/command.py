"""`kit export`: the merged model and GGUFs of a run, or of an adapter that was trained elsewhere."""

import re
from contextlib import suppress
from pathlib import Path

from kit.common.errors import KitError
from kit.common.files import read_json, write_text
from kit.common.show import Table, size
from kit.export.adapter import merge, merge_adapter, save_4bit
from kit.export.modelfile import Modelfile, modelfile_of
from kit.gguf.convert import export_gguf
from kit.gguf.formats import QUANTIZATIONS, check_quantizations
from kit.models.fetch import adapter_base, base_folder
from kit.models.saved import saved_tokenizer
from kit.recipe.recipe import Recipe
from kit.runs.gates import Gates
from kit.runs.provenance import ADDED, COPY_AGAIN, about, altered, seal
from kit.runs.run import Run, read_manifest

NAMED = {"16bit": "merged", "4bit": "merged-4bit"}  # what --save-merged makes


def export(what: str, base: str | None, gguf: list[str], save_merged: str | None, out: Path | None,
           trust_remote_code: bool = False) -> int:
    """Make what is asked for, say what was made, with sizes; returns the exit code 0.

    `trust_remote_code` is your consent to Python code that came with the model.
    """
    check_quantizations(gguf)
    if (Path(what).expanduser() / "adapter_config.json").is_file():
        folder, made = _export_adapter(Path(what).expanduser(), base, gguf, save_merged, out, trust_remote_code)
    else:
        folder, made = _export_run(Run.open(what, trust_remote_code), base, gguf, save_merged, out)
    if made and (Path(folder) / "verify.json").is_file():
        print(f"the verdict was about the files before: kit verify {what}")
    rows = [[path.name, size(sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file()))]
            for path in made]
    print(Table(["made", "size"], rows, str(folder)) if made else
          f"{folder} has it all already; what you name is made again: kit export {what} --gguf q8_0")
    return 0


def _export_run(run: Run, base: str | None, gguf: list[str], save_merged: str | None,
                out: Path | None) -> tuple[Path, list[Path]]:
    """Make what the options name; without any, what is wrong and what the recipe asks for and is not there. Seal it.

    What is there stays until the new one is whole.
    """
    if base or out:
        raise KitError(f"{'--base' if base else '--out'} is for an adapter: {run.folder} is a run, which knows its "
                       "base and keeps its files itself", "kit export RUN, or kit export RUN/adapter --out FOLDER")
    if run.result.get("status") == "running":
        raise KitError(f"{run.folder} is in use by a run at work (process {run.result.get('pid')})", "wait for it")
    recipe, wrong = run.recipe, _wrong(run)
    named = {*gguf, *([NAMED[save_merged]] if save_merged in NAMED else [])}
    again = named | (wrong & {"merged"}) if named else wrong  # from a wrong merged/ nothing right can be made
    recipe = Recipe.load(recipe, gguf=gguf or [*recipe.gguf, *(name for name in QUANTIZATIONS if name in again)],
                         save_merged=save_merged or ("16bit" if recipe.save_merged == "none" else recipe.save_merged))
    made = []
    if "merged" in again or not run.merged.is_dir():
        _merge(run, recipe)
        made.append(run.merged)
        seal(run, made)
    made += _make_missing(run, recipe, recipe.run_name, about(run), again)
    if made:
        seal(run, made)
    return run.folder, made


def _wrong(run: Run) -> set[str]:
    """What was changed since it was sealed, or failed in a `kit verify` of these files.

    It is named as in gates: merged, merged-4bit, a quantisation, Modelfile. Raises KitError when the trained weights or
    the recipe were changed.
    """
    changed = altered(run)
    has_adapter = (run.adapter / "adapter_config.json").is_file()
    sources = ("recipe.yaml", "adapter/", *(() if has_adapter else ("merged/",)))
    if bad := next((name for name in changed if name.startswith(sources)), None):
        raise KitError(f"{run.folder}: {bad} is {changed[bad]}: nothing is made from it", COPY_AGAIN)
    names = {name.partition("/")[0] if name.startswith("merged") else Path(name).stem.rpartition("-")[2]
             for name, what in changed.items() if what != ADDED or name.startswith("merged")}
    verdict = read_json(run.folder / "verify.json")
    if verdict.get("artefacts") == read_manifest(run.folder).get("artefacts"):
        with suppress(KeyError, TypeError):  # a damaged one says nothing
            names |= {_artefact(gate.name) for gate in Gates.from_json("verify", verdict["gates"]).failed}
    return names & {*NAMED.values(), "Modelfile", *QUANTIZATIONS}


def _artefact(gate: str) -> str:
    """What a gate is about: the last word of its name, as in `parity q8_0`."""
    kind, _, last = gate.rpartition(" ")
    if gate in ("merge", "merged config"):
        return "merged"
    return last.rpartition("-")[2] if kind == "file" else last


def _merge(run: Run, recipe: Recipe) -> None:
    if not (run.adapter / "adapter_config.json").is_file():
        raise KitError(f"{run.merged} holds the trained weights themselves: they can't be made again"
                       if run.merged.is_dir() else f"{run.folder} holds no trained model yet",
                       COPY_AGAIN if run.merged.is_dir() else "finish the run first")
    merge(run.adapter, run, Recipe.load(recipe, save_merged="16bit"))


def _export_adapter(adapter: Path, base: str | None, gguf: list[str], save_merged: str | None,
                    out: Path | None, trust_remote_code: bool) -> tuple[Path, list[Path]]:
    """A new folder with the merged model and what else is asked for."""
    if out is None:
        raise KitError(f"{adapter} is an adapter: where to?", "name a folder: --out FOLDER")
    if out.exists() and any(out.iterdir()):
        raise KitError(f"{out} is not empty", "name a new folder")
    recipe = Recipe.load({"model_name": adapter_base(adapter, base), "gguf": gguf,
                          "save_merged": save_merged or "16bit", "trust_remote_code": trust_remote_code})
    run = Run(out)
    merge_adapter(base_folder(recipe), adapter, run.merged, trust_remote_code)
    return out, [run.merged, *_make_missing(run, recipe, out.resolve().name, out.resolve().name, set())]


def _make_missing(run: Run, recipe: Recipe, name: str, description: str, again: set[str]) -> list[Path]:
    """Make merged-4bit/ and the GGUFs that `again` names, and those that the recipe asks for and are not there.

    The Modelfile follows. `name` and `description` are those of the GGUFs. Returns what was made.
    """
    made = []
    if "merged-4bit" in again or (recipe.save_merged == "4bit" and not run.merged_4bit.is_dir()):
        save_4bit(run.merged, run.merged_4bit, recipe)
        made.append(run.merged_4bit)
    paths = {quant: run.gguf / f"{name}-{quant}.gguf" for quant in recipe.gguf}
    missing = [quant for quant, path in paths.items() if quant in again or not path.is_file()]
    files = export_gguf(run.merged, run.gguf, missing, name, description) if missing else []
    if files or ("Modelfile" in again and paths):
        try:
            modelfile = modelfile_of(recipe, saved_tokenizer(run.merged, recipe.trust_remote_code))
            files.append(_write_modelfile(run.gguf / "Modelfile", modelfile, (files or list(paths.values()))[-1].name))
        except KitError as error:
            print(f"no Modelfile: {error}")
    return made + files


def _write_modelfile(path: Path, modelfile: Modelfile, gguf_name: str) -> Path:
    """Write it, and say so where it named another GGUF before: `ollama create` gives another model then."""
    before = re.search(r"^FROM \./(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE) if path.is_file() else None
    write_text(path, modelfile.text(gguf_name))
    if before and before[1] != gguf_name:
        print(f"the Modelfile names {gguf_name} now, not {before[1]}")
    return path
