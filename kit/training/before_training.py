"""The gates before the first step: what the trainer was given is what the recipe asks for."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import kit.common.unsloth

import torch
from trl import SFTTrainer

from kit.data.masks import IGNORED
from kit.recipe.fields import ALL_LINEAR
from kit.recipe.recipe import Recipe
from kit.recipe.settings import resolved
from kit.runs.gates import Gates

LABEL_ROWS = 8  # looked at before training
OWN_COLLATOR = "use the collator that kit.make_trainer sets"


def check_trainer(trainer: SFTTrainer, tokenizer: Any, recipe: Recipe) -> Gates:
    """Before the first step: precision of the layers, LoRA modules, the first batch's labels, settings in effect."""
    gates = Gates("before training")
    _check_precision(gates, trainer.model, recipe)
    if recipe.full_finetuning:
        _check_all_trained(gates, trainer.model)
    else:
        _check_lora(gates, trainer.model, recipe)
    with gates.guard("labels", kept_in="result.json"):
        _check_labels(gates, trainer, tokenizer)
    _check_settings(gates, trainer, recipe)
    return gates


def _check_precision(gates: Gates, model: Any, recipe: Recipe) -> None:
    """The layers that LoRA wraps (of a full model: all linear ones) are in the precision the recipe asks for.

    Layers that a quantised model's own config leaves out may be in 16-bit, as in Unsloth's dynamic 4-bit models.
    """
    layers = {name: module.base_layer for name, module in model.named_modules() if hasattr(module, "lora_A")} or \
        {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    precisions = {name: _precision(layer) for name, layer in layers.items()}
    asked = "4-bit" if recipe.load_in_4bit else "8-bit" if recipe.load_in_8bit else \
        "32-bit" if resolved(recipe).dtype == "float32" else "16-bit"
    allowed = {"16-bit", "32-bit"} if asked == "16-bit" else {asked}
    config = getattr(model.config, "quantization_config", None) or {}
    config = config if isinstance(config, dict) else vars(config)
    skipped = (config.get("llm_int8_skip_modules") or []) if asked in ("4-bit", "8-bit") else []
    others = sorted(name for name, precision in precisions.items() if precision not in allowed)
    wrong = [name for name in others if not any(f".{part}." in f".{name}." for part in skipped)]
    excused = len(others) - len(wrong)
    counts = ", ".join(f"{count} {precision}" for precision, count in Counter(precisions.values()).items()) or "no"
    passed = not wrong and excused < len(layers)
    cause = f"{excused} layers are left out by the model's own quantization_config" if excused else ""
    if not passed:
        first = f", the first is {wrong[0]}" if wrong and len(wrong) < len(layers) else ""
        cause = f"the recipe asks for {asked}, but {counts} layers were loaded{first}"
    gates.check("precision", passed, f"{counts} linear layers", " or ".join(sorted(allowed)), cause,
                "set dtype, load_in_4bit and load_in_8bit to what this machine can do: kit doctor says it")


def _precision(layer: Any) -> str:
    kind = type(layer).__name__
    if kind.startswith(("Linear4bit", "Linear8bit")):  # of bitsandbytes
        return f"{kind[6]}-bit"
    return {2: "16-bit", 4: "32-bit"}.get(layer.weight.element_size(), kind)


def _check_all_trained(gates: Gates, model: Any) -> None:
    trained = [weight.requires_grad for weight in model.parameters()]
    gates.check("trainable", all(trained), f"{sum(trained)} of {len(trained)} tensors", "all",
                "" if all(trained) else "full_finetuning is set, but some weights are frozen",
                "load the model with full_finetuning: true")


def _check_lora(gates: Gates, model: Any, recipe: Recipe) -> None:
    """Every target module has an adapter of rank r that is trained, and nothing else is."""
    asked, targets = {recipe.r}, set(recipe.target_modules)
    if ALL_LINEAR in targets:  # which layers these are kit.add_lora has told from the model
        targets = set(model.peft_config["default"].target_modules)
    if recipe.adapter_name_or_path:  # ranks and layers are the saved adapter's; kit.add_lora compared its tensors
        saved = model.peft_config["default"]
        asked, targets = {saved.r, *saved.rank_pattern.values()}, set()
    wrapped = {name: {int(a.weight.shape[0]) for a in module.lora_A.values()}
               for name, module in model.named_modules() if hasattr(module, "lora_A") and len(module.lora_A)}
    wanted = {name for name, module in model.named_modules() if name.rpartition(".")[2] in targets
              and "weight" in dict(module.named_parameters(recurse=False)) | vars(module)}
    ranks = set().union(*wrapped.values())
    missing = sorted(wanted - set(wrapped))
    frozen = [name for name, weight in model.named_parameters() if ".lora_" in name and not weight.requires_grad]
    others = sorted(name for name, weight in model.named_parameters() if weight.requires_grad and ".lora_" not in name
                    and not (recipe.bias != "none" and name.endswith("bias")))
    cause, hint = "", "call kit.add_lora once, on the model that kit.load_model returned"
    if not wrapped:
        cause = "the model has no LoRA module: nothing would be trained"
    elif missing:
        cause = f"{len(missing)} target modules have no adapter, the first is {missing[0]}"
    elif not ranks <= asked:
        cause = f"the recipe asks for rank {_listed(asked)}, the adapters have {_listed(ranks)}"
    elif frozen:
        cause = f"{len(frozen)} weights of the adapter are frozen, the first is {frozen[0]}"
    elif others:
        cause = f"{len(others)} weights besides the adapter are trained, the first is {others[0]}"
        if ".modules_to_save." in others[0]:
            hint = "take lm_head and embed_tokens out of target_modules: they would be trained whole"
    gates.check("LoRA modules", not cause, f"{len(wrapped)} of rank {_listed(ranks) or 'none'}",
                f"{len(wanted | set(wrapped))} of rank {_listed(asked)}", cause, hint)


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))


