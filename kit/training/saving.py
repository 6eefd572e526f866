"""When a training writes a checkpoint, when it stops, and how it resumes: one trainer callback decides it all.

The trainer's own save_strategy is off. Saves by steps, by epochs and by minutes, at a new best evaluation, at the end
and on a signal are asked for here, and every process asks for the same ones.
"""

import json
import time
from typing import Any

import kit.common.unsloth

from transformers import TrainerCallback
from trl import SFTTrainer

from kit.common.files import read_json, write_json
from kit.common.processes import StopWish, any_of, is_main, rank, wait
from kit.recipe.recipe import Recipe
from kit.runs.run import Run
from kit.training import checkpoints
from kit.training.evaluate import since_best
from kit.training.trainer import restore_unlogged_loss, unlogged_loss


class TrainedAlready(Exception):
    """The checkpoint that was loaded is that of the last step: nothing is left to train."""


def best_step(history: list[dict[str, Any]]) -> int | None:
    """The step of a trainer's log_history with the lowest held-out loss, the first of equals; None without any."""
    evaluations = [entry for entry in history if "eval_loss" in entry]
    return min(evaluations, key=lambda entry: entry["eval_loss"])["step"] if evaluations else None


class SaveCallback(TrainerCallback):
    """`saved` is the step of the last sealed checkpoint, `stopping` whether a signal ended the training.

    `identity` is the training's `checkpoints.identity`, `resumed` the checkpoint it resumes from.
    """

    def __init__(self, trainer: SFTTrainer, recipe: Recipe, wish: StopWish, identity: dict[str, Any],
                 resumed: checkpoints.Checkpoint | None) -> None:
        self.trainer, self.recipe, self.wish, self.identity, self.resumed = trainer, recipe, wish, identity, resumed
        self.run = Run.of(recipe)
        self.saved = resumed.step if resumed else 0
        self.stopping = self.due = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = self.last_save = time.perf_counter()
        if self.resumed is None:
            return
        unlogged = self.resumed.folder / f"accumulated_{rank()}.json"
        restore_unlogged_loss(self.trainer, json.loads(unlogged.read_text(encoding="utf-8")))
        if state.global_step >= state.max_steps or self.patience_is_over(state):
            raise TrainedAlready

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        minutes = (time.perf_counter() - self.last_save) / 60
        late = self.recipe.save_minutes is not None and minutes >= self.recipe.save_minutes
        self.stopping, late = any_of(bool(self.wish.asked), late)
        self.due = self.due or self.stopping or late or (
            self.recipe.save_strategy == "steps" and state.global_step % self.recipe.save_steps == 0)
        # What belongs to the end of an epoch, such as its evaluation, comes before the checkpoint of its last step.
        waits = float(state.epoch).is_integer() or state.global_step >= state.max_steps
        control.should_save = self.due and not waits
        control.should_training_stop = control.should_training_stop or self.stopping

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.recipe.load_best_model_at_end and best_step(state.log_history) == state.global_step:
            control.should_save = True
        if self.patience_is_over(state):
            print(f"early stopping: {self.recipe.early_stopping_patience} evaluations without a lower held-out loss")
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.stopping:
            control.should_evaluate = False
        strategy = self.recipe.save_strategy
        ended = control.should_training_stop or state.global_step >= state.max_steps
        wanted = self.due or (strategy == "epoch" and float(state.epoch).is_integer()) or (
            ended and (strategy != "no" or self.saved > 0))
        control.should_save = wanted and self.saved != state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = self.run.checkpoints / f"checkpoint-{state.global_step}"
        write_json(folder / f"accumulated_{rank()}.json", unlogged_loss(self.trainer))
        wait()
        if is_main():
            seconds = (self.resumed.seconds if self.resumed else 0.0) + time.perf_counter() - self.began
            data = read_json(self.run.folder / "manifest.json").get("data_sha256") or {}
            checkpoints.seal(folder, self.identity, seconds, self.run.log,
                             checkpoints.source(self.recipe, list(data.values())))
            best = best_step(state.log_history) if self.recipe.load_best_model_at_end else None
            checkpoints.rotate(self.run.checkpoints, self.recipe.save_total_limit, best)
        wait()
        self.saved, self.due, self.last_save = state.global_step, False, time.perf_counter()

    def patience_is_over(self, state: Any) -> bool:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        patience = self.recipe.early_stopping_patience
        return patience is not None and since_best(losses, self.recipe.early_stopping_threshold) >= patience
