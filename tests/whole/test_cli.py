"""The command: bad input is told in two lines, exits with 2 and leaves nothing half-written."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from support.command import PROJECT, kit, refused


def test_import_is_light() -> None:
    code = ("import sys, time; t = time.perf_counter(); import kit; s = time.perf_counter() - t\n"
            "assert s < 0.3, s\n"
            "assert not {'torch', 'transformers', 'unsloth', 'pydantic'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True, timeout=60)


def test_help_is_quick_and_names_the_commands() -> None:
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = kit("--help")
        seconds.append(time.perf_counter() - began)
    assert done.returncode == 0 and all(name in done.stdout for name in ("run", "train", "ask"))
    assert min(seconds) < 0.6, seconds


def test_bad_recipes(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    out = f"output_dir={tmp_path}"
    for text, words in (("r: [1\n", "not YAML"), ("learning_rat: 1\n", "did you mean 'learning_rate'"),
                        ("r: many\n", f"{recipe}:1: r: 'many'"),
                        ("gguf: [q9]\n", "f16, bf16, q8_0, q5_k_m, q4_k_m")):
        recipe.write_text(text)
        refused(tmp_path, "run", str(recipe), words=words)
    refused(tmp_path, "run", "recipes/nothing.yaml", words="there is no recipe")
    refused(tmp_path, "run", "recipes/quickstart.yaml", out, "max_stepps=3", words="did you mean 'max_steps'")
    refused(tmp_path, "train", "recipes/quickstart.yaml", out, "r", words="'r' is not field=value")


def test_bad_data(tmp_path: Path) -> None:
    out = f"output_dir={tmp_path}"
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    refused(tmp_path, "run", "recipes/quickstart.yaml", out, f"dataset={empty}", words="is empty")
    refused(tmp_path, "run", "recipes/quickstart.yaml", out, f"dataset={tmp_path}/no.jsonl", words="there is no")
    (tmp_path / "a.doc").write_text("a,b\n")
    refused(tmp_path, "run", "recipes/quickstart.yaml", out, f"dataset={tmp_path}/a.doc", words="unknown kind of file")


@pytest.mark.slow
def test_a_bad_row_fails_the_data_check_before_anything_is_trained(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "Where?", "output": "Here."}\n{"instruction": "Who?"}\n')
    done = kit("train", "recipes/quickstart.yaml", f"output_dir={tmp_path}/runs", f"dataset={rows}", timeout=120)
    assert done.returncode == 1 and "row 2" in done.stderr, done.stdout + done.stderr
    assert not list(tmp_path.rglob("adapter")) and not list(tmp_path.rglob("log.jsonl"))


def test_bad_models(tmp_path: Path) -> None:
    out = f"output_dir={tmp_path}"
    refused(tmp_path, "run", "recipes/quickstart.yaml", out, f"model_name={tmp_path}", words="no config.json")
    refused(tmp_path, "run", "recipes/quickstart.yaml", out, "model_name=/no/model", words="does not exist")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\x10")
    refused(tmp_path, "run", "recipes/quickstart.yaml", out, f"model_name={tmp_path}", words="damaged")


def test_too_little_disk_says_how_much_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from kit.common.errors import KitError
    from kit.readiness.doctor import preflight
    from kit.recipe.recipe import Recipe

    whole = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: whole._replace(free=100_000_000))
    recipe = Recipe.load({}, gguf=["f16", "q8_0"], output_dir=str(tmp_path / "runs"))
    with pytest.raises(KitError, match=r"0\.7\d GB needed, 0\.10 GB free"):
        preflight(recipe)
    assert not (tmp_path / "runs").exists()


def test_a_finished_run_is_kept(tmp_path: Path) -> None:
    from kit.recipe.recipe import Recipe
    from kit.runs.run import Run

    Run.start(Recipe.load({}, run_name="quickstart", output_dir=str(tmp_path))).finish()
    refused(tmp_path, "run", "recipes/quickstart.yaml", f"output_dir={tmp_path}", words="--overwrite")
    # A mistake together with --overwrite must not cost the old run either.
    refused(tmp_path, "run", "recipes/quickstart.yaml", f"output_dir={tmp_path}", "--overwrite",
            "dataset=nowhere.jsonl", words="there is no nowhere.jsonl")


def test_a_finished_run_that_is_replaced_can_not_speak_for_the_new_one(tmp_path: Path) -> None:
    """With `overwrite` set, too, it goes before the kernel starts: one that dies at once has not finished."""
    from kit.batch import _validated
    from kit.recipe.recipe import Recipe
    from kit.runs.run import Run, read_result

    run = Run.start(Recipe.load({}, run_name="quickstart", output_dir=str(tmp_path)))
    run.finish()
    _validated("recipes/quickstart.yaml", {"output_dir": str(tmp_path), "overwrite": True}, overwrite=False)
    assert read_result(run.folder) == {}


def test_runs_are_listed_with_what_became_of_them(tmp_path: Path) -> None:
    from kit.recipe.recipe import Recipe
    from kit.runs.run import Run

    for name in ("done", "broken"):
        run = Run.start(Recipe.load({}, run_name=name, output_dir=str(tmp_path)))
        run.stage("train")
        if name == "done":
            run.note(scores={"before": {"exact": 0.25}, "after": {"exact": 0.5}},
                     answered={"rows": 20, "before": 12, "after": 8})
            run.finish()
        else:
            run.fail("no memory")
    listed = kit("list", str(tmp_path))
    rows = {line.split()[0]: line for line in listed.stdout.splitlines() if line.strip()}
    assert listed.returncode == 0 and "50.0% of 8 " in rows["done"] and "finished" in rows["done"], listed
    assert "failed at train" in rows["broken"] and "not verified" in rows["broken"]
    # What was verified before the run was made again, or is about other files, counts here as little as on its page.
    verify = {"passed": True, "gates": [{"name": "sha256", "passed": True, "figure": "1 file"}],
              "checked": "2099-01-01T00:00:00+0000", "artefacts": None}
    for checked, word in ((verify, "VERIFIED"), ({**verify, "checked": "2001-01-01T00:00:00+0000"}, "not verified"),
                          ({**verify, "artefacts": {"a": "b"}}, "not verified"),
                          ({**verify, "gates": [{**verify["gates"][0], "passed": False}], "passed": False}, "FAILED")):
        (tmp_path / "done" / "verify.json").write_text(json.dumps(checked))
        assert word in next(line for line in kit("list", str(tmp_path)).stdout.splitlines() if "done" in line)
    assert kit("list", str(tmp_path / "nowhere")).returncode == 2
    assert kit("--version").stdout.startswith("kit ")


def test_lists_on_the_command_line_take_commas(tmp_path: Path) -> None:
    refused(tmp_path, "export", str(tmp_path), "--gguf", "q8_0,q9", words="'q9'")
    refused(tmp_path, "export", str(tmp_path), "--gguf", "q8_0, f16", words="is no run folder")


def test_ask_needs_a_run_or_a_whole_file(tmp_path: Path) -> None:
    refused(tmp_path, "ask", str(tmp_path / "nothing"), "Hi", words="is no run folder")
    refused(tmp_path, "ask", str(tmp_path / "no.gguf"), "Hi", words="no.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x00" * 4)
    refused(tmp_path, "ask", str(cut), "Hi", words="cut.gguf")


def commands() -> dict[str, Any]:
    from typer.main import get_command

    from kit.cli import app

    return get_command(app).commands  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_help_ends_with_an_example_that_can_be_copied(name: str) -> None:
    from kit.cli import app, parsed
    from kit.recipe.recipe import Recipe

    command = commands()[name]
    label, _, example = command.epilog.partition(": ")
    said = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "80"}).output
    assert label == "Example" and f"{label}: {example}\n" in re.sub(" +\n", "\n", said), "on one line, as it is typed"
    words = shlex.split(example)
    assert words[:2] == ["kit", name]
    given = command.make_context(name, words[2:]).params  # a wrong option or argument is an error here
    for word in words[2:]:
        assert not word.startswith(("recipes/", "data/")) or (PROJECT / word).is_file(), word
    if given.get("recipe"):
        Recipe.load(given["recipe"], **parsed(given["fields"]))
    else:
        parsed(given.get("fields"))
