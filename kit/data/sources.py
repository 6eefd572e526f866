"""Where rows come from: files, folders, hubs. Every row keeps the place it was read from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub.constants

from kit.common.errors import KitError, nearest, one_line
from kit.common.paths import PROJECT
from kit.data.readers import KINDS, read_rows
from kit.data.records import Problem
from kit.data.shapes import Fault, renamed, to_messages
from kit.models.fetch import hub_hint
from kit.models.template import Message
from kit.recipe.reading import MAX_ERRORS
from kit.recipe.recipe import Recipe

STARTER_TRAIN = PROJECT / "data" / "tickets-train.jsonl"
STARTER_HELDOUT = PROJECT / "data" / "tickets-heldout.jsonl"
HELDOUT = "starter (held out)"  # the source of that name
# A file's or folder's name says which split it holds, by the words Hugging Face uses for it.
SPLIT_WORDS = {"train": "train|training", "validation": "validation|valid|val|dev",
               "test": "test|testing|eval|evaluation"}
NOT_ROWS = re.compile(r"dataset_infos?|readme.*|licen[cs]e.*|requirements.*", re.IGNORECASE)


class Place(NamedTuple):
    """Where a row stands: `row` counts from 1; `line` is the file's, None where a file has no lines."""

    file: str
    row: int
    line: int | None

    def __str__(self) -> str:
        return f"row {self.row}" if self.line in (None, self.row) else f"row {self.row} (line {self.line})"


class Row(NamedTuple):
    """A row as it was read, its shape, and its messages or its faults."""

    place: Place
    raw: Any
    shape: str | None
    messages: list[Message]
    faults: list[Fault]


def rows_of(source: str | Path, recipe: Recipe, on_bytes: Callable[[int], None] | None = None) -> Iterator[Row]:
    """Every row of a file, a folder, a hub's data set or `starter`, good and bad.

    `on_bytes` is told how many further bytes of the files have been read. Raises KitError for what can't be read
    at all.
    """
    there = _fetched(source, recipe) if _on_modelscope(source, recipe) else source
    files = files_of(there, recipe)
    for path in files or ():
        name = str(source) if len(files or ()) == 1 else str(path)
        for item in read_rows(path, on_bytes):
            place = Place(name, item.row, item.line)
            if isinstance(item, Problem):
                yield Row(place, None, None, [], [Fault(item.code, item.message)])
            else:
                yield _row(place, item.value, recipe)
    if files is None:
        for number, value in enumerate(_from_hub(str(there), recipe), 1):
            yield _row(Place(str(source), number, None), value, recipe)


def _row(place: Place, raw: Any, recipe: Recipe) -> Row:
    return Row(place, raw, *to_messages(renamed(raw, recipe.columns)))


def files_of(source: str | Path, recipe: Recipe) -> list[Path] | None:
    """The files on this disk that a source means; None for a data set that the `datasets` library reads."""
    if source in ("starter", HELDOUT):
        return [STARTER_TRAIN if source == "starter" else STARTER_HELDOUT]
    path = local_path(source)
    if path is None or (path.is_dir() and _is_data_set(path, recipe)):
        return None
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in KINDS and p.is_file()
                   and not NOT_ROWS.fullmatch(p.stem)
                   and not any(part.startswith(".") for part in p.relative_to(path).parts))
    files = [p for p in found if p.suffix.lower() != ".txt"] or found
    if not files:
        raise KitError(f"dataset: {source} holds no file of rows", f"known kinds are {', '.join(KINDS)}")
    splits = {p: _split_of(p.relative_to(path)) for p in files}
    if not any(splits.values()):
        return files
    wanted = [p for p in files if (splits[p] or "train") == recipe.dataset_split]
    if not wanted:
        known = sorted({split or "train" for split in splits.values()})
        raise KitError(f"dataset: {source} has no split {recipe.dataset_split!r}; there are: {', '.join(known)}",
                       "set dataset_split to one of them")
    return wanted


def _split_of(path: Path) -> str | None:
    text = "/".join(path.with_suffix("").parts).lower()
    for split, words in SPLIT_WORDS.items():
        if re.search(rf"(?<![a-z])({words})(?![a-z])", text):
            return split
    return None


def _is_data_set(folder: Path, recipe: Recipe) -> bool:
    """A folder that `datasets` saved, or a hub's data set whose card says how its files are read."""
    if _saved(folder):
        return True
    card = folder / "README.md"
    return recipe.dataset_config is not None or (
        card.is_file() and "\nconfigs:" in card.read_text(encoding="utf-8", errors="replace")[:20_000])


def _saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote this folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def local_path(source: str | Path) -> Path | None:
    """The file or folder meant, or None when it can only be a hub id."""
    for path in (Path(source).expanduser(), PROJECT / source):
        if path.exists():
            return path
    path = Path(source)
    if path.suffix.lower() in KINDS or path.is_absolute() or str(source).startswith((".", "~")) \
            or str(source).count("/") != 1:
        folder = path.parent if path.parent.is_dir() else PROJECT / "data"
        near = nearest(path.name, [p.name for p in folder.iterdir()])
        raise KitError(f"dataset: there is no {source}{near}", "a path is looked up from the folder you are in")
    return None


def data_files(recipe: Recipe) -> list[Path]:
    """The files on this disk that a recipe reads, for hashes and checks before a run."""
    names = [*recipe.sources, *([recipe.eval_dataset] if recipe.eval_dataset else [])]
    files = []
    for name in names:
        found, folder = files_of(name, recipe), local_path(name) if name != "starter" else None
        if found is None and folder is not None:  # a data set's folder, whatever kinds of files it has
            found = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
        files += found or []
    return [*files, *([STARTER_HELDOUT] if held_out_of_starter(recipe) else [])]


