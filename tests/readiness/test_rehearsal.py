"""The export rehearsal: it passes for models that can be exported, names what can't be, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.common.errors import KitError
from kit.readiness import rehearsal
from kit.readiness.rehearsal import rehearse
from kit.readiness.shrink import random_model, shrunk
from kit.recipe.recipe import Recipe
from kit.runs.gates import Gates
from support.tiny_models import FAMILIES, tiny_tokenizer

pytestmark = pytest.mark.slow

CONFIGS = ["Qwen2Config", "Qwen3Config", "Qwen3MoeConfig", "LlamaConfig", "MistralConfig", "Gemma2Config",
           "Gemma3TextConfig", "Gemma3Config", "Phi3Config", "GPT2Config", "DeepseekV3Config", "GptOssConfig"]
STEPS = ["merged config", "merge", "convert f16", "quantise q8_0", "tokenizer f16", "shape f16", "tokenizer q8_0",
         "shape q8_0", "template f16", "template q8_0", "logits f16", "logits q8_0", "answer", "Modelfile"]


def recipe(model: Path | str, output: Path, **fields: Any) -> Recipe:
    return Recipe.load({"model_name": str(model), "output_dir": str(output), "local_files_only": True,
                        "gguf": ["f16", "q8_0"], **fields})


def signs(gates: Gates) -> dict[str, bool | None]:
    return {gate.name: gate.passed for gate in gates.gates}


def config(name: str, **values: Any) -> Any:
    import transformers

    return getattr(transformers, name)(**values)


def folder_of(made: Any, folder: Path, family: str = "qwen3") -> Path:
    """What the rehearsal reads of a model: its config and tokenizer. The weights are not looked at."""
    made.save_pretrained(folder)
    tiny_tokenizer(family).save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_shrunk_configs_run(name: str) -> None:
    import torch

    made = config(name)
    small = shrunk(made)
    assert type(small) is type(made)
    model = random_model(small, 0)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 2, 3, 4]]), use_cache=False).logits
    text, whole = small.get_text_config(), made.get_text_config()
    assert logits.shape == (1, 4, whole.vocab_size) and bool(torch.isfinite(logits).all())
    beside = sum(p.numel() for p in model.parameters() if text.vocab_size not in p.shape)
    assert beside < 1_500_000
    assert all(p.shape[-1] % 32 == 0 for p in model.base_model.parameters() if p.dim() == 2), "columns of q8_0's blocks"
    assert set(getattr(text, "layer_types", None) or []) == set(getattr(whole, "layer_types", None) or [])
    kept = ["tie_word_embeddings", "attention_bias", "hidden_act", "hidden_activation", "sliding_window",
            "final_logit_softcapping", "attn_logit_softcapping", "norm_topk_prob", "scoring_func"]
    assert [getattr(text, key, None) for key in kept] == [getattr(whole, key, None) for key in kept]
    assert (text.rope_parameters == whole.rope_parameters) if hasattr(whole, "rope_parameters") else True


def test_what_depends_on_sizes_is_shrunk_with_them() -> None:
    factors = [1 + i / 48 for i in range(48)]
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": factors, "long_factor": factors}
    long = shrunk(config("Phi3Config", hidden_size=3072, rope_parameters=rope, max_position_embeddings=131072,
                         original_max_position_embeddings=4096))
    head = long.hidden_size // long.num_attention_heads
    assert len(long.rope_parameters["long_factor"]) == len(long.rope_parameters["short_factor"]) == head // 2
    assert long.rope_parameters["long_factor"][0] == 1

    grouped = shrunk(config("Qwen2Config", num_attention_heads=28, num_key_value_heads=4))
    assert (grouped.num_attention_heads, grouped.num_key_value_heads) == (8, 2)
    assert shrunk(config("LlamaConfig", num_key_value_heads=1)).num_key_value_heads == 1
    windows = shrunk(config("Qwen2Config", use_sliding_window=True, max_window_layers=20))
    assert windows.layer_types == ["full_attention", "sliding_attention"] and windows.max_window_layers == 1
    mixed = shrunk(config("DeepseekV3Config"))
    assert mixed.num_hidden_layers == mixed.first_k_dense_replace + 1
    assert mixed.num_experts_per_tok < mixed.n_routed_experts


def test_random_weights_are_seeded_and_leave_torchs_own_seed_alone() -> None:
    import torch

    small = shrunk(config("LlamaConfig", vocab_size=256))
    state = torch.get_rng_state()
    first, again, other = (dict(random_model(small, seed).named_parameters()) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert not any(bool((weight == weight.flatten()[0]).all()) for weight in first.values()), "norms too are random"


def test_the_starter_passes_within_a_minute(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    gates = rehearse(recipe("starter", tmp_path))
    seconds = time.monotonic() - began
    assert signs(gates) == dict.fromkeys(STEPS, True), gates
    assert seconds < 60
    assert list(tmp_path.iterdir()) == []
    said = capfd.readouterr().out
    assert "✓" not in said, "the gates are shown once, by whoever asked for them"


def test_what_a_killed_rehearsal_left_goes_at_the_next(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left, at_work = tmp_path / f".rehearsal-{int(gone.stdout)}-x", tmp_path / f".rehearsal-{os.getppid()}-x"
    theirs = tmp_path / ".rehearsal-notes"
    for folder in (left, at_work, theirs):
        (folder / "merged").mkdir(parents=True)
    rehearse(recipe("starter", tmp_path, gguf=[]))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([at_work.name, theirs.name])


@pytest.mark.parametrize("family", [  # whole runs of Llama and of a base are in verifying/test_verify.py
    pytest.param(family, marks=[pytest.mark.long] if family in ("llama", "qwen2-base") else [])
    for family in FAMILIES if family != "qwen2"])  # its base is the harder one
def test_families_pass(family: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    gates = rehearse(recipe(tiny(family), tmp_path, gguf=["q8_0"]))
    assert signs(gates) == dict.fromkeys(STEPS, True), gates
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_exported_is_told(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    nothing = rehearse(recipe("starter", tmp_path, gguf=[], save_merged="none"))
    assert signs(nothing) == {"merge": None} and "save_merged: none" in nothing.gates[0].detail
    only_merged = rehearse(recipe(tiny("qwen3"), tmp_path, gguf=[]))
    assert signs(only_merged) == {"merged config": True, "merge": True, "convert": None}
    assert "gguf: []" in only_merged.gates[-1].detail
    assert list(tmp_path.iterdir()) == []


def test_full_finetuning_and_k_quants(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    gates = rehearse(recipe(tiny("qwen3"), tmp_path, full_finetuning=True, gguf=["q4_k_m"]))
    quants = ("f16", "q4_k_m")
    assert signs(gates) == {
        "merge": None, "convert f16": True, "quantise q4_k_m": True,
        **{f"{name} {quant}": True for name in ("tokenizer", "shape", "template") for quant in quants},
        "logits f16": True, "logits q4_k_m": None, "answer": True, "Modelfile": True}, gates
    assert "mean KL" in next(gate.figure for gate in gates.gates if gate.name == "logits q4_k_m")


def test_an_architecture_unknown_to_the_converter(tmp_path: Path) -> None:
    model = folder_of(config("GPTNeoConfig", vocab_size=152000, bos_token_id=None, eos_token_id=151645),
                      tmp_path / "model")
    gates = rehearse(recipe(model, tmp_path / "out"))
    assert signs(gates) == {"merged config": True, "merge": True, "convert f16": False}
    [failed] = gates.failed
    assert "GPTNeoForCausalLM is not supported" in failed.detail and "gguf: []" in failed.hint
    assert list((tmp_path / "out").iterdir()) == []


def other_splits(model: Path) -> Path:
    """The model with a tokenizer that splits texts as none does that the converter knows."""
    file = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,7}|[^\p{N}]+"
    (model / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    return model


def test_a_tokenizer_unknown_to_the_converter(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = other_splits(shutil.copytree(tiny("llama"), tmp_path / "model"))
    [failed] = rehearse(recipe(model, tmp_path / "out")).failed
    assert failed.name == "convert f16" and "pre-tokenizer was not recognized" in failed.detail


def test_a_tokenizer_taken_for_another_one(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Where the converter loads the family's own tokenizer class, which does not look at the splits in the file."""
    model = other_splits(shutil.copytree(tiny("qwen3"), tmp_path / "model"))
    gates = rehearse(recipe(model, tmp_path / "out"))
    assert gates.failed[0].name == "template f16", gates
    assert "the training has [" in gates.failed[0].detail and "the GGUF [" in gates.failed[0].detail


