"""Load a base model, or a saved adapter on its base."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from kit.common.unsloth import FastLanguageModel

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kit.models import quantised
from kit.models.fetch import loading_options, model_folder, not_loaded
from kit.models.template import prepare_tokenizer
from kit.recipe.machine import machine
from kit.recipe.recipe import Recipe
from kit.recipe.settings import Settings, resolved


def load_model(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model in the recipe's precision, and its tokenizer with the recipe's template.

    Raises KitError when the model can't be found or read, GateError when the layers are not in the
    precision asked for.
    """
    model, tokenizer = load_from(model_folder(recipe), recipe)
    return model, prepare_tokenizer(tokenizer, recipe)


def load_from(source: str, recipe: Recipe) -> tuple[Any, Any]:
    """`load_model` of a folder or hub id, with the tokenizer as it was saved."""
    settings = resolved(recipe)
    if recipe.trust_remote_code:
        print(f"trust_remote_code: Python code that comes with {source} will run")
    load = quantised.load_quantised if _without_unsloth(recipe, settings) else _load_with_unsloth
    try:
        model, tokenizer = load(source, recipe, settings, loading_options(recipe))
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        if isinstance(error, RuntimeError) and "out of memory" in str(error).lower():
            raise
        raise not_loaded("weights", recipe, error) from error
    quantised.check_precision(model, recipe)
    if machine().device == "cpu":
        _head_in_one_piece(model)
    return model, tokenizer


def _without_unsloth(recipe: Recipe, settings: Settings) -> bool:
    return machine().device == "cpu" and not quantised.unsloth_quantises(recipe, settings.dtype)


def _load_with_unsloth(source: str, recipe: Recipe, settings: Settings, options: dict[str, Any]) -> tuple[Any, Any]:
    dtype = getattr(torch, settings.dtype)
    if recipe.load_in_4bit and not quantised.usual_4bit(recipe, settings.dtype):
        # Without use_exact_model_name Unsloth may load its own 4-bit copy, quantised another way.
        options |= {"quantization_config": quantised.four_bit_config(recipe, settings.dtype),
                    "use_exact_model_name": True}
    if machine().device == "cuda" and recipe.full_finetuning and settings.bf16 and dtype == torch.float32:
        # Unsloth's words for it: the dtype is that of the products.
        dtype = torch.bfloat16
        options |= {"float32_mixed_precision": True}
    return FastLanguageModel.from_pretrained(  # type: ignore[no-any-return]
        model_name=source, max_seq_length=recipe.max_seq_length, dtype=dtype, load_in_4bit=recipe.load_in_4bit,
        load_in_8bit=recipe.load_in_8bit, full_finetuning=recipe.full_finetuning,
        use_gradient_checkpointing=recipe.use_gradient_checkpointing, **options)


def _head_in_one_piece(model: Any) -> None:
    """Give the output head contiguous rows.

    `generate` hands it the last place of each row of a batch, a view with gaps, for which a CPU's matrix product copies
    the whole head once per row: 1 GB more for 20 prompts of the starter model with an adapter, and a third more time.
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))


def reload(saved: Path, recipe: Recipe) -> tuple[Any, PreTrainedTokenizerBase]:
    """What `save_adapter` wrote, from disk: the adapter on its base, or fully fine-tuned weights."""
    has_adapter = (saved / "adapter_config.json").is_file()
    if not has_adapter or not _without_unsloth(recipe, resolved(recipe)):
        model, tokenizer = load_from(str(saved), recipe.model_copy(update={"revision": None}))
    else:
        model, _ = load_from(model_folder(recipe), recipe)
        if recipe.load_in_8bit:
            model = quantised.prepare_8bit(model, recipe)
        model = PeftModel.from_pretrained(model, str(saved))
        tokenizer = AutoTokenizer.from_pretrained(saved)
    if has_adapter:
        _restore_dtype(model, saved)
    return model, tokenizer


def _restore_dtype(model: Any, saved: Path) -> None:
    """Give the adapter the number format it was saved in.

    TRL trains adapters of quantised models in bfloat16 and PEFT loads every adapter in float32, so the same weights
    would answer a little differently.
    """
    with safe_open(saved / "adapter_model.safetensors", framework="pt") as file:
        dtypes = {file.get_tensor(name).dtype for name in file.keys() if ".lora_" in name}  # noqa: SIM118
    if len(dtypes) == 1:
        dtype = dtypes.pop()
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.to(dtype)


def free_memory() -> None:
    """Give back what deleted models held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
