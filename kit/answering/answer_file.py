"""Answers to a whole file: in batches of like length, kept as they come, written in the file's order."""

import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

from kit.answering.choosing import Engine, choose, second
from kit.answering.comparison import Comparison, compare
from kit.answering.engines import InMemory, LlamaCpp, Prompt, fitted, said_of
from kit.answering.journal import Answer, Journal
from kit.answering.question_files import (
    LONGEST_CELL,
    Questions,
    answers_beside,
    known_suffix,
    read_questions,
    write_answers,
)
from kit.answering.replies import by_length
from kit.common.errors import GateError, KitError, one_line
from kit.common.files import sha256
from kit.common.progress import say
from kit.common.show import bar, duration
from kit.recipe.fields import fields_affecting

GIVE_UP = 20  # failures in a row: then it is not the rows
SHOWN = 5  # rows named in the summary


class Answered(NamedTuple):
    """What became of a file's rows. `failed` and `shortened` are by row, from 1; `seconds` are those of this call.

    Blank lines of a .txt have numbers, but are no rows. With `against` it is compared with that other model's answers.
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
    by: str = ""
    against: "Answered | None" = None
    comparison: Comparison | None = None

    def __str__(self) -> str:
        by = f" by {self.by}" if self.comparison else ""
        lines = [f"{self.out}: {self.answered:,} of {self.rows:,} rows answered{by} in {duration(self.seconds)}, "
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
        return "\n".join([*lines, *map(str, filter(None, (self.against, self.comparison if self.against else None)))])


def _rows(places: Iterable[int]) -> str:
    numbers = list(places)
    return f"row {', '.join(map(str, numbers[:SHOWN]))}{', …' * (len(numbers) > SHOWN)}"


def answer_file(run: str | Path, file: str | Path, out: str | Path | None = None, *, engine: str | None = None,
                base: str | None = None, against: str | None = None, column: str | None = None,
                answer_column: str = "answer", batch_size: int = 20, overwrite: bool = False, show: bool = False,
                **fields: Any) -> Answered:
    """Answer every question of a file and write them, with all other columns, to `out` (<stem>.answers<suffix>).

    `run`, `engine`, `base` and `fields` are those of kit.answering.choosing; kit.answering.question_files says which
    files are read and where a question stands in them. The answer comes into `answer_column`; what became of it into
    <answer_column>_error, if any row failed, and <answer_column>_note, if any answer or prompt was cut or holds a
    control token. `against` names a second model: its answers come into <answer_column>_against, and
    <answer_column>_same says where both are equal. `show` prints each question with its answer as it comes. Answers are
    kept in `out`.partial.jsonl as they come: the same call resumes after a kill. Raises KitError for bad input,
    GateError where batches get other answers.
    """
    models = [choose(run, engine, base, **fields)] + ([second(against, engine, base, **fields)] if against else [])
    questions = read_questions(Path(file), column, models[0].recipe.columns)
    target = Path(out) if out else answers_beside(Path(file), table=against is not None)
    names = [answer_column, f"{answer_column}_against"][:len(models)]
    columns = [f"{name}{what}" for name in names for what in ("", "_error", "_note")]
    same = [f"{answer_column}_same"] if against else []
    _check_request(target, questions, [*columns, *same], overwrite, batch_size)
    with ExitStack() as opened:
        # All of them first: one that belongs to another request is told before a model is loaded.
        journals = [opened.enter_context(Journal(place, _request(model, questions), overwrite)) for model, place in
                    zip(models, (target, target.with_name(f"{target.name}.against")), strict=False)]
        parts = [_answered(target, model, questions, journal, batch_size, show)
                 for model, journal in zip(models, journals, strict=True)]
        texts = [{place: answer.text for place, answer in journal.done.items()} for journal in journals]
        added = {name: values for number, part in enumerate(parts) for name, values in
                 _columns(columns[3 * number:3 * number + 3], questions, part, journals[number].done).items()}
        first = parts[0].answered
        if against:
            compared = compare(questions, texts[0], texts[1], (models[0].label, models[1].label))
            added[same[0]] = compared.same
            first = first._replace(against=parts[1].answered._replace(comparison=compared), comparison=compared)
        write_answers(target, questions, {name: [values.get(place) for place in range(len(questions.rows))]
                                          for name, values in added.items()})
        for journal in journals:
            journal.path.unlink()
    return first


class _Part(NamedTuple):
    """What one model made of the questions: the summary, and by place what it was given and why rows failed."""

    answered: Answered
    prompts: dict[int, Prompt]
    failed: dict[int, str]


def _answered(target: Path, selected: Engine, questions: Questions, journal: Journal, batch_size: int,
              show: bool) -> _Part:
    began = time.perf_counter()
    tokens_before = sum(answer.tokens for answer in journal.done.values())
    if journal.done:
        print(f"resuming: {len(journal.done):,} rows are answered already")
    with closing(LlamaCpp(selected) if selected.name == "gguf" else InMemory(selected)) as model:
        prompts, failed = _prompts(model, questions)
        print(f"{len(prompts):,} questions from {questions.column!r}, answered by {selected.name} ({selected.label})")
        loaded = time.perf_counter()
        failed |= answer_rows(model, prompts, journal, batch_size, questions if show else None)
        ended = time.perf_counter()
    for place, answer in journal.done.items():
        if target.suffix.lower() == ".xlsx" and len(answer.text) > LONGEST_CELL:
            failed[place] = f"a cell holds {LONGEST_CELL:,} characters, the answer has {len(answer.text):,}: it is cut"
    answers = journal.done.values()
    return _Part(Answered(target, len(questions.asked) + len(questions.faults), len(answers),
                          sum(not answer.stopped for answer in answers),
                          {place + 1: prompt.cut for place, prompt in prompts.items() if prompt.cut},
                          {place + 1: ", ".join(prompt.typed) for place, prompt in prompts.items() if prompt.typed},
                          {place + 1: failed[place] for place in sorted(failed)}, ended - began,
                          (sum(answer.tokens for answer in answers) - tokens_before) / (ended - loaded),
                          selected.label), prompts, failed)


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


def answer_rows(model: InMemory | LlamaCpp, prompts: dict[int, Prompt], journal: Journal, batch_size: int,
                shown: Questions | None = None) -> dict[int, str]:
    """Answer what the journal lacks, add it there and print it if it is `shown`; returns why rows failed, by place."""
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
                _show(batch, shown, journal)
            progress.update(len(batch))
    return {place: why for place, why in failed.items() if place not in journal.done}


def _show(batch: list[int], shown: Questions | None, journal: Journal) -> None:
    if shown:
        for place in sorted(batch):
            say(_shown(place, str(shown.asked[place][-1]["content"]), journal.done[place].text))


def _shown(place: int, question: str, answer: str) -> str:
    """A question with its answer, for people; lines after the first are indented as it is."""
    return f"── row {place + 1}\n" + "\n".join(
        sign + text.strip().replace("\n", "\n  ") for sign, text in (("? ", question), ("→ ", answer)))


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
        (f"{columns[0]}_same" in columns and target.suffix.lower() == ".txt",
         f"{target}: a .txt has a line for one answer, here are two", "name a table with -o, for example answers.csv"),
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
    if not engine.own:
        model = {"model": model, "base": recipe.model_name}
    return {"file": str(questions.path.resolve()), "sha256": sha256(questions.path), "column": questions.column,
            "engine": engine.name, "model": model,
            "settings": {**{name: getattr(recipe, name) for name in fields_affecting("answers")},
                         "max_input_length": recipe.max_input_length or recipe.max_seq_length}}


def _columns(names: list[str], questions: Questions, part: _Part,
             done: dict[int, Answer]) -> dict[str, dict[int, str]]:
    """By name, what one model adds to the rows: answers; and, if there are any, why rows failed, and notes."""
    notes = {place: note for place in questions.asked if (note := _note(part.prompts.get(place), done.get(place)))}
    texts = {place: answer.text for place, answer in done.items()}
    return {name: values for name, values in zip(names, (texts, part.failed, notes), strict=True)
            if values or name == names[0]}


def _note(prompt: Prompt | None, answer: Answer | None) -> str:
    return "; ".join(filter(None, (
        "cut off at max_new_tokens" if answer and not answer.stopped else "",
        f"{prompt.cut} tokens cut from the middle of the prompt" if prompt and prompt.cut else "",
        said_of(list(prompt.typed)) if prompt and prompt.typed else "")))
