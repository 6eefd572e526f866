"""`kit doctor` on model and data: complete on this disk, or a hub that answers. Nothing is downloaded."""

from __future__ import annotations

import importlib.util
import os
import re
import threading
from pathlib import Path

import httpx
from huggingface_hub import constants, get_token, hf_hub_url
from huggingface_hub.errors import HFValidationError

from kit.common.errors import KitError, one_line
from kit.common.files import cache_dir
from kit.common.show import size
from kit.common.weight_files import INDEX, read_weights_header, shard_names
from kit.data.sources import data_files, files_of, local_path
from kit.models.fetch import cached_folder, hub_hint, model_folder
from kit.models.starter import NAME, packaged_gguf
from kit.recipe.recipe import Recipe
from kit.runs.gates import Gate

SECONDS = 2.0
ONLINE = "fetch it once with local_files_only: false and no offline switch set, or set {} to a folder that holds it"
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
    folder = cached_folder(name, recipe.revision)
    missing = lacks(folder) if folder else ["config.json, tokenizer and weights"]
    cached = _on_disk(folder, recipe) if folder and not missing else None
    if offline(recipe, "TRANSFORMERS_OFFLINE"):
        return cached or Gate("model", False, name, hint=ONLINE.format("model_name"), detail=f"offline, and the cache "
                              f"{constants.HF_HUB_CACHE} lacks {_listed(missing)}"), folder
    trouble = _hub_trouble(recipe.hub, name, "config.json", recipe.revision)
    if trouble is None:
        return cached or Gate("model", True, f"{name}: the hub has it"), folder
    if cached:
        return Gate("model", None, f"{name}: complete in the cache", detail=trouble.message,
                    hint="local_files_only: true asks no hub"), folder
    return Gate("model", False, name, detail=trouble.message, hint=trouble.hint), folder


def _starter() -> tuple[Gate, Path | None]:
    folder = cache_dir() / "starter" / NAME
    if folder.is_dir():
        missing = lacks(folder)
        return Gate("model", not missing, f"starter: {folder}", detail=_listed(missing) and f"lacks {_listed(missing)}",
                    hint="delete that folder: it is made again" if missing else ""), folder
    try:
        return Gate("model", True, f"starter: {packaged_gguf().name}, will be unpacked into {folder}"), None
    except KitError as error:
        return Gate("model", False, "starter", detail=error.message, hint=error.hint), None


def _on_disk(folder: Path, recipe: Recipe) -> Gate:
    """A folder that is there: every file of it, and weights that an adapter can be merged into."""
    if missing := lacks(folder):
        return Gate("model", False, str(folder), detail=f"it lacks {_listed(missing)}",
                    hint="fetch the model again; of a clone with git: git lfs pull")
    config = (folder / "config.json").read_text(encoding="utf-8", errors="replace")
    if re.search(r'"quantization_config"\s*:\s*\{', config) and recipe.save_merged != "none":
        return Gate("model", False, str(folder),
                    detail="its weights are quantised, and an adapter is merged into 16-bit ones only",
                    hint="set model_name to the 16-bit original (load_in_4bit quantises it while loading), or "
                         "save_merged: none and gguf: []")
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Gate("model", True, f"{folder}: complete, weights {size(weights)}")


def lacks(folder: Path) -> list[str]:
    """What a model folder needs and does not have: config, tokenizer, or a shard; a torn shard counts too."""
    missing = [name for name in ("config.json", "tokenizer_config.json") if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in TOKENIZERS):
        missing.append("a tokenizer (tokenizer.json)")
    try:
        shards = shard_names(folder) if (folder / INDEX).is_file() else ["model.safetensors"]
    except KitError:
        return [*missing, f"a readable {INDEX}"]
    for name in shards:
        try:
            read_weights_header(folder / name)
        except KitError:
            missing.append(f"a whole {name}" if (folder / name).is_file() else name)
    return missing


