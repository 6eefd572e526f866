"""`kit doctor` on model and data: complete on this disk, or a hub that answers. Nothing is downloaded."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import re
import threading
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import constants, get_token, try_to_load_from_cache

from kit.common.errors import KitError
from kit.common.paths import cache_dir
from kit.common.show import size
from kit.common.weight_files import INDEX, read_weights_header, shard_names
from kit.data.sources import data_files, files_of, local_path
from kit.models.fetch import hub_hint, model_folder
from kit.models.starter import NAME, packaged_gguf
from kit.recipe.recipe import Recipe
from kit.runs.gates import Gate

SECONDS = 2.0
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def model(recipe: Recipe) -> tuple[Gate, Path | None]:
    """Whether the model can be loaded, and its folder where it is on this disk."""
    if recipe.model_name == "starter":
        return _starter()
    try:  # hub: huggingface, because ModelScope's branch would download
        name = model_folder(recipe.model_copy(update={"hub": "huggingface"}))
    except KitError as error:
        return Gate("model", False, recipe.model_name, detail=error.message, hint=error.hint), None
    if Path(name).is_dir():
        return _on_disk(Path(name), recipe), Path(name)
    folder = _snapshot(name, recipe.revision)
    lacking = lacks(folder) if folder else ["config.json, tokenizer and weights"]
    if offline(recipe, "TRANSFORMERS_OFFLINE"):
        if folder and not lacking:
            return _on_disk(folder, recipe), folder
        return Gate("model", False, name, detail=f"offline, and the cache {_hub_cache()} lacks {_listed(lacking)}",
                    hint="fetch it once with local_files_only: false and no offline switch set, or set model_name to "
                         "a folder that holds it"), folder
    trouble = _modelscope_trouble() if recipe.hub == "modelscope" else _hub_trouble(
        f"{quote(name)}/resolve/{quote(recipe.revision or 'main', safe='')}/config.json")
    if trouble is None:
        gate = Gate("model", True, f"{name}: {'in the cache' if folder and not lacking else 'the hub has it'}")
        return (_on_disk(folder, recipe) if folder and not lacking else gate), folder
    if folder and not lacking:
        return Gate("model", None, f"{name}: complete in the cache", detail=trouble.message,
                    hint="local_files_only: true asks no hub"), folder
    return Gate("model", False, name, detail=trouble.message, hint=trouble.hint), folder


def _starter() -> tuple[Gate, Path | None]:
    folder = cache_dir() / "starter" / NAME
    if folder.is_dir():
        lacking = lacks(folder)
        return Gate("model", not lacking, f"starter: {folder}", detail=_listed(lacking) and f"lacks {_listed(lacking)}",
                    hint="delete that folder: it is made again" if lacking else ""), folder
    try:
        return Gate("model", True, f"starter: {packaged_gguf().name}, will be unpacked into {folder}"), None
    except KitError as error:
        return Gate("model", False, "starter", detail=error.message, hint=error.hint), None


def _on_disk(folder: Path, recipe: Recipe) -> Gate:
    """A folder that is there: every file of it, and weights that an adapter can be merged into."""
    lacking = lacks(folder)
    if lacking:
        return Gate("model", False, str(folder), detail=f"it lacks {_listed(lacking)}",
                    hint="fetch the model again; of a clone with git: git lfs pull")
    if _config(folder).get("quantization_config") and recipe.save_merged != "none":
        return Gate("model", False, str(folder),
                    detail="its weights are quantised, and an adapter is merged into 16-bit ones only",
                    hint="set model_name to the 16-bit original (load_in_4bit quantises it while loading), or "
                         "save_merged: none and gguf: []")
    bytes_there = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Gate("model", True, f"{folder}: complete, weights {size(bytes_there)}")


def lacks(folder: Path) -> list[str]:
    """What a model folder needs and does not have: config, tokenizer, or a shard; a torn shard counts too."""
    lacking = [name for name in ("config.json", "tokenizer_config.json") if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in TOKENIZERS):
        lacking.append("a tokenizer (tokenizer.json)")
    try:
        shards = shard_names(folder)
    except KitError:
        return [*lacking, f"a readable {INDEX}"]
    lacking += [name for name in shards if not (folder / name).is_file()]
    return lacking + [f"a whole {name}" for name in shards if (folder / name).is_file() and _torn(folder / name)]


def _torn(shard: Path) -> bool:
    try:
        read_weights_header(shard)
    except KitError:
        return True
    return False


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def data(recipe: Recipe) -> Gate:
    """Every source there, or its hub; rows are read by `kit lint`, not here."""
    hubs = []
    for source in (*recipe.sources, recipe.eval_dataset):
        if source is None:
            continue
        if files_of(source, recipe) is None and local_path(source) is None:
            hubs.append(source)
    files = data_files(recipe)
    if empty := [str(file) for file in files if not file.stat().st_size]:
        return Gate("data", False, _listed(empty), detail="no bytes in it", hint="it needs at least one row")
    many = "1 file" if len(files) == 1 else f"{len(files)} files"
    parts = [f"{many}, {size(sum(file.stat().st_size for file in files))}"] if files else []
    for name in hubs:
        if offline(recipe, "HF_DATASETS_OFFLINE"):
            if recipe.hub == "modelscope" or not _prepared(name, recipe):
                where = "ModelScope's cache is not read" if recipe.hub == "modelscope" else \
                    f"{_datasets_cache()} has no {recipe.dataset_split} split of it"
                return Gate("data", False, name, detail=f"offline, and {where}",
                            hint="fetch it once with local_files_only: false and no offline switch set, or set "
                                 "dataset to a file or folder")
            parts.append(f"{name} in the cache")
            continue
        trouble = _modelscope_trouble() if recipe.hub == "modelscope" else _hub_trouble(
            f"datasets/{quote(name)}/resolve/{quote(recipe.dataset_revision or 'main', safe='')}/README.md")
        if trouble:
            return Gate("data", False, name, detail=trouble.message, hint=trouble.hint)
        parts.append(f"{name}: the hub has it")
    return Gate("data", True, "; ".join(parts))


def offline(recipe: Recipe, switch: str) -> bool:
    """Whether the hub will not be asked: by the recipe, or by a switch of Hugging Face's libraries."""
    on = any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in ("HF_HUB_OFFLINE", switch))
    return recipe.local_files_only or (on and recipe.hub == "huggingface")