def _check_labels(gates: Gates, trainer: SFTTrainer, tokenizer: Any) -> None:
    """A batch of the trainer's own collator trains what its rows train: answers with their stop token, no padding."""
    rows = [trainer.train_dataset[i] for i in range(min(LABEL_ROWS, len(trainer.train_dataset)))]
    batch = trainer.data_collator([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
    labels, mask, stop = batch["labels"], batch.get("attention_mask"), tokenizer.eos_token_id
    wanted = [[label for label in row["labels"] if label != IGNORED] for row in rows]
    trained, asked = int((labels != IGNORED).sum()), sum(map(len, wanted))
    stops, ends = int((labels == stop).sum()), sum(ids.count(stop) for ids in wanted)
    cut = [number for number, ids in enumerate(wanted) if not _ends_with_stop(ids, tokenizer)]
    cause, hint = "", "check that rows have answers, and the chat template"
    if not asked or not trained:
        cause = "every label of the first batch is masked: nothing would be trained"
    elif cut:
        cause = (f"{len(cut)} of the first {len(rows)} rows do not end their answer with the stop token "
                 f"{tokenizer.eos_token!r}, the first is row {cut[0]}: the model would not learn to stop")
        hint = "check the chat template and max_seq_length"
    elif stops < ends:
        cause = f"the data collator masks {ends - stops} of {ends} stop tokens ({tokenizer.eos_token!r})"
        hint = OWN_COLLATOR
        if tokenizer.pad_token_id == stop:
            cause += ": it is the pad token too, and padding is not trained"
            hint = "give the tokenizer another pad token (kit.load_model does)"
    elif trained > asked:
        cause = f"the data collator trains {trained - asked} tokens that the rows mask, as prompts or padding"
        hint = OWN_COLLATOR
    elif mask is not None and bool(((labels != IGNORED) & (mask == 0)).any()):
        cause = "padding is trained: some labels stand where attention_mask is 0"
    gates.check("labels", not cause, f"{trained} of {labels.numel()} tokens trained, {stops} stop tokens",
                "answers and their stop token", cause, hint)


def _ends_with_stop(trained: list[int], tokenizer: Any) -> bool:
    """Whether the trained tokens of a row end with the stop token; a template may write white space behind it."""
    if tokenizer.eos_token_id not in trained:
        return False
    behind = trained[len(trained) - trained[::-1].index(tokenizer.eos_token_id):]
    return not tokenizer.decode(behind, skip_special_tokens=True).strip()


def _check_settings(gates: Gates, trainer: SFTTrainer, recipe: Recipe) -> None:
    """Reports each setting that a library made different from the recipe's; no failure."""
    settings = resolved(recipe)
    asked = {"optim": recipe.optim, "packing": recipe.packing, "max_length": recipe.max_seq_length,
             "gradient_checkpointing": bool(recipe.use_gradient_checkpointing), "learning_rate": recipe.learning_rate,
             "bf16": settings.bf16, "fp16": settings.fp16}
    actual = {name: getattr(value := getattr(trainer.args, name), "value", value) for name in asked}
    padding_free = actual["max_length"] is None and getattr(trainer.args, "padding_free", False)
    if padding_free:  # TRL wants none then, and Unsloth keeps it under its older name
        actual["max_length"] = getattr(trainer.args, "max_seq_length", None)
    changes = [f"{name}: {actual[name]} (asked: {value})" for name, value in asked.items() if actual[name] != value]
    figure = f"{len(changes)} changed" if changes else "as asked"
    gates.check("settings", None if changes else True, figure + ", batches without padding" * padding_free, "",
                "; ".join(changes))
