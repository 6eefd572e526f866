"""Which files a source means: a file, a folder, a data set of a hub, the bundled tickets."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub.constants

from kit.common.errors import KitError, nearest, one_line
from kit.common.files import PROJECT
from kit.data.dataset_info import is_info, read_entry, unnamed
from kit.data.readers import SUFFIXES
from kit.models.fetch import HUB_HINT
from kit.models.template import template_file
from kit.recipe.recipe import Recipe

STARTER_TRAIN = PROJECT / "data" / "tickets-train.jsonl"
STARTER_HELDOUT = PROJECT / "data" / "tickets-heldout.jsonl"
HELDOUT = "starter (held out)"  # the source of that name
# A file's or folder's name says which split it holds, by the words Hugging Face uses for it.
SPLIT_WORDS = {"train": "train|training", "validation": "validation|valid|val|dev",
               "test": "test|testing|eval|evaluation"}
NOT_ROWS = re.compile(r"dataset_infos?|readme.*|licen[cs]e.*|requirements.*", re.IGNORECASE)


class Meant(NamedTuple):
    """What a source means: a file, a folder, a hub's id, `starter`; and the recipe with what holds for this source."""

    place: str | Path
    recipe: Recipe
    folder: str | None = None  # of a hub's repository, to which reading is confined
    samples: int | None = None  # rows drawn from it
    info: Path | None = None  # the dataset_info.json that says so


def meant(source: str | Path, recipe: Recipe) -> Meant:
    """The source itself, or what an entry of a dataset_info.json (file#entry) names; of a folder the part that
    dataset_config names."""
    told = _entry(source, recipe)
    config = told.recipe.dataset_config
    if not config or told.place in ("starter", HELDOUT):
        return told
    folder = local_path(told.place)
    if folder is None or not folder.is_dir() or (own := _of_config(folder, config)) == folder:
        return told
    return told._replace(place=own, recipe=told.recipe.model_copy(update={"dataset_config": None}))


def _entry(source: str | Path, recipe: Recipe) -> Meant:
    file, mark, name = str(source).rpartition("#")
    if not mark or not file.lower().endswith(".json") or Path(source).exists():
        return Meant(source, recipe)
    info = local_path(file)
    if info is None or not info.is_file():
        raise KitError(f"dataset: {file} is no file", "file#entry names an entry of a dataset_info.json")
    entry = read_entry(info, name, recipe.hub)
    return Meant(entry.place, recipe.model_copy(update=entry.fields), entry.folder, entry.samples, info)


def weighted(recipe: Recipe) -> bool:
    """Whether some source's rows are not all taken just once."""
    return {*recipe.sources.values()} != {1} or any(meant(source, recipe).samples for source in recipe.sources)


def files_of(source: str | Path, recipe: Recipe) -> list[Path] | None:
    """The files on this disk that a source means; None for a data set that the `datasets` library reads."""
    source, recipe, *_ = meant(source, recipe)
    if source in ("starter", HELDOUT):
        return [STARTER_TRAIN if source == "starter" else STARTER_HELDOUT]
    path = local_path(source)
    if path is None or (path.is_dir() and _is_data_set(path)):
        return None
    if path.is_file():
        if is_info(path):
            raise unnamed(path)
        return [path]
    readable = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()
                      and not NOT_ROWS.fullmatch(p.stem)
                      and not any(part.startswith(".") for part in p.relative_to(path).parts))
    files = [p for p in readable if p.suffix.lower() != ".txt"] or readable
    if not files:
        raise KitError(f"dataset: {source} holds no file of rows", f"known kinds are {', '.join(SUFFIXES)}")
    splits = {p: _split_of(p.relative_to(path)) for p in files}
    if not any(splits.values()):
        return files
    of_split = [p for p in files if (splits[p] or "train") == recipe.dataset_split]
    if not of_split:
        raise _no_split(source, recipe, sorted({split or "train" for split in splits.values()}))
    return of_split


def _no_split(source: str | Path, recipe: Recipe, known: Iterable[str]) -> KitError:
    return KitError(f"dataset: {source} has no split {recipe.dataset_split!r}; there are: {', '.join(known)}",
                    "set dataset_split to one of them")


def _split_of(path: Path) -> str | None:
    text = "/".join(path.with_suffix("").parts).lower()
    return next((split for split, words in SPLIT_WORDS.items()
                 if re.search(rf"(?<![a-z])({words})(?![a-z])", text)), None)


