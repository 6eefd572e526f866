"""Load a base model, in 4 and 8 bits too, or a saved adapter on its base."""

import gc
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kit.common.unsloth import FastLanguageModel

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel, prepare_model_for_kbit_training
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from unsloth_zoo.peft_utils import SKIP_QUANTIZATION_MODULES

from kit.common.errors import GateError, KitError, one_line
from kit.common.files import write_json
from kit.common.weight_files import weight_files
from kit.models.fetch import base_folder, loading_options, model_folder, not_loaded, read_adapter_config
from kit.models.saved import code_refused, saved_tokenizer
from kit.models.sharded import load_shards, loads_sharded
from kit.models.template import check_saved_templates, prepare_tokenizer
from kit.recipe.machine import machine
from kit.recipe.recipe import Recipe
from kit.recipe.settings import Settings, resolved

# What a device says of itself, and not of the weights that it was given.
DEVICE_FAILED = re.compile(r"out of memory|CUDA|cuBLAS|cuDNN|NCCL|device-side|pinned memory", re.IGNORECASE)
LESS_MEMORY = ("end what else holds its memory (nvidia-smi lists it; in a notebook restart the kernel), load_in_4bit: "
               "true, or a smaller model")
RESTART = "restart the kernel: after such an error a process can't use the GPU any more; kit doctor tries it out"
OTHER_BASE = "name the base it was trained on: --base, or model_name in the recipe"


def load_model(recipe: Recipe) -> tuple[PreTrainedModel, Any]:
    """The base model in the recipe's precision, and its tokenizer with the recipe's template.

    Raises KitError when the model can't be found or read, GateError when the layers are not in the
    precision asked for.
    """
    model, tokenizer = load_from(model_folder(recipe), recipe)
    return model, prepare_tokenizer(tokenizer, recipe)


def load_from(source: str, recipe: Recipe, **options: Any) -> tuple[Any, Any]:
    """`load_model` of a folder or hub id, with the tokenizer as it was saved; `options` are for `from_pretrained`."""
    settings = resolved(recipe)
    if recipe.trust_remote_code:
        print(f"trust_remote_code: Python code that comes with {source} will run")
    check_saved_templates(source, recipe)  # first, because Unsloth renders the template while it loads
    load = _load_with_transformers if _without_unsloth(recipe, settings) else _load_with_unsloth
    try:
        with code_refused(source):
            made = partial(load, source, recipe, settings, loading_options(recipe) | options)
            model, tokenizer = load_shards(made, recipe) if loads_sharded(recipe) else made()
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        if isinstance(error, RuntimeError) and DEVICE_FAILED.search(str(error)):
            raise KitError(f"{machine().device_name} failed while {recipe.model_name} was loaded: {one_line(error)}",
                           LESS_MEMORY if "memory" in str(error) else RESTART) from error
        raise not_loaded("weights", recipe, error) from error
    _check_precision(model, recipe)
    if machine().device == "cpu" and (head := model.get_output_embeddings()) is not None:
        # `generate` hands it the last place of each row of a batch, a view with gaps, for which a CPU's matrix product
        # copies the whole head once per row: 1 GB more for 20 prompts of the starter model with an adapter, and a
        # third more time.
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    return model, tokenizer


def _without_unsloth(recipe: Recipe, settings: Settings) -> bool:
    """Whether Unsloth's CPU loader lacks the precision asked for.

    Instead of 8-bit it would load 16-bit, and of 4-bit it knows the usual settings only.
    """
    unusual = recipe.load_in_8bit or (recipe.load_in_4bit and not _usual_4bit(recipe, settings.dtype))
    return unusual and machine().device == "cpu"


def _usual_4bit(recipe: Recipe, dtype: str) -> bool:
    """Whether the recipe's 4-bit settings are those Unsloth loads by itself: NF4, double quantisation."""
    return (recipe.bnb_4bit_quant_type == "nf4" and recipe.bnb_4bit_use_double_quant
            and recipe.bnb_4bit_compute_dtype in (None, dtype))


