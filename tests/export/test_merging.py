"""Merging one shard after another: what it takes of memory, adapters that were trained elsewhere, DoRA, refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.common.errors import GateError, KitError
from kit.common.weight_files import weight_files
from kit.export.adapter import merge_adapter, save_4bit
from kit.export.command import export
from kit.gguf.formats import check_gguf
from kit.recipe.recipe import Recipe
from kit.runs.gates import Gates
from kit.runs.provenance import check_hashes, seal
from kit.runs.run import Run
from kit.verifying.contents import check_merge
from support.command import PROJECT
from support.command import kit as command

pytestmark = pytest.mark.slow

# A process of its own: its peak before is that of the imports. getrusage would begin with the parent's peak.
MERGE = """
import sys
from pathlib import Path
import torch, transformers, peft, safetensors.torch
from kit.export.adapter import merge_adapter
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
before = peak()
merge_adapter(*map(Path, sys.argv[1:]))
print(before, peak())
"""


def save_adapter(base: Path, folder: Path, dtype: str = "float32", **settings: Any) -> Path:
    """An adapter as PEFT writes it, without a tokenizer; its weights are random."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)), LoraConfig(
        task_type="CAUSAL_LM", init_lora_weights=False, **{"r": 8, "lora_alpha": 24, "target_modules": ["q_proj"],
                                                           **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name or "modules_to_save" in name:  # as after a training, not as at its start
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def in_float32(base: Path, folder: Path, **config: Any) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32", **config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def pefts_merge(base: Path, adapter: Path) -> dict[str, Any]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), adapter)
    return dict(model.merge_and_unload().state_dict())


SETTINGS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "DoRA, rsLoRA": {"use_dora": True, "use_rslora": True},
    "patterns": {"rank_pattern": {"layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"0.self_attn.q_proj": 7}},
    "biases": {"bias": "all"},
    "head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_merge_is_pefts(name: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    import torch

    base = in_float32(tiny("qwen2", short=True), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", **SETTINGS[name])
    merge_adapter(base, adapter, tmp_path / "merged")
    ours, theirs, before = weights(tmp_path / "merged"), pefts_merge(base, adapter), weights(base)
    assert ours.keys() == before.keys()
    for tensor in ours:
        torch.testing.assert_close(ours[tensor], theirs[tensor], rtol=1e-5, atol=1e-6, msg=tensor)
    assert any(not torch.equal(ours[tensor], before[tensor]) for tensor in ours)
    gates = Gates("merge")
    check_merge(gates, base, adapter, tmp_path / "merged")
    assert gates.passed, gates
    shutil.copyfile(base / "model.safetensors", tmp_path / "merged" / "model.safetensors")
    gates = Gates("merge")
    check_merge(gates, base, adapter, tmp_path / "merged")
    assert [gate.name for gate in gates.failed] == ["merge"]


def test_an_adapter_trained_elsewhere(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """No tokenizer with it, other keys, other order: the merge is the same, the tokenizer and stop are the base's."""
    import torch
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(tiny("qwen3", short=True), base)
    stops = {"eos_token_id": [151645, 151643], "pad_token_id": 151643}
    (base / "generation_config.json").write_text(json.dumps(stops))
    plain, other = save_adapter(base, tmp_path / "plain"), tmp_path / "other"
    shutil.copytree(plain, other)
    tensors = load_file(plain / "adapter_model.safetensors")
    renamed = {name.replace(".weight", ".default.weight"): tensors[name] for name in reversed(list(tensors))}
    save_file(renamed, other / "adapter_model.safetensors")
    merge_adapter(base, plain, tmp_path / "a")
    assert export(str(other), None, [], None, tmp_path / "b") == 0, "the base is named in adapter_config.json"
    a, b, before = weights(tmp_path / "a"), weights(tmp_path / "b" / "merged"), weights(base)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert sum(not torch.equal(a[name], before[name]) for name in a) == 2
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "a" / name).read_bytes() == (base / name).read_bytes()
    assert json.loads((tmp_path / "a" / "generation_config.json").read_text()) == stops
    with pytest.raises(KitError, match="is not empty"):
        export(str(other), None, [], None, tmp_path / "b")


def test_kit_export_makes_what_a_run_does_not_have(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = tiny("qwen3")
    recipe = Recipe.load({}, run_name="tiny", output_dir=str(tmp_path), model_name=str(base), save_merged="none")
    run = Run.start(recipe)
    run.manifest(recipe, AutoTokenizer.from_pretrained(base), [])
    save_adapter(base, run.adapter)
    AutoTokenizer.from_pretrained(base).save_pretrained(run.adapter)
    run.finish()
    seal(run)
    done = command("export", str(run.folder), "--gguf", "q8_0", "--save-merged", "4bit")
    assert done.returncode == 0, done.stderr
    gguf = run.gguf / "tiny-q8_0.gguf"
    check_gguf(gguf)
    for made in ("merged", "merged-4bit", gguf.name, "Modelfile"):
        assert f"\n{made} " in done.stdout
    assert f"FROM ./{gguf.name}" in (run.gguf / "Modelfile").read_text(encoding="utf-8")
    gates = Gates("export")
    check_merge(gates, base, run.adapter, run.merged)
    assert check_hashes(gates, run) and gates.passed, gates
    times = [file.stat().st_mtime_ns for file in (gguf, run.merged / "model.safetensors")]
    assert export(str(run.folder), None, [], None, None) == 0
    assert times == [file.stat().st_mtime_ns for file in (gguf, run.merged / "model.safetensors")], "not made again"
    with pytest.raises(KitError, match="--base is for an adapter"):
        export(str(run.folder), "starter", [], None, None)


REFUSED = {"target_parameters": ["experts.gate_up_proj"], "fan_in_fan_out": True, "trainable_token_indices": [1],
           "init_lora_weights": "pissa", "lora_bias": True, "peft_type": "LOHA"}  # fmt: skip


def test_what_cannot_be_merged_is_named(tiny: Callable[..., Path], tmp_path: Path) -> None:
    adapter, target = save_adapter(tiny("qwen3", short=True), tmp_path / "adapter"), tmp_path / "merged"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    for name, value in REFUSED.items():
        (adapter / "adapter_config.json").write_text(json.dumps({**settings, name: value}))
        with pytest.raises(KitError, match=name):
            merge_adapter(tiny("qwen3", short=True), adapter, target)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(GateError, match=r"q_proj.weight is of shape .*128, 64.*it is \(64, 64\)"):
        merge_adapter(tiny("qwen2", short=True), adapter, target)
    tied = save_adapter(tiny("qwen3", short=True), tmp_path / "tied", modules_to_save=["embed_tokens"])
    with pytest.raises(KitError, match="ties its head to its embedding"):
        merge_adapter(tiny("qwen3", short=True), tied, target)
    assert not target.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_peak_memory_is_less_than_a_shard_and_a_gigabyte(tmp_path: Path) -> None:
    """Several shards of 300 MB, DoRA on every linear layer: the merge must not even hold one of them whole."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from support.vocabularies import real_tokenizer

    config = LlamaConfig(vocab_size=1024, hidden_size=2048, intermediate_size=7168, num_hidden_layers=7,
                         num_attention_heads=16, num_key_value_heads=16, dtype="bfloat16")
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config, dtype="bfloat16").save_pretrained(base, max_shard_size="300MB")
    real_tokenizer("qwen2", "Qwen-Qwen3-0.6B").save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "adapter", "bfloat16", target_modules="all-linear", use_dora=True)
    shards = [file.stat().st_size for file in weight_files(base)]
    assert len(shards) >= 3 and max(shards) > 250e6
    done = subprocess.run([sys.executable, "-c", MERGE, str(base), str(adapter), str(tmp_path / "merged")],
                          cwd=PROJECT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    before, peak = map(int, done.stdout.split()[-2:])
    print(f"shards {max(shards) / 1e6:.0f} MB, imports {before / 1e6:.0f} MB, merge {(peak - before) / 1e6:.0f} more")
    assert peak - before < max(shards) + 250e6, "tokenizer, libraries and the largest layer in float32 take 400 MB"
    assert [file.stat().st_size for file in weight_files(tmp_path / "merged")] == shards


def test_the_4_bit_copy_is_the_merged_model_in_4_bit(tiny: Callable[..., Path], tmp_path: Path) -> None:
    import torch
    from bitsandbytes.nn import Linear4bit
    from peft.utils.integrations import dequantize_module_weight
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kit.models.load import four_bit_config

    base = tiny("qwen2", short=True)
    merge_adapter(base, save_adapter(base, tmp_path / "adapter"), tmp_path / "merged")
    recipe = Recipe.load({}, save_merged="4bit")
    save_4bit(tmp_path / "merged", tmp_path / "merged-4bit", recipe)
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "merged-4bit", device_map="cpu").eval()
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype="auto", device_map="cpu",
        quantization_config=four_bit_config(recipe, "bfloat16")).eval()
    layers = {name: module for name, module in copy.named_modules() if isinstance(module, Linear4bit)}
    assert len(layers) == 14
    for name, module in layers.items():
        assert module.weight.quant_state.quant_type == "nf4" and module.weight.quant_state.nested
        theirs = dequantize_module_weight(loaded.get_submodule(name))
        assert torch.equal(dequantize_module_weight(module), theirs), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged-4bit")
    ids = torch.tensor([tokenizer("Where is my parcel 1024?")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(copy(ids).logits, loaded(ids).logits)
