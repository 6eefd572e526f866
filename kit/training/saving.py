"""When a training writes a checkpoint, when it stops, and how it goes on: one trainer callback decides it all.

The trainer's own save_strategy is off. Saves by steps, by epochs and by minutes, at a new best evaluation, at the end
and on a signal are asked for here, and every process asks for the same ones.
"""

from __future__ import annotations

import json
import time
from typing import Any

import kit.common.unsloth

from transformers import TrainerCallback
from trl import SFTTrainer

from kit.common.files import write_json
from kit.common.processes import any_of, is_main, rank, wait
from kit.common.stopping import StopWish
from kit.recipe.recipe import Recipe
from kit.runs.run import Run
from kit.training import checkpoints
from kit.training.evaluate import since_best


class TrainedAlready(Exception):
    """The checkpoint that was loaded is that of the last step: nothing is left to train."""


def evaluations(history: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """[(step, held-out loss), …] of a trainer's log_history."""
    return [(int(entry["step"]), float(entry["eval_loss"])) for entry in history if "eval_loss" in entry]


def best_step(history: list[dict[str, Any]]) -> int | None:
    """The step with the lowest held-out loss, the first of equals; None before the first evaluation."""
    return min(evaluations(history), key=lambda found: found[1], default=(None, 0.0))[0]


def save_callback(trainer: SFTTrainer, recipe: Recipe, run: Run, wish: StopWish, made_of: dict[str, Any],
                  resumed: checkpoints.Checkpoint | None) -> Any:
    """The callback; its `saved` is the step of the last sealed checkpoint, `stopping` whether a signal ended training.

    `made_of` is the training's `checkpoints.identity`, `resumed` what it goes on from.
    """
    class SaveCallback(TrainerCallback):  # type: ignore[misc]
        saved = resumed.step if resumed else 0
        stopping = False
        due = False

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began = self.last = time.perf_counter()
            if resumed is None:
                return
            told = json.loads((resumed.folder / f"accumulated_{rank()}.json").read_text(encoding="utf-8"))
            trainer._tr_loss += told["loss"]
            trainer._globalstep_last_logged = told["last_logged"]
            if state.global_step >= state.max_steps or self.patience_is_over(state):
                raise TrainedAlready

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            minutes = (time.perf_counter() - self.last) / 60
            late = recipe.save_minutes is not None and minutes >= recipe.save_minutes
            self.stopping, late = any_of(bool(wish.asked), late)
            self.due = self.due or self.stopping or late or (
                recipe.save_strategy == "steps" and state.global_step % recipe.save_steps == 0)
            # What belongs to the end of an epoch, such as its evaluation, comes before the checkpoint of its last step.
            waits = float(state.epoch).is_integer() or state.global_step >= state.max_steps
            control.should_save = self.due and not waits
            control.should_training_stop = control.should_training_stop or self.stopping

        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if recipe.load_best_model_at_end and best_step(state.log_history) == state.global_step:
                control.should_save = True
            if self.patience_is_over(state):
                print(f"early stopping: {recipe.early_stopping_patience} evaluations without a lower held-out loss")
                control.should_training_stop = True

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.stopping:
                control.should_evaluate = False
            ended = control.should_training_stop or state.global_step >= state.max_steps
            wanted = self.due or (recipe.save_strategy == "epoch" and float(state.epoch).is_integer()) or (
                ended and (recipe.save_strategy != "no" or self.saved > 0))
            control.should_save = wanted and self.saved != state.global_step

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            folder = run.checkpoints / f"checkpoint-{state.global_step}"
            # The mean of the next log line begins here.
            write_json(folder / f"accumulated_{rank()}.json", {"loss": trainer._tr_loss.item(),
                                                               "last_logged": trainer._globalstep_last_logged})
            wait()
            if is_main():
                before = resumed.seconds if resumed else 0.0
                checkpoints.seal(folder, made_of, before + time.perf_counter() - self.began, run.log)
                best = best_step(state.log_history) if recipe.load_best_model_at_end else None
                checkpoints.rotate(run.checkpoints, recipe.save_total_limit, best)
            wait()
            self.saved, self.due, self.last = state.global_step, False, time.perf_counter()

        def patience_is_over(self, state: Any) -> bool:
            losses = [loss for _, loss in evaluations(state.log_history)]
            return recipe.early_stopping_patience is not None and \
                since_best(losses, recipe.early_stopping_threshold) >= recipe.early_stopping_patience

    return SaveCallback()