def _load_with_unsloth(source: str, recipe: Recipe, settings: Settings, options: dict[str, Any]) -> tuple[Any, Any]:
    dtype = getattr(torch, settings.dtype)
    # A full finetuning earlier in this process leaves it behind, and no model would get an adapter any more.
    os.environ.pop("UNSLOTH_ENABLE_FULL_FINETUNING", None)
    # Else Unsloth loads its own upload in place of a hub's model: other 4-bit weights, another cache, no revision.
    options |= {"use_exact_model_name": True}
    if machine().device == "cuda":
        # Of a model of pictures and text the text model, as on a CPU; else a processor takes the tokenizer's place.
        options |= {"text_only": True}
    if recipe.load_in_4bit and not _usual_4bit(recipe, settings.dtype):
        options |= {"quantization_config": four_bit_config(recipe, settings.dtype)}
    if machine().device == "cuda" and recipe.full_finetuning and settings.bf16 and dtype == torch.float32:
        # Unsloth's words for it: the dtype is that of the products.
        dtype = torch.bfloat16
        options |= {"float32_mixed_precision": True}
    return FastLanguageModel.from_pretrained(
        model_name=source, max_seq_length=recipe.max_seq_length, dtype=dtype, load_in_4bit=recipe.load_in_4bit,
        load_in_8bit=recipe.load_in_8bit, full_finetuning=recipe.full_finetuning,
        use_gradient_checkpointing=recipe.use_gradient_checkpointing, **options)


def _load_with_transformers(source: str, recipe: Recipe, settings: Settings,
                            options: dict[str, Any]) -> tuple[Any, Any]:
    """(model, tokenizer) by transformers and bitsandbytes, on a CPU where Unsloth has no path."""
    precision = "8-bit" if recipe.load_in_8bit else "this kind of 4-bit"
    print(f"{precision} through transformers and bitsandbytes: Unsloth's CPU loader does not have it")
    config = BitsAndBytesConfig(load_in_8bit=True) if recipe.load_in_8bit else four_bit_config(recipe, settings.dtype)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=settings.dtype, device_map="cpu",
                                                 quantization_config=config, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes' kernel for answers repacks the weights in place, and gradients through those are wrong.
            module.support_avx512bf16_for_cpu = False
    return model, AutoTokenizer.from_pretrained(source, **options)


def four_bit_config(recipe: Recipe, dtype: str) -> Any:
    """transformers' BitsAndBytesConfig of the recipe's 4-bit settings; `dtype` is that of the other weights."""
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=recipe.bnb_4bit_quant_type,
                              bnb_4bit_use_double_quant=recipe.bnb_4bit_use_double_quant,
                              bnb_4bit_compute_dtype=recipe.bnb_4bit_compute_dtype or dtype,
                              llm_int8_skip_modules=list(SKIP_QUANTIZATION_MODULES))


def prepare_8bit(model: Any, recipe: Recipe) -> Any:
    """PEFT's preparation, the same for training and for loading again: it puts the norms into float32."""
    return prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=bool(recipe.use_gradient_checkpointing),
        gradient_checkpointing_kwargs={"use_reentrant": False})


def _check_precision(model: Any, recipe: Recipe) -> None:
    """GateError when the quantised layers are not there, or not quantised as the recipe says."""
    if not recipe.quantised:
        return
    kind = Linear4bit if recipe.load_in_4bit else Linear8bitLt
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    if not layers:
        raise GateError(f"{recipe.model_name} was loaded without a single {kind.__name__} layer: not the precision "
                        "the recipe asks for", "set load_in_4bit and load_in_8bit to false, or use another model")
    for name, module in layers.items() if recipe.load_in_4bit else ():
        state = module.weight.quant_state
        actual = {"bnb_4bit_quant_type": state.quant_type, "bnb_4bit_use_double_quant": state.nested,
                  "bnb_4bit_compute_dtype": str(module.compute_dtype).removeprefix("torch.")}
        for field, value in actual.items():
            # A model that is quantised already, such as Unsloth's own, need not be so in the way that is the default.
            asked = getattr(recipe, field)
            if asked not in (Recipe.model_fields[field].default, value):
                raise GateError(f"{field}: {asked} was asked for, {name} of {recipe.model_name} has {value}",
                                f"set {field}: {value}, or model_name to the 16-bit original: a model that is "
                                "quantised already brings its own settings")


