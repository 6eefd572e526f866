"""Each precision really is what was asked for, learns, and answers the same after saving and loading."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kit import add_lora, load_data, load_model, make_trainer, merge, reload, save_adapter
from kit.common.errors import KitError
from kit.recipe.recipe import Recipe
from kit.runs.run import Run
from kit.training.train import train

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("fields, layer", [
    ({}, "Linear"),
    ({"load_in_4bit": True, "use_gradient_checkpointing": True}, "Linear4bit"),
    ({"load_in_8bit": True}, "Linear8bitLt"),
    ({"full_finetuning": True, "learning_rate": 1e-4, "prompt_style": "alpaca"}, "Linear"),
], ids=["16-bit", "4-bit", "8-bit", "full"])
def test_train_save_and_load_again(tiny_starter: Path, tmp_path: Path, fields: dict[str, Any], layer: str) -> None:
    import torch

    recipe = Recipe.load({}, model_name=str(tiny_starter), output_dir=str(tmp_path), max_train_samples=4,
                         max_eval_samples=2, max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=1,
                         warmup_steps=0, max_seq_length=256,
                         **{"use_gradient_checkpointing": False, "learning_rate": 1e-3} | fields)
    run = Run.start(recipe)
    model, tokenizer = load_model(recipe)
    assert layer in {type(module).__name__ for module in model.modules()}
    model = add_lora(model, recipe)
    data = load_data(recipe, tokenizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    result = train(make_trainer(model, tokenizer, data, recipe), recipe)
    assert result.steps == 3 and result.losses[-1][1] < result.losses[0][1]
    moved = [n for n, p in model.named_parameters() if n in before and not torch.equal(p.cpu(), before[n].to(p.dtype))]
    assert len(moved) >= 0.45 * len(before), "LoRA's A has no gradient in step 1, where B is zero"

    saved = save_adapter(model, tokenizer, run)
    again, tokenizer_again = reload(saved, recipe)
    assert tokenizer_again.chat_template == tokenizer.chat_template
    ids = torch.tensor([data["test"]["input_ids"][0]])
    model.eval(), again.eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    merged = merge(saved, run, recipe)
    assert merged and (merged / "model.safetensors").is_file()


def test_rows_on_disk_train_to_the_same_losses(tiny_starter: Path, tmp_path: Path) -> None:
    losses = []
    for lazy in (False, True):
        recipe = Recipe.load({}, model_name=str(tiny_starter), output_dir=str(tmp_path), run_name=f"lazy_{lazy}",
                             lazy_preprocess=lazy, max_steps=2, max_train_samples=40, max_seq_length=256,
                             use_gradient_checkpointing=False)
        model, tokenizer = load_model(recipe)
        data = load_data(recipe, tokenizer)
        assert ("input_ids" in data["train"].column_names) is not lazy
        trainer = make_trainer(add_lora(model, recipe), tokenizer, data, recipe)
        losses.append(train(trainer, recipe).losses)
    assert losses[0] == losses[1]


def test_layers_that_do_not_exist() -> None:
    recipe = Recipe.load({}, target_modules=["W_pack"])
    model, _ = load_model(recipe)
    with pytest.raises(KitError, match="its linear layers are: down_proj, gate_proj"):
        add_lora(model, recipe)


@pytest.mark.parametrize("said, remedy", [
    ("CUDA out of memory. Tried to allocate 2 GiB", "a smaller model"),
    ("CUDA error: device-side assert triggered", "restart the kernel"),
    ("cuBLAS error: CUBLAS_STATUS_NOT_INITIALIZED", "restart the kernel")])
def test_what_a_device_says_is_not_blamed_on_the_models_files(said: str, remedy: str,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr("kit.models.load._load_with_unsloth", broken)
    with pytest.raises(KitError, match="failed while starter was loaded") as caught:
        load_model(Recipe.load({}))
    assert remedy in caught.value.hint and "fetch" not in str(caught.value)


def test_no_hub_is_told_of_a_load() -> None:
    assert os.environ["UNSLOTH_DISABLE_STATISTICS"] == "1"  # Unsloth's switch: each load on a GPU asks one otherwise


def test_a_damaged_model_is_named(tmp_path: Path, starter: Path) -> None:
    import shutil

    shutil.copytree(starter, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    with pytest.raises(KitError, match="could not be loaded"):
        load_model(Recipe.load({}, model_name=str(tmp_path / "m")))
