"""The `kit` command. Exit code 0 all well, 1 a run or a check failed, 2 bad input, 130 interrupted."""

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from kit.common.debug import begin, debugging, first, trace
from kit.common.errors import KitError


def _exit(code: int | None, **_: Any) -> None:
    sys.exit(code)


app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False,
                  result_callback=_exit,  # with what the verb returned
                  context_settings={"help_option_names": ["-h", "--help"]})

RecipePath = Annotated[str, Argument(metavar="RECIPE", help="A recipe, for example recipes/quickstart.yaml")]
Fields = Annotated[list[str] | None, Argument(metavar="[FIELD=VALUE]...", help="Recipe fields set on top")]
Overwrite = Annotated[bool, Option(help="Replace a finished run of that name")]
Trust = Annotated[bool, Option("--trust-remote-code", help="Run Python code that came with the model: only if you "
                                                           "trust whoever made that folder")]
What = Annotated[str, Argument(metavar="WHAT", help="A run's name or folder, a .gguf, a recipe (its base model), the "
                               "folder of an adapter, a checkpoint or a model, or a hub id")]
Engine = Annotated[str | None, Option(help="Of a run: gguf, merged, adapter or base; by default the lightest there is")]
Base = Annotated[str | None, Option(help="An adapter's base model: a folder or hub id; by default the one it names")]
System = Annotated[str | None, Option(metavar="TEXT", help="The system message; '' for none")]


def parsed(fields: list[str] | None) -> dict[str, Any]:
    """Recipe fields of FIELD=VALUE arguments."""
    from kit.recipe.reading import parse_overrides

    return parse_overrides(fields or [])


def names(text: str | None) -> list[str]:
    """The names of an option that takes several, with commas."""
    return [name for part in (text or "").split(",") if (name := part.strip())]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"kit {version('unsloth-kit')}")
        raise typer.Exit


@app.callback()
def kit(version: Annotated[bool, Option("--version", callback=_version, is_eager=True,
                                        help="Print the version and exit")] = False,
        debug: Annotated[bool, Option("--debug", help="Before or after any verb: what upstream logs, and the traceback "
                                                      "behind an error (as KIT_DEBUG=1)")] = False) -> None:
    """Fine-tune, export and check: what you ship is what you trained."""
    if debug or debugging():
        begin()


def _verb(example: str, name: str | None = None) -> Any:
    """A command whose help ends with an example."""
    return app.command(name=name, epilog=f"Example: {example}")


# Each verb imports the room that does it, and no other: --help is quick.
@_verb("kit run recipes/quickstart.yaml run_name=first max_steps=60")
def run(recipe: RecipePath, fields: Fields = None, overwrite: Overwrite = False) -> int:
    """Run a recipe: the notebook with papermill, into runs/<name>/."""
    from kit.batch import run_notebook

    return run_notebook(recipe, parsed(fields), overwrite)


@_verb("kit train recipes/quickstart.yaml run_name=second learning_rate=1e-4")
def train(recipe: RecipePath, fields: Fields = None, overwrite: Overwrite = False) -> int:
    """The same run without a kernel: the notebook's cells in this process."""
    from kit.batch import run_cells

    return run_cells(recipe, parsed(fields), overwrite)


@_verb("kit new mine --from finetune.sh model_name=/models/Qwen2-7B")
def new(
    name: Annotated[str, Argument(metavar="NAME", help="The new recipe: NAME.yaml in this folder, or a path")],
    fields: Fields = None,
    source: Annotated[str | None, Option(
        "--from", help="LLaMA-Factory's, axolotl's or ms-swift's configuration, a pipeline's, a script, notebook or "
        "command line (in quotes), or a recipe; by default one in which every line is explained")] = None,
) -> None:
    """Make a recipe of what you have: another tool's configuration, script, notebook or command. Runs none of it."""
    from kit.recipe.new import new as make

    make(name, source, parsed(fields))


