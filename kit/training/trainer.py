"""TRL's SFTTrainer for a recipe, what it logs, and every use of names that transformers' Trainer does not document.

tests/training/test_trainer.py says by name when the installed transformers no longer has one of them.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import kit.common.unsloth

import torch
from datasets import DatasetDict, disable_progress_bars, enable_progress_bars
from filelock import FileLock
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils.notebook import NotebookProgressCallback
from trl import SFTConfig, SFTTrainer

from kit.common.errors import KitError
from kit.common.files import cache_dir, unwritable
from kit.common.processes import is_main
from kit.common.progress import say
from kit.common.show import bar, duration
from kit.recipe.fields import fields_affecting
from kit.recipe.recipe import Recipe
from kit.recipe.settings import check_joined, deepspeed_settings, resolved
from kit.runs.run import Run
from kit.training.checkpoints import DISK_HINT
from kit.training.evaluate import METRICS, evaluate
from kit.training.steps import seconds_of, tokens_of

LOGGED = ("loss", "learning_rate", "grad_norm", *(f"eval_{name}" for name in METRICS))


class PaceCallback(TrainerCallback):
    """Says after two steps how long the training will take: `seconds`, None until then."""

    def __init__(self, recipe: Recipe, rows: Any) -> None:
        self.recipe, self.rows = recipe, rows
        self.steps: list[tuple[float, int]] = []
        self.seconds: float | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began, self.tokens = time.perf_counter(), int(state.num_input_tokens_seen)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps.append((time.perf_counter() - self.began, int(state.num_input_tokens_seen) - self.tokens))
        if len(self.steps) == 2:
            tokens = tokens_of(self.recipe, self.rows, state.max_steps)
            self.seconds = seconds_of(state.max_steps, tokens, *self.steps)
            say(f"forecast after two steps: {duration(self.seconds)} for all {state.max_steps}")


class LogCallback(TrainerCallback):
    """log.jsonl, and a bar with the loss, tokens per second and the time that is left."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = bar(state.max_steps, "training", "step", initial=state.global_step)
        self.began, self.tokens = time.perf_counter(), int(state.num_input_tokens_seen)
        # The last line of a resumed log is that of its checkpoint; the seconds count on from there.
        lines = self.run.log.read_text(encoding="utf-8").splitlines() if self.run.log.is_file() else []
        self.seconds_before = float(json.loads(lines[-1])["seconds"]) if lines else 0.0
        self.run.folder.mkdir(parents=True, exist_ok=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        figures = {name: value for name, value in logs.items() if name in LOGGED}
        if not figures:
            return
        seconds = time.perf_counter() - self.began
        with unwritable(self.run.log), self.run.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, "epoch": round(state.epoch or 0, 4),
                                   "seconds": round(self.seconds_before + seconds, 2),
                                   "tokens": int(state.num_input_tokens_seen), **figures}) + "\n")
        if "loss" in figures:
            speed = (state.num_input_tokens_seen - self.tokens) / seconds
            self.bar.set_postfix_str(f"loss {float(figures['loss']):.3f}, {speed:.0f} tok/s", refresh=False)
        else:
            loss, perplexity, accuracy = (figures[f"eval_{name}"] for name in METRICS)
            say(f"held-out rows after step {state.global_step}: loss {loss:.4f}, perplexity {perplexity:.2f}, "
                f"token accuracy {accuracy:.1%}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


class KitTrainer(SFTTrainer):
    """SFTTrainer with the evaluation of kit.training.evaluate, whose memory does not grow with the vocabulary."""

    eval_batch_size: int

    def __init__(self, *arguments: Any, in_float32: bool, **options: Any) -> None:
        self.in_float32 = in_float32
        super().__init__(*arguments, **options)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        figures = evaluate(self.model, self.processing_class, self.eval_dataset, self.eval_batch_size)
        metrics = {f"eval_{name}": value for name, value in figures.items()}
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_accelerator_and_postprocess(self) -> None:
        # Where neither bf16 nor fp16 was asked for, Unsloth's trainer has turned one of them on by now.
        if self.in_float32:
            self.args.bf16 = self.args.fp16 = False
            self.args.mixed_precision = os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
        super().create_accelerator_and_postprocess()

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


def load_deepspeed_operator() -> None:
    """Compile and load DeepSpeed's operator for CPUs, one process after the other.

    PyTorch guards its build folder by a file that a killed process leaves behind, and waits for that file's end for
    ever. The system ends a FileLock with its process: who holds it knows that a file left there is nobody's.
    Raises KitError where PyTorch lies in a path with a space, which its linker flags don't quote.
    """
    if any(map(str.isspace, place := str(Path(torch.__file__).parent))):
        raise KitError(f"deepspeed: its operator for CPUs can't be compiled against {place}, a path with a space",
                       "make the environment in a folder without one, or use fsdp: true")
    from deepspeed.accelerator import get_accelerator

    folder = cache_dir() / "torch_extensions"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    with FileLock(folder / "kit.lock"):
        for left in folder.glob("*/lock"):
            left.unlink()
        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)


def training_arguments(recipe: Recipe, lazy: bool) -> SFTConfig:
    """TRL's settings for a recipe; `lazy` when tokens are made as a row is taken, so none are to prepare or remove."""
    settings = resolved(recipe)
    same = {name: getattr(recipe, name) for name in fields_affecting("SFTConfig")}
    if recipe.deepspeed:
        if not torch.cuda.is_available():
            load_deepspeed_operator()
        same |= {"deepspeed": deepspeed_settings(recipe)}
    if lazy:
        same |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    return SFTConfig(
        output_dir=str(Run.of(recipe).checkpoints), max_length=recipe.max_seq_length, packing=settings.packing,
        optim=settings.optim, bf16=settings.bf16, fp16=settings.fp16,
        gradient_checkpointing=bool(recipe.use_gradient_checkpointing), include_num_input_tokens_seen="non_padding",
        disable_tqdm=True, save_strategy="no", max_steps=recipe.max_steps or -1,
        num_train_epochs=recipe.num_train_epochs or 1.0, **same)


def make_trainer(model: Any, tokenizer: Any, data: DatasetDict, recipe: Recipe) -> SFTTrainer:
    """TRL's SFTTrainer on rows that are already tokenised and masked (`input_ids`, `labels`)."""
    check_joined(recipe)
    rows, held_out = data["train"], data["test"] if recipe.eval_strategy != "no" else None
    lazy = "input_ids" not in rows.column_names
    columns = ["input_ids", "labels"]
    disable_progress_bars()  # TRL walks over the rows twice; on rows that are ready this takes no time
    arguments = training_arguments(recipe, lazy)
    trainer = KitTrainer(model=model, args=arguments, in_float32=not (arguments.bf16 or arguments.fp16),
                         processing_class=tokenizer,
                         train_dataset=rows if lazy else rows.select_columns(columns),
                         eval_dataset=held_out and held_out.select_columns(columns))
    trainer.eval_batch_size = recipe.per_device_eval_batch_size or recipe.per_device_train_batch_size
    enable_progress_bars()
    for callback in (PrinterCallback, ProgressCallback, NotebookProgressCallback):
        trainer.remove_callback(callback)
    if is_main():
        trainer.add_callback(LogCallback(Run.of(recipe)))
    return trainer