def before_conversion(monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]) -> None:
    """Let `damage` change the merged folder right before the real export."""
    export = rehearsal.export_gguf

    def damaged(merged: Path, *rest: Any) -> list[Path]:
        damage(merged)
        return export(merged, *rest)

    monkeypatch.setattr(rehearsal, "export_gguf", damaged)


def other_rotation(merged: Path) -> None:
    values = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    values["rope_parameters"]["rope_theta"] *= 2
    (merged / "config.json").write_text(json.dumps(values), encoding="utf-8")


def test_a_wrong_conversion_shows_in_the_logits(tiny: Callable[[str], Path], tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    before_conversion(monkeypatch, other_rotation)
    gates = rehearse(recipe(tiny("qwen3"), tmp_path, gguf=["q8_0"]))
    assert "logits f16" in [gate.name for gate in gates.failed], gates
    assert gates.gates[-1].name == "logits q8_0", "the first failure ends the rehearsal"
    with pytest.raises(KitError, match="another model than the merged one"):
        gates.require()


def test_a_template_beyond_ollama_is_a_remark(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = shutil.copytree(tiny("qwen3"), tmp_path / "model")
    template = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
                "{% if loop.index == 3 %}{{ 'third' }}{% endif %}{% endfor %}"
                "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    gates = rehearse(recipe(model, tmp_path / "out", gguf=["f16"]))
    assert gates.passed and signs(gates)["Modelfile"] is None
    assert "cannot be written as an Ollama template" in gates.gates[-1].detail


def test_layers_that_do_not_exist_and_models_that_cannot_be_shrunk(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    [failed] = rehearse(recipe(tiny("qwen3"), tmp_path / "out", target_modules=["qkv"])).failed
    assert failed.name == "merge" and "qkv" in failed.detail and "q_proj" in failed.hint
    model = folder_of(config("Qwen3Config", vocab_size=152000, mtp_num_hidden_layers=1), tmp_path / "model")
    gates = rehearse(recipe(model, tmp_path / "out"))
    assert signs(gates) == {"tiny model": None} and "multi-token prediction" in gates.gates[0].detail
    [failed] = rehearse(recipe(model, tmp_path / "out", full_finetuning=True)).failed
    assert failed.name == "convert" and "full_finetuning: false" in failed.hint


def test_a_quantised_base_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = shutil.copytree(tiny("qwen3"), tmp_path / "model")
    values = json.loads((model / "config.json").read_text(encoding="utf-8"))
    values["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (model / "config.json").write_text(json.dumps(values), encoding="utf-8")
    [failed] = rehearse(recipe(model, tmp_path / "out")).failed
    assert failed.name == "merge" and "16-bit" in failed.hint


def test_an_unreadable_config_is_the_users_mistake(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = shutil.copytree(tiny("qwen3"), tmp_path / "model")
    (model / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(KitError, match="no-such-model"):
        rehearse(recipe(model, tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


def test_ctrl_c_leaves_nothing(tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def interrupt(merged: Path) -> None:
        seen.append(merged)
        threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()

    before_conversion(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        rehearse(recipe(tiny("qwen3"), tmp_path))
    assert seen and tmp_path in seen[0].parents
    assert list(tmp_path.iterdir()) == []
