"""What a run is said to need, against what it takes."""

from __future__ import annotations

import importlib.metadata
import json
import math
import random
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kit.models.fetch import ModelFiles, local_model
from kit.readiness.forecast import ANSWERS, STEP, Forecast, checkpoints_left, forecast, forecast_on
from kit.recipe.machine import Machine
from kit.recipe.recipe import Recipe
from kit.runs.run import Run, forecast_score
from kit.training.steps import seconds_of, steps_of
from support.command import PROJECT


def write_weights(path: Path, tensors: dict[str, list[int]]) -> None:
    """A safetensors file of zeros in bfloat16."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * math.prod(shape)]}
        end += 2 * math.prod(shape)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


LAYER = {"model.layers.0.input_layernorm.weight": [64], "model.layers.0.self_attn.qkv_proj.weight": [192, 64],
         "model.layers.0.self_attn.o_proj.weight": [64, 64], "model.layers.0.mlp.gate_up_proj.weight": [256, 64],
         "model.layers.0.mlp.down_proj.weight": [64, 128]}
CONFIG = {"model_type": "phi3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
          "num_attention_heads": 4, "vocab_size": 1000}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with one layer as Phi-3 has them, its projections fused; in two shards."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    shards = {"model-1.safetensors": LAYER,
              "model-2.safetensors": {"model.embed_tokens.weight": [1000, 64], "model.norm.weight": [64]}}
    for name, tensors in shards.items():
        write_weights(made / name, tensors)
    places = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (made / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    return made


def known(recipe: Recipe) -> ModelFiles:
    found = local_model(recipe)
    assert isinstance(found, ModelFiles), found
    return found


def test_the_sizes_of_a_model_come_from_its_headers(folder: Path) -> None:
    recipe = Recipe.load({}, model_name=str(folder), r=8)
    model = known(recipe)
    layer = 192 * 64 + 64 * 64 + 256 * 64 + 64 * 128
    assert model.parameters == layer + 64 + 1000 * 64 + 64
    assert model.weight_bytes == 2 * model.parameters
    assert model.adapter(recipe) == 8 * ((192 + 64) + (64 + 64) + (256 + 64) + (64 + 128))
    few = Recipe.load({}, model_name=str(folder), r=8, target_modules=["v_proj"])
    every = Recipe.load({}, model_name=str(folder), r=8, target_modules="all")
    assert model.adapter(few) == 8 * (192 + 64), "v_proj is a part of qkv_proj"
    assert model.adapter(every) == model.adapter(recipe)


CPU = Machine("cpu", "a CPU", 2, 16.0, 100.0, True, "")
GPU = Machine("cuda", "a GPU", 8, 16.0, 100.0, True, "")


def certain_gb(needs: Forecast) -> float:
    """What a run holds whatever its rows are."""
    return sum(size for name, size in needs.memory_gb.items() if name not in (STEP, ANSWERS))


def test_parts_of_memory(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 12}), encoding="utf-8")

    def needs(machine: Machine = CPU, **fields: Any) -> Forecast:
        usual = {"model_name": str(folder), "dtype": "bfloat16", "use_gradient_checkpointing": False}
        return forecast_on(machine, Recipe.load({**usual, **fields}))

    def parts(machine: Machine = CPU, **fields: Any) -> dict[str, float]:
        return needs(machine, **fields).memory_gb

    usual = parts()
    small = parts(load_in_4bit=True)
    assert small["adapter and optimiser"] == pytest.approx(usual["adapter and optimiser"] / 2, rel=1e-2)
    assert parts(GPU, load_in_4bit=True)["adapter and optimiser"] == parts(GPU)["adapter and optimiser"]
    assert small["weights"] < parts(load_in_8bit=True)["weights"] < usual["weights"]
    assert parts(dtype="float32")["weights"] == pytest.approx(2 * usual["weights"], rel=1e-3)
    model = known(Recipe.load({}, model_name=str(folder)))
    full = parts(full_finetuning=True)["adapter and optimiser"]
    assert full == pytest.approx(6 * model.parameters / 1e9, rel=1e-3), "gradient and two moments in bfloat16"
    on_cpu, on_gpu = needs(), needs(GPU)
    assert on_cpu.peak_memory_gb == pytest.approx(sum(on_cpu.memory_gb.values()), abs=1e-5)
    larger = max(on_gpu.memory_gb[STEP], on_gpu.memory_gb[ANSWERS])
    assert on_gpu.peak_memory_gb == pytest.approx(certain_gb(on_gpu) + larger, abs=1e-5)


@pytest.mark.parametrize("machine, fields, width, moments", [
    (CPU, {}, 4, 8), (GPU, {}, 4, 2), (GPU, {"optim": "adamw_torch"}, 4, 8),
    (CPU, {"load_in_4bit": True}, 2, 4), (CPU, {"load_in_8bit": True}, 2, 4),
    (GPU, {"load_in_4bit": True}, 4, 2), (GPU, {"load_in_8bit": True}, 4, 2), (None, {"load_in_4bit": True}, 4, 2)])
def test_adapters_and_checkpoints_by_device(folder: Path, machine: Machine | None, fields: dict[str, Any], width: int,
                                            moments: int) -> None:
    """Of a quantised model they are bfloat16 on a CPU and float32 on a GPU; a GPU's 8-bit moments have a byte each."""
    recipe = Recipe.load({}, model_name=str(folder), r=256, target_modules="all", save_strategy="steps", save_steps=5,
                         max_steps=5, **{"optim": "adamw_8bit", **fields})
    count = known(recipe).adapter(recipe)
    needs = forecast_on(machine, recipe)
    assert needs.files_gb["adapter"] == pytest.approx(count * width / 1e9, rel=1e-3)
    assert needs.files_gb["checkpoints"] == pytest.approx(count * (width + moments) / 1e9, rel=1e-3)
    if machine:
        assert needs.memory_gb["adapter and optimiser"] == pytest.approx(count * (2 * width + moments) / 1e9, rel=1e-3)


