"""Save the adapter; merge it into the 16-bit base model, shard by shard."""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.errors import GateError, KitError
from kit.gates.provenance import hashes_of
from kit.platforms import base_folder
from kit.runs import Run, read_manifest, write_json

if TYPE_CHECKING:
    from kit.recipe import Recipe

PREFIX = "base_model.model."
INDEX = "model.safetensors.index.json"


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears complete or not at all; what it replaces stays until then."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        old = folder.with_name(folder.name + ".old")
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        # safetensors and tokenizers raise types of their own, with the system's words in them.
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        raise KitError(f"{folder} could not be written: {getattr(error, 'strerror', None) or error}",
                       "free disk space or choose another output_dir") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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

    W' = W + (lora_alpha / r) B A, in float32 (Hu et al. 2021, LoRA, section 4.1; rsLoRA divides by sqrt(r):
    Kalajdzievski 2023), stored in the base's own format; to bfloat16 it is rounded by seeded chance, which keeps what
    rounding to the nearest would lose. One shard is in memory at a time. A QLoRA adapter is merged into the original
    16-bit weights too, so the result differs slightly from the model it was trained on.
    """
    if recipe.save_merged == "none":
        return None
    if saved == run.merged:
        return saved
    base = base_folder(recipe)
    merge_adapter(base, saved, run.merged)
    if (run.folder / "manifest.json").is_file() and not (manifest := read_manifest(run)).get("base_sha256"):
        write_json(run.folder / "manifest.json", {**manifest, "base_sha256": hashes_of(base)})
    return run.merged


def merge_adapter(base: Path, adapter: Path, target: Path) -> None:
    """Merge the adapter folder into the base folder's weights and write a complete model folder."""
    from safetensors import safe_open
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    _check_mergeable(adapter, base)
    changes, scale = changes_of(adapter)
    used: set[str] = set()
    with whole_folder(target) as folder:
        for shard in sorted(base.glob("*.safetensors")):
            with safe_open(shard, framework="pt") as file:
                merged = {}
                for name in file.keys():  # noqa: SIM118 (safe_open has no iterator)
                    merged[name] = merged_tensor(name, file.get_tensor(name), changes.get(name), scale)
                    used |= {name} & set(changes)
                save_file(merged, folder / shard.name, metadata={"format": "pt"})
        if missing := sorted(set(changes) - used):
            raise GateError(f"the adapter changes {missing[0]}, which the base model {base} does not have "
                            f"({len(missing)} of {len(changes)} tensors)", "merge into the base it was trained on")
        for name in (INDEX, "config.json", "generation_config.json"):
            if (base / name).is_file():
                shutil.copyfile(base / name, folder / name)
        tokenizer = AutoTokenizer.from_pretrained(adapter)
        tokenizer.save_pretrained(folder)
        _settle_stop(folder, tokenizer)


def _check_mergeable(adapter: Path, base: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "target_parameters"):
        if config.get(key):
            raise KitError(f"the adapter uses {key}, which can't be merged yet", "set save_merged: none and gguf: []")
    model = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if model.get("quantization_config"):
        raise KitError(f"{base} holds quantised weights, an adapter is merged into 16-bit ones",
                       "set model_name to the 16-bit original; load_in_4bit quantises it while loading")


def changes_of(adapter: Path) -> tuple[dict[str, Any], float]:
    """({name in the base: (A, B), or a whole tensor that replaces the base's}, scale of B A) of an adapter folder."""
    from safetensors.torch import load_file

    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    changes: dict[str, Any] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if name.endswith(".lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            changes[stem + ".weight"] = (tensor, tensors[f"{PREFIX}{stem}.lora_B.weight"])
        elif not name.endswith(".lora_B.weight"):
            changes[name.replace(".base_layer.", ".")] = tensor
    return changes, scale


def merged_tensor(name: str, tensor: Any, change: Any, scale: float) -> Any:
    """A base tensor with its change from `changes_of` (None for none), in the base's own format."""
    import torch

    if change is None:
        return tensor
    if not isinstance(change, tuple):
        return change.to(tensor.dtype)
    a, b = change
    exact = tensor.float() + scale * (b.float() @ a.float())
    return _rounded_by_chance(exact, name) if tensor.dtype == torch.bfloat16 else exact.to(tensor.dtype)


def _rounded_by_chance(exact: Any, name: str) -> Any:
    """float32 → bfloat16, up or down with the probability that keeps the mean (Gupta et al. 2015, section 3).

    An adapter's changes are mostly smaller than bfloat16's steps (1/256 of a weight). Rounded to the nearest they fall
    away, all in the same direction: a fifth of a short training is lost. Rounded by chance they are kept on average.
    The dice are seeded by the tensor's name, so the same merge gives the same bits everywhere.
    """
    import torch

    dice = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    bits = exact.cpu().contiguous().view(torch.int32)
    # bfloat16 is the upper half of float32: adding a random lower half carries into it as often as it should.
    carried = bits + torch.randint(0, 1 << 16, bits.shape, generator=dice, dtype=torch.int32)
    return (carried & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def _settle_stop(folder: Path, tokenizer: Any) -> None:
    """The stop and pad tokens in the model's own files are the trained ones."""
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            config["eos_token_id"] = tokenizer.eos_token_id
            config["pad_token_id"] = tokenizer.pad_token_id
            write_json(path, config)
