"""TRL's SFTTrainer for a recipe."""

from __future__ import annotations

from typing import Any

import kit.common.unsloth

from datasets import DatasetDict, disable_progress_bars, enable_progress_bars
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils.notebook import NotebookProgressCallback
from trl import SFTConfig, SFTTrainer

from kit.common.processes import is_main
from kit.recipe.recipe import Recipe
from kit.recipe.settings import resolved
from kit.recipe.sharding import deepspeed_settings
from kit.runs.run import Run
from kit.training.callbacks import log_callback
from kit.training.checkpoints import writing_checkpoint
from kit.training.evaluate import evaluate


def make_trainer(model: Any, tokenizer: Any, data: DatasetDict, recipe: Recipe) -> SFTTrainer:
    """TRL's SFTTrainer on rows that are already tokenised and masked (`input_ids`, `labels`)."""

    chosen = resolved(recipe)
    run = Run.of(recipe)
    duration = {"max_steps": recipe.max_steps} if recipe.max_steps else \
        {"num_train_epochs": recipe.num_train_epochs or 1.0}
    same = {name: getattr(recipe, name) for name in (
        "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "warmup_steps",
        "lr_scheduler_type", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "neftune_noise_alpha",
        "train_sampling_strategy", "dataloader_num_workers", "dataloader_pin_memory", "logging_steps", "eval_strategy",
        "eval_steps", "ddp_timeout", "report_to", "seed")}
    if recipe.deepspeed:
        same |= {"deepspeed": deepspeed_settings(recipe)}
    rows, held_out = data["train"], data["test"] if recipe.eval_strategy != "no" else None
    lazy = "input_ids" not in rows.column_names  # tokens are made when a row is taken: nothing to prepare or remove
    if lazy:
        same |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}

    class KitTrainer(SFTTrainer):  # type: ignore[misc]
        """SFTTrainer with the evaluation of kit.training.evaluate, whose memory does not grow with the vocabulary."""

        def _load_from_checkpoint(self, *given: Any, **named: Any) -> None:
            # TRL trains the adapter of a quantised model in bfloat16, and PEFT loads every adapter in float32.
            formats = {name: p.dtype for name, p in self.model.named_parameters() if p.requires_grad}
            super()._load_from_checkpoint(*given, **named)
            for name, p in self.model.named_parameters():
                if name in formats and p.dtype != formats[name]:
                    p.data = p.data.to(formats[name])

        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            size = recipe.per_device_eval_batch_size or recipe.per_device_train_batch_size
            found = evaluate(self.model, tokenizer, self.eval_dataset, size)
            metrics = {f"eval_{name}": value for name, value in found.items()}
            self.log(dict(metrics))
            self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

        def _save_checkpoint(self, *given: Any, **named: Any) -> None:
            with writing_checkpoint(run.checkpoints / f"checkpoint-{self.state.global_step}"):
                super()._save_checkpoint(*given, **named)

    args = SFTConfig(
        output_dir=str(run.checkpoints), max_length=recipe.max_seq_length, packing=chosen.packing, optim=chosen.optim,
        bf16=chosen.bf16, fp16=chosen.fp16, gradient_checkpointing=bool(recipe.use_gradient_checkpointing),
        include_num_input_tokens_seen="non_padding", disable_tqdm=True, save_strategy="no", **duration, **same)
    disable_progress_bars()  # TRL walks over the rows twice; on rows that are ready this takes no time
    trainer = KitTrainer(model=model, args=args, processing_class=tokenizer,
                         train_dataset=rows if lazy else rows.select_columns(["input_ids", "labels"]),
                         eval_dataset=held_out and held_out.select_columns(["input_ids", "labels"]))
    enable_progress_bars()
    for callback in (PrinterCallback, ProgressCallback, NotebookProgressCallback):
        trainer.remove_callback(callback)
    if is_main():
        trainer.add_callback(log_callback(run))
    return trainer
