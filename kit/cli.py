"""The `kit` command. Exit code 0 all well, 1 a run or a check failed, 2 bad input, 130 interrupted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kit.common.errors import KitError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]},
                  help="Fine-tune, export and check: what you ship is what you trained.")

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe, for example recipes/quickstart.yaml")]
Fields = Annotated[list[str] | None, typer.Argument(metavar="[FIELD=VALUE]...", help="Recipe fields set on top")]
Overwrite = Annotated[bool, typer.Option(help="Replace a finished run of that name")]


@app.command()
def run(recipe: RecipePath, fields: Fields = None, overwrite: Overwrite = False) -> None:
    """Run a recipe: the notebook with papermill, into runs/<name>/."""
    from kit.batch import run_notebook
    from kit.recipe.reading import parse_overrides

    raise typer.Exit(run_notebook(recipe, parse_overrides(fields or []), overwrite))


@app.command()
def train(recipe: RecipePath, fields: Fields = None, overwrite: Overwrite = False) -> None:
    """The same run without a kernel: the notebook's cells in this process."""
    from kit.batch import run_cells
    from kit.recipe.reading import parse_overrides

    raise typer.Exit(run_cells(recipe, parse_overrides(fields or []), overwrite))


@app.command()
def lint(
    data: Annotated[str | None, typer.Argument(
        metavar="DATA", help="A file, a folder, a hub id or `starter`; without it, the recipe's data")] = None,
    fields: Fields = None,
    recipe: Annotated[str | None, typer.Option(help="Check as this recipe trains: model, template, length")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page that shows rows token by token")] = None,
    fix: Annotated[Path | None, typer.Option(help="Write a repaired copy (.jsonl) with the safe repairs only")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures and findings as JSON")] = False,
    rows: Annotated[int, typer.Option(help="How many rows to show token by token", min=0)] = 2,
) -> None:
    """Check data before training: shapes, lengths, masks, doubles, what is wrong and where."""
    from kit.data.lint_command import check
    from kit.recipe.reading import parse_overrides

    raise typer.Exit(check(data, recipe, parse_overrides(fields or []), html, fix, json, rows))


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Argument(
        metavar="[RECIPE]", help="Also what this recipe needs: memory, disk, model, data")] = None,
    fields: Fields = None,
) -> None:
    """Check this machine before a run: versions, device, room, hub, converter. Downloads nothing."""
    from kit.readiness.doctor import run as examine
    from kit.recipe.reading import parse_overrides

    raise typer.Exit(examine(recipe, parse_overrides(fields or [])))


@app.command()
def verify(what: Annotated[str, typer.Argument(metavar="RUN", help="A run's name or folder")]) -> None:
    """Check that what a run ships is what it trained: every gate, with its figure; writes verify.json, report.html."""
    from kit.verifying.verify import verify as check

    gates = check(what)
    print(gates)
    raise typer.Exit(0 if gates.passed else 1)


@app.command()
def push(
    what: Annotated[str, typer.Argument(metavar="RUN", help="A verified run's name or folder")],
    kinds: Annotated[str | None, typer.Option(
        "--what", help="adapter, merged, gguf, several with commas; by default push_to_hub, or all there is")] = None,
    to: Annotated[str | None, typer.Option(help="user/name, or a name in your own account")] = None,
    public: Annotated[bool, typer.Option("--public", help="New repositories are public, not private")] = False,
    base_model: Annotated[str | None, typer.Option(help="Hub id of a base model that came from a folder")] = None,
) -> None:
    """Push what kit verify passed to the recipe's hub, each kind with a card. Logins: HF_TOKEN or `hf auth login`."""
    from kit.export.hub import made_by
    from kit.export.hub import push as send
    from kit.runs.run import Run

    found = Run.open(what)
    chosen = kinds.split(",") if kinds else found.recipe.push_to_hub or made_by(found)
    send(found, [kind.strip() for kind in chosen], to, False if public else None, base_model)


