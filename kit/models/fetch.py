"""Where a model lies: a folder, the starter, or a hub that it is fetched from."""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from kit.common.errors import KitError, one_line
from kit.models.starter import NAME, starter_model
from kit.recipe.recipe import Recipe

# Of a model on a hub; other formats of its weights would double the download.
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.py", "tokenizer.model"]


def local_folder(name: str, bare_ids: bool = True) -> Path | None:
    """The folder that a name means, there or not; None for a hub id.

    Ids of models need no owner (gpt2); without `bare_ids` only owner/name is one.
    """
    path = Path(name).expanduser()
    is_id = name.count("/") == 1 or (bare_ids and "/" not in name)
    return path if path.exists() or name.startswith((".", "/", "~")) or not is_id else None


def model_folder(recipe: Recipe) -> str:
    """What to load: the starter's folder, a folder of the user's, or a hub id.

    With `hub: modelscope` the model is fetched there first, or found in its cache. Raises KitError when a path is no
    model.
    """
    if recipe.model_name == "starter":
        return str(starter_model())
    if folder := local_folder(recipe.model_name):
        _check_model_folder(folder)
        return str(folder)
    if recipe.hub == "modelscope":
        return str(fetched("model_name", recipe.model_name, MODEL_FILES, recipe, recipe.revision, "ModelScope"))
    return recipe.model_name


def base_folder(recipe: Recipe) -> Path:
    """The base model's 16-bit weights on this disk: what an adapter is merged into. Fetched if they are not there.

    Raises KitError when the hub can't be reached or has no such model.
    """
    name = model_folder(recipe)
    return local_folder(name) or fetched("model_name", name, MODEL_FILES, recipe, recipe.revision)


def _check_model_folder(path: Path) -> None:
    if not path.is_dir():
        state = "is a file" if path.is_file() else "does not exist"
        raise KitError(f"model_name: {path} {state}; a model is a folder or a hub id like Qwen/Qwen3-4B",
                       "correct model_name, or use `starter`")
    missing = [name for name in ("config.json", "tokenizer_config.json") if not (path / name).is_file()]
    if not list(path.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        present = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise KitError(f"model_name: {path} is no model folder: no {', '.join(missing)} in it (found: {present})",
                       "name the folder that holds config.json and the weights as safetensors")


def fetched(field: str, name: str, patterns: list[str], recipe: Recipe, revision: str | None = None,
            hub: str = "Hugging Face") -> Path:
    """The folder of what `field` names on a hub: its files of these patterns, downloaded if the cache has them not."""
    if hub == "ModelScope":
        if importlib.util.find_spec("modelscope") is None:
            raise KitError("hub: modelscope needs the package modelscope", "pip install modelscope")
        from modelscope import snapshot_download
    else:
        snapshot_download = huggingface_hub.snapshot_download
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns,
                                      local_files_only=recipe.local_files_only))
    except Exception as error:  # the hub's own, those of requests or httpx, the disk's
        raise KitError(f"{field}: {name} could not be fetched from {hub}: {one_line(error)}", hub_hint()) from None


def cached_folder(name: str, revision: str | None) -> Path | None:
    """The folder of a model in Hugging Face's cache, whole or not."""
    with suppress(HFValidationError):
        for file in ("config.json", "tokenizer_config.json"):
            path = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
            if isinstance(path, str):
                return Path(path).parent
    return None


def loading_options(recipe: Recipe) -> dict[str, Any]:
    """What every `from_pretrained` of the recipe's model is given."""
    return {name: getattr(recipe, name) for name in ("revision", "trust_remote_code", "local_files_only")}


def not_loaded(part: str, recipe: Recipe, error: Exception) -> KitError:
    """For what transformers raises while it loads a part of the recipe's model: its config, tokenizer, weights."""
    hint = "check the folder's files, or fetch the model again" if local_folder(recipe.model_name) else hub_hint()
    return KitError(f"model_name: the {part} of {recipe.model_name} could not be loaded: {one_line(error)}", hint)


def hub_hint() -> str:
    """What helps when a hub can't be reached."""
    return ("without that hub: set model_name and dataset to folders on this disk, HF_ENDPOINT to a mirror, "
            "or hub: modelscope; for what is already cached, local_files_only: true")


def model_label(recipe: Recipe) -> str:
    """The model's own name, for file names: Qwen/Qwen3-4B → Qwen3-4B."""
    return NAME if recipe.model_name == "starter" else Path(recipe.model_name.rstrip("/")).name