def _of_config(folder: Path, config: str) -> Path:
    """Where a hub's configuration lies in a copy of its data set: the folder of that name, or the whole where a card or
    a saved data set says it. Raises KitError where neither knows it."""
    own = folder / config
    if own.is_dir() and config not in (".", ".."):
        return own
    if folder.resolve().name == config or _is_data_set(folder):
        return folder
    known = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    raise KitError(f"dataset: {folder} has no folder {config!r} for dataset_config{nearest(config, known)}",
                   (f"there are: {', '.join(known[:20])}; or " if known else "") +
                   "leave dataset_config out to read the whole folder")


def _is_data_set(folder: Path) -> bool:
    """A folder that `datasets` saved, or a hub's data set whose card says how its files are read."""
    card = folder / "README.md"
    return _saved(folder) or (
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
    if path.suffix.lower() in SUFFIXES or path.is_absolute() or str(source).startswith((".", "~")) \
            or str(source).count("/") != 1:
        folder = path.parent if path.parent.is_dir() else PROJECT / "data"
        near = nearest(path.name, [p.name for p in folder.iterdir()])
        raise KitError(f"dataset: there is no {source}{near}", "a path is looked up from the folder you are in")
    return None


def data_files(recipe: Recipe) -> list[Path]:
    """The files on this disk that rows are made from, for hashes and checks before a run; a template counts too."""
    template = template_file(recipe.chat_template) if recipe.chat_template else None
    files: list[Path] = [template] if template else []
    for source in filter(None, (*recipe.sources, held_out_source(recipe))):
        own, told = files_of(source, recipe), meant(source, recipe)
        if own is None and (folder := local_path(told.place)):  # a data set's folder, whatever kinds of files it has
            own = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
        files += [*([told.info] if told.info else []), *(own or [])]
    return list(dict.fromkeys(files))


def held_out_source(recipe: Recipe) -> str | None:
    """What the held-out rows are read from, None without any or where test_size takes them from the training rows.

    The bundled tickets bring held-out rows of their own; they count unless others are named.
    """
    bundled = HELDOUT if "starter" in recipe.sources and not recipe.test_size else None
    return recipe.eval_dataset or bundled


def hub_rows(told: Meant) -> Iterable[Any]:
    """The rows of a hub's data set, or of a folder that only `datasets` can read."""
    import datasets

    name, recipe = str(told.place), told.recipe
    folder = local_path(name)
    try:
        if folder is not None and _saved(folder):
            saved = datasets.load_from_disk(str(folder))
            if not isinstance(saved, datasets.DatasetDict):
                return saved
            if recipe.dataset_split not in saved:
                raise _no_split(name, recipe, saved)
            return saved[recipe.dataset_split]
        with _offline(recipe.local_files_only):
            return datasets.load_dataset(
                str(folder or name), recipe.dataset_config, split=recipe.dataset_split, data_dir=told.folder,
                revision=recipe.dataset_revision,
                download_config=datasets.DownloadConfig(local_files_only=recipe.local_files_only))
    except KitError:
        raise
    except Exception as error:
        reason = one_line(error).replace(name, "")
        fields = folder or "config" in reason.lower() or "split" in reason
        raise KitError(f"dataset: {name}: {type(error).__name__}: {one_line(error)}",
                       "check dataset_config and dataset_split" if fields else HUB_HINT) from None


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


def fetched(told: Meant) -> Meant:
    """The same, or with the folder that a data set of ModelScope was downloaded to.

    ModelScope's own loader would need an older `datasets` and a dozen packages more.
    """
    source, recipe = told.place, told.recipe
    if recipe.hub != "modelscope" or source in ("starter", HELDOUT) or local_path(source):
        return told
    if recipe.local_files_only:
        raise KitError(f"dataset: {source}: ModelScope is not asked with local_files_only",
                       "name the folder the data set was downloaded to")
    try:
        from modelscope import dataset_snapshot_download
    except ImportError:
        raise KitError("hub: modelscope needs the package modelscope", "pip install modelscope") from None
    try:
        folder = Path(dataset_snapshot_download(str(source), revision=recipe.dataset_revision))
        return told._replace(place=folder / (told.folder or ""), folder=None)
    except Exception as error:  # of its own, of requests, of the disk
        raise KitError(f"dataset: {source}: {type(error).__name__}: {one_line(error)}", HUB_HINT) from None