def data(recipe: Recipe) -> Gate:
    """Every source there, or its hub; rows are read by `kit lint`, not here."""
    hub_ids = [source for source in (*recipe.sources, recipe.eval_dataset)
               if source and files_of(source, recipe) is None and local_path(source) is None]
    files = data_files(recipe)
    if empty := [str(file) for file in files if not file.stat().st_size]:
        return Gate("data", False, _listed(empty), detail="no bytes in it", hint="it needs at least one row")
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    parts = [f"{count}, {size(sum(file.stat().st_size for file in files))}"] if files else []
    for name in hub_ids:
        if offline(recipe, "HF_DATASETS_OFFLINE"):
            if reason := _not_prepared(name, recipe):
                return Gate("data", False, name, detail=f"offline, and {reason}", hint=ONLINE.format("dataset"))
            parts.append(f"{name} in the cache")
        elif trouble := _hub_trouble(recipe.hub, name, "README.md", recipe.dataset_revision, "dataset"):
            return Gate("data", False, name, detail=trouble.message, hint=trouble.hint)
        else:
            parts.append(f"{name}: the hub has it")
    return Gate("data", True, "; ".join(parts))


def offline(recipe: Recipe, switch: str) -> bool:
    """Whether the hub will not be asked: by the recipe, or by a switch of Hugging Face's libraries."""
    on = any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in ("HF_HUB_OFFLINE", switch))
    return recipe.local_files_only or (on and recipe.hub == "huggingface")


def _not_prepared(name: str, recipe: Recipe) -> str:
    """Why a data set can't be read without its hub, or ''; `datasets` keeps a split as Arrow files in its cache."""
    if recipe.hub == "modelscope":
        return "ModelScope's cache is not read"
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    split = re.escape(re.split(r"[\[+]", recipe.dataset_split)[0])
    if any(re.search(rf"-{split}(-\d+-of-\d+)?\.arrow$", file.name) and ".incomplete" not in str(file)
           for file in (cache / name.replace("/", "___")).rglob("*.arrow")):
        return ""
    return f"{cache} has no {recipe.dataset_split} split of it"


def _hub_trouble(hub: str, name: str, file: str, revision: str | None, kind: str = "model") -> KitError | None:
    """What the hub (or its mirror) says against a file of a model or data set; None when it can be had."""
    if hub == "modelscope":
        return _modelscope_trouble()
    token = get_token()
    try:
        url = hf_hub_url(name, file, repo_type=kind, revision=revision)
    except HFValidationError as error:
        return KitError(one_line(error), "correct the name: a folder, or a hub id like Qwen/Qwen3-4B")
    answer = _head(url, {"authorization": f"Bearer {token}"} if token else {})
    if isinstance(answer, Exception):
        return KitError(f"{constants.ENDPOINT} can't be reached: {one_line(answer)}", hub_hint())
    status, code = answer.status_code, answer.headers.get("X-Error-Code")
    if not answer.is_error or (kind == "dataset" and code == "EntryNotFound"):  # a data set without a README
        return None
    about = f"{constants.ENDPOINT} answers {status}{f' ({code})' if code else ''} for {name}"
    if status in (401, 403):
        return KitError(about, "no such name, or private or gated: correct it, or accept its terms on its page and "
                               "set HF_TOKEN (or `hf auth login`)")
    return KitError(about, "correct the name or the revision" if status == 404 else f"try later, or {hub_hint()}")


def _modelscope_trouble() -> KitError | None:
    if importlib.util.find_spec("modelscope") is None:
        return KitError("hub: modelscope needs the package modelscope", "pip install modelscope")
    # Its pages are there for any name, so an answer tells only that it can be reached.
    site = f"https://{os.environ.get('MODELSCOPE_DOMAIN') or 'www.modelscope.cn'}"
    answer = _head(site, {})
    return KitError(f"{site} can't be reached: {one_line(answer)}", hub_hint()) if isinstance(answer, Exception) \
        else None


def _head(url: str, headers: dict[str, str]) -> httpx.Response | Exception:
    """The answer to one HEAD request, or why there was none; a redirect (to the file itself) is not followed.

    Not by huggingface_hub's own call, which asks for more and writes it into its cache. In a thread of its own, because
    looking up a name may take longer than any time limit of a connection.
    """
    answers: list[httpx.Response | Exception] = []

    def ask() -> None:
        try:
            answers.append(httpx.head(url, headers=headers, timeout=SECONDS))
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS + 0.5)
    return answers[0] if answers else TimeoutError(f"no answer within {SECONDS:.0f} s")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
