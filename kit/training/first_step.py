"""The first-step gate: what the trainer was given, and what its first step did."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import Any

import kit.common.unsloth

import torch
from transformers import TrainerCallback
from trl import SFTTrainer

from kit.common.processes import any_of
from kit.data.masks import IGNORED
from kit.recipe.recipe import Recipe
from kit.recipe.settings import resolved
from kit.runs.gates import Gates


def effective(trainer: SFTTrainer, recipe: Recipe) -> list[str]:
    """A line for each setting that a library made different from the recipe's."""
    args = trainer.args
    asked = {"optim": recipe.optim, "packing": recipe.packing, "max_length": recipe.max_seq_length,
             "gradient_checkpointing": bool(recipe.use_gradient_checkpointing),
             "learning_rate": recipe.learning_rate}
    lines = []
    for name, wish in asked.items():
        value = getattr(args, name)
        value = getattr(value, "value", value)
        if value != wish:
            lines.append(f"{name}: {value} (asked: {wish})")
    return lines


FP16_PATIENCE = 10  # steps
BAND = 1.5  # nats: a model that has learnt nothing may be that much worse than guessing, by its random weights
LABEL_ROWS = 8  # looked at before training
CHECKPOINTING = ("with gradient checkpointing the inputs must ask for gradients: use_gradient_checkpointing: false "
                 "shows whether it is that")


def check_trainer(trainer: SFTTrainer, tokenizer: Any, recipe: Recipe) -> Gates:
    """Before the first step: precision of the layers, LoRA modules, the first batch's labels, settings in effect."""
    gates = Gates("before training")
    check_precision(gates, trainer.model, recipe)
    check_lora(gates, trainer.model, recipe)
    with gates.guard("labels"):
        check_labels(gates, trainer, tokenizer)

    changed = effective(trainer, recipe)
    gates.check("settings", None if changed else True, "as asked" if not changed else f"{len(changed)} changed", "",
                "; ".join(changed))
    return gates