def held_out_of_starter(recipe: Recipe) -> bool:
    """The bundled tickets bring held-out rows of their own; they count unless others are named."""
    return "starter" in recipe.sources and not recipe.eval_dataset and not recipe.test_size


def _from_hub(name: str, recipe: Recipe) -> Iterable[Any]:
    import datasets

    folder = local_path(name)
    try:
        if folder is not None and _saved(folder):
            saved = datasets.load_from_disk(str(folder))
            if isinstance(saved, datasets.DatasetDict) and recipe.dataset_split not in saved:
                raise KitError(f"dataset: {name} has no split {recipe.dataset_split!r}; there are: {', '.join(saved)}",
                               "set dataset_split to one of them")
            return saved[recipe.dataset_split] if isinstance(saved, datasets.DatasetDict) else saved
        with _offline(recipe.local_files_only):
            return datasets.load_dataset(
                str(folder or name), recipe.dataset_config, split=recipe.dataset_split,
                revision=recipe.dataset_revision,
                download_config=datasets.DownloadConfig(local_files_only=recipe.local_files_only))
    except KitError:
        raise
    except Exception as error:
        reason = one_line(error)
        about = reason.replace(name, "")
        hint = "check dataset_config and dataset_split" if folder or "config" in about.lower() or "split" in about \
            else hub_hint()
        raise KitError(f"dataset: {name}: {type(error).__name__}: {reason}", hint) from None


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """`local_files_only` of `datasets` still asks the hub which files there are; its offline switch does not."""
    import datasets.config

    switches: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    try:
        for switch in switches:
            switch.HF_HUB_OFFLINE = wanted or switch.HF_HUB_OFFLINE
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = value


def _on_modelscope(source: str | Path, recipe: Recipe) -> bool:
    return recipe.hub == "modelscope" and source not in ("starter", HELDOUT) and local_path(source) is None


def _fetched(name: str | Path, recipe: Recipe) -> Path:
    """A data set of ModelScope as a folder. Its own loader would need an older `datasets` and a dozen packages more."""
    if recipe.local_files_only:
        raise KitError(f"dataset: {name}: ModelScope is not asked with local_files_only",
                       "name the folder the data set was downloaded to")
    try:
        from modelscope import dataset_snapshot_download
    except ImportError:
        raise KitError("hub: modelscope needs the package modelscope", "pip install modelscope") from None
    try:
        return Path(dataset_snapshot_download(str(name), revision=recipe.dataset_revision))
    except Exception as error:  # of its own, of requests, of the disk
        reason = one_line(error)
        raise KitError(f"dataset: {name}: {type(error).__name__}: {reason}", hub_hint()) from None


def good_rows(source: str | Path, recipe: Recipe, on_bytes: Callable[[int], None] | None = None) -> Iterator[Row]:
    """The rows of a source; KitError at the end with up to 20 bad ones, or when a file mixes shapes."""
    problems: list[str] = []
    bad = count = 0
    shapes: dict[str, Counter[str]] = {}
    first: dict[tuple[str, str], Place] = {}
    for row in rows_of(source, recipe, on_bytes):
        count += 1
        if row.shape:
            shapes.setdefault(row.place.file, Counter())[row.shape] += 1
            first.setdefault((row.place.file, row.shape), row.place)
        if row.faults:
            bad += 1
            if bad <= MAX_ERRORS:
                file = "" if row.place.file == str(source) else f"{Path(row.place.file).name} "
                problems.append(f"{file}{row.place}: {'; '.join(fault.message for fault in row.faults)}")
        elif not bad:
            yield row
    for file, found in shapes.items():
        if len(found) > 1:
            raise KitError(mixed_shapes(file, found, {shape: first[file, shape] for shape in found}),
                           "bring all rows of a file to one shape, or put each shape into a file of its own")
    refuse(f"dataset: {source}: bad rows", problems, bad,
           f"`kit lint {source}` shows all of them with remedies; known shapes: Alpaca (instruction, output), "
           "messages, conversations, prompt and completion, question and answer, others through columns")
    if not count:
        raise KitError(f"dataset: {source} is empty", "it needs at least one row")


def mixed_shapes(file: str, found: Counter[str], first: dict[str, Place]) -> str:
    """Says that a file mixes shapes, with the count of each."""
    parts = [f"{shape} {number:,} (first: {first[shape]})" for shape, number in found.most_common()]
    return f"dataset: {file} mixes shapes: {', '.join(parts)}"


def where(place: Place, recipe: Recipe) -> str:
    """The place, with its file's name unless the recipe has only one file it can be in."""
    only = [*recipe.sources] if len(recipe.sources) == 1 else []
    clear = place.file in (*only, recipe.eval_dataset, HELDOUT)
    return str(place) if clear else f"{Path(place.file).name} {place}"


def refuse(what: str, problems: list[str], count: int, hint: str) -> None:
    """KitError that lists `problems` and how many more there are; nothing when there is none."""
    if count:
        more = f"\n  … and {count - len(problems):,} more" if count > len(problems) else ""
        raise KitError(f"{what} ({count:,}):\n  " + "\n  ".join(problems) + more, hint)


def read_conversations(source: str | Path, recipe: Recipe | None = None) -> list[list[Message]]:
    """The rows of a source as lists of messages. Raises KitError with up to 20 bad rows."""
    return [row.messages for row in good_rows(source, recipe or Recipe.load({}))]
