"""What would stop a run on this machine, told before anything is written: by `kit doctor` all of it within seconds, by
`preflight`, which every run begins with, the first of model, data, converter and disk.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kit.common.errors import KitError
from kit.common.processes import is_main
from kit.data.readers import check_file
from kit.data.sources import files_of
from kit.gguf.convert import merged_weights
from kit.gguf.setup import converter_dir
from kit.models.fetch import local_folder, model_folder, read_adapter_config
from kit.models.remote import known_model
from kit.models.template import own_template
from kit.readiness import machine_checks as checks
from kit.readiness import model_checks
from kit.readiness.forecast import forecast_on
from kit.readiness.probe import ask
from kit.recipe.machine import Machine
from kit.recipe.recipe import Recipe
from kit.recipe.trackers import check_trackers
from kit.runs.gates import Gate
from kit.runs.run import Run, check_free, read_result
from kit.training.checkpoints import check_resumable


def run(source: str | None, overrides: dict[str, Any]) -> int:
    """Check this machine, and with `source` a recipe on it; exit code 0, or 1 when something would stop the run.

    Prints a numbered line for each check as soon as it and those before it are known: ✓ is fine, ✗ would stop the run,
    ! is a remark, – can't be known yet. Raises KitError for a recipe that can't be read.
    """
    if source is not None and "=" in source and not Path(source).exists():
        raise KitError(f"{source!r} is no recipe: the first argument is the recipe", "kit doctor RECIPE FIELD=VALUE …")
    recipe = Recipe.load(source or {}, **overrides) if source or overrides else None
    failed = []
    with ThreadPoolExecutor(16) as pool:
        started = [pool.submit(_guarded, name, check) for name, check in _checks(recipe, pool).items()]
        for number, gate in enumerate(map(Future.result, started), 1):
            print(f"[{number}/{len(started)}] {line(gate)}", flush=True)
            failed += [gate.name] if gate.passed is False else []
    print(f"{len(failed)} of {len(started)} checks failed: {', '.join(failed)}" if failed
          else "nothing stands in the way")
    if recipe is None:
        print("a recipe's memory, disk, model, data and architecture: kit doctor recipes/quickstart.yaml")
    return 1 if failed else 0


def _checks(recipe: Recipe | None, pool: ThreadPoolExecutor) -> dict[str, Callable[[], Gate]]:
    """Every check by its name; those that need the machine or the model wait for it."""
    machine = pool.submit(_machine, recipe.output_dir if recipe else ".")
    first = {"packages": lambda: checks.packages(recipe), "device": lambda: checks.device(machine.result()[0], recipe)}
    if recipe is None:
        return {**first, "disk": lambda: checks.disk(None, None), "llama.cpp": lambda: checks.llama_cpp(None)}
    # Where torch can't tell the machine, the forecast goes as far as it can without it.
    known = pool.submit(known_model, recipe)
    needs = pool.submit(lambda: forecast_on(None if machine.exception() else machine.result()[0], recipe,
                                            model=known.result()))
    model = pool.submit(model_checks.model, recipe)
    bits = 4 if recipe.load_in_4bit else 8 if recipe.load_in_8bit else 0
    layers = {f"{bits}-bit": lambda: checks.quantised(bits, machine.result()[0])} if bits else {}
    own = {"template": lambda: model_checks.template(recipe, model.result()[1])} if recipe.chat_template else {}
    sent = {"report_to": lambda: Gate("report_to", True, ", ".join(check_trackers(recipe.report_to)))} \
        if recipe.report_to != "none" else {}
    return {
        **first,
        "memory": lambda: checks.memory(*machine.result(), needs.result()),
        "disk": lambda: checks.disk(recipe, needs.result()),
        "model": lambda: model.result()[0],
        "data": lambda: model_checks.data(recipe),
        "llama.cpp": lambda: checks.llama_cpp(recipe),
        "architecture": lambda: model_checks.architecture(recipe, model.result()[1]),
        **layers, **own, **sent,
    }


def line(gate: Gate) -> str:
    """'✗ model: figure: cause → remedy'."""
    sign = "!" if gate.passed is None and gate.detail else gate.sign
    text = f"{sign} {gate.name}: {gate.figure}" + (f": {gate.detail}" if gate.detail else "")
    return text + (f" → {gate.hint}" if gate.hint and gate.passed is not True else "")


def _machine(output_dir: str) -> tuple[Machine, float]:
    """The machine, and its free memory in GB."""
    answer = ask("machine", output_dir)
    return Machine(**answer["machine"]), answer["free_memory_gb"]


def _guarded(name: str, check: Callable[[], Gate]) -> Gate:
    """The check's result; an error that names its cause becomes its failure."""
    try:
        return check()
    except KitError as error:
        return Gate(name, False, "failed", detail=error.message, hint=error.hint)
    except OSError as error:
        return Gate(name, False, "failed", detail=str(error), hint="make it readable")


def preflight(recipe: Recipe) -> None:
    """Raise KitError for what would stop the run later on. Writes nothing into the run folder, loads no weights.

    Of several processes the main one looks for all.
    """
    if not is_main():
        return
    check_free(Run.of(recipe), recipe.overwrite)
    check_trackers(recipe.report_to)
    if recipe.chat_template:
        own_template(recipe.chat_template)
    if recipe.resume_from_checkpoint and read_result(Run.of(recipe).folder).get("status") != "finished":
        check_resumable(recipe)
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
        merged_weights(folder)
    _check_room(recipe)


def _check_room(recipe: Recipe) -> None:
    """KitError where a disk has no room for what is surely fetched and made; says it where the sizes are not known."""
    # Checkpoints of save_minutes are made in a long run only.
    needs = forecast_on(None, recipe.model_copy(update={"save_minutes": None}), model=known_model(recipe))
    if needs.room_gb is None:
        print(f"disk: not checked: {needs.notes[-1]}", flush=True)
    for disk in checks.disks(checks.run_places(recipe, needs)):
        if disk.need_gb > disk.free_gb:
            parts = ({"fetched": needs.fetch_gb} if needs.fetch_gb else {}) | needs.files_gb
            raise KitError(f"too little disk: {disk}",
                           f"{', '.join(f'{name} {size:.2f} GB' for name, size in parts.items())}: {checks.ROOM}")
