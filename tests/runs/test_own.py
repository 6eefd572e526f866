"""A person's files survive whatever a recipe names: what is not provably the kit's is refused by name, and stays."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from kit.common.errors import KitError
from kit.recipe.recipe import Recipe
from kit.runs.own import MANIFEST, check_own, clear
from kit.runs.run import Run, check_free
from kit.training import checkpoints


def recipe_in(folder: Path, **fields: Any) -> Recipe:
    return Recipe.load({}, run_name="r", output_dir=str(folder / "runs"), **fields)


def write(path: Path, text: str = "mine") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def checkpoint(folder: Path, step: int, sealed: bool = True) -> Path:
    made = folder / f"checkpoint-{step}"
    write(made / "adapter_model.safetensors", "weights")
    write(made / "trainer_state.json", "{}")
    if sealed:
        checkpoints.seal(made, {}, 1.0, folder / "log.jsonl")
    return made


@pytest.mark.parametrize("name", [".", "..", "a/b", "a\\b", ".hidden", "n" * 81, "", "a\nb", "../mydocs"])
def test_a_run_name_is_one_folder_below_output_dir(name: str) -> None:
    with pytest.raises(KitError, match="run_name"):
        Recipe.load({}, run_name=name)


@pytest.mark.parametrize("fields", [{}, {"resume_from_checkpoint": False}])
@pytest.mark.parametrize("theirs", ["letter.txt", "checkpoint-3/adapter_model.safetensors", "checkpoint-x/a.bin",
                                    "README.md", "sub/photo.jpg"])
def test_a_folder_of_theirs_is_no_checkpoint_dir(tmp_path: Path, fields: dict[str, Any], theirs: str) -> None:
    """checkpoint_dir: /mnt/drive and a run_name that is a folder there; a plain trainer's checkpoint is no run's."""
    write(tmp_path / "drive" / "r" / theirs)
    before = everything(tmp_path)
    with pytest.raises(KitError, match=f"no run made: r/{theirs.partition('/')[0]}") as error:
        Run.start(recipe_in(tmp_path, checkpoint_dir=str(tmp_path / "drive"), **fields))
    assert everything(tmp_path) == before and error.value.hint


def test_our_own_checkpoints_go_whole_or_torn(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, checkpoint_dir=str(tmp_path / "drive"), resume_from_checkpoint=False)
    run = Run.start(recipe)
    for step, sealed in ((1, True), (2, False)):
        checkpoint(run.checkpoints, step, sealed)
    write(run.checkpoints / "README.md")
    write(tmp_path / "drive" / "other" / "letter.txt")
    run.fail("stopped")
    Run.start(recipe)
    assert [path.name for path in run.checkpoints.iterdir()] == ["kit-checkpoints.json"]
    assert (tmp_path / "drive" / "other" / "letter.txt").is_file()


def test_whole_checkpoints_are_known_without_the_mark(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, checkpoint_dir=str(tmp_path / "drive"))
    checkpoint(Run.of(recipe).checkpoints, 1)
    assert (Run.start(recipe).checkpoints / "checkpoint-1" / MANIFEST).is_file(), "to resume from"


def test_a_file_put_into_a_checkpoint_is_named(tmp_path: Path) -> None:
    run = Run.start(recipe_in(tmp_path))
    note = write(checkpoint(run.checkpoints, 1) / "note.md")
    run.fail("stopped")
    with pytest.raises(KitError, match=r"no run made: checkpoints/checkpoint-1/note\.md"):
        Run.start(recipe_in(tmp_path, resume_from_checkpoint=False))
    assert note.is_file()


@pytest.mark.parametrize("theirs", ["adapter/mine.txt", "merged/config.json", "gguf/x.gguf", "report.html",
                                    "figures/me.png"])
def test_without_a_result_a_folder_is_somebodys(tmp_path: Path, theirs: str) -> None:
    write(tmp_path / "runs" / "r" / theirs)
    before = everything(tmp_path)
    with pytest.raises(KitError, match="no run made: " + theirs.partition("/")[0]):
        Run.start(recipe_in(tmp_path))
    with pytest.raises(KitError, match="no run made"):
        clear(Run.of(recipe_in(tmp_path)).folder, Run.of(recipe_in(tmp_path)).checkpoints)
    assert everything(tmp_path) == before


def test_a_run_that_ended_at_once_is_begun_again(tmp_path: Path) -> None:
    for name in ("notebook.ipynb", "recipe.yaml", "result.json.partial", ".DS_Store"):
        write(tmp_path / "runs" / "r" / name)
    Run.start(recipe_in(tmp_path))


@pytest.mark.parametrize("theirs", ["adapter/mine.txt", "gguf/notes.md", "merged/sub/x.csv", "figures/me.png"])
def test_what_is_put_into_a_runs_own_folders_is_named_also_with_overwrite(tmp_path: Path, theirs: str) -> None:
    run = Run.start(recipe_in(tmp_path))
    for name in ("adapter/adapter_model.safetensors", "adapter/tokenizer.json", "adapter/merges.txt",
                 "gguf/a-q8_0.gguf", "gguf/Modelfile", "figures/loss.png", "merged/model.safetensors.index.json"):
        write(run.folder / name)
    check_own(run.folder, run.checkpoints)
    write(run.folder / theirs)
    run.finish()
    before = everything(tmp_path)
    with pytest.raises(KitError, match="no run made: " + theirs.split("/")[0]):
        clear(run.folder, run.checkpoints)
    assert everything(tmp_path) == before
    (run.folder / theirs).unlink()
    if "sub" in theirs:
        (run.folder / theirs).parent.rmdir()
    write(run.folder / "my-notes.txt")
    clear(run.folder, run.checkpoints)
    assert [path.name for path in run.folder.iterdir()] == ["my-notes.txt"]


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    run = Run.start(recipe_in(tmp_path))
    letter = write(tmp_path / "docs" / "letter.txt")
    (run.folder / "adapter").symlink_to(letter.parent)
    run.fail("stopped")
    Run.start(recipe_in(tmp_path))
    assert letter.is_file() and not (run.folder / "adapter").exists()


def lie(run: Run, **values: Any) -> None:
    path = run.folder / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_another_process_with_its_number_is_not_the_run(tmp_path: Path) -> None:
    """After a reboot, or as process 1 of another container."""
    recipe = recipe_in(tmp_path)
    run = Run.start(recipe)
    parent = psutil.Process(os.getppid())
    lie(run, pid=parent.pid, process_started=parent.create_time())
    with pytest.raises(KitError, match="in use by a run at work"):
        check_free(Run.of(recipe))
    lie(run, process_started=parent.create_time() - 60)
    check_free(Run.of(recipe))
    Run.start(recipe)


def test_a_notebook_replaces_a_finished_run_by_a_field(tmp_path: Path) -> None:
    """A second Run All; --overwrite is a word of the command line."""
    run = Run.start(recipe_in(tmp_path))
    write(run.folder / "report.html", "old")
    run.finish()
    with pytest.raises(KitError, match="holds a finished run") as error:
        Run.start(recipe_in(tmp_path))
    assert "overwrite = True in the parameters cell" in error.value.hint
    check_free(Run.of(recipe_in(tmp_path)), overwrite=True)
    again = Run.start(recipe_in(tmp_path, overwrite=True))
    assert not (again.folder / "report.html").exists() and again.result["status"] == "running"
    write(again.folder / "log.jsonl", "kept only where it is resumed")
    again.fail("interrupted")
    checkpoint(again.checkpoints, 3)
    Run.start(recipe_in(tmp_path, overwrite=True))
    assert (again.checkpoints / "checkpoint-3").is_dir(), "a run that did not finish is resumed"


WRITES: dict[str, Callable[[Run], None]] = {
    "stage": lambda run: run.stage("train"), "note": lambda run: run.note(loss=1), "finish": lambda run: run.finish(),
    "fail": lambda run: run.fail("x"), "a later look": lambda run: Run.open(run.folder).note(loss=1)}


@pytest.mark.parametrize("write_to", WRITES.values(), ids=WRITES)
def test_a_finished_run_is_never_written_to_again(tmp_path: Path, write_to: Callable[[Run], None]) -> None:
    """The cells after a refused Run.start still have the run before."""
    run = Run.start(recipe_in(tmp_path))
    run.finish()
    with pytest.raises(KitError, match="holds a finished run"):
        Run.start(recipe_in(tmp_path))
    before = everything(tmp_path)
    with pytest.raises(KitError, match="is a finished run, and stays as it is"):
        write_to(run)
    assert everything(tmp_path) == before
