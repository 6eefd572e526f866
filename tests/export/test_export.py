"""Merging: PEFT's own merge, rounded so that nothing is lost; whole folders only, and never into the wrong base."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import kit
from kit.common.errors import GateError, KitError
from kit.common.files import sha256, whole_folder
from kit.common.weight_files import weight_files
from kit.export.adapter import changes_of, merge_adapter, save_adapter
from kit.gguf.convert import merged_weights
from kit.recipe.recipe import Recipe
from kit.runs.run import Run

pytestmark = pytest.mark.slow

TARGETS = ["q_proj", "o_proj", "down_proj"]


@pytest.fixture(scope="module")
def adapter_of(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`adapter_of(use_rslora=…)`: an adapter of the tiny model whose B is not zero but for one row."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    @cache
    def make(use_rslora: bool = False) -> Path:
        base, adapter = tiny("qwen3"), tmp_path_factory.mktemp("adapter")
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(
            r=8, lora_alpha=24, target_modules=TARGETS, use_rslora=use_rslora, init_lora_weights=False,
            task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter[3] = 0
        model.save_pretrained(adapter, save_embedding_layers=False)
        AutoTokenizer.from_pretrained(base).save_pretrained(adapter)
        return adapter

    return make


@pytest.fixture(scope="module")
def trained(tiny: Callable[[str], Path], adapter_of: Callable[..., Path]) -> tuple[Path, Path]:
    """(bfloat16 base, adapter)."""
    return tiny("qwen3"), adapter_of()


def pefts_merge(base: Path, adapter: Path, dtype: Any) -> dict[str, Any]:
    """PEFT's merge into the base loaded in `dtype`."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter)
    return dict(model.merge_and_unload().state_dict())


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def in_format(base: Path, dtype: Any, folder: Path, **options: Any) -> Path:
    """A copy of the base in another number format, or in several files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(folder, **options)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind, use_rslora", [("float32", False), ("float32", True), ("float16", False)])
def test_merged_weights_are_pefts_to_the_bit(tiny: Callable[[str], Path], adapter_of: Callable[..., Path],
                                             tmp_path: Path, kind: str, use_rslora: bool) -> None:
    import torch

    dtype = getattr(torch, kind)
    base, adapter = in_format(tiny("qwen3"), dtype, tmp_path / "base"), adapter_of(use_rslora)
    merge_adapter(base, adapter, tmp_path / "merged")
    ours, before, theirs = weights(tmp_path / "merged"), weights(base), pefts_merge(base, adapter, dtype)
    assert ours.keys() == before.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, theirs[name]), name
    assert sum(not torch.equal(ours[name], before[name]) for name in ours) == len(TARGETS) * 2, "of two layers"


def test_bfloat16_weights_are_a_neighbour_of_the_exact_sum(trained: tuple[Path, Path], tmp_path: Path) -> None:
    import torch

    base, adapter = trained
    merge_adapter(base, adapter, tmp_path / "merged")
    ours, before, exact = weights(tmp_path / "merged"), weights(base), pefts_merge(base, adapter, torch.float32)
    ups = []
    for name, tensor in ours.items():
        assert tensor.dtype == torch.bfloat16
        if not any(target in name for target in TARGETS):
            assert torch.equal(tensor, before[name]), name
            continue
        assert torch.equal(tensor[3], before[name][3]), "a row that the adapter does not change"
        # bfloat16 is the upper half of float32: one neighbour is cut off there, the other is the next one up.
        bits = exact[name].contiguous().view(torch.int32)
        below = bits & -(1 << 16)
        above = torch.where(bits == below, below, below + (1 << 16))
        found = tensor.float().view(torch.int32)
        assert bool(((found == below) | (found == above)).all()), name
        share = (bits - below).float() / (1 << 16)
        near = (share > 0) & (share < 0.25)
        ups.append(((found == above).float() - share)[near])
    assert abs(float(torch.cat(ups).mean())) < 0.01, "up as often as the place between the neighbours says: 1 in 8 here"


def test_the_same_bits_again_and_shard_by_shard(trained: tuple[Path, Path], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base, adapter = trained
    sharded = in_format(base, torch.bfloat16, tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    for name, source in {"whole": base, "again": base, "parts": sharded}.items():
        merge_adapter(source, adapter, tmp_path / name)
    whole = weights(tmp_path / "whole")
    for other in (weights(tmp_path / "again"), weights(tmp_path / "parts")):
        assert other.keys() == whole.keys() and all(torch.equal(other[name], whole[name]) for name in whole)
    AutoModelForCausalLM.from_pretrained(tmp_path / "parts")


@pytest.fixture(scope="module")
def learnt(starter: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """(an adapter of the starter model after a short real training, token ids of held-out rows)."""
    recipe = Recipe.load({}, output_dir=str(tmp_path_factory.mktemp("learnt")), max_steps=5, max_train_samples=32,
                         test_size=4, learning_rate=5e-4, warmup_steps=0, use_gradient_checkpointing=False,
                         gradient_accumulation_steps=1, per_device_train_batch_size=2, max_seq_length=256,
                         train_sampling_strategy="sequential")
    model, tokenizer = kit.load_model(recipe)
    model = kit.add_lora(model, recipe)
    data = kit.load_data(recipe, tokenizer)
    kit.train(kit.make_trainer(model, tokenizer, data, recipe), recipe)
    return save_adapter(model, tokenizer, Run.of(recipe)), data["test"]["input_ids"][:4]


def test_a_small_change_is_kept_where_rounding_to_nearest_loses_it(
        learnt: tuple[Path, list[list[int]]], starter: Path, tmp_path: Path) -> None:
    """Least squares of what was added on what should have been: 1 is all of it. Then the answers, against float32."""
    import torch
    from transformers import AutoModelForCausalLM

    adapter, rows = learnt
    merge_adapter(starter, adapter, tmp_path / "merged")
    before, ours = weights(starter), weights(tmp_path / "merged")
    exact = {name: before[name].float() + change.scale * (change.b.float() @ change.a.float())
             for name, change in changes_of(adapter).items()}
    nearest = {name: tensor.to(torch.bfloat16) for name, tensor in exact.items()}

    def kept(found: dict[str, Any]) -> float:
        products = squares = 0.0
        for name, whole in exact.items():
            change = (whole - before[name].float()).double()
            products += float(((found[name].double() - before[name].double()) * change).sum())
            squares += float((change * change).sum())
        return products / squares

    assert kept(ours) == pytest.approx(1, abs=0.02)
    assert kept(nearest) < 0.9

    model = AutoModelForCausalLM.from_pretrained(starter, dtype=torch.float32).eval()

    def logprobs(found: dict[str, Any]) -> Iterator[Any]:
        model.load_state_dict({name: tensor.float() for name, tensor in found.items()}, strict=False)
        with torch.no_grad():
            for ids in rows:
                yield model(torch.tensor([ids])).logits[0].log_softmax(-1)

    expected = list(logprobs(exact))

    def divergence(found: dict[str, Any]) -> float:
        """Mean KL in nats from the model with the exact weights."""
        each = [(p.exp() * (p - q)).sum(-1) for p, q in zip(expected, logprobs(found), strict=True)]
        return float(torch.cat(each).mean())

    by_chance, by_nearest = divergence({name: ours[name] for name in exact}), divergence(nearest)
    assert 0 < by_chance < by_nearest


def test_the_wrong_base_is_refused_and_the_old_merge_stays(trained: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base, adapter = trained
    target = tmp_path / "merged"
    merge_adapter(base, adapter, target)
    before = (target / "model.safetensors").stat().st_mtime_ns
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    tensors = load_file(other / "adapter_model.safetensors")
    moved = {name.replace("layers.0.", "layers.99."): tensor for name, tensor in tensors.items()}
    save_file(moved, other / "adapter_model.safetensors")
    with pytest.raises(GateError, match=r"layers\.99\..*does not have"):
        merge_adapter(base, other, target)
    assert (target / "model.safetensors").stat().st_mtime_ns == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged", "other"]


def test_a_quantised_base_is_refused(trained: tuple[Path, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(trained[0], base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(KitError, match="16-bit"):
        merge_adapter(base, trained[1], tmp_path / "merged")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with pytest.raises(KeyboardInterrupt), whole_folder(target) as folder:
        (folder / "a").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KitError, match="No space left"), whole_folder(target) as folder:
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@contextmanager
def no_file_above(megabytes: float) -> Iterator[None]:
    """Writes fail part-way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(megabytes * 10**6), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir()}


