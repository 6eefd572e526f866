"""The trainer's callbacks that report: the log's lines, the bar, the forecast of time."""

from __future__ import annotations

import json
import time
from typing import Any

import kit.common.unsloth

from transformers import TrainerCallback

from kit.common.show import bar, duration
from kit.recipe.recipe import Recipe
from kit.runs.run import Run
from kit.training.evaluate import METRICS
from kit.training.steps import seconds_of, tokens_of

LOGGED = ("loss", "learning_rate", "grad_norm", *(f"eval_{name}" for name in METRICS))


class PaceCallback(TrainerCallback):  # type: ignore[misc]
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
            print(f"forecast after two steps: {duration(self.seconds)} for all {state.max_steps}", flush=True)


class LogCallback(TrainerCallback):  # type: ignore[misc]
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
        line = {"step": state.global_step, "epoch": round(state.epoch or 0, 4),
                "seconds": round(self.seconds_before + seconds, 2), "tokens": int(state.num_input_tokens_seen),
                **figures}
        with self.run.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if "loss" in figures:
            speed = (state.num_input_tokens_seen - self.tokens) / seconds
            self.bar.set_postfix_str(f"loss {float(figures['loss']):.3f}, {speed:.0f} tok/s", refresh=False)
        else:
            loss, perplexity, accuracy = (figures[f"eval_{name}"] for name in METRICS)
            print(f"\nheld-out rows after step {state.global_step}: loss {loss:.4f}, perplexity {perplexity:.2f}, "
                  f"token accuracy {accuracy:.1%}", flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()
