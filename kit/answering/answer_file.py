"""Answers to a whole file: in batches of like length, kept as they come, written in the file's order."""

import sys
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from kit.answering.engines import Engine, InMemory, LlamaCpp, Prompt, choose, fitted, said_of
from kit.answering.journal import Answer, Journal
from kit.answering.question_files import LONGEST_CELL, Questions, known_suffix, read_questions, write_answers
from kit.answering.replies import by_length
from kit.common.errors import GateError, KitError, one_line
from kit.common.files import sha256
from kit.common.show import bar, duration
from kit.recipe.fields import fields_affecting

GIVE_UP = 20  # failures in a row: then it is not the rows
SHOWN = 5  # rows named in the summary


class Answered(NamedTuple):
    """What became of a file's rows. `failed` and `shortened` are by row, from 1; `seconds` are those of this call.

    Blank lines of a .txt have numbers, but are no rows.
    """

    out: Path
    rows: int
    answered: int
    cut_off: int  # answers that max_new_tokens ended
    shortened: dict[int, int]  # tokens cut from the middle of the prompt
    typed: dict[int, str]  # control tokens in the question, which the model takes for its own
    failed: dict[int, str]
    seconds: float
    tokens_per_second: float

    def __str__(self) -> str:
        lines = [f"{self.out}: {self.answered:,} of {self.rows:,} rows answered in {duration(self.seconds)}, "
                 f"{self.tokens_per_second:.0f} tokens/s"]
        if self.cut_off:
            lines.append(f"cut off at max_new_tokens: {self.cut_off:,} answers")
        if self.shortened:
            lines.append(f"longer than max_input_length: {len(self.shortened):,} prompts, which lost "
                         f"{sum(self.shortened.values()):,} tokens from their middle ({_rows(self.shortened)})")
        if self.typed:
            lines.append(f"control tokens in the question, which the model takes for its own: {len(self.typed):,} rows "
                         f"({_rows(self.typed)})")
        if self.failed:
            lines.append(f"failed: {len(self.failed):,} of {self.rows:,} rows")
            lines += [f"  row {row}: {why}" for row, why in list(self.failed.items())[:SHOWN]]
            lines += ["  …"] * (len(self.failed) > SHOWN)
        return "\n".join(lines)


def _rows(places: Iterable[int]) -> str:
    numbers = list(places)
    return f"row {', '.join(map(str, numbers[:SHOWN]))}{', …' * (len(numbers) > SHOWN)}"


def answer_file(run: str | Path, file: str | Path, out: str | Path | None = None, *, engine: str | None = None,
                column: str | None = None, answer_column: str = "answer", batch_size: int = 20,
                overwrite: bool = False, **fields: Any) -> Answered:
    """Answer every question of a file and write them, with all other columns, to `out` (<stem>.answers<suffix>).

    `run` is a run's name or folder, a .gguf, or a recipe file (its base model); `engine` as in kit.answering.engines;
    `fields` are recipe fields set on top. kit.answering.question_files says which files are read and where a question
    stands in them. The answer comes into `answer_column`; what became of it into <answer_column>_error, if any row
    failed, and <answer_column>_note, if any answer or prompt was cut or holds a control token. Answers are kept in
    `out`.partial.jsonl as they come: the same call resumes after a kill. Raises KitError for bad input, GateError where
    batches get other answers.
    """
    selected = choose(str(run), engine, **fields)
    questions = read_questions(Path(file), column, selected.recipe.columns)
    target = Path(out) if out else Path(file).with_name(f"{Path(file).stem}.answers{Path(file).suffix}")
    columns = [answer_column, f"{answer_column}_error", f"{answer_column}_note"]
    _check_request(target, questions, columns, overwrite, batch_size)
    began = time.perf_counter()
    with Journal(target, _request(selected, questions), overwrite) as journal:
        tokens_before = sum(answer.tokens for answer in journal.done.values())
        if journal.done:
            print(f"resuming: {len(journal.done):,} rows are answered already")
        with closing(LlamaCpp(selected) if selected.name == "gguf" else InMemory(selected)) as model:
            prompts, failed = _prompts(model, questions)
            print(f"{len(prompts):,} questions from {questions.column!r}, answered by {selected.name}"
                  + (f" ({selected.path.name})" if selected.name == "gguf" and selected.path else ""))
            loaded = time.perf_counter()
            failed |= answer_rows(model, prompts, journal, batch_size)
            ended = time.perf_counter()
        _write(target, questions, columns, journal.done, failed, prompts)
        journal.path.unlink()
    answers = journal.done.values()
    return Answered(target, len(questions.asked) + len(questions.faults), len(answers),
                    sum(not answer.stopped for answer in answers),
                    {place + 1: prompt.cut for place, prompt in prompts.items() if prompt.cut},
                    {place + 1: ", ".join(prompt.typed) for place, prompt in prompts.items() if prompt.typed},
                    {place + 1: failed[place] for place in sorted(failed)}, ended - began,
                    (sum(answer.tokens for answer in answers) - tokens_before) / (ended - loaded))


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
    """Answer what the journal lacks, and add it there; returned is why rows failed, by place."""
    limit = 1 if isinstance(model, LlamaCpp) else batch_size
    # Of all rows, answered or not: done again after a kill, a batch has the same neighbours, and rounding its result.
    batches = by_length({place: prompt.ids for place, prompt in prompts.items()}, limit)
    todo = [batch for batch in reversed(batches) if not journal.done.keys() >= set(batch)]
    if not isinstance(model, LlamaCpp) and limit > 1 and todo and (proof := model.prove(list(prompts.values()))):
        print(proof)
    failed: dict[int, str] = {}
    failures_in_a_row = 0
    with bar(len(prompts), "answering", "row", initial=len(prompts) - sum(map(len, todo))) as progress:
        while todo:
            batch = todo.pop()
            if len(batch) > limit:
                todo += _split(batch, limit)
                continue
            try:
                # Drawn anew for each batch, sampled answers are the same after a kill.
                answers = model.answer([prompts[place] for place in batch], (model.recipe.seed + batch[0]) % 2**32)
            except Exception as error:
                if len(batch) > 1:
                    memory = _out_of_memory(error)
                    limit = len(batch) // 2 if memory else limit
                    todo += _split(batch, limit if memory else 1)
                    progress.write(f"out of memory: from here on {limit} rows at a time" if memory else
                                   f"{len(batch)} rows failed together and are asked one by one: {_reason(error)}",
                                   file=sys.stderr)
                    continue
                failed[batch[0]] = _reason(error)
                failures_in_a_row += 1
                if failures_in_a_row == GIVE_UP:
                    raise GateError(f"{GIVE_UP} rows failed one after the other, the last with: {_reason(error)}",
                                    "the answers so far are kept: the same command resumes") from error
            else:
                failures_in_a_row = 0
                journal.add(dict(zip(batch, answers, strict=True)))
            progress.update(len(batch))
    return {place: why for place, why in failed.items() if place not in journal.done}


