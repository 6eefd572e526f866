"""A recipe's whole run without a person: papermill over the notebook, or its cells in this process."""

import os
import re
import signal
import sys
import time
import traceback
from typing import Any

import jupytext
import papermill
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillException
from papermill.log import logger
from papermill.translators import translate_parameters

from kit.common.debug import debugging, trace
from kit.common.errors import KitError, Stopped
from kit.common.files import PROJECT, disk_error
from kit.common.processes import SIGNALS, is_main, rank, world_size
from kit.readiness.doctor import preflight
from kit.recipe.cells import names_assigned
from kit.recipe.recipe import Recipe
from kit.recipe.settings import check_joined, join
from kit.runs.own import clear
from kit.runs.run import Run, close_dead, read_result

NOTEBOOK = PROJECT / "notebooks" / "01_finetune.py"
EVERYWHERE = "every-process"  # the tag of cells that each process of torchrun runs
SECONDS_BEHIND_MAIN = 5  # torchrun ends all when one ends, so the main process says its error before the others do


def run_notebook(source: str, overrides: dict[str, Any], overwrite: bool) -> int:
    """Validate, then execute the notebook into runs/<name>/notebook.ipynb. Returns the exit code.

    0 only when the run marked itself finished: an exception, a killed kernel and an early exit are 1; 75 when a signal
    ended the training with a checkpoint.
    """
    if world_size() > 1:
        raise KitError("kit run is one process", "torchrun --nproc_per_node N -m kit train RECIPE")
    check_joined(Recipe.load(source, **overrides))
    run = Run.of(_validated(source, overrides, overwrite))
    run.folder.mkdir(parents=True, exist_ok=True)
    _pass_on_signals(run)
    logger.setLevel("INFO" if debugging() else "ERROR")  # it warns of every field not named in the notebook
    papermill_engines.register("kit", SpeakingEngine)
    reason = "the kernel ended before the last cell"
    try:
        papermill.execute_notebook(_notebook(), run.folder / "notebook.ipynb",
                                   parameters=_parameters(source, overrides), engine_name="kit",
                                   kernel_name="python3", progress_bar=False, stdout_file=sys.stdout,
                                   stderr_file=sys.stderr)
    except KeyboardInterrupt:
        return _ended(run, "interrupted", 130)
    except PapermillException as error:
        codes = {"Stopped": Stopped.exit_code, "KeyboardInterrupt": 130}
        if code := codes.get(getattr(error, "ename", "")):
            return _ended(run, "interrupted", code)
        reason = str(getattr(error, "evalue", "")) or str(error).strip().splitlines()[-1]
    except Exception as error:  # a dead kernel surfaces as one of several types
        reason = f"{type(error).__name__}: {error}"
    return _ended(run, reason, 1)


def run_cells(source: str, overrides: dict[str, Any], overwrite: bool) -> int:
    """The same cells in this process, no kernel. Returns the exit code.

    Under torchrun every process runs the cells that load and train, and the main one the others too.
    """
    recipe = _validated(source, overrides, overwrite)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does
    join(recipe)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    reason, code = "the notebook ended early", 1
    try:
        try:
            _execute(source, overrides, namespace)
        except OSError as error:
            raise disk_error(error, Run.of(recipe).folder) or error from None
    except KeyboardInterrupt:
        return _ended(Run.of(recipe), "interrupted", 130)
    except KitError as error:
        if not is_main():
            time.sleep(SECONDS_BEHIND_MAIN)
            print(f"kit: process {rank()}: {error.message}", file=sys.stderr)
            return 0 if isinstance(error, Stopped) else error.exit_code
        trace(error)
        print(f"kit: {error}", file=sys.stderr)
        reason, code = f"{type(error).__name__}: {error}", error.exit_code
    except SystemExit as stop:
        reason = f"a cell called exit({stop.code})"
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
    if not is_main():
        return 0
    run = namespace.get("run")
    if isinstance(run, Run) and run.result.get("status") == "running":
        run.fail(reason, "stopped" if code == Stopped.exit_code else "failed")
    return _ended(Run.of(recipe), reason, code)