def check_precision(gates: Gates, model: Any, recipe: Recipe) -> None:
    """The layers that LoRA wraps (of a full model: all linear ones) are in the precision the recipe asks for.

    Layers that a quantised model's own config leaves out may be in 16-bit, as in Unsloth's dynamic 4-bit models.
    """
    bases = {name: module.base_layer for name, module in model.named_modules() if hasattr(module, "lora_A")} or \
        {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    kinds = {name: _kind(layer) for name, layer in bases.items()}
    asked = "4-bit" if recipe.load_in_4bit else "8-bit" if recipe.load_in_8bit else \
        "32-bit" if resolved(recipe).dtype == "float32" else "16-bit"
    allowed = {asked, "32-bit"} if asked == "16-bit" else {asked}
    skipped = _left_out(model) if asked in ("4-bit", "8-bit") else []
    excused = {name for name, kind in kinds.items() if kind not in allowed
               and any(f".{part}." in f".{name}." for part in skipped)}
    wrong = sorted(name for name, kind in kinds.items() if kind not in allowed and name not in excused)
    told = _counted(Counter(kinds.values()))
    good = not wrong and len(excused) < len(kinds)
    cause = f"{len(excused)} layers are left out by the model's own quantization_config" if excused else ""
    if not good:
        cause = f"the recipe asks for {asked}, but {told} layers were loaded" + (
            f", the first is {wrong[0]}" if wrong and len(wrong) < len(kinds) else "")
    gates.check("precision", good, f"{told} linear layers", " or ".join(sorted(allowed)), cause,
                "set dtype, load_in_4bit and load_in_8bit to what this machine can do: kit doctor says it")


def check_lora(gates: Gates, model: Any, recipe: Recipe) -> None:
    """Every target module has an adapter of rank r that is trained, and nothing else is."""
    if recipe.full_finetuning:
        trained = sum(p.requires_grad for p in model.parameters())
        total = sum(1 for _ in model.parameters())
        gates.check("trainable", trained == total, f"{trained} of {total} tensors", "all",
                    "" if trained == total else "full_finetuning is set, but some weights are frozen",
                    "load the model with full_finetuning: true")
        return
    asked, modules = {recipe.r}, list(recipe.target_modules)
    if recipe.adapter_name_or_path:  # ranks and layers are the saved adapter's; kit.add_lora compared its tensors
        own = model.peft_config["default"]
        asked, modules = {own.r, *own.rank_pattern.values()}, []
    wanted = ", ".join(map(str, sorted(asked)))
    wrapped = {name: {int(a.weight.shape[0]) for a in module.lora_A.values()}
               for name, module in model.named_modules() if hasattr(module, "lora_A") and len(module.lora_A)}
    targets = {name for name, module in model.named_modules() if name.rpartition(".")[2] in modules
               and "weight" in dict(module.named_parameters(recurse=False)) | vars(module)}
    missing = sorted(targets - set(wrapped))
    ranks = sorted(set().union(*wrapped.values()))
    frozen = [name for name, p in model.named_parameters() if ".lora_" in name and not p.requires_grad]
    strangers = sorted(name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name
                       and not (recipe.bias != "none" and name.endswith("bias")))
    cause, hint = "", "call kit.add_lora once, on the model that kit.load_model returned"
    if not wrapped:
        cause = "the model has no LoRA module: nothing would be trained"
    elif missing:
        cause = f"{len(missing)} target modules have no adapter, the first is {missing[0]}"
    elif not asked.issuperset(ranks):
        cause = f"the recipe asks for rank {wanted}, the adapters have {', '.join(map(str, ranks))}"
    elif frozen:
        cause = f"{len(frozen)} weights of the adapter are frozen, the first is {frozen[0]}"
    elif strangers:
        cause = f"{len(strangers)} weights besides the adapter are trained, the first is {strangers[0]}"
        if ".modules_to_save." in strangers[0]:
            hint = "take lm_head and embed_tokens out of target_modules: they would be trained whole"
    gates.check("LoRA modules", not cause, f"{len(wrapped)} of rank {', '.join(map(str, ranks)) or 'none'}",
                f"{len(targets | set(wrapped))} of rank {wanted}", cause, hint)


def check_labels(gates: Gates, trainer: SFTTrainer, tokenizer: Any) -> None:
    """A batch of the trainer's own collator trains what its rows train: answers with their stop token, no padding."""
    rows = [trainer.train_dataset[i] for i in range(min(LABEL_ROWS, len(trainer.train_dataset)))]
    batch = trainer.data_collator([{k: row[k] for k in ("input_ids", "labels")} for row in rows])
    labels, padded = batch["labels"], batch.get("attention_mask")
    wanted = [[label for label in row["labels"] if label != IGNORED] for row in rows]
    trained, asked = int((labels != IGNORED).sum()), sum(map(len, wanted))
    stop = tokenizer.eos_token_id
    stops, ends = int((labels == stop).sum()), sum(ids.count(stop) for ids in wanted)
    cut = [number for number, ids in enumerate(wanted) if not _stops(ids, tokenizer)]
    cause, hint = "", "check that rows have answers, and the chat template"
    if not asked or not trained:
        cause = "every label of the first batch is masked: nothing would be trained"
    elif cut:
        cause = (f"{len(cut)} of the first {len(rows)} rows do not end their answer with the stop token "
                 f"{tokenizer.eos_token!r}, the first is row {cut[0]}: the model would not learn to stop")
        hint = "check the chat template and max_seq_length"
    elif stops < ends:
        cause = f"the data collator masks {ends - stops} of {ends} stop tokens ({tokenizer.eos_token!r})"
        hint = "use the collator that kit.make_trainer sets"
        if tokenizer.pad_token_id == tokenizer.eos_token_id:
            cause += ": it is the pad token too, and padding is not trained"
            hint = "give the tokenizer another pad token (kit.load_model does)"
    elif trained > asked:
        cause = f"the data collator trains {trained - asked} tokens that the rows mask, as prompts or padding"
        hint = "use the collator that kit.make_trainer sets"
    elif padded is not None and bool(((labels != IGNORED) & (padded == 0)).any()):
        cause = "padding is trained: some labels stand where attention_mask is 0"
    gates.check("labels", not cause, f"{trained} of {labels.numel()} tokens trained, {stops} stop tokens",
                "answers and their stop token", cause, hint)


class Gradients:
    """What the first backward pass gave each trained tensor, also where it is sharded over several processes.

    DeepSpeed takes the step within backward and keeps no gradient, so there each one is looked at as it comes.
    """

    def __init__(self, model: Any, as_they_come: bool = False) -> None:
        self.model = model
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.reached, self.infinite, self.alive = set[str](), set[str](), set[str]()
        self.hooks = [p.register_hook(partial(self._note, name)) for name, p in self.trained.items()
                      if as_they_come]

    def _note(self, name: str, gradient: Any) -> None:
        here = gradient.to_local() if hasattr(gradient, "to_local") else gradient  # this process's shard
        self.reached.add(name)
        if not bool(here.isfinite().all()):
            self.infinite.add(name)
        if bool(here.any()):
            self.alive.add(name)

    def look(self) -> None:
        """After backward: what the gradients are, for all processes together."""
        for hook in self.hooks:
            hook.remove()
        if not self.hooks:
            for name, p in self.trained.items():
                if p.grad is not None:
                    self._note(name, p.grad)
        for found in (self.reached, self.infinite, self.alive):
            flags = any_of(*(name in found for name in self.trained))
            found.update(name for name, flag in zip(self.trained, flags, strict=True) if flag)

    def finite(self) -> bool:
        """Whether every gradient of this step is a finite number."""
        if self.hooks:
            found = not self.infinite
            self.infinite.clear()
            return found
        return all(bool(p.grad.isfinite().all()) for p in self.trained.values() if p.grad is not None)


def check_gradients(gates: Gates, seen: Gradients) -> None:
    """After the first backward: finite gradients wherever weights are trained, none where they are frozen.

    B starts at zero, so A's first gradient is zero, but B's is not.
    """
    none = [name for name in seen.trained if name not in seen.reached]
    infinite = [name for name in seen.trained if name in seen.infinite]
    dead = [name for name in seen.trained if ".lora_B" in name and name in seen.reached and name not in seen.alive]
    frozen = [name for name, p in seen.model.named_parameters() if not p.requires_grad and p.grad is not None]
    told = [(none, "have no gradient", CHECKPOINTING),
            (infinite, "have a gradient that is no finite number", "lower learning_rate, or set dtype: float32"),
            (dead, "are a LoRA B with a gradient of zero: nothing reaches them", "use_gradient_checkpointing: false"),
            (frozen, "are frozen and have a gradient", "call kit.add_lora on the model of kit.load_model")]
    count = len(seen.trained)
    cause, hint = next(((f"{len(names)} of {count} trained tensors {what}, the first is {names[0]}", remedy)
                        for names, what, remedy in told if names), ("", ""))
    gates.check("gradients", not cause, f"{count - len(none)} of {count} trained tensors have one",
                "all, finite; every LoRA B above zero", cause, hint)


def check_loss(gates: Gates, loss: float, vocabulary: int) -> None:
    """A first loss above ln(vocabulary) + BAND is worse than guessing: labels or weights are wrong."""
    band = math.log(vocabulary) + BAND
    good = math.isfinite(loss) and 0 < loss <= band
    gates.check("first loss", good, f"{loss:.3f}", f"above 0, at most ln({vocabulary:,}) + {BAND} = {band:.2f}",
                "" if good else "worse than guessing among all tokens: labels, template or weights are wrong",
                "look at the highlighted tokens of the first row, and at the model's files")


def _stops(trained: list[int], tokenizer: Any) -> bool:
    """Whether the trained tokens of a row end with the stop token; a template may write white space behind it."""
    if tokenizer.eos_token_id not in trained:
        return False
    behind = trained[len(trained) - trained[::-1].index(tokenizer.eos_token_id):]
    return not tokenizer.decode(behind, skip_special_tokens=True).strip()


def _left_out(model: Any) -> list[str]:
    """Names or parts of names of layers that the model's quantization_config does not quantise."""
    config = getattr(model.config, "quantization_config", None) or {}
    config = config if isinstance(config, dict) else vars(config)
    return list(config.get("llm_int8_skip_modules") or [])


def _kind(layer: Any) -> str:
    name = type(layer).__name__
    if name.startswith("Linear4bit"):
        return "4-bit"
    if name.startswith("Linear8bit"):
        return "8-bit"
    return {2: "16-bit", 4: "32-bit"}.get(layer.weight.element_size(), name)


def _counted(found: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in found.items()) or "no"


def first_step_callback(gates: Gates, model: Any) -> Any:
    """A trainer callback that adds `gradients` and `first loss` in the first step and stops training if one fails.

    The gates see the step as it is really taken, with the trainer's precision, checkpointing and batches.
    """
    class FirstStep(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.hook = model.register_forward_hook(self.check_reach)
            self.seen = Gradients(model, as_they_come=args.deepspeed is not None)

        def check_reach(self, module: Any, given: Any, output: Any) -> None:
            """In the first forward pass: a loss without a gradient would end backward in PyTorch's own words."""
            self.hook.remove()
            loss = getattr(output, "loss", None)
            if loss is not None and not loss.requires_grad:
                trained = sum(p.requires_grad for p in model.parameters())
                gates.check("gradients", False, f"0 of {trained} trained tensors reached", "all",
                            "the loss depends on no trained tensor", CHECKPOINTING)
                gates.require()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if any(gate.name == "gradients" for gate in gates.gates):
                return
            # float16's loss scale starts so high that the first gradients overflow; such steps are skipped.
            if args.fp16 and state.global_step < FP16_PATIENCE and not self.seen.finite():
                return
            self.seen.look()
            check_gradients(gates, self.seen)
            gates.require()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # Whatever logging_steps is, the first step's loss is wanted now. One that goes on waits for its next line.
            control.should_log = control.should_log or state.global_step == 1

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if logs and "loss" in logs and not any(gate.name == "first loss" for gate in gates.gates):
                check_loss(gates, float(logs["loss"]), model.get_input_embeddings().num_embeddings)
                gates.require()

    return FirstStep()