def reload(saved: Path, recipe: Recipe, on_its_base: bool = False) -> tuple[Any, Any]:
    """What `save_adapter` wrote, from disk: the adapter on its base, or fully fine-tuned weights; safetensors only.

    The base is the one that the adapter's config names; with `on_its_base` the recipe's, and where the adapter was
    saved without a tokenizer the base's is taken. Raises KitError when the adapter does not fit its base.
    """
    if not (saved / "adapter_config.json").is_file():
        weight_files(saved)
        return load_from(str(saved), recipe.model_copy(update={"revision": None}), use_safetensors=True)
    read_adapter_config(saved)  # PEFT would take a pickle where there are no safetensors
    with _misfits(saved, recipe):
        model, tokenizer = _with_adapter(saved, recipe, on_its_base)
    tensors = load_file(saved / "adapter_model.safetensors")
    _check_names(model, tensors, saved, recipe)
    # In the number format it was saved in: TRL trains adapters of quantised models in bfloat16 and PEFT loads every
    # adapter in float32, so the same weights would answer a little differently.
    dtypes = {tensor.dtype for name, tensor in tensors.items() if ".lora_" in name}
    for name, parameter in model.named_parameters() if len(dtypes) == 1 else ():
        if ".lora_" in name:
            parameter.data = parameter.data.to(*dtypes)
    return model, tokenizer


def _with_adapter(saved: Path, recipe: Recipe, on_its_base: bool) -> tuple[Any, Any]:
    has_tokenizer = (saved / "tokenizer_config.json").is_file()
    if not _without_unsloth(recipe, resolved(recipe)):
        # A revision is that of the base: by its id alone the loader would take the newest one.
        base = str(base_folder(recipe)) if recipe.revision else model_folder(recipe) if on_its_base else ""
        with _naming(base, saved) if base else nullcontext(saved) as folder:
            if not has_tokenizer:
                check_saved_templates(model_folder(recipe), recipe)
            return load_from(str(folder), recipe.model_copy(update={"revision": None}), use_safetensors=True)
    model, tokenizer = load_from(model_folder(recipe), recipe)
    if recipe.load_in_8bit:
        model = prepare_8bit(model, recipe)
    model = PeftModel.from_pretrained(model, str(saved))
    return model, saved_tokenizer(saved, recipe.trust_remote_code) if has_tokenizer else tokenizer


@contextmanager
def _naming(base: str, adapter: Path) -> Iterator[Path]:
    """The adapter's folder as one whose config names `base`, which is what loaders go by; without pickles."""
    config = read_adapter_config(adapter)
    if config.get("base_model_name_or_path") == base:
        yield adapter
        return
    with TemporaryDirectory(prefix="kit-adapter-") as made:
        for path in adapter.iterdir():
            if path.is_file() and path.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt", ".py"):
                (Path(made) / path.name).symlink_to(path.resolve())
        (Path(made) / "adapter_config.json").unlink()
        write_json(Path(made) / "adapter_config.json", {**config, "base_model_name_or_path": base, "revision": None})
        yield Path(made)


@contextmanager
def _misfits(adapter: Path, recipe: Recipe) -> Iterator[None]:
    """What torch and PEFT say of an adapter of another model's shapes or layers becomes a KitError that names both."""
    try:
        yield
    except (KitError, RuntimeError, ValueError) as error:
        said = " ".join(str(error.__cause__ or error).split())
        if not (found := re.search(r"size mismatch for .*?(?= size mismatch for |$)|Target modules .*", said)):
            raise
        raise KitError(f"the adapter {adapter} does not fit {recipe.model_name}: {found[0][:300]}",
                       OTHER_BASE) from error


def _check_names(model: Any, tensors: dict[str, Any], adapter: Path, recipe: Recipe) -> None:
    """KitError where the model has layers that the adapter lacks, or the other way round: PEFT only warns of it."""
    def pairs(names: Iterable[str]) -> set[str]:
        return {name.replace(".default", "") for name in names if re.search(r"\.lora_[AB]\.", name)}

    if unmatched := sorted(pairs(tensors) ^ pairs(name for name, _ in model.named_parameters())):
        raise KitError(f"the adapter {adapter} does not fit {recipe.model_name}: {unmatched[0]} is only on one side "
                       f"({len(unmatched)} tensors)", OTHER_BASE)


def make_room(model: Any, tokens: int) -> None:
    """Let the model read this many tokens: Unsloth's GPU path silently cuts off what is longer than max_seq_length."""
    for module in model.modules():
        if getattr(module, "max_seq_length", tokens) < tokens:
            module.max_seq_length = tokens


def free_memory() -> None:
    """Give back what deleted models held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