def _notebook() -> Any:
    """The notebook, but for what somebody wrote into its parameters cell: what is run is what the command says."""
    notebook = jupytext.read(NOTEBOOK)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            lines = [line for line in cell.source.splitlines() if not re.match(r'\w+ = ""', line)]  # empty fields
            if written := sorted(names_assigned("\n".join(lines)) - {"recipe"}):
                print(f"the notebook's parameters cell has lines that this command does not use: {', '.join(written)}")
            cell.source = "\n".join(line for line in lines if line.startswith("recipe")) or "recipe = None"
    return notebook


def _parameters(source: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """What is written into the notebook. An empty text becomes null: there it would be a form's field left empty."""
    return {"recipe": source, **{name: None if value == "" else value for name, value in overrides.items()}}


def _validated(source: str, overrides: dict[str, Any], overwrite: bool) -> Recipe:
    """The recipe, when all that can be known before the first cell is right; the run it replaces is gone then."""
    recipe = Recipe.load(source, **overrides)
    run = Run.of(recipe)
    replaced = ("finished", "failed", "stopped") if overwrite else ("finished",) if recipe.overwrite else ()
    if is_main() and read_result(run.folder).get("status") in replaced:
        # The old run goes only after everything else about the new one is known to be right.
        preflight(recipe.model_copy(update={"run_name": recipe.run_name + ".new"}))
        clear(run.folder, run.checkpoints)
    preflight(recipe)
    return recipe


def _ended(run: Run, reason: str, code: int) -> int:
    """Say how the run ended; 0 when it marked itself finished."""
    result = close_dead(run.folder, reason)
    if result.get("status") == "finished":
        print(f"\nfinished: {run.folder}")
        return 0
    print(f"\nkit: the run stopped at {result.get('stage', 'the start')!r}: {result.get('reason', reason)}\n"
          f"  → what it made so far: {run.folder}", file=sys.stderr)
    return code


def _pass_on_signals(run: Run) -> None:
    """The first SIGINT or SIGTERM goes to the kernel, where a training saves its state; the next one ends it all."""
    def pass_on(*_: object) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.default_int_handler)
        kernel = read_result(run.folder)
        if kernel.get("status") != "running" or kernel.get("pid") == os.getpid():
            raise KeyboardInterrupt
        os.kill(kernel["pid"], signal.SIGINT)

    for number in SIGNALS:
        signal.signal(number, pass_on)


def _execute(source: str, overrides: dict[str, Any], namespace: dict[str, Any]) -> None:
    """The notebook's cells, those of this process, with its parameters set as papermill sets them."""
    title = ""
    for number, cell in enumerate(_notebook().cells, 1):
        if cell.cell_type == "markdown":
            title = heading(cell.source) or title
            continue
        code, tags = cell.source, cell.metadata.get("tags", [])
        if "parameters" in tags:
            code += "\n" + translate_parameters("python3", "python", _parameters(source, overrides), "Parameters")
        if is_main() or EVERYWHERE in tags or "parameters" in tags:
            if title:
                print(f"\n── {title} ──", flush=True)
            exec(compile(code, f"{NOTEBOOK.name}[cell {number}]", "exec"), namespace)
        title = ""


def heading(markdown: str) -> str:
    """The first heading's text, or ''."""
    return next((line.lstrip("#").strip() for line in markdown.splitlines() if line.startswith("#")), "")


class SpeakingClient(PapermillNotebookClient):
    """Prints each heading as its cells begin, and the text form of tables."""

    def execute_cell(self, cell: Any, cell_index: int, **options: Any) -> Any:
        if cell.cell_type == "markdown" and (title := heading(cell.source)):
            print(f"\n── {title} ── cell {cell_index + 1} of {len(self.nb.cells)}", file=self.stdout_file, flush=True)
        return super().execute_cell(cell, cell_index, **options)

    def log_output_message(self, output: Any) -> None:
        super().log_output_message(output)
        data = output.get("data", {})
        if "text/plain" in data and "image/png" not in data:
            print("".join(data["text/plain"]), file=self.stdout_file, flush=True)


class SpeakingEngine(NBClientEngine):
    """NBClientEngine with the client above."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, stdout_file: Any = None, stderr_file: Any = None,
                                 **_: Any) -> Any:
        client = SpeakingClient(nb_man, kernel_name=kernel_name, log=logger, stdout_file=stdout_file,
                                stderr_file=stderr_file, startup_timeout=60, timeout=None, coalesce_streams=True,
                                # At 20 (information) the kernel also logs the traceback of a cell's error.
                                extra_arguments=[f"--log-level={20 if debugging() else 40}"])
        return client.execute()
