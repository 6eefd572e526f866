"""The gates in the first step: what the first backward pass and the first loss say of the model and its data."""

import math
from functools import partial
from typing import Any

import kit.common.unsloth

from transformers import TrainerCallback

from kit.common.processes import any_of
from kit.runs.gates import Gates

FP16_PATIENCE = 10  # steps
BAND = 1.5  # nats: a model that has learnt nothing may be that much worse than guessing, by its random weights
CHECKPOINTING = ("with gradient checkpointing the inputs must ask for gradients: use_gradient_checkpointing: false "
                 "shows whether it is that")


class Gradients:
    """What the first backward pass gave each trained tensor, also where it is sharded over several processes.

    DeepSpeed takes the step within backward and keeps no gradient, so there each one is looked at as it comes.
    """

    def __init__(self, model: Any, as_they_come: bool = False) -> None:
        self.model = model
        self.trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.reached, self.infinite, self.nonzero = set[str](), set[str](), set[str]()
        self.hooks = [weight.register_hook(partial(self._note, name)) for name, weight in self.trained.items()
                      if as_they_come]

    def _note(self, name: str, gradient: Any) -> None:
        shard = gradient.to_local() if hasattr(gradient, "to_local") else gradient  # this process's part
        self.reached.add(name)
        if not bool(shard.isfinite().all()):
            self.infinite.add(name)
        if bool(shard.any()):
            self.nonzero.add(name)

    def look(self) -> None:
        """After backward: what the gradients are, for all processes together."""
        for hook in self.hooks:
            hook.remove()
        if not self.hooks:
            for name, weight in self.trained.items():
                if weight.grad is not None:
                    self._note(name, weight.grad)
        for names in (self.reached, self.infinite, self.nonzero):
            flags = any_of(*(name in names for name in self.trained))
            names.update(name for name, flag in zip(self.trained, flags, strict=True) if flag)

    def finite(self) -> bool:
        """Whether every gradient of this step is a finite number."""
        if self.hooks:
            finite = not self.infinite
            self.infinite.clear()
            return finite
        return all(bool(p.grad.isfinite().all()) for p in self.trained.values() if p.grad is not None)


def check_gradients(gates: Gates, gradients: Gradients) -> None:
    """After the first backward: finite gradients wherever weights are trained, none where they are frozen.

    B starts at zero, so A's first gradient is zero, but B's is not.
    """
    trained, reached = gradients.trained, gradients.reached
    missing = [name for name in trained if name not in reached]
    infinite = [name for name in trained if name in gradients.infinite]
    zero = [name for name in trained if ".lora_B" in name and name in reached and name not in gradients.nonzero]
    frozen = [name for name, p in gradients.model.named_parameters() if not p.requires_grad and p.grad is not None]
    faults = [(missing, "have no gradient", CHECKPOINTING),
              (infinite, "have a gradient that is not finite", "lower learning_rate, or set dtype: float32"),
              (zero, "are a LoRA B with a gradient of zero: nothing reaches them", "use_gradient_checkpointing: false"),
              (frozen, "are frozen and have a gradient", "call kit.add_lora on the model of kit.load_model")]
    cause, hint = next(((f"{len(names)} of {len(trained)} trained tensors {fault}, the first is {names[0]}", remedy)
                        for names, fault, remedy in faults if names), ("", ""))
    gates.check("gradients", not cause, f"{len(trained) - len(missing)} of {len(trained)} trained tensors have one",
                "all, finite; every LoRA B above zero", cause, hint)


def check_loss(gates: Gates, loss: float, vocabulary: int) -> None:
    """A first loss above ln(vocabulary) + BAND is worse than guessing: labels or weights are wrong."""
    bound = math.log(vocabulary) + BAND
    passed = 0 < loss <= bound  # no NaN either
    gates.check("first loss", passed, f"{loss:.3f}", f"above 0, at most ln({vocabulary:,}) + {BAND} = {bound:.2f}",
                "" if passed else "worse than guessing among all tokens: labels, template or weights are wrong",
                "look at the highlighted tokens of the first row, and at the model's files")


class FirstStepCallback(TrainerCallback):
    """Adds `gradients` and `first loss` to `gates` in the first step, and stops the training if one fails.

    The gates see the step as it is really taken, with the trainer's precision, checkpointing and batches.
    """

    def __init__(self, gates: Gates, model: Any) -> None:
        self.gates, self.model = gates, model

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.hook = self.model.register_forward_hook(self.check_reach)
        self.gradients = Gradients(self.model, as_they_come=args.deepspeed is not None)

    def check_reach(self, module: Any, inputs: Any, output: Any) -> None:
        """In the first forward pass: a loss without a gradient would end backward in PyTorch's own words."""
        self.hook.remove()
        loss = getattr(output, "loss", None)
        if loss is not None and not loss.requires_grad:
            self.gates.check("gradients", False, f"0 of {len(self.gradients.trained)} trained tensors reached", "all",
                             "the loss depends on no trained tensor", CHECKPOINTING)
            self.gates.require()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._checked("gradients"):
            return
        # float16's loss scale starts so high that the first gradients overflow; such steps are skipped.
        if args.fp16 and state.global_step < FP16_PATIENCE and not self.gradients.finite():
            return
        self.gradients.look()
        check_gradients(self.gates, self.gradients)
        self.gates.require()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # Whatever logging_steps is, the first step's loss is wanted now. A resumed training waits for its next line.
        control.should_log = control.should_log or state.global_step == 1

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" in logs and not self._checked("first loss"):
            check_loss(self.gates, float(logs["loss"]), self.model.get_input_embeddings().num_embeddings)
            self.gates.require()

    def _checked(self, name: str) -> bool:
        return any(gate.name == name for gate in self.gates.gates)
