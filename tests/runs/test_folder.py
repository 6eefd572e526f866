"""The run folder tells the truth about a run, however it ended."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kit.common.errors import KitError
from kit.recipe.recipe import Recipe
from kit.runs.run import Run, check_free, close_dead, read_result


def recipe_in(folder: Path) -> Recipe:
    return Recipe.load({}, run_name="r", output_dir=str(folder))


def test_stages_figures_and_files(tmp_path: Path) -> None:
    run = Run.start(recipe_in(tmp_path))
    run.stage("train")
    assert read_result(run.folder)["stage"] == "train"
    run.note(loss=1.5)
    run.finish()
    result = read_result(run.folder)
    assert (result["status"], result["loss"]) == ("finished", 1.5)
    assert {"start", "train"} <= set(result["seconds"]) and "recipe.yaml" in result["files"]
    assert Run.open(run.folder).recipe == recipe_in(tmp_path)
    assert not list(run.folder.glob("*.partial"))


def test_a_finished_run_is_not_overwritten(tmp_path: Path) -> None:
    Run.start(recipe_in(tmp_path)).finish()
    before = sorted((p, p.read_bytes()) for p in (tmp_path / "r").iterdir())
    with pytest.raises(KitError, match="holds a finished run"):
        Run.start(recipe_in(tmp_path))
    assert sorted((p, p.read_bytes()) for p in (tmp_path / "r").iterdir()) == before


def test_an_unfinished_run_is_replaced_and_nothing_of_others_is_touched(tmp_path: Path) -> None:
    run = Run.start(recipe_in(tmp_path))
    (run.folder / "log.jsonl").write_text("{}\n")
    (run.folder / "my-notes.txt").write_text("keep")
    run.fail("out of memory")
    Run.start(recipe_in(tmp_path))
    assert (run.folder / "my-notes.txt").read_text() == "keep"
    assert not (run.folder / "log.jsonl").exists()


def test_a_folder_of_somebody_elses_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.docx").write_text("x")
    with pytest.raises(KitError, match=r"no run made: thesis\.docx"):
        check_free(Run.of(recipe_in(tmp_path)))


def end_with(tmp_path: Path, last_line: str) -> dict[str, object]:
    code = ("from kit.recipe.recipe import Recipe; from kit.runs.run import Run; import os, signal\n"
            f"run = Run.start(Recipe.load({{}}, run_name='r', output_dir={str(tmp_path)!r})); run.stage('train')\n"
            + last_line)
    subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    return read_result(tmp_path / "r")


def test_an_early_exit_is_written_down(tmp_path: Path) -> None:
    result = end_with(tmp_path, "raise SystemExit(0)")
    assert (result["status"], result["stage"]) == ("stopped", "train")
    assert "early exit" in str(result["reason"])


def test_a_killed_process_is_seen_by_the_next_reader(tmp_path: Path) -> None:
    result = end_with(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert (result["status"], result["stage"]) == ("stopped", "train")
    assert json.loads((tmp_path / "r" / "result.json").read_text())["status"] == "running"
    close_dead(tmp_path / "r", "the kernel died")
    assert json.loads((tmp_path / "r" / "result.json").read_text())["status"] == "stopped"
    Run.start(recipe_in(tmp_path))


def test_a_run_at_work_is_not_disturbed(tmp_path: Path) -> None:
    code = ("from kit.recipe.recipe import Recipe; from kit.runs.run import Run\n"
            f"Run.start(Recipe.load({{}}, run_name='r', "
            f"output_dir={str(tmp_path)!r})); print('started', flush=True); input()")
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as run:
        assert run.stdout and run.stdout.readline() == "started\n"
        with pytest.raises(KitError, match=f"at work .process {run.pid}"):
            Run.start(recipe_in(tmp_path))
        run.communicate("\n")
    # In a notebook "Run all" begins again in the same kernel.
    Run.start(recipe_in(tmp_path))
    Run.start(recipe_in(tmp_path))


def test_a_folder_gives_no_consent_to_code(tmp_path: Path) -> None:
    """The recipe in it says trust_remote_code: true; only the run of the recipe itself, and whoever opens it, may."""
    trusting = recipe_in(tmp_path).model_copy(update={"trust_remote_code": True})
    run = Run.start(trusting)
    run.finish()
    assert run.recipe == trusting, "so that kit.verify(run) works in the notebook"
    assert "trust_remote_code: true" in (run.folder / "recipe.yaml").read_text()
    assert Run.open(run.folder).recipe.trust_remote_code is False
    assert Run.open(run.folder, trust_remote_code=True).recipe == trusting


def test_a_torn_result_does_not_hide_the_folder(tmp_path: Path) -> None:
    Run.start(recipe_in(tmp_path)).finish()
    (tmp_path / "r" / "result.json").write_text('{"status": "fin')
    assert read_result(tmp_path / "r") == {}
    assert Run.open(tmp_path / "r").folder == tmp_path / "r"


def test_no_such_run_lists_those_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Run.start(Recipe.load({}, run_name="mine")).finish()
    with pytest.raises(KitError, match="runs here: mine"):
        Run.open("yours")
    assert Run.open("mine").folder == Path("runs/mine")
