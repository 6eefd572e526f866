"""TRL's SFTTrainer for a recipe, and every use of names that transformers' Trainer does not document.

tests/training/test_trainer.py says by name when the installed transformers no longer has one of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kit.common.unsloth

from datasets import DatasetDict, disable_progress_bars, enable_progress_bars
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils.notebook import NotebookProgressCallback
from trl import SFTConfig, SFTTrainer

from kit.common.files import unwritable
from kit.common.processes import is_main
from kit.recipe.fields import fields_affecting
from kit.recipe.recipe import Recipe
from kit.recipe.settings import deepspeed_settings, resolved
from kit.runs.run import Run
from kit.training.callbacks import LogCallback
from kit.training.checkpoints import DISK_HINT
from kit.training.evaluate import evaluate


class KitTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer with the evaluation of kit.training.evaluate, whose memory does not grow with the vocabulary."""

    def __init__(self, eval_batch_size: int, **options: Any) -> None:
        self.eval_batch_size = eval_batch_size
        super().__init__(**options)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        figures = evaluate(self.model, self.processing_class, self.eval_dataset, self.eval_batch_size)
        metrics = {f"eval_{name}": value for name, value in figures.items()}
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _load_from_checkpoint(self, *arguments: Any, **options: Any) -> None:
        # TRL trains the adapter of a quantised model in bfloat16, and PEFT loads every adapter in float32.
        dtypes = {name: weight.dtype for name, weight in self.model.named_parameters() if weight.requires_grad}
        super()._load_from_checkpoint(*arguments, **options)
        for name, weight in self.model.named_parameters():
            if name in dtypes and weight.dtype != dtypes[name]:
                weight.data = weight.data.to(dtypes[name])

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with unwritable(folder, DISK_HINT, also=(RuntimeError,)):  # torch's writer tells of a full disk by that
            super()._save_checkpoint(*arguments, **options)


def unlogged_loss(trainer: SFTTrainer) -> dict[str, float]:
    """The loss summed up since the last log line, and that line's step: the mean of the next line needs both."""
    return {"loss": trainer._tr_loss.item(), "last_logged": trainer._globalstep_last_logged}


def restore_unlogged_loss(trainer: SFTTrainer, saved: dict[str, float]) -> None:
    trainer._tr_loss += saved["loss"]
    trainer._globalstep_last_logged = saved["last_logged"]


def load_best_model(trainer: SFTTrainer, checkpoint: Path) -> None:
    trainer.state.best_model_checkpoint = str(checkpoint)
    trainer._load_best_model()


def tokens_since_resume(trainer: SFTTrainer) -> int:
    """Tokens without padding, those before the checkpoint that training resumed from not counted."""
    return int(trainer.state.num_input_tokens_seen) - int(trainer._initial_num_input_tokens_seen)


def training_arguments(recipe: Recipe, lazy: bool) -> SFTConfig:
    """TRL's settings for a recipe; `lazy` when tokens are made as a row is taken, so none are to prepare or remove."""
    settings = resolved(recipe)
    duration = {"max_steps": recipe.max_steps} if recipe.max_steps else \
        {"num_train_epochs": recipe.num_train_epochs or 1.0}
    same = {name: getattr(recipe, name) for name in fields_affecting("SFTConfig")}
    if recipe.deepspeed:
        same |= {"deepspeed": deepspeed_settings(recipe)}
    if lazy:
        same |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    return SFTConfig(
        output_dir=str(Run.of(recipe).checkpoints), max_length=recipe.max_seq_length, packing=settings.packing,
        optim=settings.optim, bf16=settings.bf16, fp16=settings.fp16,
        gradient_checkpointing=bool(recipe.use_gradient_checkpointing), include_num_input_tokens_seen="non_padding",
        disable_tqdm=True, save_strategy="no", **duration, **same)


def make_trainer(model: Any, tokenizer: Any, data: DatasetDict, recipe: Recipe) -> SFTTrainer:
    """TRL's SFTTrainer on rows that are already tokenised and masked (`input_ids`, `labels`)."""
    rows, held_out = data["train"], data["test"] if recipe.eval_strategy != "no" else None
    lazy = "input_ids" not in rows.column_names
    columns = ["input_ids", "labels"]
    disable_progress_bars()  # TRL walks over the rows twice; on rows that are ready this takes no time
    trainer = KitTrainer(recipe.per_device_eval_batch_size or recipe.per_device_train_batch_size,
                         model=model, args=training_arguments(recipe, lazy), processing_class=tokenizer,
                         train_dataset=rows if lazy else rows.select_columns(columns),
                         eval_dataset=held_out and held_out.select_columns(columns))
    enable_progress_bars()
    for callback in (PrinterCallback, ProgressCallback, NotebookProgressCallback):
        trainer.remove_callback(callback)
    if is_main():
        trainer.add_callback(LogCallback(Run.of(recipe)))
    return trainer
