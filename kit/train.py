"""The trainer and the training itself: TRL's SFTTrainer, a log line per step, a progress bar."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kit.errors import GateError
from kit.gates import Gates
from kit.gates.first_step import first_step_callback
from kit.model import import_unsloth, resolved
from kit.runs import Run, peak_memory_gb
from kit.show import bar, clock

if TYPE_CHECKING:
    from datasets import DatasetDict
    from trl import SFTTrainer

    from kit.recipe import Recipe


@dataclass(frozen=True)
class TrainResult:
    """What training did. Losses are means over the trained tokens of the logged steps, in nats."""

    steps: int
    losses: list[tuple[int, float]]
    train_seconds: float
    tokens: int
    tokens_per_second: float
    peak_memory_gb: float
    gates: Gates  # of the first step
    forecast_seconds: float | None = None  # said after two steps

    def figures(self) -> dict[str, Any]:
        """Everything but the gates, for result.json."""
        return {name: value for name, value in vars(self).items() if name != "gates"}

    @property
    def final_loss(self) -> float:
        return self.losses[-1][1]


def make_trainer(model: Any, tokenizer: Any, data: DatasetDict, recipe: Recipe) -> SFTTrainer:
    """TRL's SFTTrainer on rows that are already tokenised and masked (`input_ids`, `labels`)."""
    import_unsloth()
    from datasets import disable_progress_bars, enable_progress_bars
    from transformers.trainer_callback import PrinterCallback, ProgressCallback
    from transformers.utils.notebook import NotebookProgressCallback
    from trl import SFTConfig, SFTTrainer

    chosen = resolved(recipe)
    run = Run.of(recipe)
    duration = {"max_steps": recipe.max_steps} if recipe.max_steps else \
        {"num_train_epochs": recipe.num_train_epochs or 1.0}
    same = {name: getattr(recipe, name) for name in (
        "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "warmup_steps",
        "lr_scheduler_type", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "neftune_noise_alpha",
        "train_sampling_strategy", "dataloader_num_workers", "logging_steps", "save_strategy", "save_steps",
        "save_total_limit", "report_to", "seed")}
    rows = data["train"]
    lazy = "input_ids" not in rows.column_names  # tokens are made when a row is taken: nothing to prepare or remove
    if lazy:
        same |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    args = SFTConfig(
        output_dir=str(run.checkpoints), max_length=recipe.max_seq_length, packing=chosen.packing, optim=chosen.optim,
        bf16=chosen.bf16, fp16=chosen.fp16, gradient_checkpointing=bool(recipe.use_gradient_checkpointing),
        include_num_input_tokens_seen="non_padding", disable_tqdm=True, **duration, **same)
    disable_progress_bars()  # TRL walks over the rows twice; on rows that are ready this takes no time
    trainer = SFTTrainer(model=model, args=args, processing_class=tokenizer,
                         train_dataset=rows if lazy else rows.select_columns(["input_ids", "labels"]))
    enable_progress_bars()
    for callback in (PrinterCallback, ProgressCallback, NotebookProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(_log_callback(run))
    return trainer


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


def train(trainer: SFTTrainer, recipe: Recipe) -> TrainResult:
    """Train; log.jsonl gets a line per logged step.

    Raises GateError in the first step when a gradient is missing or no number, or the loss is worse than guessing
    (kit.gates.first_step), and later when the loss is no number.
    """
    import torch

    unsloth = import_unsloth()
    unsloth.FastLanguageModel.for_training(
        trainer.model, use_gradient_checkpointing=bool(recipe.use_gradient_checkpointing))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    gates = Gates("first step")
    said: list[float] = []
    for callback in (first_step_callback(gates, trainer.model), _pace_callback(recipe, trainer.train_dataset, said)):
        trainer.add_callback(callback)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    # Without the trainer's autocast around forward, the model answers as it will after saving and loading.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    losses = [(int(entry["step"]), float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry]
    bad = [step for step, loss in losses if not math.isfinite(loss)]
    if bad or not losses:
        raise GateError(f"the loss is no finite number at step {bad[0] if bad else 0}",
                        "lower learning_rate, or set dtype: float32")
    tokens = int(trainer.state.num_input_tokens_seen)
    return TrainResult(trainer.state.global_step, losses, round(seconds, 2), tokens, round(tokens / seconds, 1),
                       round(peak_memory_gb(), 2), gates, said[0] if said else None)


def _pace_callback(recipe: Recipe, rows: Any, said: list[float]) -> Any:
    """Says after two steps how long the training will take, and puts the seconds into `said`."""
    from transformers import TrainerCallback

    from kit.forecast import Pace, tokens_of

    class PaceCallback(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.pace = Pace(state.max_steps, tokens_of(recipe, rows, state.max_steps))

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began, self.tokens = time.perf_counter(), int(state.num_input_tokens_seen)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            now = int(state.num_input_tokens_seen)
            seconds = self.pace.step(time.perf_counter() - self.began, now - self.tokens)
            if seconds is not None:
                said.append(seconds)
                print(f"forecast after two steps: {clock(seconds)} for all {state.max_steps}", flush=True)

    return PaceCallback()


def _log_callback(run: Run) -> Any:
    from transformers import TrainerCallback

    class LogCallback(TrainerCallback):  # type: ignore[misc]
        """log.jsonl and a bar with loss, tokens per second and the time that is left."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar = bar(state.max_steps, "training", "step")
            self.began = time.perf_counter()
            run.folder.mkdir(parents=True, exist_ok=True)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.update(state.global_step - self.bar.n)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if not logs or "loss" not in logs:
                return
            seconds = time.perf_counter() - self.began
            line = {"step": state.global_step, "epoch": round(state.epoch or 0, 4), "seconds": round(seconds, 2),
                    "tokens": int(state.num_input_tokens_seen),
                    **{k: v for k, v in logs.items() if k in ("loss", "learning_rate", "grad_norm")}}
            with run.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            speed = f"{state.num_input_tokens_seen / seconds:.0f} tok/s"
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.3f}, {speed}", refresh=False)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.close()

    return LogCallback()
