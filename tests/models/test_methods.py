"""Every way to train, with gradient checkpointing off, on and as Unsloth's: two real steps, every gradient looked at.

The models are tiny, all else is real: Unsloth's and PEFT's adapters, bitsandbytes' layers, TRL's trainer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kit
from kit.common.errors import GateError, KitError
from kit.export.adapter import check_mergeable
from kit.models.load import load_from
from kit.recipe.recipe import Recipe
from kit.runs.run import Run
from support.tiny_runs import talks, write_rows

pytestmark = pytest.mark.slow

METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "QLoRA": {"load_in_4bit": True},
    "QLoRA fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False,
                  "bnb_4bit_compute_dtype": "float32"},
    "QDoRA": {"load_in_4bit": True, "use_dora": True},
    "LoftQ": {"load_in_4bit": True, "loftq_config": {"loftq_bits": 4}, "save_merged": "none"},
    "8-bit": {"load_in_8bit": True},
    "full": {"full_finetuning": True},
}


@pytest.fixture
def recipe_of(taught: Callable[..., Path], tmp_path: Path) -> Callable[..., Recipe]:
    """`recipe_of(name, **fields)`: a recipe that trains the tiny model for two steps."""
    rows = write_rows(tmp_path / "talks.jsonl", talks())

    def make(run_name: str = "run", **fields: Any) -> Recipe:
        return Recipe.load({"run_name": run_name, "output_dir": str(tmp_path),
                            "model_name": str(taught("qwen2", short=True)), "dataset": str(rows), "max_steps": 2,
                            "max_train_samples": 4, "warmup_steps": 0,
                            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-3,
                            "max_seq_length": 256, "r": 4, "use_gradient_checkpointing": False,
                            "train_sampling_strategy": "sequential", "save_minutes": None, **fields})

    return make


def trained(recipe: Recipe, watch: Any = None) -> tuple[Any, Any, Any]:
    """(model, tokenizer, kit.train's result) of the recipe's own path, with a callback looking on."""
    model, tokenizer = kit.load_model(recipe)
    model = kit.add_lora(model, recipe)
    trainer = kit.make_trainer(model, tokenizer, kit.load_data(recipe, tokenizer), recipe)
    if watch:
        trainer.add_callback(watch)
    return model, tokenizer, kit.train(trainer, recipe)


def gradients() -> tuple[Any, list[dict[str, bool | None]]]:
    """(a callback, what it finds at each step: {trained tensor: whether its gradient is finite and not zero})."""
    from transformers import TrainerCallback

    found: list[dict[str, bool | None]] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            found.append({name: None if p.grad is None else bool(p.grad.isfinite().all()) and bool(p.grad.any())
                          for name, p in model.named_parameters() if p.requires_grad})

    return Watch(), found


WAYS = {"off": False, "on": True, "unsloth": "unsloth"}


@pytest.mark.parametrize("method, checkpointing", [
    # Off and one of the two ways of recomputing for each method, in turn; the product is for `make test-all`.
    pytest.param(method, value, id=f"{method}-{way}",
                 marks=[pytest.mark.long] if way == ("unsloth", "on")[number % 2] and method != "8-bit" else [])
    for number, method in enumerate(METHODS) for way, value in WAYS.items()])
def test_every_trained_tensor_gets_a_gradient(method: str, checkpointing: bool | str,
                                              recipe_of: Callable[..., Recipe]) -> None:
    import bitsandbytes as bnb

    recipe = recipe_of(use_gradient_checkpointing=checkpointing, **METHODS[method])
    watch, found = gradients()
    model, _, result = trained(recipe, watch)
    assert model.is_gradient_checkpointing is bool(checkpointing)
    first, second = found
    if recipe.full_finetuning:
        assert len(first) == len(list(model.parameters())) and all(first.values())
        return
    assert len(first) == 2 * 7 * (3 if recipe.use_dora else 2), "A, B and DoRA's lengths of 7 layers in each of two"
    late = [] if recipe.loftq_config else [name for name in first if ".lora_A." in name]  # B is zero in step 1
    assert [name for name, good in first.items() if not good] == late
    assert [name for name, good in second.items() if not good] == []
    assert result.steps == 2

    bases = [module.base_layer for module in model.modules() if hasattr(module, "lora_A")]
    kinds = {bnb.nn.Linear4bit: recipe.load_in_4bit, bnb.nn.Linear8bitLt: recipe.load_in_8bit}
    for kind, asked in kinds.items():
        assert all(isinstance(base, kind) is asked for base in bases)
    for base in bases:
        if recipe.load_in_8bit:
            assert str(base.weight.dtype) == "torch.int8"
        if recipe.load_in_4bit:
            state = base.weight.quant_state
            assert (state.quant_type, state.nested) == (recipe.bnb_4bit_quant_type, recipe.bnb_4bit_use_double_quant)
            assert str(base.compute_dtype) == f"torch.{recipe.bnb_4bit_compute_dtype or 'bfloat16'}"
            assert str(base.weight.dtype) == "torch.uint8" and base.weight.numel() * 2 == state.shape.numel()


@pytest.mark.parametrize("method", ["QLoRA", "QLoRA fp4", "8-bit"])
def test_answering_and_evaluating_in_between_changes_no_loss(method: str, recipe_of: Callable[..., Recipe]) -> None:
    import torch
    from transformers import TrainerCallback

    class Interrupt(TrainerCallback):
        def __init__(self) -> None:
            self.tokenizer: Any = None
            self.times = 0

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None,
                        processing_class: Any = None, **_: Any) -> None:
            kit.answer(model, processing_class, [talks()[0][:1]], recipe)
            model.eval()
            with torch.no_grad():
                model(input_ids=torch.tensor([[1, 2, 3, 4]]), labels=torch.tensor([[1, 2, 3, 4]]))
            model.train()
            self.times += 1

    fields = {**METHODS[method], "max_steps": 4, "max_train_samples": 8, "max_new_tokens": 2, "learning_rate": 1e-2}
    recipe = recipe_of("plain", **fields)
    interrupt = Interrupt()
    plain, disturbed = trained(recipe)[2].losses, trained(recipe_of("disturbed", **fields), interrupt)[2].losses
    assert interrupt.times == 4
    assert plain == disturbed
    assert len({loss for _, loss in plain}) == 4, "it learns: the losses differ from step to step"


@pytest.mark.parametrize("method", ["DoRA", "QLoRA fp4"])
def test_saved_and_loaded_again_it_answers_the_same(method: str, recipe_of: Callable[..., Recipe]) -> None:
    import torch

    recipe = recipe_of(**METHODS[method])
    model, tokenizer, _ = trained(recipe)
    again, _ = kit.reload(kit.save_adapter(model, tokenizer, Run.of(recipe)), recipe)
    ids = torch.tensor([tokenizer("Where is my parcel?")["input_ids"]])
    model.eval(), again.eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_8_bit_dora_is_refused_on_a_cpu(recipe_of: Callable[..., Recipe]) -> None:
    recipe = recipe_of(load_in_8bit=True, use_dora=True)
    with pytest.raises(KitError, match="use_dora with load_in_8bit"):
        kit.add_lora(kit.load_model(recipe)[0], recipe)


def test_loftq_leaves_the_least_that_its_rank_can(recipe_of: Callable[..., Recipe],
                                                  taught: Callable[..., Path]) -> None:
    import torch
    from peft.utils.integrations import dequantize_module_weight
    from safetensors.torch import load_file

    recipe = recipe_of(**METHODS["LoftQ"], use_rslora=True)
    model, tokenizer = kit.load_model(recipe)
    model = kit.add_lora(model, recipe)
    original = load_file(taught("qwen2", short=True) / "model.safetensors")
    seen = 0
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            whole = original[name.removeprefix("base_model.model.") + ".weight"]
            lost = whole - dequantize_module_weight(module.base_layer)
            best = torch.linalg.svdvals(lost.float())
            left = lost.float() - module.get_delta_weight("default").float()
            # Eckart and Young: no change of rank 4 leaves less than the other singular values.
            assert float(left.norm()) == pytest.approx(float(best[4:].norm()), rel=0.02)
            seen += 1
    assert seen == 14
    for number in range(2):  # it can't be merged into the original weights, nor what is trained on from it
        adapter = kit.save_adapter(model, tokenizer, Run.of(recipe_of(f"run{number}")))
        with pytest.raises(KitError, match="loftq, which changes the base model's weights"):
            check_mergeable(adapter, taught("qwen2", short=True))
        goes_on = recipe_of(load_in_4bit=True, adapter_name_or_path=str(adapter))
        model = kit.add_lora(kit.load_model(goes_on)[0], goes_on)
    goes_on = recipe_of(adapter_name_or_path=str(adapter))
    with pytest.raises(KitError, match="began with init_lora_weights: loftq"):
        kit.add_lora(kit.load_model(goes_on)[0], goes_on)
    with pytest.raises(KitError, match="loftq_iter: 1"):
        kit.add_lora(kit.load_model(recipe)[0], recipe_of(**METHODS["LoftQ"] | {"loftq_config": {"loftq_iter": 5}}))


def test_training_goes_on_from_an_adapter(recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    first = recipe_of("first", r=6, use_dora=True, use_rslora=True, target_modules=["q_proj", "down_proj"])
    model, tokenizer, _ = trained(first)
    adapter = kit.save_adapter(model, tokenizer, Run.of(first))
    ids = torch.tensor([[5, 6, 7, 8]])
    second = recipe_of("second", adapter_name_or_path=str(adapter))
    again = kit.add_lora(kit.load_model(second)[0], second)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, again.eval()(ids).logits)
    config = again.peft_config["default"]
    assert (config.r, config.use_dora, config.use_rslora, set(config.target_modules)) == \
        (6, True, True, {"q_proj", "down_proj"})
    watch, found = gradients()
    model, tokenizer = kit.load_model(second)
    trainer = kit.make_trainer(kit.add_lora(model, second), tokenizer, kit.load_data(second, tokenizer), second)
    assert kit.check_trainer(trainer, tokenizer, second).passed, "rank and layers are the adapter's, not the recipe's"
    trainer.add_callback(watch)
    kit.train(trainer, second)
    assert all(all(step.values()) for step in found) and len(found[0]) == 2 * 2 * 3, "also A, at once: B is not zero"

    def refused(folder: Path, message: str) -> None:
        recipe = recipe_of("third", adapter_name_or_path=str(folder))
        with pytest.raises(KitError, match=message) as error:
            kit.add_lora(kit.load_model(recipe)[0], recipe)
        assert error.value.hint

    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor[..., :-1].contiguous() if "lora_A" in name else tensor for name, tensor in tensors.items()},
              other / "adapter_model.safetensors")
    refused(other, "does not fit .*size mismatch")
    save_file({name: tensor for name, tensor in tensors.items() if "layers.1." not in name},
              other / "adapter_model.safetensors")
    refused(other, r"layers\.1\..*only on one side \(6 tensors\)")
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": ["W_pack"]}))
    refused(other, "does not fit .*W_pack")
    refused(tmp_path / "nothing", "is no LoRA adapter")


def test_an_adapter_trained_elsewhere_keeps_its_ranks_and_layers(
        recipe_of: Callable[..., Recipe], taught: Callable[..., Path], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    config = LoraConfig(task_type="CAUSAL_LM", r=4, rank_pattern={"v_proj": 2}, layers_to_transform=[0],
                        target_modules=["q_proj", "v_proj"])
    base = AutoModelForCausalLM.from_pretrained(taught("qwen2", short=True))
    get_peft_model(base, config).save_pretrained(tmp_path / "theirs")
    recipe = recipe_of(adapter_name_or_path=str(tmp_path / "theirs"))
    model, tokenizer = kit.load_model(recipe)
    trainer = kit.make_trainer(kit.add_lora(model, recipe), tokenizer, kit.load_data(recipe, tokenizer), recipe)
    gates = kit.check_trainer(trainer, tokenizer, recipe)
    assert gates.passed and "2 of rank 2, 4" in {gate.figure for gate in gates.gates}, gates.verdict
    kit.train(trainer, recipe)
    saved = load_file(kit.save_adapter(trainer.model, tokenizer, Run.of(recipe)) / "adapter_model.safetensors")
    assert sorted(len(tensor) for name, tensor in saved.items() if "lora_A" in name) == [2, 4]


def test_a_model_quantised_already_keeps_its_settings(recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    """The recipe's defaults take it as it is; what a recipe names and the model has not is refused."""
    model, tokenizer = load_from(recipe_of().model_name, recipe_of(**METHODS["QLoRA fp4"]))
    model.save_pretrained(tmp_path / "fp4")
    tokenizer.save_pretrained(tmp_path / "fp4")
    as_it_is = {"model_name": str(tmp_path / "fp4"), "load_in_4bit": True}
    kit.load_model(recipe_of(**as_it_is))
    with pytest.raises(GateError, match=r"bnb_4bit_compute_dtype: float16 was asked for.* has float32"):
        kit.load_model(recipe_of(**as_it_is, bnb_4bit_compute_dtype="float16"))


def test_small_steps_of_full_finetuning_are_kept_and_shipped(tiny_starter: Path, tmp_path: Path) -> None:
    """In bfloat16 most of them would be lost twice: in every update, and once more when the weights are saved."""
    import torch

    recipe = Recipe.load({"model_name": str(tiny_starter), "dataset": "starter", "output_dir": str(tmp_path),
                          "full_finetuning": True, "learning_rate": 1e-5, "max_steps": 4, "max_seq_length": 256,
                          "max_train_samples": 16, "per_device_train_batch_size": 2, "lr_scheduler_type": "constant",
                          "gradient_accumulation_steps": 1, "warmup_steps": 0, "use_gradient_checkpointing": False})
    model, tokenizer = kit.load_model(recipe)
    layers = [name for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2]
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name in layers}
    assert {p.dtype for p in before.values()} == {torch.float32}
    trainer = kit.make_trainer(model, tokenizer, kit.load_data(recipe, tokenizer), recipe)
    kit.train(trainer, recipe)
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if name in layers}
    changed = sum(int((trained[name] != before[name]).sum()) for name in layers)
    assert changed > 0.98 * sum(p.numel() for p in before.values())

    model = kit.whole_model(trainer, recipe)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    shipped = {name: p.detach().float() for name, p in model.named_parameters() if name in layers}
    wanted = torch.cat([(trained[name] - before[name]).flatten() for name in layers])
    got = torch.cat([(shipped[name] - before[name]).flatten() for name in layers])
    # How much of the change is there, on average: 1 is all of it.
    assert float((wanted @ got) / (wanted @ wanted)) == pytest.approx(1, abs=0.15)