@_verb("kit lint starter max_seq_length=128 --html starter.html")
def lint(
    data: Annotated[str | None, Argument(
        metavar="DATA", help="A file, a folder, a hub id or `starter`; without it, the recipe's data")] = None,
    fields: Fields = None,
    recipe: Annotated[str | None, Option(help="Check as this recipe trains: model, template, length")] = None,
    html: Annotated[Path | None, Option(help="Write a page that shows rows token by token")] = None,
    fix: Annotated[Path | None, Option(help="Write a repaired copy (.jsonl) with the safe repairs only")] = None,
    json: Annotated[bool, Option("--json", help="Print the figures and findings as JSON")] = False,
    rows: Annotated[int, Option(help="How many rows to show token by token", min=0)] = 2,
) -> int:
    """Check data before training: shapes, lengths, masks, duplicates, what is wrong and where."""
    from kit.data.lint import check, recipe_of

    return check(recipe_of(data, recipe, parsed(fields)), html, fix, json, rows, defaults=recipe is None)


@_verb("kit doctor recipes/quickstart.yaml load_in_4bit=true")
def doctor(
    recipe: Annotated[str | None, Argument(
        metavar="[RECIPE]", help="Also what this recipe needs: memory, disk, model, data")] = None,
    fields: Fields = None,
) -> int:
    """Check this machine before a run: versions, device, room, hub, converter. Downloads nothing."""
    from kit.readiness.doctor import run as examine

    return examine(recipe, parsed(fields))


@_verb("kit list runs", name="list")
def list_runs(folder: Annotated[Path, Argument(help="Where runs are, as output_dir names it")] = Path("runs")) -> int:
    """List the runs of a folder: status, verdict, held-out score, size."""
    from kit.runs.listing import table

    if not folder.is_dir():
        raise KitError(f"there is no folder {folder}", "name the output_dir of your runs")
    print(table(folder))
    return 0


@_verb("kit download Qwen/Qwen3-4B --to models")
def download(
    names_: Annotated[list[str], Argument(metavar="NAME...", help="Hub ids: owner/name")],
    data: Annotated[bool, Option("--data", help="They are data sets, not models")] = False,
    hub: Annotated[str, Option(help="huggingface (or its mirror at HF_ENDPOINT), or modelscope")] = "huggingface",
    to: Annotated[Path | None, Option(metavar="FOLDER", help="Below it, as owner/name; by default the hub's own "
                                                             "cache")] = None,
    revision: Annotated[str | None, Option(help="Branch, tag or commit")] = None,
    include: Annotated[str | None, Option(help="Only files like these, several with commas: 'ruozhiba/*'; by default "
                                               "what a run needs of a model, and all of a data set")] = None,
) -> None:
    """Fetch models or data: sizes first, then each file checked against the hub's hash. After Ctrl-C the same command
    goes on."""
    from kit.models.download import download as fetch
    from kit.models.download import how_to_use

    for folder in fetch(names_, data, hub, to, revision, names(include)):
        print(how_to_use(folder, data))


@_verb("kit verify first")
def verify(
    what: Annotated[str, Argument(metavar="RUN", help="A run's name or folder")],
    trust_remote_code: Trust = False,
) -> int:
    """Check that what a run ships is what it trained: every gate, with its figure; writes verify.json, report.html."""
    from kit.runs.run import Run

    opened = Run.open(what, trust_remote_code)  # a wrong name is refused before unsloth is imported: seconds
    from kit.verifying.verify import verify as check

    gates = check(opened)
    print(gates)
    return 0 if gates.passed else 1


