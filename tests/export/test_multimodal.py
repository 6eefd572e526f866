"""A model of pictures and text: its text model is trained, and the merged model is the whole one with that changed."""

from __future__ import annotations

from pathlib import Path

import pytest

import kit
from kit.readiness.forecast import forecast_on
from kit.recipe.machine import Machine
from kit.recipe.recipe import Recipe
from kit.runs.gates import Gates
from kit.runs.run import Run
from support.command import PROJECT
from support.command import kit as command
from support.tiny_models import tiny_multimodal
from support.tiny_runs import talks, write_rows

pytestmark = pytest.mark.slow
RECIPE = PROJECT / "recipes" / "qwen3.5-4b-lora.yaml"


def test_merging_changes_the_text_model_alone(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from kit.verifying.contents import check_merge

    base = tiny_multimodal(tmp_path / "base", short=True)
    (base / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    recipe = Recipe.load(RECIPE, model_name=str(base), output_dir=str(tmp_path), gguf=[], dtype="float32")
    model, tokenizer = kit.load_model(recipe)
    model = kit.add_lora(model, recipe)
    adapted = {name.split(".")[-1] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == set(recipe.target_modules)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    saved = kit.save_adapter(model, tokenizer, Run.of(recipe))
    merged = kit.merge(saved, Run.of(recipe), recipe)
    gates = Gates("merge")
    check_merge(gates, base, saved, merged)
    gates.require()
    old, new = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    assert old.keys() == new.keys() and (merged / "preprocessor_config.json").is_file()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert len(changed) == 3 * 6 + 7 and all(name.startswith("model.language_model.layers.") for name in changed)
    ids = torch.tensor([tokenizer("Where is my parcel?")["input_ids"]])
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(whole(ids).logits, model(ids).logits, atol=0.1)
        with model.disable_adapter():
            assert not torch.allclose(whole(ids).logits, model(ids).logits, atol=0.1)


@pytest.mark.long
def test_a_run_of_it_is_verified_to_the_gguf(tmp_path: Path) -> None:
    base, rows = tiny_multimodal(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", talks())
    done = command("train", str(RECIPE), f"model_name={base}", f"dataset={rows}", f"output_dir={tmp_path}",
                   "max_steps=20", "learning_rate=1.0e-2", "max_seq_length=256", "test_size=4", "max_new_tokens=8",
                   "gguf=[f16, q8_0]")
    assert done.returncode == 0 and "VERIFIED" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    assert "parity f16" in done.stdout


def test_a_state_in_place_of_keys_and_values() -> None:
    """In the forecast of answers: it does not grow with the prompt, and counts once for each of these layers."""
    import runpy

    make = runpy.run_path(str(PROJECT / "docs" / "make.py"))
    model, gpu = make["model_of"]("Qwen/Qwen3.5-4B"), Machine("cuda", "a GPU", 8, 24.0, 0.0, True, "")
    assert model.parameters == 4_205_751_296

    def answers(kinds: list[str], length: int) -> float:
        model.config["layer_types"] = kinds
        recipe = Recipe.load(RECIPE, max_seq_length=length, max_eval_samples=1)
        return forecast_on(gpu, recipe, model=model).memory_gb["answers"] * 1e9

    full, linear = ["full_attention"] * 32, ["linear_attention"] * 32
    keys_and_values = 2 * 2 * (2 * 4 * 256 * 32)  # bytes of a token, copied once
    for length in (512, 2048):
        grows = answers(full, length) - answers(linear, length)
        assert grows == pytest.approx((length + 512) * keys_and_values - 2 * 32 * 4 * 32 * 128 * 128, rel=1e-3)
