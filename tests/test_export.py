"""Merging: the same weights as PEFT's own merge, whole folders only, and never into the wrong base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kit.errors import GateError, KitError
from kit.export import merge_adapter, whole_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "rslora"])
def trained(request: pytest.FixtureRequest, starter: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An adapter whose B is not zero, saved, and the model it was saved from (float32)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(starter, dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=24, target_modules=["q_proj", "o_proj", "down_proj"],
                        use_rslora=request.param, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    adapter = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(adapter, save_embedding_layers=False)
    AutoTokenizer.from_pretrained(starter).save_pretrained(adapter)
    return model, adapter


def test_merged_weights_are_pefts(trained: Any, starter: Path, tmp_path: Path) -> None:
    import copy

    import torch
    from safetensors.torch import load_file

    model, adapter = trained
    merge_adapter(starter, adapter, tmp_path / "merged")
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(starter / "model.safetensors")
    theirs = copy.deepcopy(model).merge_and_unload().state_dict()
    changed = 0
    for name, tensor in ours.items():
        assert tensor.dtype == base[name].dtype
        assert torch.equal(tensor, theirs[name].to(tensor.dtype)), name
        changed += not torch.equal(tensor, base[name])
    assert changed == 3 * 30, "three projections in each of 30 layers"


def test_a_shard_at_a_time_gives_the_same(trained: Any, starter: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    _, adapter = trained
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(starter, dtype=torch.bfloat16).save_pretrained(sharded, max_shard_size="60MB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    merge_adapter(sharded, adapter, tmp_path / "a")
    merge_adapter(starter, adapter, tmp_path / "b")
    whole = load_file(tmp_path / "b" / "model.safetensors")
    parts = {k: v for p in (tmp_path / "a").glob("*.safetensors") for k, v in load_file(p).items()}
    assert parts.keys() == whole.keys() and all(torch.equal(parts[k], whole[k]) for k in whole)
    AutoModelForCausalLM.from_pretrained(tmp_path / "a")


def test_the_wrong_base_is_refused_and_the_old_merge_stays(trained: Any, starter: Path, tmp_path: Path) -> None:
    _, adapter = trained
    target = tmp_path / "merged"
    merge_adapter(starter, adapter, target)
    before = (target / "model.safetensors").stat().st_mtime_ns
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    from safetensors.torch import load_file, save_file

    tensors = load_file(other / "adapter_model.safetensors")
    moved = {name.replace("layers.0.", "layers.99."): tensor for name, tensor in tensors.items()}
    save_file(moved, other / "adapter_model.safetensors")
    with pytest.raises(GateError, match=r"layers\.99\..*does not have"):
        merge_adapter(starter, other, target)
    assert (target / "model.safetensors").stat().st_mtime_ns == before
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name or p.name.endswith(".old")] == []


def test_a_quantised_base_is_refused(trained: Any, starter: Path, tmp_path: Path) -> None:
    _, adapter = trained
    base = tmp_path / "base"
    shutil.copytree(starter, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(KitError, match="16-bit"):
        merge_adapter(base, adapter, tmp_path / "merged")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with pytest.raises(KeyboardInterrupt), whole_folder(target) as folder:
        (folder / "a").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KitError, match="No space left"), whole_folder(target) as folder:
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []
