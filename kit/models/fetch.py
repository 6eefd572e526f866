"""Where a model lies: a folder, the starter, or a hub that it is fetched from."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from kit.common.errors import KitError, one_line
from kit.models.starter import starter_model
from kit.recipe.recipe import Recipe

# Of a model on a hub; other formats of its weights would double the download.
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.py", "tokenizer.model"]


def model_folder(recipe: Recipe) -> str:
    """What to load: the starter's folder, a folder of the user's, or a hub id.

    With `hub: modelscope` the model is fetched there first, or found in its cache. Raises KitError when a path is no
    model.
    """
    if recipe.model_name == "starter":
        return str(starter_model())
    path = Path(recipe.model_name).expanduser()
    if path.exists() or recipe.model_name.startswith((".", "/", "~")) or recipe.model_name.count("/") > 1:
        _check_model_folder(path)
        return str(path)
    if recipe.hub == "modelscope":
        if importlib.util.find_spec("modelscope") is None:
            raise KitError("hub: modelscope needs the package modelscope", "pip install modelscope")
        from modelscope import snapshot_download

        try:
            return str(snapshot_download(recipe.model_name, revision=recipe.revision, allow_patterns=MODEL_FILES,
                                         local_files_only=recipe.local_files_only))
        except Exception as error:  # of its own, of requests, of the disk
            reason = one_line(error)
            raise KitError(f"model_name: {recipe.model_name} could not be fetched from ModelScope: {reason}",
                           hub_hint()) from None
    return recipe.model_name


def _check_model_folder(path: Path) -> None:
    if not path.is_dir():
        what = "is a file" if path.is_file() else "does not exist"
        raise KitError(f"model_name: {path} {what}; a model is a folder or a hub id like Qwen/Qwen3-4B",
                       "correct model_name, or use `starter`")
    missing = [name for name in ("config.json", "tokenizer_config.json") if not (path / name).is_file()]
    if not list(path.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise KitError(f"model_name: {path} is no model folder: no {', '.join(missing)} in it (found: {found})",
                       "name the folder that holds config.json and the weights as safetensors")


def base_folder(recipe: Recipe) -> Path:
    """The base model's 16-bit weights on this disk: what an adapter is merged into. Fetched if they are not there.

    Raises KitError when the hub can't be reached or has no such model.
    """
    name = model_folder(recipe)
    if Path(name).is_dir():
        return Path(name)

    try:
        return Path(snapshot_download(name, revision=recipe.revision, local_files_only=recipe.local_files_only,
                                      allow_patterns=MODEL_FILES))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise KitError(f"model_name: the weights of {name} could not be fetched: "
                       f"{one_line(error)}", hub_hint()) from None


def hub_hint() -> str:
    """What helps when a hub can't be reached."""
    return ("without that hub: set model_name and dataset to folders on this disk, HF_ENDPOINT to a mirror, "
            "or hub: modelscope; for what is already cached, local_files_only: true")


def model_label(recipe: Recipe) -> str:
    """The model's own name, for file names: Qwen/Qwen3-4B → Qwen3-4B."""
    if recipe.model_name == "starter":
        return "SmolLM2-135M-Instruct"
    return Path(recipe.model_name.rstrip("/")).name
