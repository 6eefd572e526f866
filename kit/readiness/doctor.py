"""`kit doctor`: what would stop a run on this machine, told within seconds and without writing anything."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kit.common.errors import KitError
from kit.readiness import machine_checks as checks
from kit.readiness.architecture import architecture
from kit.readiness.forecast import Forecast, forecast
from kit.readiness.model_checks import data, model
from kit.readiness.probe import Probe
from kit.recipe.machine import Machine
from kit.recipe.recipe import Recipe
from kit.runs.gates import Gate, Gates

MORE = "a recipe's memory, disk, model, data and architecture: kit doctor recipes/quickstart.yaml"


def run(source: str | None, overrides: dict[str, Any]) -> int:
    """Check this machine, and with `source` a recipe on it; exit code 0, or 1 when something would stop the run.

    Raises KitError for a recipe that can't be read.
    """
    if source is not None and "=" in source and not Path(source).exists():
        raise KitError(f"{source!r} is no recipe: the first argument is the recipe", "kit doctor RECIPE FIELD=VALUE …")
    recipe = Recipe.load(source or {}, **overrides) if source or overrides else None
    report = doctor(recipe)
    print(_verdict(report) + (f"\n{MORE}" if recipe is None else ""))
    return 1 if report.failed else 0


def doctor(recipe: Recipe | None = None) -> Gates:
    """Print a numbered line for each check as soon as it and those before it are known; returns them all.

    ✓ is fine, ✗ would stop the run, ! is a remark, – can't be known yet.
    """
    report = Gates("doctor")
    with ThreadPoolExecutor(16) as pool, ExitStack() as children:
        found = _begin(recipe, pool, children)
        for number, check in enumerate(found, 1):
            gate = check.result()
            report.gates.append(gate)
            print(f"[{number}/{len(found)}] {line(gate)}", flush=True)
    return report


def _begin(recipe: Recipe | None, pool: ThreadPoolExecutor, children: ExitStack) -> list[Future[Gate]]:
    """Start every check at once; those that need the machine or the model wait for it in their threads."""
    bits = 0 if recipe is None else 4 if recipe.load_in_4bit else 8 if recipe.load_in_8bit else 0
    torch = children.enter_context(Probe("torch", recipe.output_dir if recipe else ".", str(bits)))
    machine = pool.submit(lambda: _machine(torch.answer()))

    def start(name: str, check: Callable[[], Gate]) -> Future[Gate]:
        return pool.submit(_guarded, name, check)

    first = [start("packages", checks.packages), start("device", lambda: checks.device(machine.result()[0], recipe))]
    llama_cpp = start("llama.cpp", lambda: checks.llama_cpp(recipe))
    if recipe is None:
        return [*first, start("disk", lambda: checks.disk(None, None)), llama_cpp]
    there = pool.submit(model, recipe)
    needs = pool.submit(_needs, recipe, machine)
    layers = [start(f"{bits}-bit", lambda: checks.quantised(recipe, machine.result()[0], torch))] if bits else []
    return [
        *first,
        start("memory", lambda: checks.memory(*machine.result(), needs.result())),
        start("disk", lambda: checks.disk(recipe, needs.result())),
        start("model", lambda: there.result()[0]),
        start("data", lambda: data(recipe)),
        llama_cpp,
        start("architecture", lambda: architecture(recipe, there.result()[1])),
        *layers,
    ]


def line(gate: Gate) -> str:
    """'✗ model: figure: cause → remedy'."""
    sign = "!" if gate.passed is None and gate.detail else gate.sign
    text = f"{sign} {gate.name}: {gate.figure}" + (f": {gate.detail}" if gate.detail else "")
    return text + (f" → {gate.hint}" if gate.hint and gate.passed is not True else "")


def _machine(answer: dict[str, Any]) -> tuple[Machine, float]:
    """The machine, and its free memory in GB."""
    return Machine(**answer["machine"]), answer["free_memory_gb"]


def _needs(recipe: Recipe, machine: Future[tuple[Machine, float]]) -> Forecast:
    """The run's forecast on this machine; where torch can't tell the machine, as far as that goes without it."""
    return forecast(recipe, there=None if machine.exception() else machine.result()[0])


def _guarded(name: str, check: Callable[[], Gate]) -> Gate:
    """The check's result; an error that names its cause becomes its failure."""
    try:
        return check()
    except KitError as error:
        return Gate(name, False, "failed", detail=error.message, hint=error.hint)
    except OSError as error:
        return Gate(name, False, "failed", detail=str(error), hint="make it readable")


def _verdict(report: Gates) -> str:
    if report.failed:
        names = ", ".join(gate.name for gate in report.failed)
        return f"{len(report.failed)} of {len(report.gates)} checks failed: {names}"
    return "nothing stands in the way"
