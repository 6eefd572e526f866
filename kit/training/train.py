"""The trainer and the training itself: TRL's SFTTrainer, a log line per step, checkpoints, a progress bar."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from kit.common.unsloth import FastLanguageModel

import torch
from trl import SFTTrainer

from kit.common.errors import GateError, KitError, Stopped
from kit.common.processes import from_main, is_main
from kit.common.stopping import StopWish
from kit.recipe.machine import peak_memory_gb
from kit.recipe.recipe import Recipe
from kit.recipe.sharding import sharding
from kit.runs.gates import Gates
from kit.runs.run import Run
from kit.training.callbacks import pace_callback
from kit.training.checkpoints import identity, newest, problem, restore_log
from kit.training.evaluate import METRICS
from kit.training.first_step import first_step_callback
from kit.training.saving import TrainedAlready, best_step, save_callback


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


def train(trainer: SFTTrainer, recipe: Recipe) -> TrainResult:
    """Train; log.jsonl gets a line per logged step. Goes on from the run's newest sound checkpoint, if there is one.

    Raises GateError in the first step when a gradient is missing or no number, or the loss is worse than guessing
    (kit.training.first_step), and later when the loss is no number; Stopped when a signal ended it with a checkpoint;
    KitError when the checkpoint was made of other data or settings.
    """
    FastLanguageModel.for_training(
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
                         pace_callback(recipe, trainer.train_dataset, said)):
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
