"""Save the adapter; merge it into the 16-bit base model, shard by shard; write the merged model in 4-bit too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from kit.common.files import hashes_of, whole_folder, write_json
from kit.common.show import bar
from kit.common.weight_files import INDEX, weight_files
from kit.export.merging import changes_of, check_mergeable, fitting, merge_file
from kit.models.fetch import base_folder
from kit.recipe.recipe import Recipe
from kit.runs.folder import read_manifest
from kit.runs.run import Run


def save_adapter(model: Any, tokenizer: Any, run: Run) -> Path:
    """Write the adapter with its tokenizer and trained template; returns the folder.

    A fully fine-tuned model has no adapter: its weights go to `merged/` in 16-bit.
    """
    full = not hasattr(model, "peft_config")
    target = run.merged if full else run.adapter
    with whole_folder(target) as folder:
        if full:
            model.save_pretrained(folder)
        else:
            # "auto" would ask the hub for the base model's vocabulary size.
            model.save_pretrained(folder, save_embedding_layers=False)
        tokenizer.save_pretrained(folder)
        if full:
            _settle_stop(folder, tokenizer)
    return target


def merge(saved: Path, run: Run, recipe: Recipe) -> Path | None:
    """Merge what `save_adapter` wrote into the base model's 16-bit weights; returns `merged/`, or None.

    The adapter is added in float32 and stored in the base's own format; to bfloat16 it is rounded by seeded chance,
    which keeps what rounding to the nearest would lose. One tensor is in memory at a time. A QLoRA adapter is merged
    into the original 16-bit weights too, so the result differs slightly from the model it was trained on. With
    save_merged: 4bit the merged model is also written to `merged-4bit/`.
    """
    if recipe.save_merged == "none":
        return None
    if saved != run.merged:
        base = base_folder(recipe)
        merge_adapter(base, saved, run.merged)
        if (run.folder / "manifest.json").is_file() and not (manifest := read_manifest(run.folder)).get("base_sha256"):
            write_json(run.folder / "manifest.json", {**manifest, "base_sha256": hashes_of(base)})
    if recipe.save_merged == "4bit":
        save_4bit(run.merged, run.merged_4bit, recipe)
    return run.merged


def merge_adapter(base: Path, adapter: Path, target: Path) -> None:
    """Merge the adapter folder into the base folder's weights and write a complete model folder.

    An adapter that was saved without a tokenizer gets the base's, and the base's stop tokens. Raises KitError, or
    GateError when the base is not the one it was trained on, before anything is written.
    """
    check_mergeable(adapter, base)
    changes = fitting(changes_of(adapter), adapter, base)
    files = weight_files(base)
    with whole_folder(target) as folder, bar(sum(file.stat().st_size for file in files), "merging", "B", leave=False,
                                             unit_scale=True, delay=2) as progress:
        for file in files:
            merge_file(file, folder / file.name, changes, progress)
        for name in (INDEX, "config.json", "generation_config.json"):
            if (base / name).is_file():
                shutil.copyfile(base / name, folder / name)
        _give_tokenizer(folder, adapter, base)


def _give_tokenizer(folder: Path, adapter: Path, base: Path) -> None:
    from transformers import AutoTokenizer

    trained = (adapter / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(adapter if trained else base)
    tokenizer.save_pretrained(folder)
    if trained:
        _settle_stop(folder, tokenizer)


def save_4bit(merged: Path, target: Path, recipe: Recipe) -> None:
    """Write the merged model's weights as bitsandbytes 4-bit, with the recipe's bnb_4bit settings, and its tokenizer.

    transformers and vLLM load the folder as it is: its config says how it is quantised.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kit.models.quantised import four_bit_config

    kind = json.loads((merged / "config.json").read_text(encoding="utf-8")).get("dtype") or "bfloat16"
    # On the CPU on every machine: there is room for it, and the same weights come out.
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto", device_map="cpu",
                                                 quantization_config=four_bit_config(recipe, kind),
                                                 trust_remote_code=recipe.trust_remote_code)
    with whole_folder(target) as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(merged).save_pretrained(folder)


def _settle_stop(folder: Path, tokenizer: Any) -> None:
    """The stop and pad tokens in the model's own files are the trained ones."""
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            config["eos_token_id"] = tokenizer.eos_token_id
            config["pad_token_id"] = tokenizer.pad_token_id
            write_json(path, config)
