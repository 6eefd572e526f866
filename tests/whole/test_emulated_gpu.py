"""Unsloth's GPU path, and the kit's, on emulated cards (support/cuda_emulation.py): what was found without one.

Triton's interpreter takes about 100 ms for a token of a training step, so the models have one layer and the rows are
short.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from support.command import PROJECT, kit
from support.cuda_emulation import PROFILES, card_environment, driver_environment
from support.tiny_runs import TOPICS, turns, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                                                   reason="no triton: make engines installs it")]
SHAPE = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
FIELDS: dict[str, Any] = {
    "local_files_only": True, "test_size": 2, "max_seq_length": 128, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1, "max_steps": 2, "learning_rate": 1e-2, "r": 8, "lora_alpha": 16,
    "max_new_tokens": 6, "metric": "none", "enable_thinking": False, "gguf": [], "save_strategy": "no",
    "use_gradient_checkpointing": False}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`base("qwen3")` is a model of one layer that knows some words, in a folder with rows.jsonl."""
    from support.tiny_runs import taught_model

    folder = tmp_path_factory.mktemp("emulated")
    write_rows(folder / "rows.jsonl", [turns(topic.format(1024 + number), TOPICS[topic])
                                       for number in range(8) for topic in list(TOPICS)[1:4:2]])
    return cache(lambda family: taught_model(family, folder / family, short=True, **SHAPE))


def recipe_of(model: Path, folder: Path, **fields: Any) -> dict[str, Any]:
    return {**FIELDS, "model_name": str(model), "dataset": str(model.parent / "rows.jsonl"), "output_dir": str(folder),
            "run_name": "run", **fields}


def on_card(profile: str, code: str, *arguments: str, **environment: str) -> Any:
    """What `code` prints as its last line, as JSON, in a process that sees this card."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=PROJECT, text=True, capture_output=True,
                          timeout=600, env=card_environment(profile, **environment))
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("profile, family, fields, noted", [
    ("T4", "qwen3", {"eval_strategy": "steps", "eval_steps": 2}, "float16: compute capability 7.5 has no bfloat16"),
    ("A100", "llama", {"load_in_4bit": True, "packing": True, "use_gradient_checkpointing": "unsloth"},
     "bfloat16: compute capability 8.0 has bfloat16")])
def test_the_main_notebook(profile: str, family: str, fields: dict[str, Any], noted: str,
                           base: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_of(base(family), tmp_path, **fields)), encoding="utf-8")
    done = kit("run", str(recipe), **card_environment(profile))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result, manifest = (json.loads((tmp_path / "run" / f"{name}.json").read_text(encoding="utf-8"))
                        for name in ("result", "manifest"))
    assert result["status"] == "finished" and "gates passed" in result["verdict"]
    assert manifest["machine"]["device"] == "cuda" and manifest["machine"]["device_name"] == PROFILES[profile].name
    text = json.dumps(manifest)
    assert noted in text and "attention: PyTorch's SDPA" in text
    gates = {gate["name"]: gate for stage in result["gates"].values() for gate in stage}
    assert gates["settings"]["passed"] is True, gates["settings"]
    verify = json.loads((tmp_path / "run" / "verify.json").read_text(encoding="utf-8"))
    memory = next(gate for gate in verify["gates"] if gate["name"] == "in memory")
    assert f"in {'float16' if profile == 'T4' else 'bfloat16'}" in memory["figure"]


def in_hub_cache(model: Path, hub: Path, name: str, *revisions: str) -> dict[str, Path]:
    """The model as a hub's cache holds it, of each revision with other weights; returns the folders by revision."""
    from safetensors.torch import load_file, save_file

    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    folders = {}
    for number, revision in enumerate(revisions, 1):
        commit = str(number) * 40
        folders[revision] = repository / "snapshots" / commit
        shutil.copytree(model, folders[revision])
        weights = load_file(model / "model.safetensors")
        weights["model.norm.weight"] = weights["model.norm.weight"] * number
        save_file(weights, folders[revision] / "model.safetensors", metadata={"format": "pt"})
        (repository / "refs" / revision).write_text(commit, encoding="utf-8")
    return folders


