"""Load a base model, or a saved adapter on its base."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from kit.common.unsloth import FastLanguageModel

import torch
from peft import PeftModel, prepare_model_for_kbit_training
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kit.common.errors import KitError, one_line
from kit.models.fetch import hub_hint, model_folder
from kit.models.quantised import check_precision, four_bit_config, load_quantised, unsloth_quantises, usual_4bit
from kit.models.template import prepare_tokenizer
from kit.recipe.machine import machine
from kit.recipe.recipe import Recipe
from kit.recipe.settings import resolved, settings


def load_model(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model in the recipe's precision, and its tokenizer with the recipe's template.

    Raises KitError when the model can't be found or read, GateError when the layers are not in the
    precision asked for.
    """
    model, tokenizer = _load(model_folder(recipe), recipe)
    return model, prepare_tokenizer(tokenizer, recipe)


def _load(name: str, recipe: Recipe) -> tuple[Any, Any]:
    there = machine(Path(recipe.output_dir))
    chosen = settings(recipe, there)
    dtype = getattr(torch, chosen.dtype)
    common = {"revision": recipe.revision, "trust_remote_code": recipe.trust_remote_code,
              "local_files_only": recipe.local_files_only}
    if recipe.trust_remote_code:
        print(f"trust_remote_code: Python code that comes with {name} will run")
    try:
        if there.device == "cpu" and not unsloth_quantises(recipe, chosen.dtype):
            model, tokenizer = load_quantised(name, recipe, chosen.dtype, common)
        else:
            if recipe.load_in_4bit and not usual_4bit(recipe, chosen.dtype):
                # Without use_exact_model_name Unsloth may load its own 4-bit copy, quantised another way.
                common |= {"quantization_config": four_bit_config(recipe, chosen.dtype), "use_exact_model_name": True}
            if there.device == "cuda" and recipe.full_finetuning and chosen.bf16 and dtype == torch.float32:
                # Unsloth's words for it: the dtype is that of the products.
                dtype = torch.bfloat16
                common |= {"float32_mixed_precision": True}
            model, tokenizer = FastLanguageModel.from_pretrained(
                model_name=name, max_seq_length=recipe.max_seq_length, dtype=dtype,
                load_in_4bit=recipe.load_in_4bit, load_in_8bit=recipe.load_in_8bit,
                full_finetuning=recipe.full_finetuning,
                use_gradient_checkpointing=recipe.use_gradient_checkpointing, **common)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        if isinstance(error, RuntimeError) and "out of memory" in str(error).lower():
            raise
        reason = one_line(error)
        hint = "check the folder's files, or fetch the model again" if Path(name).is_dir() else hub_hint()
        raise KitError(f"model_name: {recipe.model_name} could not be loaded: {reason}", hint) from error
    check_precision(model, recipe)
    if there.device == "cpu":
        _head_in_one_piece(model)
    return model, tokenizer


def _head_in_one_piece(model: Any) -> None:
    """Give the output head contiguous rows.

    `generate` hands it the last place of each row of a batch, a view with gaps, for which a CPU's matrix product copies
    the whole head once per row: 1 GB more for 20 prompts of the starter model with an adapter, and a third more time.
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]))


def _prepare_8bit(model: Any, recipe: Recipe) -> Any:
    """PEFT's preparation, the same for training and for loading again: it puts the norms into float32."""
    return prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=bool(recipe.use_gradient_checkpointing),
        gradient_checkpointing_kwargs={"use_reentrant": False})


def reload(saved: Path, recipe: Recipe) -> tuple[Any, PreTrainedTokenizerBase]:
    """What `save_adapter` wrote, from disk: the adapter on its base, or fully fine-tuned weights."""
    if not (saved / "adapter_config.json").is_file():
        return _load(str(saved), recipe.model_copy(update={"revision": None}))
    if machine().device == "cpu" and not unsloth_quantises(recipe, resolved(recipe).dtype):
        base, _ = _load(model_folder(recipe), recipe)
        if recipe.load_in_8bit:
            base = _prepare_8bit(base, recipe)
        model = PeftModel.from_pretrained(base, str(saved))
        tokenizer = AutoTokenizer.from_pretrained(saved)
    else:
        model, tokenizer = _load(str(saved), recipe.model_copy(update={"revision": None}))
    _as_saved(model, saved)
    return model, tokenizer


def _as_saved(model: Any, saved: Path) -> None:
    """Give the adapter the number format it was saved in.

    TRL trains adapters of quantised models in bfloat16 and PEFT loads every adapter in float32, so the same weights
    would answer a little differently.
    """
    with safe_open(saved / "adapter_model.safetensors", framework="pt") as file:
        kinds = {file.get_tensor(name).dtype for name in file.keys() if ".lora_" in name}  # noqa: SIM118
    if len(kinds) == 1:
        kind = kinds.pop()
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.to(kind)


def free_memory() -> None:
    """Give back what deleted models held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
