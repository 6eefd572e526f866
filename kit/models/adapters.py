"""An adapter on this disk or a hub, and what its configuration says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from kit.common.errors import KitError, one_line
from kit.models.fetch import hub_hint
from kit.recipe.recipe import Recipe


def local_adapter(name: str) -> Path | None:
    """The folder that an adapter_name_or_path means, there or not; None for an id on the hub."""
    path = Path(name).expanduser()
    return path if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1 else None


def adapter_folder(recipe: Recipe) -> Path:
    """The adapter that adapter_name_or_path names, on this disk; fetched from the hub if it is an id there."""
    name = str(recipe.adapter_name_or_path)
    if path := local_adapter(name):
        return path

    try:
        return Path(snapshot_download(name, local_files_only=recipe.local_files_only, allow_patterns=["adapter_*"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise KitError(f"adapter_name_or_path: {name} is no folder and could not be fetched: "
                       f"{one_line(error)}", hub_hint()) from None


PREFIX = "base_model.model."
# These starts change the base model's own weights: the adapter belongs to the changed ones.
STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga", "kasa", "mica")


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """adapter_config.json; KitError when the folder holds no LoRA adapter in safetensors."""
    path = adapter / "adapter_config.json"
    if not path.is_file():
        raise KitError(f"{adapter} is no LoRA adapter: there is no adapter_config.json in it",
                       "name a folder that PEFT's save_pretrained wrote")
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise KitError(f"{path} can't be read: {error}", "name a folder that PEFT's save_pretrained wrote") from None
    if config.get("peft_type") != "LORA":
        raise KitError(f"{path}: peft_type is {config.get('peft_type')!r}, only LORA is known here",
                       "merge it with the tool it was trained with")
    if not (adapter / "adapter_model.safetensors").is_file():
        raise KitError(f"{adapter} has no adapter_model.safetensors",
                       "save the adapter as safetensors: PEFT's save_pretrained does")
    return config


def changed_base(config: dict[str, Any]) -> str:
    """The start (init_lora_weights) of an adapter that fits other weights than the base model's own, else ''."""
    start = "loftq" if config.get("loftq_config") else str(config.get("init_lora_weights", ""))
    return start if start.startswith(STARTS) else ""