EXACT_AND_LONG = """
import json, sys
from pathlib import Path
import kit
from kit import Recipe
from kit.models.load import reload
from kit.verifying.reference import Row, predict

recipe = Recipe.load(json.loads(sys.argv[1]))
settings = kit.resolved(recipe)
model, tokenizer = kit.load_model(recipe)
norms = [float(model.model.norm.weight.abs().sum())]
model = kit.add_lora(model, recipe)
model.save_pretrained(sys.argv[2])
tokenizer.save_pretrained(sys.argv[2])
again, _ = reload(Path(sys.argv[2]), recipe)
norms.append(float(again.base_model.model.model.norm.weight.abs().sum()))
ids = tokenizer("Where is my parcel? " * 8, add_special_tokens=False)["input_ids"]
row = Row(0, ids, list(range(len(ids) - 1)), True, True, True, False)
cut = predict(model, [row])[0].best.tolist()
whole = kit.answer(model, tokenizer, [[{"role": "user", "content": "Where is my parcel? " * 8}]], recipe)[0].ids
print(json.dumps({"notes": settings.notes, "norms": norms, "tokens": len(ids), "places": len(cut), "ids": whole}))
"""


def test_the_model_that_is_named_is_the_one_that_is_loaded_and_long_rows_are_read_whole(
        base: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folders = in_hub_cache(base("qwen3"), tmp_path / "hub", "Qwen/Qwen3-4B", "main", "v1")
    recipe = recipe_of(base("qwen3"), tmp_path, model_name="Qwen/Qwen3-4B", revision="v1", max_seq_length=32)
    package = tmp_path / "packages"
    (package / "xformers-0.0.35.dist-info").mkdir(parents=True)
    (package / "xformers-0.0.35.dist-info" / "METADATA").write_text("Name: xformers\nVersion: 0.0.35\n")
    (package / "xformers").mkdir()
    (package / "xformers" / "__init__.py").write_text("raise ImportError('libcudart.so.12: built for another torch')")
    path = os.pathsep.join([card_environment("T4")["PYTHONPATH"], str(package)])
    found = on_card("T4", EXACT_AND_LONG, json.dumps(recipe), str(tmp_path / "adapter"),
                    HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1", PYTHONPATH=path)
    wanted = float(load_file(folders["v1"] / "model.safetensors")["model.norm.weight"].float().abs().sum())
    assert found["norms"] == pytest.approx([wanted, wanted], rel=1e-2)
    assert found["tokens"] > 32 and found["places"] == found["tokens"] - 1
    assert any("xformers 0.0.35 is installed and does not load" in note for note in found["notes"])


IN_FLOAT32 = """
import json, sys
import kit
from kit import Recipe

said = []
for fields in json.loads(sys.argv[1]):
    recipe = Recipe.load(fields)
    model, tokenizer = kit.load_model(recipe)
    model = kit.add_lora(model, recipe)
    data = kit.load_data(recipe, tokenizer)
    trainer = kit.make_trainer(model, tokenizer, data, recipe)
    gates = kit.check_trainer(trainer, tokenizer, recipe)
    said.append([trainer.args.bf16, trainer.args.fp16, trainer.accelerator.mixed_precision,
                 str(next(model.parameters()).dtype), [gate.detail for gate in gates.failed],
                 next(gate.figure for gate in gates.gates if gate.name == "settings")])
print(json.dumps(said))
"""


BFLOAT16 = """
import tempfile, importlib.util, json, torch
from pathlib import Path
file = Path(tempfile.mkdtemp()) / "kernel.py"
file.write_text('''import triton, triton.language as tl
@triton.jit
def product(a, b, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.load(a + i) * tl.load(b + i))
''')
spec = importlib.util.spec_from_file_location("kernel", file)
kernel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
a, out = torch.tensor([1.5, -2.0, 3.0, 0.25], dtype=torch.bfloat16), torch.zeros(8, dtype=torch.bfloat16)
kernel.product[(1,)](a, a, out[4:], 4)
print(json.dumps(out.tolist()))
"""


def test_the_emulation_computes_bfloat16_which_tritons_interpreter_alone_does_not() -> None:
    assert on_card("A100", BFLOAT16) == [0, 0, 0, 0, 2.25, 4, 9, 0.0625]
    alone = subprocess.run([sys.executable, "-c", BFLOAT16], text=True, capture_output=True, check=True,
                           env={**os.environ, "TRITON_INTERPRET": "1"})
    assert json.loads(alone.stdout) != [0, 0, 0, 0, 2.25, 4, 9, 0.0625], "then round_bfloat16 is not needed any more"


def test_float32_is_trained_in_float32(base: Callable[[str], Path], tmp_path: Path) -> None:
    fields = recipe_of(base("qwen3"), tmp_path, dtype="float32")
    lora, full, usual, *mixed = on_card("A100", IN_FLOAT32, json.dumps([
        fields, {**fields, "full_finetuning": True}, {**fields, "dtype": None}, {**fields, "bf16": True},
        {**fields, "bf16": True, "full_finetuning": True}]))
    assert lora == full == [False, False, "no", "torch.float32", [], "as asked, batches without padding"]
    assert usual == [True, False, "bf16", "torch.bfloat16", [], "as asked, batches without padding"]
    assert mixed == [[True, False, "bf16", "torch.float32", [], "as asked, batches without padding"]] * 2


def test_a_gpu_too_old_for_the_kernels_is_refused(base: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_of(base("qwen3"), tmp_path)), encoding="utf-8")
    for command in ("doctor", "run"):
        done = kit(command, str(recipe), **card_environment("P100"))
        assert done.returncode, done.stdout
        assert "Tesla P100-PCIE-16GB has compute capability 6.0" in done.stdout + done.stderr, done.stderr[-2000:]
        assert "Traceback" not in done.stdout + done.stderr
    assert "no GPU" in kit("doctor", str(recipe), **card_environment("P100", CUDA_VISIBLE_DEVICES="")).stdout


def test_a_gpu_that_torch_cannot_use_is_no_run_on_the_cpu(base: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_of(base("qwen3"), tmp_path)), encoding="utf-8")
    for command in ("doctor", "train"):
        done = kit(command, str(recipe), **driver_environment("T4"))
        said = done.stdout + done.stderr
        assert done.returncode and "Traceback" not in said
        for words in ("there is a GPU (Tesla T4 with driver 580.65.06, which serves CUDA up to 13.0)", "cu130",
                      "CUDA_VISIBLE_DEVICES"):
            assert words in said, said[-2000:]
    assert "no GPU" in kit("doctor", str(recipe), **driver_environment("T4", CUDA_VISIBLE_DEVICES="")).stdout


