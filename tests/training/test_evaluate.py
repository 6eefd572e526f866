"""Held-out rows during training: right figures, little memory, no trace in the training; the best weights kept."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kit
from kit.common.files import sha256
from kit.recipe.recipe import Recipe
from kit.runs.run import Run
from kit.training.evaluate import evaluate
from support.train_runs import BASE

pytestmark = pytest.mark.slow



def trainer_of(fields: dict[str, Any]) -> tuple[Any, Any, Recipe]:
    recipe = Recipe.load(fields)
    run = Run.start(recipe)
    model, tokenizer = kit.load_model(recipe)
    run.manifest(recipe, tokenizer, [])
    data = kit.load_data(recipe, tokenizer)
    return kit.make_trainer(kit.add_lora(model, recipe), tokenizer, data, recipe), tokenizer, recipe


@pytest.fixture
def fields(tiny_starter: Path, tmp_path: Path) -> dict[str, Any]:
    return {**BASE, "model_name": str(tiny_starter), "output_dir": str(tmp_path), "dtype": "float32"}


def weights(run: Run, step: int) -> str:
    return sha256(run.checkpoints / f"checkpoint-{step}" / "adapter_model.safetensors")


def test_figures_are_those_of_whole_logits(fields: dict[str, Any]) -> None:
    import torch

    trainer, tokenizer, _ = trainer_of({**fields, "eval_strategy": "steps", "test_size": 7})
    found = evaluate(trainer.model, tokenizer, trainer.eval_dataset, 3)
    loss = right = tokens = 0.0
    trainer.model.eval()
    for row in trainer.eval_dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        with torch.no_grad():
            logits = trainer.model(input_ids=ids).logits[0, :-1].float()
        trained = labels != -100
        loss += float(torch.nn.functional.cross_entropy(logits[trained], labels[trained], reduction="sum"))
        right += float((logits.argmax(-1) == labels)[trained].sum())
        tokens += float(trained.sum())
    assert found["loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    assert found["token_accuracy"] == pytest.approx(right / tokens)


def test_less_memory_than_the_logits_would_take(tiny: Callable[..., Path]) -> None:
    """Four rows of 512 trained tokens, a vocabulary of 152,000: their logits alone are 1.2 GB in float32."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny("qwen2")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = [[(7 * i + j) % 1000 for i in range(512)] for j in range(4)]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    evaluate(model, tokenizer, rows.select([0]), 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    evaluate(model, tokenizer, rows, 4)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e9
    assert more < 0.6, f"{more:.2f} GB"


@pytest.mark.parametrize("precision", [{"dtype": "bfloat16", "lora_dropout": 0.2}, {"load_in_4bit": True}])
def test_evaluating_leaves_no_trace_in_the_training(precision: dict[str, Any], fields: dict[str, Any]) -> None:
    found = []
    for name, often in (("without", {}), ("with", {"eval_strategy": "steps", "eval_steps": 1})):
        trainer, tokenizer, recipe = trainer_of({**fields, "dtype": None, **precision, **often, "run_name": name})
        if often:  # and answering in between
            kit.answer(trainer.model, tokenizer, [[{"role": "user", "content": "Who?"}]], recipe)
        result = kit.train(trainer, recipe)
        found.append((result.losses, weights(Run.of(recipe), 6)))
        assert len(result.evaluations) == (6 if often else 0)
    assert found[0] == found[1]


def test_early_stopping_ends_with_the_best_weights(fields: dict[str, Any]) -> None:
    fields |= {"eval_strategy": "steps", "eval_steps": 2, "early_stopping_patience": 2, "load_best_model_at_end": True,
               "max_steps": 40, "max_train_samples": 8, "learning_rate": 0.03, "warmup_steps": 0,
               "lr_scheduler_type": "constant", "save_strategy": "no", "save_total_limit": 1}
    trainer, _, recipe = trainer_of(fields)
    result = kit.train(trainer, recipe)
    run = Run.of(recipe)
    losses = [entry["loss"] for entry in result.evaluations]
    best = losses.index(min(losses))
    assert result.steps == result.evaluations[-1]["step"] < 40
    assert best == len(losses) - 3 and result.best_step == result.evaluations[best]["step"]
    # Kept are the best and the last; the model has the best one's weights.
    assert {path.name for path in run.checkpoints.glob("checkpoint-*")} == {
        f"checkpoint-{result.best_step}", f"checkpoint-{result.steps}"}
    saved = kit.save_adapter(trainer.model, trainer.processing_class, run)
    assert sha256(saved / "adapter_model.safetensors") == weights(run, result.best_step)
    logged = [json.loads(line) for line in run.log.read_text(encoding="utf-8").splitlines()]
    assert [entry["eval_loss"] for entry in logged if "eval_loss" in entry] == losses

    # Ended is ended: the same run again takes no further step, and ends with the same weights.
    trainer, _, recipe = trainer_of(fields)
    again = kit.train(trainer, recipe)
    assert (again.steps, again.losses, again.best_step) == (result.steps, result.losses, result.best_step)
    saved = kit.save_adapter(trainer.model, trainer.processing_class, run)
    assert sha256(saved / "adapter_model.safetensors") == weights(run, result.best_step)


def test_checkpoints_by_minutes_on_a_disk_of_their_own(fields: dict[str, Any], tmp_path: Path) -> None:
    drive = tmp_path / "drive"
    fields |= {"save_strategy": "no", "save_minutes": 1e-6, "checkpoint_dir": str(drive), "save_total_limit": 3}
    trainer, _, recipe = trainer_of(fields)
    result = kit.train(trainer, recipe)
    assert sorted(path.name for path in (drive / "run").glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (4, 5, 6)]
    assert not (tmp_path / "run" / "checkpoints").exists()

    # The machine is gone with its run folder, the drive is not.
    (tmp_path / "run").rename(tmp_path / "gone")
    trainer, _, recipe = trainer_of(fields)
    again = kit.train(trainer, recipe)
    assert again.resumed_from == 6 and again.losses == result.losses
    assert len(Run.of(recipe).log.read_text(encoding="utf-8").splitlines()) == 6


def test_a_run_that_may_not_resume_starts_again(fields: dict[str, Any]) -> None:
    trainer, _, recipe = trainer_of(fields)
    kit.train(trainer, recipe)
    trainer, _, recipe = trainer_of({**fields, "resume_from_checkpoint": False, "max_steps": 2})
    assert not list(Run.of(recipe).checkpoints.glob("checkpoint-*"))
    assert kit.train(trainer, recipe).resumed_from is None