@pytest.mark.parametrize("limit_mb, fails_at", [(1, "weights"), (2, "tokenizer.json")])
def test_a_full_disk_while_merging(trained: tuple[Path, Path], tmp_path: Path, limit_mb: float,
                                   fails_at: str) -> None:
    from safetensors.torch import save_file

    base, adapter = tmp_path / "base", trained[1]
    shutil.copytree(trained[0], base)
    if fails_at == "tokenizer.json":  # the embedding alone is larger than the tokenizer
        small = {name: tensor for name, tensor in weights(base).items() if "embed" not in name}
        save_file(small, base / "model.safetensors", metadata={"format": "pt"})
        assert (base / "model.safetensors").stat().st_size < limit_mb * 10**6 < (adapter / fails_at).stat().st_size
    target = tmp_path / "merged"
    merge_adapter(base, adapter, target)
    good = hashes(target)
    with no_file_above(limit_mb), pytest.raises(KitError, match=r"merged .*File too large") as e:
        merge_adapter(base, adapter, target)
    assert "free " in e.value.hint
    assert sorted(os.listdir(tmp_path)) == ["base", "merged"], "nothing half-written"
    assert hashes(target) == good, "the last good one stays"
    merge_adapter(base, adapter, target)


def test_a_full_disk_while_saving_the_adapter(trained: tuple[Path, Path], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, adapter = trained
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    run = Run(tmp_path)
    for limit_mb in (0.01, 2):  # the weights, the tokenizer
        with no_file_above(limit_mb), pytest.raises(KitError, match=r"adapter .*File too large"):
            save_adapter(model, AutoTokenizer.from_pretrained(base), run)
        assert os.listdir(tmp_path) == []


def test_full_weights_are_written_in_shards(trained: tuple[Path, Path], tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's weights come through the machine's memory one shard at a time; transformers' own are of 50 GB."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, _ = trained
    asked = []
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    saving = type(model).save_pretrained
    monkeypatch.setattr(type(model), "save_pretrained", lambda self, folder, **options: (
        asked.append(options["max_shard_size"]), saving(self, folder, **options | {"max_shard_size": "5MB"})))
    merged = save_adapter(model, AutoTokenizer.from_pretrained(base), Run(tmp_path / "run"))
    assert asked == ["4GB"] and len(weight_files(merged)) > 1
    assert merged_weights(merged) == merged_weights(base)
