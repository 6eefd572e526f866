"""The trainer and the training itself: TRL's SFTTrainer, a log line per step, checkpoints, a progress bar."""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kit.checkpoints import identity, newest, problem, restore_log, writing_checkpoint
from kit.errors import GateError, KitError, Stopped
from kit.evaluate import evaluate
from kit.gates import Gates
from kit.gates.first_step import first_step_callback
from kit.model import import_unsloth, resolved
from kit.processes import deepspeed_settings, from_main, is_main, sharding
from kit.runs import Run, peak_memory_gb
from kit.saving import TrainedAlready, best_step, save_callback
from kit.show import bar, clock
from kit.stopping import StopWish

if TYPE_CHECKING:
    from datasets import DatasetDict
    from trl import SFTTrainer

    from kit.recipe import Recipe


METRICS = ("loss", "perplexity", "token_accuracy")
LOGGED = ("loss", "learning_rate", "grad_norm", *(f"eval_{name}" for name in METRICS))


@dataclass(frozen=True)
class TrainResult:
    """What training did. Losses are means over the trained tokens of the logged steps, in nats.

    Of a training that went on from a checkpoint `losses`, `evaluations`, `tokens` and `train_seconds` are those of the
    whole, `tokens_per_second` and `peak_memory_gb` those since then.
    """

    steps: int
    losses: list[tuple[int, float]]
    train_seconds: float
    tokens: int
    tokens_per_second: float
    peak_memory_gb: float
    gates: Gates  # of the first step
    forecast_seconds: float | None = None  # said after two steps
    evaluations: list[dict[str, float]] = field(default_factory=list)  # step, loss, perplexity, token_accuracy
    best_step: int | None = None  # whose weights the model has, with load_best_model_at_end
    resumed_from: int | None = None  # the checkpoint's step

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
        "train_sampling_strategy", "dataloader_num_workers", "dataloader_pin_memory", "logging_steps", "eval_strategy",
        "eval_steps", "ddp_timeout", "report_to", "seed")}
    if recipe.deepspeed:
        same |= {"deepspeed": deepspeed_settings(recipe)}
    rows, held_out = data["train"], data["test"] if recipe.eval_strategy != "no" else None
    lazy = "input_ids" not in rows.column_names  # tokens are made when a row is taken: nothing to prepare or remove
    if lazy:
        same |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}

    class KitTrainer(SFTTrainer):  # type: ignore[misc]
        """SFTTrainer with the evaluation of `kit.evaluate`, whose memory does not grow with the vocabulary."""

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
    """Train; log.jsonl gets a line per logged step. Goes on from the run's newest sound checkpoint, if there is one.

    Raises GateError in the first step when a gradient is missing or no number, or the loss is worse than guessing
    (kit.gates.first_step), and later when the loss is no number; Stopped when a signal ended it with a checkpoint;
    KitError when the checkpoint was made of other data or settings.
    """
    import torch

    unsloth = import_unsloth()
    unsloth.FastLanguageModel.for_training(
        trainer.model, use_gradient_checkpointing=bool(recipe.use_gradient_checkpointing))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run = Run.of(recipe)
    made_of = identity(recipe, trainer.processing_class, trainer.train_dataset, trainer.eval_dataset,
                       sharding(recipe))
    resumed = from_main(lambda: newest(run.checkpoints, made_of)) if recipe.resume_from_checkpoint else None
    if is_main() and resumed:
        print(f"goes on from {resumed.folder.name}")
        restore_log(resumed.folder, run.log)
    gates = Gates("first step")
    said: list[float] = []
    began = time.perf_counter()
    with StopWish() as wish:
        saving = save_callback(trainer, recipe, run, wish, made_of, resumed)
        for callback in (saving, first_step_callback(gates, trainer.model),
                         _pace_callback(recipe, trainer.train_dataset, said)):
            trainer.add_callback(callback)
        with suppress(TrainedAlready):
            trainer.train(resume_from_checkpoint=str(resumed.folder) if resumed else None)
    seconds = time.perf_counter() - began
    state = trainer.state
    if saving.stopping:
        raise Stopped(f"stopped by {wish.asked or 'a signal'} after step {state.global_step} of {state.max_steps}; "
                      f"{run.checkpoints / f'checkpoint-{saving.saved}'} is complete",
                      "the same command goes on from there")
    best = _load_best(trainer, run) if recipe.load_best_model_at_end else None
    # Without the trainer's autocast around forward, the model answers as it will after saving and loading.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    losses = [(int(entry["step"]), float(entry["loss"])) for entry in state.log_history if "loss" in entry]
    bad = [step for step, loss in losses if not math.isfinite(loss)]
    if bad or not losses:
        raise GateError(f"the loss is no finite number at step {bad[0] if bad else 0}",
                        "lower learning_rate, or set dtype: float32")
    found = [{"step": entry["step"], **{name: entry[f"eval_{name}"] for name in METRICS}}
             for entry in state.log_history if "eval_loss" in entry]
    tokens = int(state.num_input_tokens_seen)
    new = tokens - int(trainer._initial_num_input_tokens_seen)
    return TrainResult(state.global_step, losses, round(seconds + (resumed.seconds if resumed else 0), 2), tokens,
                       round(new / seconds, 1), round(peak_memory_gb(), 2), gates, said[0] if said else None, found,
                       best, resumed.step if resumed else None)


def _load_best(trainer: SFTTrainer, run: Run) -> int:
    """Give the model the weights of the checkpoint with the lowest held-out loss; returns its step."""
    step = best_step(trainer.state.log_history)
    folder = run.checkpoints / f"checkpoint-{step}"
    if reason := from_main(lambda: problem(folder)):
        raise KitError(f"load_best_model_at_end: {folder} can't be used: {reason}",
                       "train again, or set load_best_model_at_end: false for the last step's weights")
    if step != trainer.state.global_step:
        trainer.state.best_model_checkpoint = str(folder)
        trainer._load_best_model()
        print(f"the model has the weights of step {step}, the lowest held-out loss")
    return int(step or 0)


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
            self.bar = bar(state.max_steps, "training", "step", initial=state.global_step)
            self.began, self.tokens = time.perf_counter(), int(state.num_input_tokens_seen)
            self.before = _logged_seconds(run)
            run.folder.mkdir(parents=True, exist_ok=True)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.update(state.global_step - self.bar.n)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            shown = {k: v for k, v in (logs or {}).items() if k in LOGGED}
            if not shown:
                return
            seconds = time.perf_counter() - self.began
            line = {"step": state.global_step, "epoch": round(state.epoch or 0, 4),
                    "seconds": round(self.before + seconds, 2),
                    "tokens": int(state.num_input_tokens_seen), **shown}
            with run.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if "loss" in shown:
                speed = (state.num_input_tokens_seen - self.tokens) / seconds
                self.bar.set_postfix_str(f"loss {float(shown['loss']):.3f}, {speed:.0f} tok/s", refresh=False)
            else:
                loss, perplexity, accuracy = (shown[f"eval_{name}"] for name in METRICS)
                print(f"\nheld-out rows after step {state.global_step}: loss {loss:.4f}, perplexity {perplexity:.2f}, "
                      f"token accuracy {accuracy:.1%}", flush=True)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.close()

    return LogCallback()


def _logged_seconds(run: Run) -> float:
    """Training time up to the last line of the log: that of the checkpoint, where training goes on from one."""
    lines = run.log.read_text(encoding="utf-8").splitlines() if run.log.is_file() else []
    return float(json.loads(lines[-1])["seconds"]) if lines else 0.0
