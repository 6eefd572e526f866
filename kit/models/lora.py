"""LoRA on a base model: a fresh adapter, one to train on, LoftQ."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kit.common.unsloth import FastLanguageModel

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from kit.common.errors import KitError, one_line
from kit.common.processes import world_size
from kit.common.weight_files import weight_files
from kit.models.fetch import PREFIX, adapter_folder, base_folder, changed_base, read_adapter_config
from kit.models.load import free_memory, load_model, prepare_8bit
from kit.models.sharded import is_sharded, whole_size
from kit.recipe.fields import ALL_LINEAR
from kit.recipe.recipe import Recipe

# What an adapter that is trained further keeps of its settings; the rest is the recipe's.
ITS_OWN = ("r", "lora_alpha", "target_modules", "bias", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
           "modules_to_save", "layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters")
OTHER_BASE = "set model_name to the base it was trained on (base_model_name_or_path in its adapter_config.json)"


def add_lora(model: PreTrainedModel, recipe: Recipe) -> PeftModel | PreTrainedModel:
    """The model with a fresh adapter, or with adapter_name_or_path to train on; with full_finetuning as it is.

    Raises KitError when the layers are not there, or the adapter is of another model.
    """
    if recipe.full_finetuning:
        return model
    if recipe.adapter_name_or_path:
        return _with_saved_adapter(model, adapter_folder(recipe), recipe)
    linears = sorted({name.rpartition(".")[2] for name, module in model.named_modules()
                      if type(module).__name__.startswith(("Linear", "Bf16StoredLinear"))} - {"lm_head"})
    targets = linears if ALL_LINEAR in recipe.target_modules else list(recipe.target_modules)
    if not {*linears} & {*targets}:
        raise KitError(f"target_modules: {', '.join(recipe.target_modules)}: no such layer in {recipe.model_name}",
                       f"its linear layers are: {', '.join(linears)}")
    lora = {"r": recipe.r, "lora_alpha": recipe.lora_alpha, "lora_dropout": recipe.lora_dropout,
            "target_modules": targets, "bias": recipe.bias, "use_rslora": recipe.use_rslora}
    if recipe.use_dora:
        lora["use_dora"] = True
    model = _with_fresh_adapter(model, recipe, lora)
    if recipe.loftq_config is not None:
        _start_loftq(model, base_folder(recipe), recipe)
        model.peft_config["default"].loftq_config = recipe.loftq_config  # for whoever merges it
    return model


def _with_fresh_adapter(model: Any, recipe: Recipe, lora: dict[str, Any]) -> Any:
    """The model with an adapter of these PEFT settings; through stock PEFT for 8-bit on a CPU, else Unsloth's way."""
    if recipe.load_in_8bit and next(model.parameters()).device.type != "cuda":
        if lora.get("use_dora"):
            raise KitError("use_dora with load_in_8bit does not work on a CPU: PEFT loses the scales of the 8-bit "
                           "weights when it measures their lengths", "set load_in_4bit in place of load_in_8bit")
        torch.manual_seed(recipe.random_state)
        return get_peft_model(prepare_8bit(model, recipe), LoraConfig(task_type="CAUSAL_LM", **lora))
    return FastLanguageModel.get_peft_model(
        model, random_state=recipe.random_state, max_seq_length=recipe.max_seq_length,
        use_gradient_checkpointing=recipe.use_gradient_checkpointing, **lora)


