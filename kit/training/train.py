"""The training itself: it resumes, stops on a signal, and ends with one whole model and the figures of the run."""

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from kit.common.unsloth import FastLanguageModel

import torch
from transformers import TrainerCallback
from trl import SFTTrainer

from kit.common.errors import GateError, KitError, Stopped
from kit.common.processes import StopWish, from_main, is_main, wait
from kit.models.load import reload
from kit.models.precision import rounded_by_chance
from kit.recipe.machine import peak_memory_gb
from kit.recipe.recipe import Recipe
from kit.recipe.settings import joined, leave, resolved, sharding
from kit.runs.gates import Gates
from kit.runs.run import Run
from kit.training.checkpoints import Checkpoint, identity, newest, problem, restore_log
from kit.training.evaluate import METRICS
from kit.training.first_step import FirstStepCallback
from kit.training.saving import SaveCallback, TrainedAlready, best_step
from kit.training.trainer import PaceCallback, load_best_model, tokens_since_resume


@dataclass(frozen=True)
class TrainResult:
    """What training did. Losses are means over the trained tokens of the logged steps, in nats.

    After a resume `losses`, `evaluations`, `tokens` and `train_seconds` are those of the whole training,
    `tokens_per_second` and `peak_memory_gb` those since the resume.
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


def train(trainer: SFTTrainer, recipe: Recipe) -> TrainResult:
    """Train; log.jsonl gets a line per logged step. Resumes from the run's newest sound checkpoint, if there is one.

    Raises GateError in the first step when a gradient is missing or not finite, or the loss is worse than guessing
    (kit.training.first_step), and later when the loss is not finite; Stopped when a signal ended it with a checkpoint;
    KitError when the checkpoint was made from other data or settings.
    """
    FastLanguageModel.for_training(trainer.model, use_gradient_checkpointing=bool(recipe.use_gradient_checkpointing))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run, gates, pace = Run.of(recipe), Gates("first step"), PaceCallback(recipe, trainer.train_dataset)
    own_identity = identity(recipe, trainer.processing_class, trainer.train_dataset, trainer.eval_dataset)
    resumed = _checkpoint(run, own_identity) if recipe.resume_from_checkpoint else None
    if trainer.state.global_step and not resumed:  # its weights are no longer those that a training begins with
        raise KitError(f"this trainer has taken {trainer.state.global_step} steps already, and there is no checkpoint "
                       "to resume from", "run the cells again from the one that loads the model")
    began = time.perf_counter()
    with StopWish() as wish:
        saving = SaveCallback(trainer, recipe, wish, own_identity, resumed)
        with _callbacks(trainer, saving, FirstStepCallback(gates, trainer.model), pace), suppress(TrainedAlready):
            trainer.train(resume_from_checkpoint=str(resumed.folder) if resumed else None)
    seconds = time.perf_counter() - began
    state = trainer.state
    if saving.stopping:
        raise Stopped(f"stopped by {wish.asked or 'a signal'} after step {state.global_step} of {state.max_steps}; "
                      f"{run.checkpoints / f'checkpoint-{saving.saved}'} is complete",
                      "the same command, or in a notebook this cell again, resumes from there")
    best = _load_best(trainer, run) if recipe.load_best_model_at_end else None
    # Without the trainer's autocast around forward, the model answers as it will after saving and loading.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    return TrainResult(
        steps=state.global_step, losses=_finite_losses(state.log_history), tokens=int(state.num_input_tokens_seen),
        train_seconds=round(seconds + (resumed.seconds if resumed else 0), 2),
        tokens_per_second=round(tokens_since_resume(trainer) / seconds, 1), peak_memory_gb=round(peak_memory_gb(), 2),
        gates=gates, forecast_seconds=pace.seconds, best_step=best, resumed_from=resumed.step if resumed else None,
        evaluations=[{"step": entry["step"], **{name: entry[f"eval_{name}"] for name in METRICS}}
                     for entry in state.log_history if "eval_loss" in entry])


@contextmanager
def _callbacks(trainer: SFTTrainer, *callbacks: TrainerCallback) -> Iterator[None]:
    """They serve one call: a second one on the same trainer, after an interrupt, is not stopped by the first's."""
    for callback in callbacks:
        trainer.add_callback(callback)
    try:
        yield
    finally:
        for callback in callbacks:
            trainer.remove_callback(callback)


def _checkpoint(run: Run, own_identity: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint to resume from, with the run's log as it was then."""
    checkpoint = from_main(lambda: newest(run.checkpoints, own_identity))
    if checkpoint and is_main():
        print(f"resumes from {checkpoint.folder.name}")
        restore_log(checkpoint.folder, run.log)
    return checkpoint


def _finite_losses(history: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """[(step, loss), …] of the logged steps; GateError without any, or when one is not finite."""
    losses = [(int(entry["step"]), float(entry["loss"])) for entry in history if "loss" in entry]
    bad = [step for step, loss in losses if not math.isfinite(loss)]
    if bad or not losses:
        raise GateError(f"the loss is not finite at step {bad[0] if bad else 0}",
                        "lower learning_rate, or set dtype: float32")
    return losses


def _load_best(trainer: SFTTrainer, run: Run) -> int:
    """Give the model the weights of the checkpoint with the lowest held-out loss; returns its step."""
    step = best_step(trainer.state.log_history)
    folder = run.checkpoints / f"checkpoint-{step}"
    if reason := from_main(lambda: problem(folder)):
        raise KitError(f"load_best_model_at_end: {folder} can't be used: {reason}",
                       "train again, or set load_best_model_at_end: false for the last step's weights")
    if step != trainer.state.global_step:
        load_best_model(trainer, folder)
        print(f"the model has the weights of step {step}, the lowest held-out loss")
    return int(step or 0)


def whole_model(trainer: SFTTrainer, recipe: Recipe) -> Any:
    """The trained model in one piece; of several processes the main one gets it, and trains no more with the others.

    Under DDP each process has it. FSDP2 and ZeRO gather their shards into a folder, from which it is loaded again.
    Fully fine-tuned weights leave in 16-bit, so that what is answered and recorded from here on is what is shipped.
    """
    model = trainer.model
    sharded = joined() and sharding(recipe)["engine"] not in ("DDP", "one process")
    folder = Run.of(recipe).folder / "gathered"
    if sharded:
        trainer.save_model(str(folder))
        wait()
    leave()
    if sharded:
        if not is_main():
            return None
        model, _ = reload(folder, recipe)
        shutil.rmtree(folder)
    if recipe.full_finetuning and is_main():
        dtype = torch.float16 if resolved(recipe).fp16 else torch.bfloat16
        for name, weight in model.named_parameters():
            if weight.dtype == torch.float32:
                # By chance, as in a merge: to the nearest, small changes would all fall away.
                weight.data = weight.data.to(dtype) if dtype == torch.float16 else \
                    rounded_by_chance(weight.data, name).to(weight.device)
        model.config.dtype = dtype
    return model