@app.command()
def export(
    what: Annotated[str, typer.Argument(
        metavar="WHAT", help="A run's name or folder, or the folder of an adapter trained elsewhere")],
    base: Annotated[str | None, typer.Option(
        help="The adapter's base model: a folder or hub id; by default the one it names")] = None,
    gguf: Annotated[list[str] | None, typer.Option(help="A GGUF to write, q8_0 for example; may be repeated")] = None,
    save_merged: Annotated[str | None, typer.Option(help="16bit, or 4bit for merged-4bit/ besides")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for what is made of an adapter")] = None,
) -> None:
    """Make what a run does not have yet, or of an adapter: merged model, 4-bit copy, GGUFs with their Modelfile."""
    from kit.export.command import export as make

    raise typer.Exit(make(what, base, gguf or [], save_merged, out))


@app.command()
def ask(
    what: Annotated[str, typer.Argument(metavar="RUN", help="A run's name or folder, or a .gguf file")],
    prompt: Annotated[str | None, typer.Argument(help="The question; without it, a conversation")] = None,
    engine: Annotated[str | None, typer.Option(
        help="gguf, merged, adapter or base; by default the lightest that is there")] = None,
) -> None:
    """Ask a run's model a question; the answer is streamed."""
    from kit.answering.engines import answers

    ask_one = answers(what, engine)
    if prompt is not None:
        _say(ask_one([{"role": "user", "content": prompt}]))
        return
    history = []
    while (question := _read_question()) is not None:
        history.append({"role": "user", "content": question})
        history.append({"role": "assistant", "content": _say(ask_one(history))})


@app.command()
def answer(
    what: Annotated[str, typer.Argument(metavar="RUN", help="A run's name or folder, a .gguf file, or a recipe (its "
                                        "base model)")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Questions: .txt (a line each), .csv, .tsv, .jsonl, "
                                         ".json or .xlsx")],
    fields: Fields = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="By default beside FILE: <stem>.answers<suffix>")]
    = None,
    engine: Annotated[str | None, typer.Option(
        help="gguf, merged, adapter or base; by default the lightest that is there")] = None,
    column: Annotated[str | None, typer.Option(
        help="The questions' column; by default prompt or question, else the first")] = None,
    answer_column: Annotated[str, typer.Option(help="The column that answers come into")] = "answer",
    batch_size: Annotated[int, typer.Option(help="Rows answered at once", min=1)] = 20,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT, and answers kept of another request")] = False,
) -> None:
    """Answer a whole file, the other columns kept; after a kill the same command goes on. Exit code 1: rows failed."""
    from kit.answering.answer_file import answer_file
    from kit.recipe.reading import parse_overrides

    done = answer_file(what, file, out, engine=engine, column=column, answer_column=answer_column,
                       batch_size=batch_size, overwrite=overwrite, **parse_overrides(fields or []))
    print(done)
    raise typer.Exit(1 if done.failed else 0)


def _say(pieces: object) -> str:
    text = ""
    for piece in pieces:  # type: ignore[attr-defined]
        text += piece
        print(piece, end="", flush=True)
    print()
    return text


def _read_question() -> str | None:
    """The next line that is not empty; None at the end of the input."""
    while True:
        if sys.stdin.isatty():
            print("› ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return None
        if line.strip():
            return line.strip()


def main() -> None:
    """What the `kit` script calls: a user's mistake is told in two lines, without a traceback."""
    try:
        app()
    except KitError as error:
        print(f"kit: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, SystemExit) as stop:
        # typer makes an exit with 130 of Ctrl-C.
        if isinstance(stop, KeyboardInterrupt) or stop.code == 130:
            print("kit: interrupted", file=sys.stderr)
            sys.exit(130)
        raise
    except BrokenPipeError:
        sys.exit(1)


if __name__ == "__main__":
    main()
