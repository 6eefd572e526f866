"""Load a base model, add LoRA, load a saved adapter again. The one module that imports unsloth."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kit.errors import KitError
from kit.merging import PREFIX, changed_base, read_adapter_config
from kit.platforms import Settings, base_folder, cache_dir, hub_hint, machine, model_folder, settings
from kit.processes import sharding, world_size
from kit.prompts import prepare_tokenizer
from kit.quantised import (
    check_precision,
    four_bit_config,
    load_quantised,
    start_loftq,
    unsloth_quantises,
    usual_4bit,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kit.recipe import Recipe

# What an adapter that is trained on keeps; the rest of its settings is the recipe's.
KEPT = ("r", "lora_alpha", "target_modules", "bias", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
        "modules_to_save", "layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters")
OTHER_BASE = "set model_name to the base it was trained on (base_model_name_or_path in its adapter_config.json)"


def import_unsloth() -> ModuleType:
    """`import unsloth`, with its compiled files in the cache and nothing installed behind the user's back."""
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_dir() / "unsloth_compiled_cache"))
    os.environ.setdefault("UNSLOTH_AUTO_INSTALL", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Two remarks that alarm and change nothing: text bars are wanted, and the kernel is an optional speed-up.
    warnings.filterwarnings("ignore", message="IProgress not found")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, once installed, warns in every run
    import unsloth

    return unsloth


def resolved(recipe: Recipe) -> Settings:
    """What the recipe becomes on this machine, with reasons."""
    chosen = settings(recipe, machine(Path(recipe.output_dir)))
    if world_size() > 1:
        chosen.notes.append(f"{world_size()} processes: {sharding(recipe)['engine']}")
        if sharding(recipe)["engine"] == "ZeRO-3":
            chosen.notes.append("the loss of transformers, in place of Unsloth's chunked one, which can't see the "
                                "weights that ZeRO-3 holds elsewhere")
    return chosen


def load_model(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model in the recipe's precision, and its tokenizer with the recipe's template.

    Raises KitError when the model can't be found or read, GateError when the layers are not in the
    precision asked for.
    """
    model, tokenizer = _load(model_folder(recipe), recipe)
    return model, prepare_tokenizer(tokenizer, recipe)


def _load(name: str, recipe: Recipe) -> tuple[Any, Any]:
    import torch
    from safetensors import SafetensorError

    unsloth = import_unsloth()
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
            model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
                model_name=name, max_seq_length=recipe.max_seq_length, dtype=dtype,
                load_in_4bit=recipe.load_in_4bit, load_in_8bit=recipe.load_in_8bit,
                full_finetuning=recipe.full_finetuning,
                use_gradient_checkpointing=recipe.use_gradient_checkpointing, **common)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        if isinstance(error, RuntimeError) and "out of memory" in str(error).lower():
            raise
        reason = str(error).strip().split("\n")[0][:300]
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


def add_lora(model: PreTrainedModel, recipe: Recipe) -> PeftModel | PreTrainedModel:
    """The model with a fresh adapter, or with adapter_name_or_path to train on; with full_finetuning as it is.

    Raises KitError when the layers are not there, or the adapter is of another model.
    """
    if recipe.full_finetuning:
        return model
    if recipe.adapter_name_or_path:
        return _continued(model, adapter_folder(recipe), recipe)
    _check_targets(model, recipe)
    lora = {"r": recipe.r, "lora_alpha": recipe.lora_alpha, "lora_dropout": recipe.lora_dropout,
            "target_modules": list(recipe.target_modules), "bias": recipe.bias, "use_rslora": recipe.use_rslora}
    if recipe.use_dora:
        lora["use_dora"] = True
    model = _wrapped(model, recipe, lora)
    if recipe.loftq_config is not None:
        start_loftq(model, base_folder(recipe), recipe)
        model.peft_config["default"].loftq_config = recipe.loftq_config  # for whoever merges it
    return model


def _wrapped(model: Any, recipe: Recipe, lora: dict[str, Any]) -> Any:
    """The model with an adapter of these PEFT settings; through stock PEFT for 8-bit on a CPU, else Unsloth's way."""
    unsloth = import_unsloth()
    if recipe.load_in_8bit and not _on_gpu(model):
        if lora.get("use_dora"):
            raise KitError("use_dora with load_in_8bit does not work on a CPU: PEFT loses the scales of the 8-bit "
                           "weights when it measures their lengths", "set load_in_4bit in place of load_in_8bit")
        return _add_lora_8bit(model, lora, recipe)
    return unsloth.FastLanguageModel.get_peft_model(
        model, random_state=recipe.random_state, max_seq_length=recipe.max_seq_length,
        use_gradient_checkpointing=recipe.use_gradient_checkpointing, **lora)


def _add_lora_8bit(model: Any, lora: dict[str, Any], recipe: Recipe) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(recipe.random_state)
    return get_peft_model(_prepare_8bit(model, recipe), LoraConfig(task_type="CAUSAL_LM", **lora))


def _prepare_8bit(model: Any, recipe: Recipe) -> Any:
    """PEFT's preparation, the same for training and for loading again: it puts the norms into float32."""
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=bool(recipe.use_gradient_checkpointing),
        gradient_checkpointing_kwargs={"use_reentrant": False})


def local_adapter(name: str) -> Path | None:
    """The folder that an adapter_name_or_path means, there or not; None for an id on the hub."""
    path = Path(name).expanduser()
    return path if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1 else None


def adapter_folder(recipe: Recipe) -> Path:
    """The adapter that adapter_name_or_path names, on this disk; fetched from the hub if it is an id there."""
    name = str(recipe.adapter_name_or_path)
    if path := local_adapter(name):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, local_files_only=recipe.local_files_only, allow_patterns=["adapter_*"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise KitError(f"adapter_name_or_path: {name} is no folder and could not be fetched: "
                       f"{str(error).strip().splitlines()[0][:300]}", hub_hint()) from None


def _continued(model: Any, adapter: Path, recipe: Recipe) -> Any:
    """A fresh adapter of the saved one's settings, made the usual way, with the saved weights in it."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    config, tensors = read_adapter_config(adapter), load_file(adapter / "adapter_model.safetensors")
    start = changed_base(config)
    if start and not (start == "loftq" and recipe.load_in_4bit):
        raise KitError(f"adapter_name_or_path: {adapter} began with init_lora_weights: {start}: it belongs to a base "
                       f"model of other weights than {recipe.model_name}",
                       "set load_in_4bit: true" if start == "loftq" else "leave adapter_name_or_path out")
    lora = {name: config[name] for name in KEPT if config.get(name)}
    if isinstance(lora["target_modules"], str):  # a pattern, which Unsloth's CPU path would take apart
        lora["target_modules"] = sorted({name.removeprefix(PREFIX).partition(".lora_")[0] for name in tensors
                                         if ".lora_A." in name})
    try:
        model = _wrapped(model, recipe, {"lora_dropout": recipe.lora_dropout, **lora})
        result = set_peft_model_state_dict(model, tensors)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise KitError(f"adapter_name_or_path: {adapter} does not fit {recipe.model_name}: {reason}",
                       OTHER_BASE) from None
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    lost = sorted(trained & set(result.missing_keys)) + sorted(result.unexpected_keys)
    if lost:
        raise KitError(f"adapter_name_or_path: {adapter} does not fit {recipe.model_name}: {lost[0]} is only on one "
                       f"side ({len(lost)} tensors)", OTHER_BASE)
    model.peft_config["default"].loftq_config = config.get("loftq_config") or {}
    return model


def _check_targets(model: Any, recipe: Recipe) -> None:
    linears = sorted({name.rpartition(".")[2] for name, module in model.named_modules()
                      if type(module).__name__.startswith(("Linear", "Bf16StoredLinear"))} - {"lm_head"})
    unknown = [name for name in recipe.target_modules if name not in linears]
    if len(unknown) == len(recipe.target_modules):
        raise KitError(f"target_modules: {', '.join(unknown)}: no such layer in {recipe.model_name}",
                       f"its linear layers are: {', '.join(linears)}")


def _on_gpu(model: Any) -> bool:
    return next(model.parameters()).device.type == "cuda"


def trainable_share(model: Any) -> tuple[int, int]:
    """(trainable, all) parameters; 4-bit weights are counted unpacked."""
    if hasattr(model, "get_nb_trainable_parameters"):
        trainable, total = model.get_nb_trainable_parameters()
        return int(trainable), int(total)
    total = model.num_parameters()
    return total, total


def reload(saved: Path, recipe: Recipe) -> tuple[Any, PreTrainedTokenizerBase]:
    """What `save_adapter` wrote, from disk: the adapter on its base, or fully fine-tuned weights."""
    from peft import PeftModel
    from transformers import AutoTokenizer

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
    from safetensors import safe_open

    with safe_open(saved / "adapter_model.safetensors", framework="pt") as file:
        kinds = {file.get_tensor(name).dtype for name in file.keys() if ".lora_" in name}  # noqa: SIM118
    if len(kinds) == 1:
        kind = kinds.pop()
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.to(kind)


def free_memory() -> None:
    """Give back what deleted models held."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
