"""4-bit and 8-bit base models: their settings, loading where Unsloth has no path, and what was really loaded."""

from __future__ import annotations

from typing import Any

import kit.common.unsloth

from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from unsloth_zoo.peft_utils import SKIP_QUANTIZATION_MODULES

from kit.common.errors import GateError
from kit.recipe.recipe import Recipe
from kit.recipe.settings import Settings


def usual_4bit(recipe: Recipe, dtype: str) -> bool:
    """Whether the recipe's 4-bit settings are those Unsloth loads by itself: NF4, double quantisation."""
    return (recipe.bnb_4bit_quant_type == "nf4" and recipe.bnb_4bit_use_double_quant
            and recipe.bnb_4bit_compute_dtype in (None, dtype))


def unsloth_quantises(recipe: Recipe, dtype: str) -> bool:
    """Whether Unsloth's CPU loader has the precision asked for.

    Instead of 8-bit it would load 16-bit, and of 4-bit it knows the usual settings only.
    """
    return not recipe.load_in_8bit and (not recipe.load_in_4bit or usual_4bit(recipe, dtype))


def four_bit_config(recipe: Recipe, dtype: str) -> Any:
    """transformers' BitsAndBytesConfig of the recipe's 4-bit settings; `dtype` is that of the other weights."""
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=recipe.bnb_4bit_quant_type,
                              bnb_4bit_use_double_quant=recipe.bnb_4bit_use_double_quant,
                              bnb_4bit_compute_dtype=recipe.bnb_4bit_compute_dtype or dtype,
                              llm_int8_skip_modules=list(SKIP_QUANTIZATION_MODULES))


def load_quantised(source: str, recipe: Recipe, settings: Settings, options: dict[str, Any]) -> tuple[Any, Any]:
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


def prepare_8bit(model: Any, recipe: Recipe) -> Any:
    """PEFT's preparation, the same for training and for loading again: it puts the norms into float32."""
    return prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=bool(recipe.use_gradient_checkpointing),
        gradient_checkpointing_kwargs={"use_reentrant": False})


def check_precision(model: Any, recipe: Recipe) -> None:
    """GateError when the quantised layers are not there, or not quantised as the recipe says."""
    for asked, layer in ((recipe.load_in_4bit, Linear4bit), (recipe.load_in_8bit, Linear8bitLt)):
        if asked and not any(isinstance(module, layer) for module in model.modules()):
            raise GateError(f"{recipe.model_name} was loaded without a single {layer.__name__} layer: not the "
                            "precision the recipe asks for",
                            "set load_in_4bit and load_in_8bit to false, or use another model")
    if not recipe.load_in_4bit:
        return
    for name, module in model.named_modules():
        if not isinstance(module, Linear4bit):
            continue
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
