"""Save the adapter; merge it into the 16-bit base model, shard by shard; write the merged model in 4-bit too."""

import shutil
from pathlib import Path
from typing import Any

from kit.common.files import hashes_of, read_json, whole_folder, write_json
from kit.common.show import bar
from kit.common.weight_files import INDEX, weight_files
from kit.export.merging import changes_of, check_mergeable, fitting, merge_file
from kit.models.fetch import base_folder
from kit.recipe.recipe import Recipe
from kit.runs.run import Run, read_manifest


def save_adapter(model: Any, tokenizer: Any, run: Run) -> Path:
    """Write the adapter with its tokenizer and trained template; returns the folder.

    A fully fine-tuned model has no adapter: its weights go to `merged/` in 16-bit.
    """
    is_adapter = hasattr(model, "peft_config")
    target = run.adapter if is_adapter else run.merged
    with whole_folder(target) as folder:
        # "auto" would ask the hub for the base model's vocabulary size.
        model.save_pretrained(folder, **({"save_embedding_layers": False} if is_adapter else {}))
        _save_tokenizer(tokenizer, folder)
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
    from transformers import AutoTokenizer  # not at the top: unsloth, which must come before it, is not needed here

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
        if (adapter / "tokenizer_config.json").is_file():
            _save_tokenizer(AutoTokenizer.from_pretrained(adapter), folder)
        else:
            AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def save_4bit(merged: Path, target: Path, recipe: Recipe) -> None:
    """Write the merged model's weights as bitsandbytes 4-bit, with the recipe's bnb_4bit settings, and its tokenizer.

    transformers and vLLM load the folder as it is: its config says how it is quantised.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kit.models.load import four_bit_config  # imports unsloth, which only this export needs

    dtype = read_json(merged / "config.json").get("dtype") or "bfloat16"
    # On the CPU on every machine: there is room for it, and the same weights come out.
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto", device_map="cpu",
                                                 quantization_config=four_bit_config(recipe, dtype),
                                                 trust_remote_code=recipe.trust_remote_code)
    with whole_folder(target) as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(merged).save_pretrained(folder)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save the trained tokenizer; its stop and pad tokens become those of the model's own files, if any lie there."""
    tokenizer.save_pretrained(folder)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for path in (folder / "config.json", folder / "generation_config.json"):
        if path.is_file():
            write_json(path, {**read_json(path), **ends})
