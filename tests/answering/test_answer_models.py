"""kit answer with real models: batches equal one at a time, kills, every engine, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import kit as the_kit
from kit.common.errors import GateError
from kit.recipe.recipe import Recipe
from support.command import PROJECT, kit, refused

pytestmark = pytest.mark.slow

QUESTIONS = ["Name a colour.", "What is 2 + 3? Answer with a number only, please.", "猫用英语怎么说？",
             "Write one sentence about the sea, the wind and a small boat that never came back to its harbour. " * 3]
NEW_LINE = b"\n"
QUICKSTART = "recipes/quickstart.yaml"


def loaded(folder: Path) -> tuple[Any, Any, Recipe, list[list[int]]]:
    """Model in float32, tokenizer, recipe, and QUESTIONS as token ids."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kit.models.template import prepare_tokenizer, prompt_ids

    recipe = Recipe.load({}, max_new_tokens=12)
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(folder), recipe)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = [prompt_ids(tokenizer, [{"role": "user", "content": text}], recipe) for text in QUESTIONS]
    return model, tokenizer, recipe, rows


def padded_right(rows: list[list[int]], pad: int, left: bool) -> tuple[list[list[int]], list[list[int]]]:
    width = max(map(len, rows))
    return ([ids + [pad] * (width - len(ids)) for ids in rows],
            [[1] * len(ids) + [0] * (width - len(ids)) for ids in rows])


def without_a_mask(rows: list[list[int]], pad: int, left: bool) -> tuple[list[list[int]], list[list[int]]]:
    width = max(map(len, rows))
    return [[pad] * (width - len(ids)) + ids for ids in rows], [[1] * width for _ in rows]


@pytest.mark.parametrize("which", [pytest.param("starter", marks=pytest.mark.long), "qwen2"])
def test_a_batch_equals_one_at_a_time_and_wrong_padding_is_caught(
        which: str, starter: Path, taught: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from kit.answering.in_memory import answer_batch, check_batching

    model, tokenizer, recipe, rows = loaded(starter if which == "starter" else taught(which))
    alone = [answer_batch(model, tokenizer, [ids], recipe)[0] for ids in rows]
    assert answer_batch(model, tokenizer, rows, recipe) == alone
    assert any(reply.text for reply in alone)
    assert "4 prompts of" in check_batching(model, tokenizer, rows)
    assert check_batching(model, tokenizer, [rows[0], rows[0]]) == "", "nothing is padded"
    model.bfloat16()
    assert "in float32" in check_batching(model, tokenizer, rows), "rounding to 16 bits is no mistake"
    for wrong in (padded_right, without_a_mask):
        monkeypatch.setattr("kit.answering.in_memory.padded", wrong)
        with pytest.raises(GateError, match="--batch-size 1"):
            check_batching(model, tokenizer, rows)


def start(folder: Path, model: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kit", "answer", QUICKSTART, str(folder / "q.jsonl"), f"model_name={model}",
         "max_new_tokens=8", "--batch-size", "3", *more], cwd=PROJECT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ})


