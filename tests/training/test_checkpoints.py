"""Which checkpoint counts: the manifest, what is refused and why, what is kept. No model is loaded here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.common.errors import KitError
from kit.recipe.recipe import Recipe
from kit.training import checkpoints
from kit.training.checkpoints import (
    MANIFEST,
    identity,
    newest,
    problem,
    restore_log,
    rotate,
    rows_sha256,
    seal,
    source,
)
from kit.training.evaluate import since_best
from kit.training.saving import best_step

MADE_OF = {"training rows": "a" * 64, "chat template": "b" * 64, "processes": 1, "per_device_train_batch_size": 2}
FILES = ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json",
         "accumulated_0.json", "deep/global_step/shard.pt")


def write(folder: Path, step: int, **made_of: Any) -> Path:
    """A checkpoint as a trainer leaves it, sealed."""
    path = folder / f"checkpoint-{step}"
    for name in FILES:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(f"{name} of step {step}".encode() * 50)
    log = folder.parent / "log.jsonl"
    log.write_text("".join(json.dumps({"step": n}) + "\n" for n in range(1, step + 1)))
    seal(path, {**MADE_OF, **made_of}, 12.5 * step, log)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def test_the_newest_sound_one_counts(folder: Path) -> None:
    assert newest(folder, MADE_OF) is None
    for step in (2, 10, 4):
        write(folder, step)
    found = newest(folder, MADE_OF)
    assert found == (folder / "checkpoint-10", 10, 125.0)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["missing", "cut", "longer", "flipped", "empty"])
def test_a_harmed_one_is_skipped_with_its_reason(name: str, harm: str, folder: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, 2)
    path = write(folder, 4) / name
    data = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": data[:-1], "longer": data + b"x", "flipped": data[:-1] + bytes([data[-1] ^ 1]),
                          "empty": b""}[harm])
    found = newest(folder, MADE_OF)
    assert found and found.step == 2
    said = capsys.readouterr().out
    assert "checkpoint-4 is skipped" in said and name in said
    # Out of the trainer's way, and kept until a later one is sealed.
    assert not (folder / "checkpoint-4").exists() and (folder / "checkpoint-4.broken").is_dir()


def test_power_off_between_any_two_writes(folder: Path) -> None:
    """Files appear one after the other, the manifest last: whatever is missing at the end, step 2 counts."""
    write(folder, 2)
    whole = write(folder, 4)
    aside = folder.parent / "aside"
    shutil.move(whole, aside)
    files = [path.relative_to(aside) for path in aside.rglob("*") if path.is_file() and path.name != MANIFEST]
    for count in range(len(files) + 1):
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir()
        for name in files[:count]:
            (whole / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(aside / name, whole / name)
        found = newest(folder, MADE_OF)
        assert found and found.step == 2, count
    shutil.copytree(aside, whole)
    found = newest(folder, MADE_OF)
    assert found and found.step == 4


@pytest.mark.parametrize("text", ["", "{", "[]", '"text"', "{}", '{"files": {}}', '{"files": 1, "step": 4}', "\x00\x01",
                                  '{"files": {"optimizer.pt": {}}, "step": 4}'])
def test_a_manifest_that_is_none(text: str, folder: Path) -> None:
    path = write(folder, 4)
    (path / MANIFEST).write_text(text)
    assert "manifest" in problem(path)
    assert newest(folder, MADE_OF) is None


def test_one_that_was_renamed_is_not_of_that_step(folder: Path) -> None:
    write(folder, 4).rename(folder / "checkpoint-9")
    assert "that of step 4" in problem(folder / "checkpoint-9")


@pytest.mark.parametrize("now, told", [
    ({"training rows": "c" * 64}, "the training rows changed"),
    ({"chat template": "c" * 64}, "the chat template changed"),
    ({"processes": 2}, "processes: 1 → 2"),
    ({"per_device_train_batch_size": 4}, "per_device_train_batch_size: 2 → 4"),
    ({"learning_rate": 0.1}, "learning_rate: None → 0.1"),
])
def test_a_changed_training_is_refused_with_what_changed(now: dict[str, Any], told: str, folder: Path) -> None:
    write(folder, 4)
    with pytest.raises(KitError, match="checkpoint-4") as caught:
        newest(folder, {**MADE_OF, **now})
    assert told in caught.value.message and "--overwrite" in caught.value.hint


def test_fields_that_change_the_training_are_compared() -> None:
    for name in ("learning_rate", "seed", "max_steps", "lora_alpha", "packing", "weight_decay", "prompt_style",
                 "logging_steps", "eval_steps", "early_stopping_patience", "train_sampling_strategy"):
        assert name in checkpoints.TRAINED


def test_rotation_keeps_the_newest_and_the_best(folder: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        write(folder, step)
    (folder / "checkpoint-3.broken").mkdir()
    (folder / "checkpoint-notes").mkdir()
    rotate(folder, 2, best=4)
    assert {path.name for path in folder.iterdir()} == {"checkpoint-4", "checkpoint-8", "checkpoint-10",
                                                        "checkpoint-notes"}
    rotate(folder, None, best=None)
    assert len(list(folder.iterdir())) == 4


def test_the_log_is_that_of_the_checkpoint(folder: Path) -> None:
    path = write(folder, 4)
    log = folder.parent / "log.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 5}) + "\n")
    restore_log(path, log)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3, 4]


@pytest.mark.slow
def test_rows_are_told_apart_by_tokens_labels_and_order() -> None:
    from datasets import Dataset

    def digest(ids: list[list[int]], labels: list[list[int]]) -> str:
        return rows_sha256(Dataset.from_dict({"input_ids": ids, "labels": labels}))

    same = digest([[1, 2], [3]], [[-100, 2], [3]])
    assert same == digest([[1, 2], [3]], [[-100, 2], [3]])
    others = [digest([[1], [2, 3]], [[-100], [2, 3]]), digest([[3], [1, 2]], [[3], [-100, 2]]),
              digest([[1, 2], [3]], [[1, 2], [3]]), digest([[1, 2]], [[-100, 2]])]
    assert len({same, *others}) == 5
    talks = Dataset.from_dict({"messages": [[{"role": "user", "content": "a"}]]})
    lazy = talks.with_transform(lambda batch: {"input_ids": [[1]], "labels": [[1]]})
    assert rows_sha256(talks) == rows_sha256(lazy) != same
    chosen = Dataset.from_dict({"input_ids": [[9], [3], [1, 2]], "labels": [[9], [3], [-100, 2]]}).select([2, 1])
    assert rows_sha256(chosen) == same


@given(st.lists(st.floats(0, 10), max_size=12), st.floats(0, 1))
def test_patience_counts_what_came_after_the_best(losses: list[float], threshold: float) -> None:
    count = since_best(losses, threshold)
    assert 0 <= count <= len(losses)
    if threshold == 0 and losses:
        assert count == len(losses) - 1 - losses.index(min(losses))
    assert since_best([*losses, -1.0 - threshold], threshold) == 0


def test_the_best_step_is_the_first_of_the_lowest() -> None:
    history = [{"step": 2, "eval_loss": 1.5}, {"step": 2, "loss": 0.1}, {"step": 4, "eval_loss": 1.0},
               {"step": 6, "eval_loss": 1.0}]
    assert best_step(history) == 4 and best_step([]) is None


def rows_in(path: Path, *answers: str) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": text}) + "\n" for n, text in
                            enumerate(answers)), encoding="utf-8")
    return path


@pytest.mark.slow
def test_what_makes_a_checkpoint_unusable_is_told_before_the_run_begins(tmp_path: Path) -> None:
    """A run that was stopped: the settings, the data file and what picks its rows are compared at once."""
    from kit.data.formatting import load_data
    from kit.models.template import load_tokenizer
    from kit.readiness.doctor import preflight

    data = rows_in(tmp_path / "a.jsonl", "yes", "no", "maybe")
    given = {"run_name": "r", "output_dir": str(tmp_path), "dataset": str(data), "gguf": [], "save_merged": "none"}

    def recipe(**more: Any) -> Recipe:
        return Recipe.load({}, **{**given, **more})

    first = recipe()
    preflight(first)
    tokenizer = load_tokenizer(first)
    made = tmp_path / "r" / "checkpoints" / "checkpoint-2"
    made.mkdir(parents=True)
    (tmp_path / "r" / "result.json").write_text('{"status": "stopped", "stage": "train"}')
    seal(made, identity(first, tokenizer, load_data(first, tokenizer)["train"], None), 1.0, tmp_path / "log",
         source(first, [checkpoints.sha256(data)]))

    def refused(chosen: Recipe) -> str:
        try:
            preflight(chosen)
        except KitError as error:
            assert "--overwrite" in error.hint
            return error.message.rpartition("has changed: ")[2]
        return ""

    assert refused(recipe()) == "" and refused(recipe(max_new_tokens=7)) == ""
    assert refused(recipe(learning_rate=0.5)) == "learning_rate: 0.0002 → 0.5"
    assert refused(recipe(learning_rate=0.5, resume_from_checkpoint=False)) == ""
    moved = shutil.copyfile(data, tmp_path / "moved.jsonl")
    assert refused(recipe(dataset=str(moved))) == "", "the same rows, in another place"
    assert refused(recipe(max_train_samples=3)) == "", "all there are"
    assert refused(recipe(max_train_samples=2)) == "the training rows changed"
    rows_in(data, "yes", "no", "never")
    assert refused(recipe()) == "the training rows changed"
    (tmp_path / "r" / "result.json").write_text('{"status": "finished", "stage": "done"}')
    assert refused(recipe(overwrite=True)) == "", "a finished run is replaced as a whole"
