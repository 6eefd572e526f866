"""An adapter on this disk or a hub, and what its configuration says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kit.common.errors import KitError
from kit.common.files import read_json
from kit.models.fetch import fetched, local_folder
from kit.recipe.recipe import Recipe

PREFIX = "base_model.model."
# These starts change the base model's own weights: the adapter belongs to the changed ones.
STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga", "kasa", "mica")


def adapter_folder(recipe: Recipe) -> Path:
    """The adapter that adapter_name_or_path names, on this disk; fetched from the hub if it is an id there."""
    name = str(recipe.adapter_name_or_path)
    return local_folder(name, bare_ids=False) or fetched("adapter_name_or_path", name, ["adapter_*"], recipe)


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """adapter_config.json; KitError when the folder holds no LoRA adapter in safetensors."""
    config = read_json(adapter / "adapter_config.json")
    if not config:
        raise KitError(f"{adapter} is no LoRA adapter: there is no adapter_config.json in it that can be read",
                       "name a folder that PEFT's save_pretrained wrote")
    if config.get("peft_type") != "LORA":
        raise KitError(f"{adapter}: peft_type is {config.get('peft_type')!r}, only LORA is known here",
                       "merge it with the tool it was trained with")
    if not (adapter / "adapter_model.safetensors").is_file():
        raise KitError(f"{adapter} has no adapter_model.safetensors",
                       "save the adapter as safetensors: PEFT's save_pretrained does")
    return config


def changed_base(config: dict[str, Any]) -> str:
    """The start (init_lora_weights) of an adapter that fits other weights than the base model's own, else ''."""
    start = "loftq" if config.get("loftq_config") else str(config.get("init_lora_weights", ""))
    return start if start.startswith(STARTS) else ""
