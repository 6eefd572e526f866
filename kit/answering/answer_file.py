"""Answers to a whole file: in batches of like length, kept as they come, written in the file's order."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from kit.answering.engines import Engine, choose
from kit.answering.infer import by_length
from kit.answering.journal import Answer, Journal
from kit.answering.question_files import LONGEST_CELL, Questions, known_kind, read_questions, write_answers
from kit.answering.row_engines import InMemory, LlamaCpp, Prompt, fitted
from kit.common.errors import GateError, KitError
from kit.common.files import sha256
from kit.common.show import bar, clock

# What an answer depends on besides model and question.
SETTINGS = ("prompt_style", "system_prompt", "enable_thinking", "max_new_tokens", "temperature", "top_p", "top_k",
            "min_p", "repetition_penalty", "seed", "dtype", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type",
            "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
GIVE_UP = 20  # failures in a row: then it is not the rows
SHOWN = 5  # rows named in what is told at the end


class Answered(NamedTuple):
    """What became of a file's rows. `failed` and `shortened` are by row, from 1; `seconds` are those of this call.

    Blank lines of a .txt have numbers, but are no rows.
    """

    out: Path
    rows: int
    answered: int
    cut_off: int  # answers that max_new_tokens ended
    shortened: dict[int, int]  # tokens cut from the middle of the prompt
    failed: dict[int, str]
    seconds: float
    tokens_per_second: float

    def __str__(self) -> str:
        lines = [f"{self.out}: {self.answered:,} of {self.rows:,} rows answered in {clock(self.seconds)}, "
                 f"{self.tokens_per_second:.0f} tokens/s"]
        if self.cut_off:
            lines.append(f"cut off at max_new_tokens: {self.cut_off:,} answers")
        if self.shortened:
            lines.append(f"longer than max_input_length: {len(self.shortened):,} prompts, which lost "
                         f"{sum(self.shortened.values()):,} tokens from their middle (row {_first(self.shortened)})")
        if self.failed:
            lines.append(f"failed: {len(self.failed):,} of {self.rows:,} rows")
            lines += [f"  row {row}: {why}" for row, why in list(self.failed.items())[:SHOWN]]
            lines += ["  …"] * (len(self.failed) > SHOWN)
        return "\n".join(lines)


def answer_file(run: str | Path, file: str | Path, out: str | Path | None = None, *, engine: str | None = None,
                column: str | None = None, answer_column: str = "answer", batch_size: int = 20,
                overwrite: bool = False, **fields: Any) -> Answered:
    """Answer every question of a file and write them, with all other columns, to `out` (<stem>.answers<suffix>).

    `run` is a run's name or folder, a .gguf, or a recipe file (its base model); `engine` as in kit.answering.engines;
    `fields` are recipe fields set on top. kit.answering.question_files says which files are read and where a question
    stands in them. The answer comes into `answer_column`; what became of it into <answer_column>_error, if any row
    failed, and <answer_column>_note, if any answer or prompt was cut. Answers are kept in `out`.partial.jsonl as they
    come: the same call resumes after a kill. Raises KitError for bad input, GateError where batches get other answers.
    """
    chosen = choose(str(run), engine, **fields)
    questions = read_questions(Path(file), column, chosen.recipe.columns)
    target = Path(out) if out else Path(file).with_name(f"{Path(file).stem}.answers{Path(file).suffix}")
    _check_target(target, questions, answer_column, overwrite)
    if batch_size < 1:
        raise KitError(f"batch size {batch_size}: at least one row is answered at a time", "--batch-size 20")
    total = len(questions.asked) + len(questions.faults)
    began = time.perf_counter()
    with Journal(target, _about(chosen, questions), overwrite) as journal, _sigterm_like_ctrl_c():
        before = sum(answer.tokens for answer in journal.done.values())
        if journal.done:
            print(f"going on: {len(journal.done):,} rows are answered already")
        try:
            with closing(LlamaCpp(chosen) if chosen.name == "gguf" else InMemory(chosen)) as model:
                prompts, failed = _prompts(model, questions)
                print(f"{len(prompts):,} questions from {questions.column!r}, answered by {chosen.name}"
                      + (f" ({chosen.path.name})" if chosen.name == "gguf" and chosen.path else ""))
                loaded = time.perf_counter()
                failed |= answer_rows(model, prompts, journal, batch_size)
                ended = time.perf_counter()
        except KeyboardInterrupt:
            print(f"\n{len(journal.done):,} of {total:,} rows are answered; the same command goes on",
                  file=sys.stderr)
            raise
        shortened = {place: prompt.cut for place, prompt in prompts.items() if prompt.cut}
        _write(target, questions, answer_column, journal.done, failed, shortened)
        journal.remove()
    answers = journal.done.values()
    return Answered(target, total, len(answers), sum(not answer.stopped for answer in answers),
                    {place + 1: cut for place, cut in shortened.items()},
                    {place + 1: failed[place] for place in sorted(failed)}, ended - began,
                    (sum(answer.tokens for answer in answers) - before) / (ended - loaded))


def _prompts(model: InMemory | LlamaCpp, questions: Questions) -> tuple[dict[int, Prompt], dict[int, str]]:
    """By place of the row: what the model will get, and why a row can't be asked."""
    prompts, failed = {}, dict(questions.faults)
    with bar(len(questions.asked), "reading questions", "row", leave=False, delay=2) as progress:
        for place, messages in questions.asked.items():
            try:
                prompts[place] = fitted(model, messages)
            except KitError as error:
                failed[place] = error.message
            progress.update()
    return prompts, failed