def _split(batch: list[int], size: int) -> list[list[int]]:
    """Smaller batches; as they are taken from the end, the last comes first."""
    return [batch[start:start + size] for start in range(0, len(batch), size)][::-1]


def _out_of_memory(error: Exception) -> bool:
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def _reason(error: Exception) -> str:
    return error.message if isinstance(error, KitError) else f"{type(error).__name__}: {one_line(error, 200)}"


def _check_request(target: Path, questions: Questions, columns: list[str], overwrite: bool, batch_size: int) -> None:
    known_suffix(target)
    taken = next((name for name in columns if name in questions.columns), None)
    for wrong, message, hint in (
        (target.is_dir(), f"{target} is a folder", "name a file with -o"),
        (not target.parent.is_dir(), f"{target}: there is no folder {target.parent}", "make it first"),
        (target.resolve() == questions.path.resolve(), f"{target} is the file of questions",
         "name another one with -o"),
        (target.exists() and not overwrite, f"{target} is there already",
         "name another one with -o, or --overwrite to replace it"),
        (taken is not None, f"{questions.path} has a column {taken!r} already",
         "--answer-column NAME for another name"),
        (batch_size < 1, f"batch size {batch_size}: at least one row is answered at a time", "--batch-size 20"),
    ):
        if wrong:
            raise KitError(message, hint)


def _request(engine: Engine, questions: Questions) -> dict[str, Any]:
    """What answers depend on: the same again, or it is another request."""
    recipe = engine.recipe
    if engine.path is None:
        model: Any = f"{recipe.model_name} {recipe.revision or ''}".strip()
    else:
        files = [engine.path] if engine.path.is_file() else sorted(engine.path.iterdir())
        model = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    return {"file": str(questions.path.resolve()), "sha256": sha256(questions.path), "column": questions.column,
            "engine": engine.name, "model": model,
            "settings": {**{name: getattr(recipe, name) for name in fields_affecting("answers")},
                         "max_input_length": recipe.max_input_length or recipe.max_seq_length}}


def _write(target: Path, questions: Questions, columns: list[str], done: dict[int, Answer], failed: dict[int, str],
           prompts: dict[int, Prompt]) -> None:
    notes = {place: note for place in questions.asked if (note := _note(prompts.get(place), done.get(place)))}
    for place, answer in done.items():
        if target.suffix.lower() == ".xlsx" and len(answer.text) > LONGEST_CELL:
            failed[place] = f"a cell holds {LONGEST_CELL:,} characters, the answer has {len(answer.text):,}: it is cut"
    texts = {place: answer.text for place, answer in done.items()}
    write_answers(target, questions, {name: [values.get(place) for place in range(len(questions.rows))]
                                      for name, values in zip(columns, (texts, failed, notes), strict=True)
                                      if values or name == columns[0]})


def _note(prompt: Prompt | None, answer: Answer | None) -> str:
    return "; ".join(filter(None, (
        "cut off at max_new_tokens" if answer and not answer.stopped else "",
        f"{prompt.cut} tokens cut from the middle of the prompt" if prompt and prompt.cut else "",
        said_of(list(prompt.typed)) if prompt and prompt.typed else "")))