@pytest.mark.long
@pytest.mark.parametrize("profile, family, fields", [
    ("T4", "llama", {"full_finetuning": True, "learning_rate": 1e-3}),
    ("A100", "qwen3", {"full_finetuning": True, "learning_rate": 1e-3}),
    ("L4", "qwen3", {"load_in_8bit": True}),
    ("H100", "llama", {"packing": True}),
    ("A100", "llama", {"dtype": "float32"}),
    ("T4", "qwen3", {"load_in_4bit": True, "dtype": "bfloat16"})])
def test_the_command(profile: str, family: str, fields: dict[str, Any], base: Callable[[str], Path],
                     tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_of(base(family), tmp_path, **fields)), encoding="utf-8")
    done = kit("train", str(recipe), **card_environment(profile))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.long
def test_a_stopped_training_goes_on(base: Callable[[str], Path], tmp_path: Path) -> None:
    fields = recipe_of(base("llama"), tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    losses = {}
    for name in ("whole", "stopped"):
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(json.dumps(fields | {"run_name": name}), encoding="utf-8")
        if name == "stopped":
            log = tmp_path / name / "log.jsonl"
            command = [sys.executable, "-m", "kit", "train", str(recipe)]
            with subprocess.Popen(command, cwd=PROJECT, env=card_environment("T4"), text=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT) as first:
                while not (log.is_file() and log.read_text(encoding="utf-8")):
                    assert first.poll() is None, first.communicate()[0][-3000:]
                    time.sleep(0.05)
                first.terminate()
                said = first.communicate(timeout=300)[0]
            assert first.returncode == 75, said[-3000:]
        done = kit("train", str(recipe), **card_environment("T4"))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        losses[name] = json.loads((tmp_path / name / "result.json").read_text(encoding="utf-8"))["train"]
    assert losses["stopped"]["resumed_from"] in (1, 2)
    assert losses["stopped"]["losses"] == losses["whole"]["losses"]