def answer_rows(model: InMemory | LlamaCpp, prompts: dict[int, Prompt], journal: Journal,
                batch_size: int) -> dict[int, str]:
    """Answer what the journal lacks, and add it there; returned is why rows failed, by place.

    Batches are made of all rows, answered or not: so one that is done again after a kill has the same neighbours, and
    rounding the same result.
    """
    places, limit = sorted(prompts), batch_size if model.together else 1
    batches = [[places[i] for i in batch] for batch in by_length([len(prompts[p].ids) for p in places], limit)]
    todo = [batch for batch in reversed(batches) if not journal.done.keys() >= set(batch)]
    if limit > 1 and todo and (proof := model.prove(list(prompts.values()))):
        print(proof)
    failed: dict[int, str] = {}
    in_a_row = 0
    with bar(len(places), "answering", "row", initial=len(places) - sum(map(len, todo))) as progress:
        while todo:
            batch = todo.pop()
            if len(batch) > limit:
                todo += reversed(_split(batch, limit))
                continue
            try:
                # Drawn anew for each batch, sampled answers are the same after a kill.
                found = model.answer([prompts[place] for place in batch], (model.recipe.seed + batch[0]) % 2**32)
            except Exception as error:
                if len(batch) == 1:
                    failed[batch[0]] = _reason(error)
                    in_a_row += 1
                    progress.update()
                elif _out_of_memory(error):
                    limit = len(batch) // 2
                    todo.append(batch)
                    progress.write(f"out of memory: from here on {limit} rows at a time", file=sys.stderr)
                else:
                    todo += reversed(_split(batch, 1))
                    progress.write(f"{len(batch)} rows failed together and are asked one by one: {_reason(error)}",
                                   file=sys.stderr)
                if in_a_row == GIVE_UP:
                    raise GateError(f"{GIVE_UP} rows failed one after the other, the last with: {_reason(error)}",
                                    "the answers so far are kept: the same command goes on") from error
            else:
                in_a_row = 0
                journal.add(dict(zip(batch, found, strict=True)))
                progress.update(len(batch))
    return {place: why for place, why in failed.items() if place not in journal.done}


def _split(batch: list[int], size: int) -> list[list[int]]:
    return [batch[start:start + size] for start in range(0, len(batch), size)]


def _out_of_memory(error: Exception) -> bool:
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def _reason(error: Exception) -> str:
    if isinstance(error, KitError):
        return error.message
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _check_target(target: Path, questions: Questions, answer_column: str, overwrite: bool) -> None:
    known_kind(target)
    if target.is_dir():
        raise KitError(f"{target} is a folder", "name a file with -o")
    if not target.parent.is_dir():
        raise KitError(f"{target}: there is no folder {target.parent}", "make it first")
    if target.resolve() == questions.path.resolve():
        raise KitError(f"{target} is the file of questions", "name another one with -o")
    if target.exists() and not overwrite:
        raise KitError(f"{target} is there already", "name another one with -o, or --overwrite to replace it")
    taken = [name for name in _columns(answer_column) if name in questions.columns]
    if taken:
        raise KitError(f"{questions.path} has a column {taken[0]!r} already", "--answer-column NAME for another name")


def _columns(answer_column: str) -> tuple[str, str, str]:
    return answer_column, f"{answer_column}_error", f"{answer_column}_note"


def _about(engine: Engine, questions: Questions) -> dict[str, Any]:
    """What answers depend on: the same again, or it is another request."""
    recipe = engine.recipe
    if engine.path is None:
        model: Any = f"{recipe.model_name} {recipe.revision or ''}".strip()
    else:
        files = [engine.path] if engine.path.is_file() else sorted(engine.path.iterdir())
        model = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    return {"file": str(questions.path.resolve()), "sha256": sha256(questions.path), "column": questions.column,
            "engine": engine.name, "model": model,
            "settings": {**{name: getattr(recipe, name) for name in SETTINGS},
                         "max_input_length": recipe.max_input_length or recipe.max_seq_length}}


def _write(target: Path, questions: Questions, answer_column: str, done: dict[int, Answer], failed: dict[int, str],
           shortened: dict[int, int]) -> None:
    notes = {place: f"{cut} tokens cut from the middle of the prompt" for place, cut in shortened.items()}
    for place, answer in done.items():
        if not answer.stopped:
            notes[place] = "; ".join(filter(None, ("cut off at max_new_tokens", notes.get(place))))
        if target.suffix.lower() == ".xlsx" and len(answer.text) > LONGEST_CELL:
            failed[place] = f"a cell holds {LONGEST_CELL:,} characters, the answer has {len(answer.text):,}: it is cut"
    name, error, note = _columns(answer_column)
    every = range(len(questions.rows))
    added = {name: [done[place].text if place in done else None for place in every]}
    for column, said in ((error, failed), (note, notes)):
        if said:
            added[column] = [said.get(place) for place in every]
    write_answers(target, questions, added)


def _first(rows: dict[int, int]) -> str:
    return ", ".join(str(row) for row in list(rows)[:SHOWN]) + (", …" if len(rows) > SHOWN else "")


@contextmanager
def _sigterm_like_ctrl_c() -> Iterator[None]:
    """Inside, SIGTERM stops as Ctrl-C does; Python lets only the main thread ask for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
