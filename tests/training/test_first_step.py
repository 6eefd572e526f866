"""The gates before and in the first step: untouched trainers pass, each sabotage is caught by its own gate."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kit.common.unsloth import FastLanguageModel

import pytest

import kit
from kit.batch import run_cells
from kit.common.errors import GateError
from kit.recipe.fields import PROJECTIONS
from kit.recipe.recipe import Recipe
from kit.runs.gates import Gate, Gates
from kit.runs.run import Run
from kit.training.before_training import check_trainer
from kit.training.first_step import FirstStepCallback, Gradients, check_gradients

pytestmark = pytest.mark.slow

WORDS = ["red", "green", "blue", "黄色", "black", "white and grey", "pink", "silver"]
CHECKPOINTING = [False, True, "unsloth"]


@pytest.fixture(scope="module")
def model_of(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model whose first loss is that of guessing: its makers' random weights are surer than they know."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made: dict[str, Path] = {}

    def calm(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            model = AutoModelForCausalLM.from_pretrained(tiny(family, short=True), dtype=torch.bfloat16)
            with torch.no_grad():
                for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
                    weight.mul_(0.25)
            model.save_pretrained(made[family])
            AutoTokenizer.from_pretrained(tiny(family, short=True)).save_pretrained(made[family])
        return made[family]

    return calm


@pytest.fixture
def recipe(model_of: Callable[[str], Path], tmp_path: Path) -> Recipe:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"instruction": f"Say {word}", "output": f"{word}: it is said."}) + "\n"
                            for word in WORDS), encoding="utf-8")
    return Recipe.load({}, model_name=str(model_of("qwen3")), dataset=str(data), output_dir=str(tmp_path), max_steps=1,
                       max_seq_length=128, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                       warmup_steps=0, learning_rate=1e-3, optim="adamw_torch_fused",
                       use_gradient_checkpointing=False)


def trainer_of(recipe: Recipe, load: Callable[[Recipe], tuple[Any, Any]] = kit.load_model,
               lora: Callable[[Any, Recipe], Any] = kit.add_lora) -> tuple[Any, Any]:
    """The trainer as the notebook makes it, and its tokenizer."""
    model, tokenizer = load(recipe)
    model = lora(model, recipe)
    return kit.make_trainer(model, tokenizer, kit.load_data(recipe, tokenizer), recipe), tokenizer


def named(gates: Gates, name: str) -> Gate:
    return next(gate for gate in gates.gates if gate.name == name)


def caught(gates: Gates, name: str, cause: str) -> None:
    """Only the gate of this name failed, for this cause, and it says what to change."""
    assert [gate.name for gate in gates.failed] == [name], gates
    [gate] = gates.failed
    assert re.search(cause, gate.detail), gate.detail
    assert gate.hint


def stopped(trainer: Any, recipe: Recipe, name: str, cause: str, steps: int = 0) -> None:
    """Training stops by this gate before step `steps + 1` is taken."""
    with pytest.raises(GateError, match=f"(?s)first step: .*{name}: .*{cause}") as error:
        kit.train(trainer, recipe)
    assert error.value.hint
    assert trainer.state.global_step == steps


@pytest.mark.parametrize("fields", [
    *({"use_gradient_checkpointing": how, **precision} for how in CHECKPOINTING
      for precision in ({}, {"load_in_4bit": True}, {"load_in_8bit": True})),
    {"full_finetuning": True, "learning_rate": 1e-4},
    {"model": "qwen2", "bias": "all"},
    {"use_rslora": True, "r": 4},
    {"dtype": "float32"},
    {"target_modules": ["q_proj"]},
    {"target_modules": ["gate_proj", "down_proj"]},
    {"train_on_responses_only": False},
    {"lazy_preprocess": True},
], ids=str)  # fmt: skip
def test_untouched_trainers_pass(recipe: Recipe, model_of: Callable[[str], Path], fields: dict[str, Any]) -> None:
    family, fields = fields.get("model", "qwen3"), {k: v for k, v in fields.items() if k != "model"}
    recipe = Recipe.load(recipe, model_name=str(model_of(family)), **fields)
    trainer, tokenizer = trainer_of(recipe)
    gates = check_trainer(trainer, tokenizer, recipe)
    assert [(gate.name, gate.passed) for gate in gates.gates] == [
        ("precision", True), ("trainable" if recipe.full_finetuning else "LoRA modules", True), ("labels", True),
        ("settings", True)], gates
    asked = "4-bit" if recipe.load_in_4bit else "8-bit" if recipe.load_in_8bit else \
        "32-bit" if recipe.dtype or recipe.full_finetuning else "16-bit"
    # Two layers, and of a full model the head as well.
    layers = 15 if recipe.full_finetuning else 2 * len(recipe.target_modules)
    assert named(gates, "precision").figure == f"{layers} {asked} linear layers"
    if not recipe.full_finetuning:
        assert named(gates, "LoRA modules").figure == f"{layers} of rank {recipe.r}"
    assert named(gates, "labels").figure.endswith(f"{8 if recipe.train_on_responses_only else 16} stop tokens")
    first = kit.train(trainer, recipe).gates
    assert [(gate.name, gate.passed) for gate in first.gates] == [("gradients", True), ("first loss", True)], first
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert named(first, "gradients").figure == f"{len(trained)} of {len(trained)} trained tensors have one"


def test_layers_that_a_quantised_model_leaves_out_are_told_and_pass(recipe: Recipe, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
                                llm_int8_skip_modules=["lm_head", "model.layers.0.mlp"])
    folder = tmp_path / "dynamic"
    AutoModelForCausalLM.from_pretrained(recipe.model_name, dtype=torch.bfloat16,
                                         quantization_config=config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(recipe.model_name).save_pretrained(folder)
    recipe = Recipe.load(recipe, model_name=str(folder), load_in_4bit=True)
    trainer, tokenizer = trainer_of(recipe)
    gate = named(check_trainer(trainer, tokenizer, recipe), "precision")
    assert (gate.passed, gate.figure) == (True, "11 4-bit, 3 16-bit linear layers")
    assert gate.detail.startswith("3 layers are left out")


def test_8_bit_that_is_16_bit(recipe: Recipe) -> None:
    """Unsloth's own loader takes load_in_8bit on a CPU, prints a line and loads 16-bit."""
    def load(recipe: Recipe) -> tuple[Any, Any]:
        model, tokenizer = FastLanguageModel.from_pretrained(recipe.model_name, load_in_8bit=True)
        return model, kit.models.template.prepare_tokenizer(tokenizer, recipe)

    def lora(model: Any, recipe: Recipe) -> Any:
        return FastLanguageModel.get_peft_model(model, r=recipe.r, target_modules=PROJECTIONS,
                                                                 use_gradient_checkpointing=False)

    recipe = Recipe.load(recipe, load_in_8bit=True)
    trainer, tokenizer = trainer_of(recipe, load, lora)
    caught(check_trainer(trainer, tokenizer, recipe), "precision",
           "the recipe asks for 8-bit, but 14 16-bit layers were loaded")