def test_the_bound_grows_with_the_rows_and_shrinks_with_checkpointing(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 12}), encoding="utf-8")

    def step(**fields: Any) -> float:
        usual = {"model_name": str(folder), "use_gradient_checkpointing": False}
        return forecast_on(GPU, Recipe.load({**usual, **fields})).memory_gb[STEP]

    assert step(max_seq_length=4096) == pytest.approx(2 * step(max_seq_length=2048), rel=1e-3)
    assert step(per_device_train_batch_size=4) == pytest.approx(2 * step(per_device_train_batch_size=2), rel=1e-3)
    assert step(use_gradient_checkpointing=True) < step()


def test_experts_count_as_often_as_a_token_passes_one(folder: Path) -> None:
    """All of a layer's experts in one tensor, or a tensor for each: the bound is the same."""
    def step(tensors: dict[str, list[int]]) -> float:
        config = CONFIG | {"num_experts_per_tok": 2}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        write_weights(folder / "model-1.safetensors", LAYER | tensors)
        places = dict.fromkeys(LAYER | tensors, "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), encoding="utf-8")
        return forecast_on(GPU, Recipe.load({}, model_name=str(folder))).memory_gb[STEP]

    apart = step({f"model.layers.0.mlp.experts.{i}.up_proj.weight": [128, 64] for i in range(4)})
    assert apart == step({"model.layers.0.mlp.experts.up_proj": [4, 128, 64]}) > step({})


def test_without_a_machine_the_disk_is_forecast(folder: Path) -> None:
    recipe = Recipe.load({}, model_name=str(folder))
    needs = forecast_on(None, recipe)
    assert needs.peak_memory_gb is None and needs.disk_gb == forecast_on(CPU, recipe).disk_gb


def test_a_model_that_is_not_here(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = forecast(Recipe.load({}, model_name="nobody/nothing", max_steps=7))
    assert said.peak_memory_gb is None and said.disk_gb is None and said.steps == 7
    assert "nobody/nothing is not on this disk" in said.notes[-1] and "?" in repr(said)

    (folder / "model-1.safetensors").write_bytes(b"\xff" * 20)
    assert "damaged" in forecast(Recipe.load({}, model_name=str(folder))).notes[-1]
    (folder / "model-2.safetensors").unlink()
    assert "model-2.safetensors" in forecast(Recipe.load({}, model_name=str(folder))).notes[-1]
    monkeypatch.setenv("KIT_CACHE", str(tmp_path / "empty"))
    assert "unpacked by the first run" in forecast(Recipe.load({})).notes[-1]
    assert not (tmp_path / "empty").exists()


def test_a_config_without_the_usual_names(folder: Path) -> None:
    (folder / "config.json").write_text('{"n_embd": 64}', encoding="utf-8")
    assert "no hidden_size, num_hidden_layers" in forecast(Recipe.load({}, model_name=str(folder))).notes[-1]


def test_nothing_heavy_is_imported(starter: Path) -> None:
    code = ("import sys, time; began = time.perf_counter(); from kit.readiness.forecast import forecast\n"
            "from kit import Recipe\n"
            "print(forecast(Recipe.load('recipes/quickstart.yaml')))\n"
            "print(time.perf_counter() - began, {'torch', 'transformers', 'unsloth', 'datasets'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert re.search(r"memory at most +\d\.\d\d GB", done.stdout), done.stderr
    seconds, heavy = done.stdout.splitlines()[-1].split(" ", 1)
    # Only torch itself knows whether there is a GPU, where its build could use one.
    built_for_cpus = importlib.metadata.version("torch").endswith("+cpu")
    assert heavy == "set()" and float(seconds) < 2 if built_for_cpus else heavy in ("set()", "{'torch'}")


def test_more_processes_take_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.load({}, per_device_train_batch_size=2, gradient_accumulation_steps=1)
    assert steps_of(recipe, 9) == 5
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert steps_of(recipe, 9) == 3


def test_disk_counts_what_is_there_for_a_while(folder: Path) -> None:
    def room(**fields: Any) -> tuple[float, float]:
        said = forecast(Recipe.load({"model_name": str(folder), "save_minutes": None}, **fields))
        assert said.disk_gb is not None and said.room_gb is not None
        return said.disk_gb, said.room_gb

    assert room(save_merged="none")[0] == room(save_merged="none")[1] < room()[0]
    kept, needed = room(gguf=["q8_0"])
    assert needed > kept + 0.01, "q8_0 is made from a 16-bit file that goes again"
    assert room(gguf=["q8_0", "f16"])[0] == room(gguf=["q8_0", "f16"])[1]
    # Should it take longer than the minutes, checkpoints come and all but the last ones go.
    assert room(save_minutes=5)[1] > room()[1] == room(save_minutes=5, checkpoint_dir="/elsewhere")[1]
    merged = room()[0] - room(save_merged="none")[0]
    assert room()[0] + 0.2 * merged < room(save_merged="4bit")[0] < room()[0] + merged


def test_an_export_holds_a_tensor_at_a_time(folder: Path) -> None:
    def export(**fields: Any) -> float:
        said = forecast(Recipe.load({"model_name": str(folder)}, **fields)).export_gb
        assert said is not None
        return said

    largest, layer = 1000 * 64, 256 * 64
    assert export(gguf=["q8_0"]) == pytest.approx(0.5 + 8 * largest / 1e9, rel=1e-3)
    assert export(gguf=["q8_0", "f16"]) == export(gguf=["q8_0"]), "one after the other"
    assert 10 * layer / 1e9 < export() <= export(save_merged="4bit") < 0.01
    assert export(save_merged="none") == 0


@pytest.mark.slow
@pytest.mark.long
def test_no_step_of_an_export_holds_the_model(tmp_path: Path, tiny: Any) -> None:
    """0.6 GB of weights in a hundred matrices: merge and 4-bit copy take what is forecast, beside the libraries."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = tiny("qwen3", short=True)
    config = AutoConfig.from_pretrained(source)
    config.update({"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 36, "layer_types": None})
    config.layer_types = ["full_attention"] * 36
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="100MB")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=False)
    del model
    done = subprocess.run([sys.executable, "-c", PEAKS, *(str(tmp_path / name) for name in (
        "base", "adapter", "merged", "4bit"))], cwd=PROJECT, capture_output=True, text=True, timeout=300)
    merging, copying = map(float, done.stdout.splitlines()[-1].split())
    base = str(tmp_path / "base")
    whole = known(Recipe.load({}, model_name=base)).weight_bytes / 1e9
    merge, copy = (forecast(Recipe.load({}, model_name=base, save_merged=kind)).export_gb for kind in ("16bit", "4bit"))
    assert merge is not None and copy is not None and whole > 0.5
    assert merging < merge + 0.2 < whole and copying < copy + 0.2 < whole, done.stdout


# Anonymous memory alone: what is mapped from a file gives way.
PEAKS = """
import sys, threading, time, kit.common.unsloth, kit.models.load
from pathlib import Path
from kit.export.adapter import merge_adapter, save_4bit
from kit.recipe.recipe import Recipe
base, adapter, merged, small = map(Path, sys.argv[1:])
held = lambda: int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024
peaks = []
def watch():
    while True:
        peaks.append(held())
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
figures = []
for step in (lambda: merge_adapter(base, adapter, merged), lambda: save_4bit(merged, small, Recipe.load({}))):
    before = held()
    peaks.clear()
    step()
    figures.append((max(peaks) - before) / 1e9)
print(*figures)
"""


@pytest.mark.parametrize("fields, left", [
    ({}, 0), ({"save_strategy": "epoch", "num_train_epochs": 1.5}, 2), ({"save_strategy": "steps", "save_steps": 6}, 2),
    ({"eval_strategy": "steps", "eval_steps": 4}, 0),
    ({"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}, 3),
    ({"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "save_total_limit": None}, 4),
])
def test_checkpoints_that_are_left(fields: dict[str, Any], left: int) -> None:
    """Of 14 steps; the best one may be kept besides the newest two."""
    assert checkpoints_left(Recipe.load({"test_size": 2, "save_strategy": "no", **fields}), 14) == left


def test_pace_goes_by_tokens() -> None:
    assert seconds_of(10, 1000, (9.0, 300), (2.0, 200)) == 9 + 2 + 2 / 200 * 500
    assert seconds_of(10, None, (9.0, 300), (2.0, 200)) == 9 + 2 * 9


def test_score_is_what_happened_over_what_was_said() -> None:
    said = {"peak_memory_gb": 2.0, "disk_gb": 0.5, "steps": 10, "train_seconds": 100}
    result = {"peak_memory_gb": 3.0, "train": {"steps": 10, "train_seconds": 80},
              "files": {"merged/model.safetensors": 400_000_000, "gguf/a.gguf": 200_000_000, "notebook.ipynb": 10**9,
                        "figures/loss.png": 10**9}}
    assert forecast_score(said, result) == {"peak_memory_gb": 1.5, "disk_gb": 1.2, "steps": 1.0, "train_seconds": 0.8}
    assert forecast_score({"steps": 10, "peak_memory_gb": None}, result) == {"steps": 1.0}
    assert forecast_score(said, {}) == {}


@pytest.mark.slow
@pytest.mark.parametrize("rows, fields, whole_passes", [
    (7, {"gradient_accumulation_steps": 4}, True),
    (13, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 2}, True),
    (11, {"gradient_accumulation_steps": 4, "num_train_epochs": 1.5}, False),
    (9, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 0.3}, False),
    (10, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "max_steps": 5}, False),
    (12, {"gradient_accumulation_steps": 1, "num_train_epochs": 3, "save_strategy": "epoch"}, True),
])
def test_steps_tokens_and_checkpoints_are_the_trainer_s(tmp_path: Path, tokenizer: Any, rows: int,
                                                        fields: dict[str, Any], whole_passes: bool) -> None:
    import torch
    from datasets import Dataset, DatasetDict
    from transformers import LlamaConfig, LlamaForCausalLM

    from kit import make_trainer
    from kit.training.train import train

    random_ = random.Random(rows)
    ids = [[random_.randrange(20) for _ in range(random_.randint(20, 40))] + [tokenizer.eos_token_id]
           for _ in range(rows)]
    split = {"input_ids": ids, "labels": ids}
    data = DatasetDict(train=Dataset.from_dict(split), test=Dataset.from_dict(split))
    recipe = Recipe.load({}, output_dir=str(tmp_path), full_finetuning=True, dtype="float32",
                         **{"save_strategy": "steps", "save_steps": 2, **fields})
    torch.manual_seed(0)
    tiny = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32,
                                        num_hidden_layers=1, num_attention_heads=2, pad_token_id=0))
    trainer = make_trainer(tiny, tokenizer, data, recipe)
    result = train(trainer, recipe)
    said = forecast(recipe, data)
    assert said.steps == result.steps == trainer.state.max_steps
    assert said.tokens == (result.tokens if whole_passes else pytest.approx(result.tokens, rel=0.3))
    made = len(list(Run.of(recipe).checkpoints.glob("checkpoint-*")))
    assert made == checkpoints_left(recipe, result.steps)


@pytest.mark.slow
@pytest.mark.long  # the next test holds the forecast of a whole run against what happened
@pytest.mark.parametrize("training", ["quickstart", "long-checkpointing"])
def test_memory_of_a_real_training(training: str) -> None:
    done = subprocess.run([sys.executable, "benchmarks/forecast.py", training], cwd=PROJECT,
                          capture_output=True, text=True, timeout=400)
    figures = re.findall(r"memory +([\d.]+) to +([\d.]+) GB forecast, +([\d.]+) happened", done.stdout)
    assert len(figures) == 1, done.stderr[-2000:]
    for certain, most, happened in figures:
        assert float(certain) <= float(happened) <= float(most), done.stdout
    for said, happened in re.findall(r"steps (\d+), (\d+)", done.stdout):
        assert said == happened


@pytest.mark.slow
def test_a_finished_run_is_what_was_forecast(finished_run: Path, tokenizer: Any) -> None:
    from kit import load_data

    run = Run.open(finished_run)
    needs = forecast(run.recipe, load_data(run.recipe, tokenizer))
    assert known(run.recipe).adapter(run.recipe) == run.result["trainable_parameters"]
    happened = forecast_score(needs.as_json(), run.result)
    assert happened["steps"] == 1
    assert 0.9 < happened["disk_gb"] < 1.1
    assert certain_gb(needs) <= run.result["peak_memory_gb"] and happened["peak_memory_gb"] <= 1