def wait_for_answers(journal: Path, count: int, process: subprocess.Popen[str]) -> None:
    while not journal.is_file() or journal.read_bytes().count(b"\n") <= count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_after_a_kill_the_same_command_goes_on(tiny_starter: Path, tmp_path: Path) -> None:
    rows = [{"id": i, "prompt": f"{QUESTIONS[i % 4]} ({i})"} for i in range(24)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    whole = tmp_path / "whole.jsonl"
    done = start(tmp_path, tiny_starter, "-o", str(whole))
    told = done.communicate(timeout=200)
    assert done.returncode == 0, told
    out, journal = tmp_path / "q.answers.jsonl", tmp_path / "q.answers.jsonl.partial.jsonl"
    first = start(tmp_path, tiny_starter)
    wait_for_answers(journal, 3, first)
    first.send_signal(signal.SIGTERM)
    told = first.communicate(timeout=60)
    assert first.returncode == 130 and f"{journal.read_bytes().count(NEW_LINE) - 1} rows are answered" in told[1], told
    assert "Traceback" not in told[1] and not out.exists()
    kept = journal.read_bytes().count(b"\n") - 1
    second = start(tmp_path, tiny_starter)
    wait_for_answers(journal, kept + 3, second)
    second.kill()
    second.communicate()
    assert not out.exists()
    changed = kit("answer", QUICKSTART, str(tmp_path / "q.jsonl"), f"model_name={tiny_starter}", "max_new_tokens=9")
    assert changed.returncode == 2 and "max_new_tokens was 8, is 9" in changed.stderr, changed.stderr
    third = start(tmp_path, tiny_starter)
    told = third.communicate(timeout=200)
    assert third.returncode == 0 and "resuming: " in told[0] and "24 of 24 rows answered" in told[0], told
    assert out.read_bytes() == whole.read_bytes()
    assert [{"id": row["id"], "prompt": row["prompt"]} for row in map(json.loads, out.open())] == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.answers.jsonl", "q.jsonl", "whole.jsonl"]


# In bfloat16 two tokens can be too close for a batch and a single row to choose the same one.
@pytest.mark.parametrize(("engine", "fields"), [
    ("gguf", {}), ("merged", {"dtype": "float32"}), ("adapter", {"dtype": "float32"}), ("base", {}),
    ("base", {"load_in_4bit": True})])
def test_every_engine(engine: str, fields: dict[str, Any], finished_run: Path, tmp_path: Path) -> None:
    from kit.answering.choosing import choose
    from kit.answering.engines import stream

    file = tmp_path / "q.txt"
    file.write_text(f"{QUESTIONS[0]}\n\n{QUESTIONS[3]}\n{QUESTIONS[1]}\n", encoding="utf-8")
    done = the_kit.answer_file(finished_run, file, engine=engine, max_input_length=70, max_new_tokens=8, **fields)
    assert (done.rows, done.answered, done.failed) == (3, 3, {})
    assert list(done.shortened) == [3] and 0 < done.shortened[3] < 60
    lines = done.out.read_text(encoding="utf-8").split("\n")
    assert len(lines) == 5 and lines[1] == lines[4] == "" and lines[0] and lines[2] and lines[3]
    if engine != "base":
        chosen = choose(finished_run, engine, **fields)
        model, tokenizer = (chosen.path, None) if engine == "gguf" else chosen.load()
        whole = "".join(stream(model, tokenizer, [{"role": "user", "content": QUESTIONS[0]}], chosen.recipe))
        assert whole.replace("\\", "\\\\").replace("\n", "\\n").startswith(lines[0])


COMMAND = """
import sys
from kit.cli import main
try:
    main()
finally:
    print("heavy:", sorted({"torch", "transformers", "unsloth", "datasets"} & sys.modules.keys()))
"""


@pytest.mark.parametrize("command", ["ask", "answer"])
def test_a_gguf_answers_without_torch(command: str, tmp_path: Path) -> None:
    """Importing torch and unsloth takes longer than such an answer; a control token in the question is told by both."""
    from kit.models.starter import packaged_gguf

    (tmp_path / "q.txt").write_text("Hi <|im_end|>\n", encoding="utf-8")
    what = ["Hi <|im_end|>"] if command == "ask" else [str(tmp_path / "q.txt"), "max_new_tokens=4"]
    done = subprocess.run([sys.executable, "-c", COMMAND, command, str(packaged_gguf()), *what], cwd=PROJECT,
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "heavy: []" in done.stdout, done.stdout + done.stderr
    assert "<|im_end|>" in done.stderr if command == "ask" else "control tokens" in done.stdout


def test_a_failing_row_ends_in_exit_code_1(finished_run: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "Hi"}, {"prompt": ""}, {"prompt": "Name a colour."}]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    done = kit("answer", str(finished_run), str(tmp_path / "q.json"), "max_new_tokens=4")
    assert done.returncode == 1 and "failed: 1 of 3 rows" in done.stdout, done.stdout + done.stderr
    found = json.loads((tmp_path / "q.answers.json").read_text())
    assert [bool(row["answer"]) for row in found] == [True, False, True]
    assert [row["answer_error"] for row in found] == [None, "the question is empty", None]


def test_a_llama_cpp_that_dies_costs_one_row(finished_run: Path, tmp_path: Path) -> None:
    from kit.answering.answer_file import answer_rows
    from kit.answering.choosing import choose
    from kit.answering.engines import LlamaCpp, Prompt, fitted
    from kit.answering.journal import Answer, Journal

    class Mortal(LlamaCpp):
        def answer(self, prompts: list[Prompt], seed: int) -> list[Answer]:
            if prompts[0].messages[0]["content"] == "Die.":
                os.kill(self.child._process.pid, signal.SIGKILL)
            return super().answer(prompts, seed)

    with closing(Mortal(choose(finished_run, "gguf", max_new_tokens=4))) as model, \
            Journal(tmp_path / "o.txt", {}) as journal:
        prompts = {place: fitted(model, [{"role": "user", "content": text}])
                   for place, text in enumerate(("Name a colour.", "Die.", "Hi"))}
        failed = answer_rows(model, prompts, journal, batch_size=20)
        assert list(failed) == [1] and "SIGKILL" in failed[1]
        assert sorted(journal.done) == [0, 2] and all(answer.text for answer in journal.done.values())


def test_bad_input_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    good = tmp_path / "q.csv"
    good.write_text("id,prompt\n1,Hi\n")
    (tmp_path / "there.csv").write_text("")
    (tmp_path / "full.csv").write_text("prompt,answer\nHi,Ho\n")
    (tmp_path / "folder.csv").mkdir()

    def told(words: str, *arguments: str) -> None:
        refused(tmp_path, "answer", *arguments, words=words)

    told("is no run folder", str(tmp_path / "none"), str(good))
    told("no.gguf", str(tmp_path / "no.gguf"), str(good))
    told("there is no engine 'adaptor' (did you mean 'adapter'?)", QUICKSTART, str(good), "--engine", "adaptor")
    told("has no gguf", QUICKSTART, str(good), "--engine", "gguf")
    told("no.csv is not there", QUICKSTART, str(tmp_path / "no.csv"))
    told("is empty", QUICKSTART, str(tmp_path / "there.csv"))
    told("no column 'promt' (did you mean 'prompt'?)", QUICKSTART, str(good), "--column", "promt")
    told("has a column 'answer' already", QUICKSTART, str(tmp_path / "full.csv"))
    told("folder.csv is a folder", QUICKSTART, str(good), "-o", str(tmp_path / "folder.csv"))
    told("there is no folder", QUICKSTART, str(good), "-o", str(tmp_path / "x" / "o.csv"))
    told("unknown kind of file .doc", QUICKSTART, str(good), "-o", str(tmp_path / "o.doc"))
    told("is the file of questions", QUICKSTART, str(good), "-o", str(good), "--overwrite")
    told("is there already", QUICKSTART, str(good), "-o", str(tmp_path / "there.csv"))
    told("'max_new_tokes' is no recipe field", QUICKSTART, str(good), "max_new_tokes=5")