def _hub_cache() -> str:
    return constants.HF_HUB_CACHE


def _datasets_cache() -> Path:
    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")


def _snapshot(name: str, revision: str | None) -> Path | None:
    """The model's folder in the hub's cache, whole or not."""
    for file in ("config.json", "tokenizer_config.json"):
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _prepared(name: str, recipe: Recipe) -> bool:
    """Whether `datasets` has the split as Arrow files in its cache."""
    split = re.split(r"[\[+]", recipe.dataset_split)[0]
    folder = _datasets_cache() / name.replace("/", "___")
    return any(re.search(rf"-{re.escape(split)}(-\d+-of-\d+)?\.arrow$", file.name) and ".incomplete" not in str(file)
               for file in folder.rglob("*.arrow"))


def _modelscope_trouble() -> KitError | None:
    if importlib.util.find_spec("modelscope") is None:
        return KitError("hub: modelscope needs the package modelscope", "pip install modelscope")
    # Its pages are there for any name, so an answer tells only that it can be reached.
    answer = _head(f"https://{os.environ.get('MODELSCOPE_DOMAIN') or 'www.modelscope.cn'}", {})
    return answer if isinstance(answer, KitError) else None


def _hub_trouble(path: str) -> KitError | None:
    """What the Hugging Face hub or its mirror says against a file there; None when it can be had."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    token = get_token()
    answer = _head(f"{endpoint}/{path}", {"authorization": f"Bearer {token}"} if token else {})
    if isinstance(answer, KitError):
        return answer
    status, reason = answer
    if status < 400 or (status == 404 and reason == "EntryNotFound" and path.startswith("datasets/")):
        return None
    about = f"{endpoint} answers {status}{f' ({reason})' if reason else ''} to {path}"
    if status in (401, 403):
        return KitError(about, "no such name, or private or gated: correct it, or accept its terms on its page and "
                               "set HF_TOKEN (or `hf auth login`)")
    if status == 404:
        return KitError(about, "correct the name or the revision")
    return KitError(about, f"try later, or {hub_hint()}")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect (to the file itself) is an answer: it is not followed."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _head(url: str, headers: dict[str, str]) -> tuple[int, str] | KitError:
    """One HEAD request: (status, the hub's error code or ''), or why there was no answer.

    In a thread of its own, because looking up a name may take longer than any time limit of a socket.
    """
    answers: list[tuple[int, str] | str] = []

    def ask() -> None:
        request = urllib.request.Request(url, headers=headers, method="HEAD")
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=SECONDS) as answer:
                answers.append((answer.status, ""))
        except urllib.error.HTTPError as error:
            answers.append((error.code, error.headers.get("X-Error-Code") or ""))
        except (OSError, http.client.HTTPException, ValueError) as error:
            answers.append(str(getattr(error, "reason", error)))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS + 0.5)
    found = answers[0] if answers else f"no answer within {SECONDS:.0f} s"
    host = "/".join(url.split("/")[:3])
    return KitError(f"{host} can't be reached: {found}", hub_hint()) if isinstance(found, str) else found


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
