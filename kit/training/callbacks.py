"""The trainer's callbacks that show: log lines, the bar, the forecast of time."""

from __future__ import annotations

import json
import time
from typing import Any

import kit.common.unsloth

from transformers import TrainerCallback

from kit.common.show import bar, clock
from kit.recipe.recipe import Recipe
from kit.runs.run import Run
from kit.training.evaluate import METRICS
from kit.training.steps import Pace, tokens_of

LOGGED = ("loss", "learning_rate", "grad_norm", *(f"eval_{name}" for name in METRICS))


def pace_callback(recipe: Recipe, rows: Any, said: list[float]) -> Any:
    """Says after two steps how long the training will take, and puts the seconds into `said`."""
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


def log_callback(run: Run) -> Any:
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
