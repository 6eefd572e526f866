"""A model on a hub, as far as its files' sizes and headers tell: nothing of it is fetched or written.

Read are the list of its files, config.json, and of each file of weights the header, which has the shapes.
"""

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx

from kit.common.errors import KitError
from kit.common.hub_errors import Trouble
from kit.common.weight_files import INDEX, MAX_HEADER, TensorInfo, header_length, header_tensors
from kit.models.fetch import MODEL_FILES, ModelFiles, local_folder, local_model
from kit.models.hubs import HUBS, RemoteFile, Site
from kit.recipe.recipe import Recipe

SECONDS = 8.0  # for all that is asked about a model
BEGINNING = 1 << 17  # bytes of a file of weights that are asked for first; most headers are shorter


def known_model(recipe: Recipe) -> ModelFiles | str:
    """`local_model`, and of a model that is not on this disk what its hub tells within SECONDS, or why it does not."""
    found = local_model(recipe)
    if isinstance(found, ModelFiles) or recipe.model_name == "starter" or local_folder(recipe.model_name):
        return found
    if offline(recipe, "TRANSFORMERS_OFFLINE"):
        return f"{recipe.model_name} is not on this disk, and no hub may be asked: its size is not known"
    told = within(SECONDS, lambda: _told(recipe))
    if isinstance(told, Exception):
        why = told.message if isinstance(told, KitError) else Trouble(told).reason
        return f"{recipe.model_name} is not on this disk, and the hub does not tell its size: {why}"
    return told


def hub_cache(recipe: Recipe) -> Path:
    """Where the recipe's model is fetched to; KitError where the hub's package is missing."""
    return HUBS[recipe.hub](False, None).cache()


def offline(recipe: Recipe, switch: str) -> bool:
    """Whether the hub will not be asked: by the recipe, or by a switch of Hugging Face's libraries."""
    on = any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in ("HF_HUB_OFFLINE", switch))
    return recipe.local_files_only or (on and recipe.hub == "huggingface")


def within(seconds: float, ask: Callable[[], Any]) -> Any:
    """What `ask()` returns, or the exception that it raised: a TimeoutError where it takes longer.

    In a thread of its own: looking up a name may take longer than any time limit of a connection, and so may the
    retries of a hub's library.
    """
    answers: list[Any] = [TimeoutError(f"no answer within {seconds:.0f} s")]

    def answer() -> None:
        try:
            answers.append(ask())
        except Exception as error:  # the hub's own, those of requests or httpx
            answers.append(error)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[-1]


def _told(recipe: Recipe) -> ModelFiles | str:
    site, name = HUBS[recipe.hub](False, recipe.revision), recipe.model_name
    files = {file.path: file for file in site.files(name) if any(fnmatch(file.path, kind) for kind in MODEL_FILES)}
    if "config.json" not in files:
        raise KitError(f"{name} at {site.name} holds no config.json")
    with httpx.Client(follow_redirects=True, timeout=SECONDS / 2) as client, ThreadPoolExecutor(8) as pool:
        def read(path: str, count: int | None = None) -> bytes:
            return _read(client, *site.address(name, path), min(count or MAX_HEADER, files[path].size))

        shards = [path for path in files if path.endswith(".safetensors") and "/" not in path]
        if INDEX in files:
            shards = sorted(set(json.loads(read(INDEX))["weight_map"].values()))
        if not shards or not set(shards) <= set(files):
            raise KitError(f"{name} at {site.name} has no weights in safetensors, or not all of them")
        config = pool.submit(lambda: json.loads(read("config.json")))
        headers = pool.map(lambda path: _header(lambda count: read(path, count)), shards)
        tensors = {key: tensor for header in headers for key, tensor in header.items()}
        return ModelFiles.of(name, config.result(), tensors, {path: file.size for path, file in files.items()},
                             sum(file.size for file in files.values() if not _here(site, name, file)))


def _read(client: httpx.Client, address: str, headers: dict[str, str], count: int) -> bytes:
    """The first `count` bytes of a file; a hub that sends all of it is not listened to any longer."""
    with client.stream("GET", address, headers=headers | {"range": f"bytes=0-{count - 1}"}) as answer:
        answer.raise_for_status()
        data = b""
        for piece in answer.iter_bytes(1 << 16):
            data += piece
            if len(data) >= count:
                break
        return data[:count]


def _header(read: Callable[[int], bytes]) -> dict[str, TensorInfo]:
    beginning = read(BEGINNING)
    end = 8 + header_length(beginning)
    return header_tensors((beginning if end <= len(beginning) else read(end))[8:end])


def _here(site: Site, name: str, file: RemoteFile) -> bool:
    path = site.cached(name, file.path)
    return bool(path and path.is_file() and path.stat().st_size == file.size)