@_verb("kit push first --what adapter,gguf --to me/tickets")
def push(
    what: Annotated[str, Argument(metavar="RUN", help="A verified run's name or folder")],
    kinds: Annotated[str | None, Option(
        "--what", help="adapter, merged, merged-4bit, gguf, several with commas; by default push_to_hub, or all there "
                       "is")] = None,
    to: Annotated[str | None, Option(help="user/name, or a name in your own account")] = None,
    public: Annotated[bool, Option("--public", help="New repositories are public, not private")] = False,
    base_model: Annotated[str | None, Option(help="Hub id of a base model that came from a folder")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Push what kit verify passed to the recipe's hub, each kind with a card. Logins: HF_TOKEN or `hf auth login`."""
    from kit.export import hub
    from kit.runs.run import Run

    pushed = Run.open(what, trust_remote_code)
    hub.push(pushed, names(kinds) or pushed.recipe.push_to_hub or hub.made_by(pushed), to, False if public else None,
             base_model)


@_verb("kit export first --gguf q4_k_m,q8_0")
def export(
    what: Annotated[str, Argument(
        metavar="WHAT", help="A run's name or folder, or the folder of an adapter trained elsewhere")],
    base: Base = None,
    gguf: Annotated[str | None, Option(help="GGUFs to write, several with commas: q8_0,f16")] = None,
    save_merged: Annotated[str | None, Option(help="16bit, or 4bit for merged-4bit/ besides")] = None,
    out: Annotated[Path | None, Option("--out", "-o", help="Folder for what is made of an adapter")] = None,
    trust_remote_code: Trust = False,
) -> int:
    """Make what a run lacks, what failed in kit verify, and anew what you name: merged model, 4-bit copy, GGUFs with
    their Modelfile. Or make them of an adapter."""
    from kit.export.command import export as make

    return make(what, base, names(gguf), save_merged, out, trust_remote_code)


@_verb('kit ask first "Where is my parcel?" temperature=0.7')
def ask(
    what: What,
    words: Annotated[list[str] | None, Argument(
        metavar="[PROMPT] [FIELD=VALUE]...", help="The question, in quotes; without it, a conversation. Recipe fields "
                                                  "set on top")] = None,
    engine: Engine = None,
    base: Base = None,
    system: System = None,
    trust_remote_code: Trust = False,
) -> None:
    """Ask a model a question; the answer is streamed. In a conversation /help lists its commands."""
    from kit.answering.chat import chat, question_and_fields, say
    from kit.answering.choosing import choose
    from kit.answering.engines import answers

    prompt, fields = question_and_fields(words or [])
    ask_one = answers(choose(what, engine, base, **(fields | _said(system, trust_remote_code))))
    if prompt is None:
        chat(ask_one)
    else:
        say(ask_one([{"role": "user", "content": prompt}]))


@_verb("kit answer first questions.csv --column question -o answers.csv")
def answer(
    what: What,
    file: Annotated[Path, Argument(metavar="FILE", help="Questions: .txt (a line each), .csv, .tsv, .jsonl, "
                                         ".json or .xlsx")],
    fields: Fields = None,
    out: Annotated[Path | None, Option("-o", "--out", help="By default beside FILE: <stem>.answers<suffix>")] = None,
    engine: Engine = None,
    base: Base = None,
    against: Annotated[str | None, Option(
        metavar="WHAT", help="A second model: its answers come beside, and where they differ is told")] = None,
    system: System = None,
    column: Annotated[str | None, Option(
        help="The questions' column; by default prompt or question, else the first")] = None,
    answer_column: Annotated[str, Option(help="The column that answers come into")] = "answer",
    batch_size: Annotated[int, Option(help="Rows answered at once", min=1)] = 20,
    show: Annotated[bool, Option("--show", help="Print each question with its answer")] = False,
    overwrite: Annotated[bool, Option(help="Replace OUT, and answers kept of another request")] = False,
    trust_remote_code: Trust = False,
) -> int:
    """Answer a whole file, the other columns kept; after a kill the same command resumes. Exit code 1: rows failed."""
    from kit.answering.answer_file import answer_file

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops as Ctrl-C does
    done = answer_file(what, file, out, engine=engine, base=base, against=against, column=column,
                       answer_column=answer_column, batch_size=batch_size, overwrite=overwrite, show=show,
                       **(parsed(fields) | _said(system, trust_remote_code)))
    print(done)
    return 1 if done.failed or (done.against and done.against.failed) else 0


def _said(system: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """Options as recipe fields; of what is not said, a recipe's own counts."""
    return {**({} if system is None else {"system_prompt": system or None}),
            **({"trust_remote_code": True} if trust_remote_code else {})}


def main() -> None:
    """What the `kit` script calls: a user's mistake is told in two lines, without a traceback."""
    sys.argv[1:] = first(sys.argv[1:])
    try:
        app()
    except KitError as error:
        trace(error)
        print(f"kit: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, SystemExit) as stop:
        # typer makes an exit with 130 of Ctrl-C.
        if isinstance(stop, KeyboardInterrupt) or stop.code == 130:
            trace(stop)
            print("kit: interrupted", file=sys.stderr)
            sys.exit(130)
        raise
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        from kit.common.files import disk_error

        if not (full := disk_error(error, "a file")):
            raise
        print(f"kit: {full}", file=sys.stderr)
        sys.exit(full.exit_code)