def _with_saved_adapter(model: Any, adapter: Path, recipe: Recipe) -> Any:
    """A fresh adapter of the saved one's settings, made the usual way, with the saved weights in it."""
    config, tensors = read_adapter_config(adapter), load_file(adapter / "adapter_model.safetensors")
    start = changed_base(config)
    if start and not (start == "loftq" and recipe.load_in_4bit):
        raise KitError(f"adapter_name_or_path: {adapter} began with init_lora_weights: {start}: it belongs to a base "
                       f"model of other weights than {recipe.model_name}",
                       "set load_in_4bit: true" if start == "loftq" else "leave adapter_name_or_path out")
    lora = {setting: config[setting] for setting in ITS_OWN if config.get(setting)}
    if isinstance(lora["target_modules"], str):  # a pattern, which Unsloth's CPU path would take apart
        lora["target_modules"] = sorted({name.removeprefix(PREFIX).partition(".lora_")[0] for name in tensors
                                         if ".lora_A." in name})
    misfit = f"adapter_name_or_path: {adapter} does not fit {recipe.model_name}"
    try:
        model = _with_fresh_adapter(model, recipe, {"lora_dropout": recipe.lora_dropout, **lora})
        result = set_peft_model_state_dict(model, tensors)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise KitError(f"{misfit}: {one_line(error)}", OTHER_BASE) from None
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    unmatched = sorted(trained & set(result.missing_keys)) + sorted(result.unexpected_keys)
    if unmatched:
        raise KitError(f"{misfit}: {unmatched[0]} is only on one side ({len(unmatched)} tensors)", OTHER_BASE)
    model.peft_config["default"].loftq_config = config.get("loftq_config") or {}
    return model


def trainable_share(model: PeftModel | PreTrainedModel) -> tuple[int, int]:
    """(trainable, all) parameters; 4-bit weights are counted unpacked, those that other processes hold too."""
    if is_sharded(model):
        sizes = [(whole_size(weight), weight.requires_grad) for weight in model.parameters()]
        return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
    if isinstance(model, PeftModel):
        return model.get_nb_trainable_parameters()
    total = model.num_parameters()
    return total, total


@contextmanager
def whole(model: Any, recipe: Recipe) -> Iterator[Any]:
    """The model, able to answer in this process: as it is, or loaded anew for a while where it was read in shards."""
    if world_size() == 1 or not is_sharded(model):
        yield model
        return
    alone = recipe.model_copy(update={"fsdp": False, "deepspeed": None})
    with torch.random.fork_rng():
        copy = add_lora(load_model(alone)[0], alone)
        yield copy
    del copy
    free_memory()


def _start_loftq(model: Any, base: Path, recipe: Recipe) -> None:
    """Start each adapter as what 4-bit lost: B A is the best rank-r approximation of W - Q, Q the quantised weight.

    LoftQ with one iteration (Li et al. 2023, algorithm 1), which leaves Q as it is, so that the base model can be
    loaded again. PEFT's own start needs CUDA and weights that are not quantised yet. KitError for other settings.
    """
    possible = {"loftq_bits": 4, "loftq_iter": 1}
    if possible | (recipe.loftq_config or {}) != possible:
        raise KitError(f"loftq_config: {recipe.loftq_config}: only loftq_bits: 4 with loftq_iter: 1 is possible on a "
                       "base that is quantised while it is loaded", "set loftq_config: {loftq_bits: 4, loftq_iter: 1}")
    layers = {f"{name.removeprefix(PREFIX)}.weight": module for name, module in model.named_modules()
              if hasattr(module, "lora_A") and type(module.base_layer).__name__ == "Linear4bit"}
    done = 0
    for file in weight_files(base):
        with safe_open(file, framework="pt") as tensors, torch.random.fork_rng(), torch.no_grad():
            for name in sorted(layers.keys() & set(tensors.keys())):
                module = layers[name]
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                quantised = dequantize_module_weight(module.base_layer).float()
                lost = tensors.get_tensor(name).to(quantised) - quantised
                torch.manual_seed(recipe.random_state)
                # By random projections (Halko et al. 2009): of a large layer all singular values would take minutes.
                lost /= module.scaling["default"]
                u, size, v = torch.svd_lowrank(lost, q=min(2 * len(a), *lost.shape), niter=4)
                root = size[:len(a)].sqrt()
                b.copy_(u[:, :len(a)] * root)
                a.copy_((v[:, :len(a)] * root).T)
                done += 1
    if done < len(layers) or not done:
        raise KitError(f"loftq_config: {base} holds the 16-bit weights of {done} of {len(layers)} 4-bit layers",
                       "set model_name to the 16-bit original, or leave loftq_config out")