@pytest.mark.parametrize("loaded, asked, cause", [
    ({}, {"load_in_4bit": True}, "asks for 4-bit, but 14 16-bit layers"),
    ({"load_in_4bit": True}, {}, "asks for 16-bit, but 14 4-bit layers"),
    ({}, {"dtype": "float32"}, "asks for 32-bit, but 14 16-bit layers"),
])
def test_another_precision_than_asked(recipe: Recipe, loaded: dict[str, Any], asked: dict[str, Any],
                                      cause: str) -> None:
    trainer, tokenizer = trainer_of(Recipe.load(recipe, **loaded))
    caught(check_trainer(trainer, tokenizer, Recipe.load(recipe, **asked)), "precision", cause)


def test_one_layer_of_many_is_not_quantised(recipe: Recipe) -> None:
    import torch

    recipe = Recipe.load(recipe, load_in_4bit=True)
    trainer, tokenizer = trainer_of(recipe)
    wrapped = trainer.model.get_base_model().model.layers[1].mlp.up_proj
    wrapped.base_layer = torch.nn.Linear(64, 128, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    caught(check_trainer(trainer, tokenizer, recipe), "precision",
           r"13 4-bit, 1 16-bit layers .*layers\.1\.mlp\.up_proj")


def freeze(model: Any, part: str) -> None:
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.requires_grad_(False)


@pytest.mark.parametrize("made, sabotage, cause", [
    ({"target_modules": ["q_proj", "v_proj"]}, lambda model: None,
     r"10 target modules have no adapter, the first is .*layers\.0\.mlp\.down_proj"),
    ({"r": 8}, lambda model: None, "asks for rank 16, the adapters have 8"),
    ({}, lambda model: model.get_input_embeddings().weight.requires_grad_(True),
     r"1 weights besides the adapter are trained, the first is .*embed_tokens"),
    ({}, lambda model: freeze(model, "lora_B"), "14 weights of the adapter are frozen, the first is .*lora_B"),
    ({"full_finetuning": True}, lambda model: None, "no LoRA module: nothing would be trained"),
], ids=["missing", "rank", "embedding", "frozen", "none"])  # fmt: skip
def test_not_the_adapter_that_was_asked_for(recipe: Recipe, made: dict[str, Any], sabotage: Callable[[Any], Any],
                                            cause: str) -> None:
    trainer, tokenizer = trainer_of(Recipe.load(recipe, **made))
    sabotage(trainer.model)
    caught(check_trainer(trainer, tokenizer, recipe), "LoRA modules", cause)


def test_full_finetuning_with_frozen_weights(recipe: Recipe) -> None:
    recipe = Recipe.load(recipe, full_finetuning=True)
    trainer, tokenizer = trainer_of(recipe)
    freeze(trainer.model, "embed_tokens")
    caught(check_trainer(trainer, tokenizer, recipe), "trainable", "some weights are frozen")


def without_labels(collator: Any) -> Callable[[list[dict[str, Any]]], Any]:
    """A collator that makes its own labels, as it does for rows of token ids only."""
    return lambda rows: collator([{"input_ids": row["input_ids"]} for row in rows])


def test_labels_that_do_not_teach_the_answer_and_its_stop(recipe: Recipe) -> None:
    from transformers import DataCollatorForLanguageModeling

    trainer, tokenizer = trainer_of(recipe)
    rows, collator, pad = trainer.train_dataset, trainer.data_collator, tokenizer.pad_token

    def told(cause: str, change: Callable[[dict[str, Any], int], dict[str, Any]]) -> None:
        trainer.train_dataset = rows.map(change, with_indices=True)
        caught(check_trainer(trainer, tokenizer, recipe), "labels", cause)

    told("every label of the first batch is masked", lambda row, _: {"labels": [-100] * len(row["labels"])})
    stop = tokenizer.eos_token_id
    told("8 of the first 8 rows do not end their answer with the stop token '<|im_end|>'", lambda row, _: {
        "labels": [-100 if label == stop else label for label in row["labels"]]})
    told("1 of the first 8 rows do not end .*the first is row 5", lambda row, i: {
        "labels": row["labels"] if i != 5 else row["labels"][:-4] + [-100] * 4})

    trainer.train_dataset = rows
    tokenizer.pad_token = tokenizer.eos_token
    trainer.data_collator = without_labels(DataCollatorForLanguageModeling(tokenizer, mlm=False))
    caught(check_trainer(trainer, tokenizer, recipe), "labels",
           r"masks 8 of 8 stop tokens \('<\|im_end\|>'\): it is the pad token too")
    tokenizer.pad_token = pad
    caught(check_trainer(trainer, tokenizer, recipe), "labels", r"trains \d+ tokens that the rows mask")

    def trains_padding(rows: list[dict[str, Any]]) -> Any:
        batch = collator(rows)
        padded = batch["attention_mask"] == 0
        assert bool(padded.any())
        # As many trained tokens as before: only where they stand tells it.
        batch["labels"][padded.nonzero()[0][0], padded.nonzero()[0][1]] = pad_id
        answer = (batch["labels"][0] != -100).nonzero()[0]
        batch["labels"][0, answer] = -100
        return batch

    pad_id = tokenizer.pad_token_id
    trainer.data_collator = trains_padding
    caught(check_trainer(trainer, tokenizer, recipe), "labels", "padding is trained")

    trainer.data_collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)  # can't pad labels
    caught(check_trainer(trainer, tokenizer, recipe), "labels", "ValueError: Unable to create tensor")


def test_settings_that_a_library_changed_are_told_and_no_failure(recipe: Recipe) -> None:
    recipe = Recipe.load(recipe, optim="paged_adamw_8bit", packing=True)
    trainer, tokenizer = trainer_of(recipe)
    gates = check_trainer(trainer, tokenizer, recipe)
    gate = named(gates, "settings")
    assert (gate.passed, gate.figure) == (None, "2 changed") and gates.passed
    assert gate.detail == "optim: adamw_torch_fused (asked: paged_adamw_8bit); packing: False (asked: True)"


def reentrant(trainer: Any, every_n_layers: int) -> None:
    """Checkpointing as it was for years: inputs that ask for no gradient, and none comes out of the layer."""
    trainer.args.gradient_checkpointing_kwargs = {"use_reentrant": True, "every_n_layers": every_n_layers}
    trainer.model.get_base_model().enable_input_require_grads = lambda: None
    trainer.model.get_input_embeddings()._forward_hooks.clear()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("every_n_layers, cause", [
    (1, "the loss depends on no trained tensor"),
    (2, r"14 of 28 trained tensors have no gradient, the first is .*layers\.0\..*lora_A"),
])
def test_checkpointing_without_a_gradient(recipe: Recipe, every_n_layers: int, cause: str) -> None:
    recipe = Recipe.load(recipe, use_gradient_checkpointing=True, max_steps=3)
    trainer, tokenizer = trainer_of(recipe)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    reentrant(trainer, every_n_layers)
    assert check_trainer(trainer, tokenizer, recipe).passed, "nothing to be seen before the first step"
    stopped(trainer, recipe, "gradients", cause)
    assert all(bool((p == before[name]).all()) for name, p in trainer.model.named_parameters() if name in before)
    assert not list(Run.of(recipe).folder.rglob("*.safetensors"))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_a_run_whose_first_step_fails_ends_there(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    make_trainer = kit.make_trainer

    def sabotaged(*given: Any) -> Any:
        trainer = make_trainer(*given)
        reentrant(trainer, 2)
        return trainer

    monkeypatch.setattr(kit, "make_trainer", sabotaged)
    source = Path(recipe.output_dir) / "recipe.yaml"
    source.write_text(Recipe.load(recipe, use_gradient_checkpointing=True, max_new_tokens=4).dump(), encoding="utf-8")
    assert run_cells(str(source), {"run_name": "stopped"}, False) == 1
    run = Run.open(Path(recipe.output_dir) / "stopped")
    assert (run.result["status"], run.result["stage"]) == ("failed", "train")
    assert "gradients: 14 of 28 trained tensors have no gradient" in run.result["reason"]
    assert not run.adapter.exists() and not run.merged.exists() and not list(run.folder.rglob("*.safetensors"))


def detach(trainer: Any) -> None:
    import torch

    b = trainer.model.get_base_model().model.layers[1].self_attn.v_proj.lora_B["default"]
    b.forward = lambda x: torch.nn.functional.linear(x, b.weight.detach())


def no_number(trainer: Any) -> None:
    trainer.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.data[0, 0] = math.nan


def garbage(trainer: Any) -> None:
    trainer.model.get_input_embeddings().weight.data.mul_(40)


@pytest.mark.parametrize("sabotage, name, cause, steps", [
    (detach, "gradients", r"1 of 28 trained tensors have no gradient, the first is .*1\.self_attn\.v_proj\.lora_B", 0),
    (no_number, "gradients", "28 of 28 trained tensors have a gradient .*finite", 0),
    (garbage, "first loss", "worse than guessing", 1),
])
def test_a_first_step_that_teaches_nothing_good(recipe: Recipe, sabotage: Callable[[Any], None], name: str,
                                                cause: str, steps: int) -> None:
    # The first step's loss is looked at in the first step, whatever is logged.
    recipe = Recipe.load(recipe, max_steps=3, logging_steps=50)
    trainer, _ = trainer_of(recipe)
    sabotage(trainer)
    stopped(trainer, recipe, name, cause, steps)


def test_labels_of_other_tokens(tmp_path: Path) -> None:
    """Only a model that knows something can be worse than guessing: the starter model."""
    recipe = Recipe.load({}, output_dir=str(tmp_path), max_steps=2, max_train_samples=4, max_seq_length=256,
                         gradient_accumulation_steps=1, use_gradient_checkpointing=False)
    trainer, _ = trainer_of(recipe)
    trainer.train_dataset = trainer.train_dataset.map(lambda row: {
        "labels": [label if label == -100 else (label * 7919 + 13) % 49_000 for label in row["labels"]]})
    stopped(trainer, recipe, "first loss", "worse than guessing", 1)


def test_gradients_of_a_real_backward(recipe: Recipe) -> None:
    """What no trainer of today does by itself: a frozen weight with a gradient, a B that nothing reaches."""
    import torch

    trainer, _ = trainer_of(recipe)
    model = trainer.model
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    model(**batch).loss.backward()

    def gates() -> Gates:
        found = Gates("first step")
        seen = Gradients(model)
        seen.look()
        check_gradients(found, seen)
        return found

    assert gates().passed
    head = model.get_input_embeddings().weight
    head.grad = torch.zeros_like(head)
    caught(gates(), "gradients", "are frozen and have a gradient, the first is .*embed_tokens")
    head.grad = None
    b = model.get_base_model().model.layers[0].mlp.up_proj.lora_B["default"].weight
    kept, b.grad = b.grad, torch.zeros_like(b)
    caught(gates(), "gradients", r"1 of 28 .* LoRA B with a gradient of zero: .* is .*up_proj\.lora_B")
    b.grad = kept.clone()
    b.grad[0, 0] = math.inf
    caught(gates(), "gradients", r"finite, the first is .*up_proj\.lora_B")


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_the_gates_change_nothing(recipe: Recipe, logging_steps: int) -> None:
    import torch

    recipe = Recipe.load(recipe, max_steps=4, logging_steps=logging_steps, lora_dropout=0.2, max_grad_norm=0.5)
    plain, _ = trainer_of(recipe)
    FastLanguageModel.for_training(plain.model, use_gradient_checkpointing=False)
    plain.train()
    gated, tokenizer = trainer_of(recipe)
    assert check_trainer(gated, tokenizer, recipe).passed
    result = kit.train(gated, recipe)
    assert result.gates.passed and len(result.gates.gates) == 2
    theirs, ours = plain.model.state_dict(), gated.model.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert any(bool(ours[name].any()) for name in ours if "lora_B" in name), "B has moved"
    if logging_steps == 1:
        assert result.losses == [(line["step"], line["loss"]) for line in plain.state.log_history if "loss" in line]
    assert not gated.model._forward_hooks, "the callback takes its hook away"


def test_float16_steps_that_overflow_are_waited_for(recipe: Recipe) -> None:
    """Such steps are skipped by the trainer's loss scaler; a gradient that stays infinite is a failure."""
    trainer, _ = trainer_of(recipe)
    trainer.model(**trainer.data_collator([trainer.train_dataset[0]])).loss.backward()
    next(p for p in trainer.model.parameters() if p.grad is not None).grad.fill_(math.inf)
    gates = Gates("first step")
    callback = FirstStepCallback(gates, trainer.model)
    trainer.args.fp16 = True
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    for trainer.state.global_step in range(10):
        callback.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
    assert gates.gates == []
    trainer.state.global_step = 10
    with pytest.raises(GateError, match="finite"):
        callback.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
