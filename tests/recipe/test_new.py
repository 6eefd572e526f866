"""`kit new --from`: each tool's files become recipes that train with the values that would have trained there."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

import kit
from kit.common.errors import KitError
from kit.recipe.fields import PROJECTIONS
from kit.recipe.new import new
from kit.recipe.recipe import Recipe
from support.command import kit as command
from support.tiny_runs import talks, write_rows

FILES = Path(__file__).parent / "foreign"
ALL = ["all-linear"]
# transformers' own defaults, where a file says nothing: (our field, value).
TRAINER = {"optim": "adamw_torch_fused", "weight_decay": 0.0, "seed": 42}
# What each file trains with there, by the tool's own source where the file says nothing.
EFFECTIVE: dict[str, dict[str, Any]] = {
    "llamafactory-qlora.yaml": {
        **TRAINER, "model_name": "Qwen/Qwen2-7B-Instruct", "load_in_4bit": True, "full_finetuning": False, "r": 8,
        "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ALL, "max_seq_length": 1024, "prompt_style": "chat",
        "dataset": ["data/dataset_info.json#qwen_train_data", "data/dataset_info.json#identity"],
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, "learning_rate": 1e-4,
        "num_train_epochs": 1.0, "max_steps": None, "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "bf16": True,
        "use_gradient_checkpointing": "unsloth", "test_size": 0.1, "eval_strategy": "steps", "eval_steps": 500,
        "train_on_responses_only": True, "output_dir": "saves/qwen2-7b/qlora/sft", "logging_steps": 100},
    "llamafactory-full.yaml": {
        **TRAINER, "full_finetuning": True, "load_in_4bit": False, "learning_rate": 1e-5, "num_train_epochs": 3.0,
        "gradient_accumulation_steps": 2, "max_train_samples": 1000, "deepspeed": None, "trust_remote_code": False,
        "dataset": "data/dataset_info.json#qwen_train_data", "resume_from_checkpoint": True},
    "llamafactory.sh": {
        **TRAINER, "optim": "adamw_torch", "model_name": "/root/autodl-tmp/model/q3b", "r": 8, "lora_alpha": 256,
        "target_modules": ["q_proj", "v_proj"], "fp16": True, "bf16": None, "learning_rate": 5e-5,
        "dataset": "/root/data/dataset_info.json#lawbench_train", "warmup_steps": 0, "packing": False,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "num_train_epochs": 3.0},
    "llamafactory-merge.yaml": {"model_name": "Qwen/Qwen2-7B", "adapter_name_or_path": None, "dataset": "starter"},
    "pipeline.yaml": {
        **TRAINER, "model_name": "Qwen/Qwen2.5-7B-Instruct", "dataset": "dataset/novel_finetuning_dataset.jsonl",
        "load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16", "r": 32, "lora_alpha": 64, "lora_dropout": 0.1,
        "target_modules": PROJECTIONS[:4], "prompt_style": "chatml", "learning_rate": 2e-4, "num_train_epochs": 3,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "lr_scheduler_type": "linear",
        "warmup_steps": 0, "use_gradient_checkpointing": True, "dataloader_pin_memory": False, "save_steps": 100,
        "save_strategy": "steps", "resume_from_checkpoint": True, "output_dir": "output/qwen_qlora_model"},
    "torchrun.sh": {
        **TRAINER, "model_name": "/models/Qwen2.5-0.5B", "dataset": "data/ruozhiba 弱智吧.jsonl", "load_in_8bit": True,
        "load_in_4bit": False, "output_dir": "output/ruozhiba_qlora8", "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4, "learning_rate": 2e-4, "num_train_epochs": 3, "save_strategy": "epoch",
        "save_total_limit": 2, "use_gradient_checkpointing": "unsloth"},
    "finetune.sh": {
        **TRAINER, "optim": "adamw_torch", "weight_decay": 0.01, "model_name": "Qwen/Qwen2-7B",
        "dataset": "example_data.jsonl", "full_finetuning": True, "load_in_4bit": False, "max_seq_length": 512,
        "num_train_epochs": 5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8,
        "learning_rate": 3e-4, "adam_beta2": 0.95, "warmup_steps": 0.01, "lr_scheduler_type": "cosine", "bf16": True,
        "train_on_responses_only": False, "lazy_preprocess": True, "use_gradient_checkpointing": True,
        "deepspeed": None, "eval_strategy": "no", "save_steps": 10},
    "axolotl-qlora.yaml": {
        "model_name": "Qwen/Qwen2-7B", "load_in_4bit": True, "full_finetuning": False, "r": 32, "lora_alpha": 64,
        "lora_dropout": 0.05, "target_modules": ALL, "dataset": "tatsu-lab/alpaca", "prompt_style": "alpaca",
        "max_seq_length": 2048, "packing": True, "num_train_epochs": 4, "optim": "adamw_torch_fused",
        "lr_scheduler_type": "cosine", "learning_rate": 2e-4, "warmup_steps": 10, "weight_decay": 0.0,
        "train_on_responses_only": True, "test_size": 0.05, "eval_strategy": "epoch", "bf16": None,
        "trust_remote_code": False, "fsdp": False, "seed": 42},
    "axolotl-full.yml": {
        "full_finetuning": True, "max_seq_length": 4096, "dataset": "data/chats.jsonl",
        "columns": {"messages": "dialogue", "role": "speaker", "content": "text"}, "max_steps": 100,
        "num_train_epochs": None, "optim": "adamw_bnb_8bit", "lr_scheduler_type": "constant", "warmup_steps": 0.03,
        "learning_rate": 2e-5, "train_on_responses_only": False, "use_gradient_checkpointing": "unsloth"},
    "swift-sft.sh": {
        "model_name": "Qwen/Qwen2.5-7B-Instruct", "hub": "modelscope", "r": 8, "lora_alpha": 32, "lora_dropout": 0.05,
        "target_modules": ALL, "system_prompt": "You are a helpful assistant.", "warmup_steps": 0.05,
        "dataset": ["AI-ModelScope/alpaca-gpt4-data-zh", "AI-ModelScope/alpaca-gpt4-data-en", "swift/self-cognition"],
        "adam_beta2": 0.95, "weight_decay": 0.1, "lr_scheduler_type": "cosine", "gradient_accumulation_steps": 16,
        "num_train_epochs": 1, "dtype": "bfloat16", "max_seq_length": 2048, "run_name": "mine", "seed": 42},
    "swift.yaml": {
        "dataset": "swift/self-cognition", "max_train_samples": 1000, "test_size": 0.01, "learning_rate": 1e-4,
        "gradient_accumulation_steps": 16, "eval_strategy": "steps", "eval_steps": 1000, "num_train_epochs": 5},
    "swift-full.sh": {
        "model_name": "qwen/Qwen2-7B", "hub": "huggingface", "full_finetuning": True, "learning_rate": 1e-5,
        "gradient_accumulation_steps": 4, "max_train_samples": 500, "eval_dataset": "held.jsonl",
        "max_seq_length": 4096, "overlong_rows": "truncate_prompt", "train_on_responses_only": False,
        "deepspeed": None},
    "unsloth_alpaca.py": {
        "model_name": "/root/autodl-tmp/models/Qwen/Qwen3-4B", "load_in_4bit": False, "local_files_only": True,
        "r": 32, "lora_alpha": 16, "target_modules": PROJECTIONS, "use_gradient_checkpointing": "unsloth",
        "dataset": "/root/autodl-tmp/datasets/yahma/alpaca-cleaned", "prompt_style": "alpaca", "max_seq_length": 1024,
        "train_on_responses_only": False, "max_steps": 60, "num_train_epochs": None, "learning_rate": 2e-4,
        "warmup_steps": 5, "optim": "adamw_8bit", "weight_decay": 0.01, "gguf": ["q4_k_m", "q8_0"],
        "save_merged": "16bit", "bf16": None, "seed": 3407, "per_device_train_batch_size": 2},
    "unsloth_chat.py": {
        "load_in_4bit": True, "max_seq_length": 4096, "r": 32, "lora_alpha": 64, "dataset": "rows.jsonl",
        "max_train_samples": 1000, "train_on_responses_only": True, "prompt_style": "chat", "num_train_epochs": 2,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "weight_decay": 0.001,
        "warmup_steps": 0.03, "learning_rate": 1e-4},
    "trl_peft.py": {
        **TRAINER, "model_name": "Qwen/Qwen2.5-0.5B", "load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16",
        "r": 8, "lora_alpha": 32, "target_modules": ALL, "max_seq_length": 512, "learning_rate": 2e-5,
        "num_train_epochs": 3, "use_gradient_checkpointing": "unsloth", "train_on_responses_only": False},
}  # fmt: skip
# What has no counterpart, and is said.
LOST = {
    "llamafactory-full.yaml": ("trust_remote_code", "deepspeed=recipes/deepspeed/zero3.json", "of all together"),
    "llamafactory-merge.yaml": ("kit export saves/qwen2-7b/lora/sft --base Qwen/Qwen2-7B "
                                "--out models/qwen2-7b-sft-lora-merged",),
    "llamafactory.sh": ("--template: default – roles in plain words there",),
    "torchrun.sh": ("torchrun --nproc_per_node 2 -m kit train", "--padding_side", "LoRA's rank"),
    "axolotl-full.yml": ("wandb_project: mine",),
    "swift-sft.sh": ("--model_author: swift", "neither a subset nor a number of rows"),
    "unsloth_chat.py": ("model_name = args.model: not known before the code runs", "no model is named"),
    "trl_peft.py": ("no data set is named",),
}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def made(source: Path | str, **fields: Any) -> tuple[Recipe, str]:
    """(the recipe, its text) of `kit new mine --from source`."""
    Path("mine.yaml").unlink(missing_ok=True)
    new("mine", str(source), fields)
    return Recipe.load("mine.yaml"), Path("mine.yaml").read_text(encoding="utf-8")


def test_every_example_has_its_values() -> None:
    assert {path.name for path in FILES.iterdir() if path.is_file()} == set(EFFECTIVE)


@pytest.mark.parametrize("name", EFFECTIVE)
def test_it_trains_with_what_would_have_trained_there(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, text = made(FILES / name)
    assert {field: getattr(recipe, field) for field in EFFECTIVE[name]} == EFFECTIVE[name]
    said = capsys.readouterr().out
    for words in LOST.get(name, ()):
        assert words in said and words in text
    for line in text.splitlines():  # each line says what it was called there
        assert line.startswith("#") or not line or " # " in line


def test_the_comment_says_the_name_there_or_whose_default_it_is() -> None:
    lines = made(FILES / "llamafactory-qlora.yaml")[1].splitlines()
    comments = {line.partition(":")[0]: line.partition(" # ")[2] for line in lines if not line.startswith("#")}
    assert comments["load_in_4bit"] == "quantization_bit: 4" and comments["max_seq_length"] == "cutoff_len"
    assert comments["r"] == "LLaMA-Factory's default" and comments["seed"] == "transformers' default"
    assert comments["warmup_steps"] == "warmup_ratio"
    assert "lora_config.r" in made(FILES / "pipeline.yaml")[1] and "--learning_rate" in made(FILES / "finetune.sh")[1]


@pytest.mark.parametrize("line, fields", [
    ("bash finetune.sh -m /m/Qwen2-7B -d 'my rows.jsonl' --use_lora True --q_lora True",
     {"model_name": "/m/Qwen2-7B", "dataset": "my rows.jsonl", "load_in_4bit": True, "r": 64, "lora_alpha": 16,
      "lora_dropout": 0.05, "max_seq_length": 512, "learning_rate": 3e-4, "train_on_responses_only": False}),
    ("bash finetune.sh -m <model_path> -d <data_path> --deepspeed <config_path> [--use_lora True] [--q_lora True]",
     {"model_name": "starter", "load_in_4bit": True, "r": 64, "num_train_epochs": 5}),
    ("FORCE_TORCHRUN=1 llamafactory-cli train {files}/llamafactory-qlora.yaml learning_rate=3e-5",
     {"learning_rate": 3e-5, "load_in_4bit": True}),
    ("llamafactory-cli train --stage sft --adapter_name_or_path saves/a --dataset x --resume_from_checkpoint saves/b",
     {"adapter_name_or_path": "saves/a", "resume_from_checkpoint": True}),
    ("llamafactory-cli train --stage sft --template qwen3_nothink --dataset a", {"enable_thinking": False, "r": 8}),
    ("swift sft --model q --dataset a.jsonl#100 --train_type lora", {"max_train_samples": 100, "dataset": "a.jsonl"}),
    ("swift sft --config {files}/swift.yaml --learning_rate 5e-5", {"learning_rate": 5e-5, "num_train_epochs": 5}),
    ("accelerate launch -m axolotl.cli.train {files}/axolotl-qlora.yaml", {"r": 32, "prompt_style": "alpaca"}),
    ("torchrun --nproc_per_node 2 my.py --lr 1e-3 --epochs 2 --batch_size 3 --model_name_or_path x",
     {"learning_rate": 1e-3, "num_train_epochs": 2, "per_device_train_batch_size": 3}),
    ("CUDA_VISIBLE_DEVICES=0 python src/train_bash.py --stage sft --do_train --model_name_or_path /m --dataset a,b "
     "--template qwen --finetuning_type lora --lora_target q_proj,v_proj --quantization_bit 4 --fp16",
     {"r": 8, "load_in_4bit": True, "target_modules": PROJECTIONS[:3:2], "max_seq_length": 2048, "fp16": True,
      "dataset": ["data/dataset_info.json#a", "data/dataset_info.json#b"]}),
    ("python finetune.py --base_model 'org/llama' --data_path rows.json --micro_batch_size 4 --num_epochs 3 "
     "--cutoff_len 512 --val_set_size 0.1 --lora_r 8 --lora_target_modules '[q_proj,v_proj]' --train_on_inputs",
     {"model_name": "org/llama", "full_finetuning": False, "r": 8, "per_device_train_batch_size": 4, "test_size": 0.1,
      "target_modules": PROJECTIONS[:3:2], "train_on_responses_only": False, "max_seq_length": 512}),
    ("python llm_sft.py --model_type qwen-14b-chat --sft_type lora --template_type chatml --dtype bf16 --dataset x "
     "--train_dataset_sample -1 --max_length 2048 --quantization_bit 4 --lora_target_modules ALL --lora_dropout_p 0.",
     {"prompt_style": "chatml", "load_in_4bit": True, "dtype": "bfloat16", "lora_alpha": 32, "lora_dropout": 0.0,
      "target_modules": ALL, "hub": "modelscope", "max_train_samples": None}),
])  # fmt: skip
def test_a_command_line_in_its_place(line: str, fields: dict[str, Any]) -> None:
    recipe, _ = made(line.format(files=shlex.quote(str(FILES))))
    assert {field: getattr(recipe, field) for field in fields} == fields


def test_fields_on_top_and_one_of_our_recipes() -> None:
    recipe, text = made(FILES / "pipeline.yaml", learning_rate=1e-5, max_steps=7)
    assert (recipe.learning_rate, recipe.max_steps, recipe.num_train_epochs) == (1e-5, 7, None)
    recipe, text = made("recipes/qwen3-4b-alpaca.yaml", r=8, target_modules=["q_proj"], max_seq_length=512, top_k=3)
    original = Recipe.load("recipes/qwen3-4b-alpaca.yaml")
    assert (recipe.r, recipe.target_modules, recipe.top_k) == (8, ["q_proj"], 3)
    assert recipe.model_copy(update={"r": 16, "target_modules": PROJECTIONS, "top_k": 0, "max_seq_length": 2048,
                                     "run_name": original.run_name}) == original
    assert "# rank = capacity" in text and "kit run mine.yaml" in text


def test_without_a_source_every_line_is_explained() -> None:
    new("带 名".replace(" ", ""), None, {"dataset": "a.jsonl"})
    assert Recipe.load("带名.yaml").dataset == "a.jsonl"
    new("sub/other", None, {})
    assert Recipe.load("sub/other.yaml").run_name == "other"


def test_data_beside_the_file_is_found(tmp_path: Path) -> None:
    """LLaMA-Factory's examples lie two folders below its `data`."""
    deep = tmp_path / "LLaMA Factory" / "examples" / "train_lora"
    deep.mkdir(parents=True)
    (tmp_path / "LLaMA Factory" / "data").mkdir()
    (tmp_path / "LLaMA Factory" / "data" / "dataset_info.json").write_text("{}")
    shutil.copy(FILES / "llamafactory-full.yaml", deep / "中文.yaml")
    recipe, _ = made(deep / "中文.yaml")
    assert recipe.dataset == f"{tmp_path / 'LLaMA Factory' / 'data' / 'dataset_info.json'}#qwen_train_data"


SCRIPT = """
import argparse
from dataclasses import dataclass, field
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

@dataclass
class More:
    max_length: int = field(default=768, metadata={"help": "tokens"})
    lora_target_modules: list = field(default_factory=lambda: ["q_proj", "v_proj"])
    nothing: str = None

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset_name_or_path", required=True)
    parser.add_argument("--pretrained_model_name_or_path", default="Qwen/Qwen2.5-0.5B")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    args = parser.parse_args()
    model = get_peft_model(base, LoraConfig(r=12, lora_alpha=24, lora_dropout=0.1, target_modules=args.targets))
    settings = TrainingArguments(learning_rate=args.learning_rate, warmup_ratio=0.1, weight_decay=0.02)
"""


def test_a_script_beside_the_command_shows_what_no_argument_says(tmp_path: Path) -> None:
    (tmp_path / "sft_qwen_quantization.py").write_text(SCRIPT)
    shutil.copy(FILES / "torchrun.sh", tmp_path / "run.sh")
    recipe, text = made("run.sh")
    assert (recipe.r, recipe.lora_alpha, recipe.lora_dropout, recipe.target_modules) == (12, 24, 0.1, PROJECTIONS[:3:2])
    assert (recipe.max_seq_length, recipe.warmup_steps, recipe.weight_decay) == (768, 0.1, 0.02)
    assert (recipe.model_name, recipe.learning_rate) == ("/models/Qwen2.5-0.5B", 2e-4), "the command counts"
    assert "# sft_qwen_quantization.py: lora_alpha" in text
    recipe, _ = made("sft_qwen_quantization.py")
    assert (recipe.model_name, recipe.learning_rate, recipe.r) == ("Qwen/Qwen2.5-0.5B", 1e-5, 12)


def test_scripts_that_start_each_other_are_read_once() -> None:
    Path("a.sh").write_text("bash b.sh --lora_rank 4 --stage sft --cutoff_len 99\n")
    Path("b.sh").write_text("bash a.sh --lora_rank 5 --stage sft --learning_rate 1e-3\n")
    recipe, text = made("a.sh")
    assert (recipe.r, recipe.max_seq_length, recipe.learning_rate) == (4, 99, 1e-3) and "b.sh: --learning_rate" in text


@pytest.mark.parametrize("end", [
    " > log.txt 2>&1 &", " 2>&1 | tee train.log", " &> log.txt", " >>log 2>&1", "; echo done", " && echo 'a > b; c'",
    " &", " < answers.txt"])
@pytest.mark.parametrize("option, field, value", [
    ("--learning_rate 1e-5", "learning_rate", 1e-5), ("--save_total_limit 2", "save_total_limit", 2),
    ("--lora_target_modules q_proj 'v_proj'", "target_modules", ["q_proj", "v_proj"])])
def test_where_a_commands_output_goes_is_no_value(end: str, option: str, field: str, value: Any) -> None:
    Path("last.sh").write_text("cd x && nohup python finetune.py --model_name_or_path a/b --data_path 'a b.jsonl' "
                               f"--use_lora True {option}{end}\n")
    recipe, _ = made("last.sh")
    assert getattr(recipe, field) == value and recipe.dataset == "a b.jsonl"


def test_an_option_of_another_script_is_known_by_the_table() -> None:
    recipe, text = made("python t.py --model_name_or_path a/b --dataset_name_or_path rows.jsonl --learning_rate 1e-4")
    assert recipe.dataset == "rows.jsonl" and "not known" not in text


def test_a_method_that_is_not_here_is_refused_and_a_merge_says_what_is_next(
        capsys: pytest.CaptureFixture[str]) -> None:
    Path("freeze.yaml").write_text("model_name_or_path: a/b\nstage: sft\nfinetuning_type: freeze\ndataset: x.json\n")
    with pytest.raises(KitError, match="finetuning_type: freeze"):
        made("freeze.yaml")
    _, text = made(FILES / "llamafactory-merge.yaml")
    assert "next: kit export saves/" in capsys.readouterr().out and "kit run" not in text


@pytest.mark.parametrize("line", [
    "python infer_qlora.py --base_model_path /path/to/b --lora_path /path/to/l --question_file /path/to/q.txt",
    "swift infer --adapters x --stream true", "llamafactory-cli chat x.yaml --template qwen"])
def test_a_command_that_answers_is_told_so(line: str) -> None:
    with pytest.raises(KitError, match="answers questions and trains nothing"):
        made(line)


def notebook(path: Path, *cells: str) -> Path:
    code = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {},
                                "cells": [{**code, "source": cell} for cell in cells]}), encoding="utf-8")
    return path


def test_a_notebook_is_read_and_never_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    source = (FILES / "unsloth_alpaca.py").read_text(encoding="utf-8")
    path = notebook(tmp_path / "笔记 本.ipynb", "!pip install unsloth\n%matplotlib inline\n",
                    "%%bash\nrm -rf /nowhere\n", f"open({str(mark)!r}, 'w')\nraise SystemExit\n",
                    "if True:\n    !nvidia-smi\n", "this is no Python", source)
    recipe, text = made(path)
    assert {field: getattr(recipe, field) for field in EFFECTIVE["unsloth_alpaca.py"]} == \
        EFFECTIVE["unsloth_alpaca.py"]
    assert not mark.exists() and "a cell that is no Python" in text


def test_values_that_only_running_would_tell_are_named() -> None:
    growing = "".join(f"a{n + 1} = a{n} + a{n}\nl{n + 1} = [l{n}, l{n}]\n" for n in range(60))
    Path("x.py").write_text("from trl import SFTConfig\na0 = 'x'\nl0 = [1]\n" + growing + (
        "SFTConfig(learning_rate=rate(), output_dir=a60, seed=l60, max_length=9 ** 9 ** 9, weight_decay=1 / 0,\n"
        "          num_train_epochs=1 + 1, **options)\n"))
    recipe, text = made("x.py")
    assert recipe.num_train_epochs == 2 and recipe.output_dir == "runs"
    for said in ("learning_rate = rate()", "output_dir = a60", "seed = l60", "max_length = 9 ** 9 ** 9",
                 "weight_decay = 1 / 0", "SFTConfig(**…)"):
        assert f"{said}: not known before the code runs" in text


TOKEN = "hf_" + "Ab3dE5gH" * 5  # made up


def test_no_secret_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    Path("secret.yaml").write_text(yaml.safe_dump({
        "model_name_or_path": f"https://user:{TOKEN}@host/x", "finetuning_type": "lora", "hf_hub_token": TOKEN,
        "swanlab_api_key": "correct-horse", "template": TOKEN, "lora_rank": 4}))
    recipe, text = made("secret.yaml")
    said = capsys.readouterr().out
    assert recipe.r == 4 and recipe.model_name == "starter"
    assert TOKEN not in text + said and "correct-horse" not in text + said and "HF_TOKEN" in said
    Path("n.py").write_text(f"from unsloth import FastLanguageModel\nKEY = {TOKEN!r}\n"
                            "FastLanguageModel.from_pretrained('m', token=KEY)\n"
                            "FastLanguageModel.get_peft_model(model, r=4)\n")
    assert TOKEN not in made("n.py")[1] + capsys.readouterr().out


def test_text_of_a_file_can_not_become_a_line_of_the_recipe() -> None:
    Path("odd.yaml").write_text(yaml.safe_dump({
        "model_name_or_path": "x\nr: 1000\n#", "lora_rank": 8, "finetuning_type": "lora\nlora_alpha: 9",
        "foo": "a\u2028r: 77\x1b[2J", "k\ney": 5, "default_system": "two\nlines: ok # so\n", "stage": "sft"}))
    recipe, text = made("odd.yaml")
    assert (recipe.model_name, recipe.r, recipe.lora_alpha) == ("x\nr: 1000\n#", 8, 16)
    assert recipe.system_prompt == "two\nlines: ok # so\n" and "\x1b" not in text


def aliases(kind: str) -> str:
    lines = "a: &a [x]\n" if kind == "list" else "a: &a {x: 1}\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True):
        inside = ",".join(["*" + a] * 9)
        lines += f"{b}: &{b} [{inside}]\n" if kind == "list" else f"{b}: &{b} {{<<: [{inside}]}}\n"
    return lines + "base_model: x\n"


@pytest.mark.parametrize("name, content, words", [
    ("empty.yaml", "", "is empty"), ("binary.yaml", b"\xff\xfe\x00", "not UTF-8"), ("nul.yaml", "a\0b", "no text"),
    ("list.yaml", "- a\n- b\n", "a list, where lines"), ("words.yaml", "just words", "a str, where lines"),
    ("torn.yaml", "a: [1", "not YAML"), ("tag.yaml", "base_model: !!python/object/apply:os.system ['x']\n", "tags"),
    ("self.yaml", "base_model: &a [*a]\n", "refers to nothing before it"),
    ("list-bomb.yaml", aliases("list"), "more than"), ("merge-bomb.yaml", aliases("map"), "more than"),
    ("deep.yaml", "base_model: " + "[" * 3000, "in one another"), ("dpo.yaml", "stage: dpo\nlora_rank: 8\n", "dpo"),
    ("unknown.yaml", "foo: 1\nbar: 2\n", "no option of a known tool"),
    ("bad.ipynb", "not json", "no notebook"), ("none.ipynb", '{"cells": []}', "trains nothing"),
    ("plain.py", "print(1)\n", "trains nothing"),
    ("grpo.py", "GRPOTrainer(model=m)\nget_peft_model(m)\n", "GRPOTrainer"),
    ("eyes.py", "FastVisionModel.get_peft_model(FastVisionModel.from_pretrained('x'))\n", "only text is trained"),
    ("long.py", "SFTConfig(seed=" + "+".join(["1"] * 20_000) + ")\n", "no Python"),
    ("none.sh", "echo hi\n", "no command"),
    ("nothing.sh", "torchrun train.py\npython x.py\n", "no option of a known tool"),
])  # fmt: skip
def test_files_of_any_making_end_in_one_message(name: str, content: str | bytes, words: str) -> None:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(KitError, match=words) as error:
        made(name)
    assert error.value.hint and len(str(error.value)) < 1000 and not Path("mine.yaml").exists()


def test_anchors_are_read_as_far_as_they_stay_small() -> None:
    Path("a.yaml").write_text("base: &b {lora_r: 4, lora_alpha: 6}\n<<: *b\n"
                              "base_model: x\nmicro_batch_size: 3\nadapter: lora\n")
    recipe, _ = made("a.yaml")
    assert (recipe.r, recipe.lora_alpha, recipe.per_device_train_batch_size) == (4, 6, 3)


def test_values_that_a_field_refuses_are_said_and_left_out() -> None:
    Path("x.yaml").write_text(yaml.safe_dump({
        "model_name_or_path": "x", "finetuning_type": "lora", "lora_rank": 99_999, "learning_rate": "fast",
        "logging_steps": 0.1, "max_steps": 10, "num_train_epochs": 3, "eval_strategy": "steps", "save_strategy": "best",
        "lr_scheduler_type": "cosine_with_min_lr", "load_best_model_at_end": True}))
    recipe, text = made("x.yaml")
    assert (recipe.r, recipe.max_steps, recipe.num_train_epochs, recipe.eval_strategy) == (16, 10, None, "no")
    assert recipe.lr_scheduler_type == "cosine"
    for said in ("lora_rank: 99999", "learning_rate: fast", "logging_steps: 0.1", "num_train_epochs: 3",
                 "save_strategy", "eval_strategy: steps – no held-out rows", "load_best_model_at_end: true"):
        assert said in text, said


def test_nothing_is_overwritten_and_names_are_checked() -> None:
    Path("mine.yaml").write_text("r: 8\n")
    for name, words in (("mine", "is there already"), ("my recipe", "can't be a run's"), ("mine.yaml", "already")):
        with pytest.raises(KitError, match=words):
            new(name, str(FILES / "swift.yaml"), {})
    assert Path("mine.yaml").read_text() == "r: 8\n"
    Path("file").touch()
    for name, words in ((".", "can't be a run's name"), ("", "can't be a run's"), ("file/x", "can't be written")):
        with pytest.raises(KitError, match=words):
            new(name, str(FILES / "swift.yaml"), {})
    with pytest.raises(KitError, match="pattern"):
        new("other", str(FILES / "swift.yaml"), {"run_name": "a b"})
    with pytest.raises(KitError, match=r"there is no file nosuch\.yaml"):
        new("other", "nosuch.yaml", {})
    with pytest.raises(KitError, match="is a folder"):
        new("other", ".", {})
    with pytest.raises(KitError, match="1 problem"):
        new("other", str(FILES / "swift.yaml"), {"r": 0})


PIECES = ("null", "[]", "'", '"', "$X", "$(ls)", "\\", "\n", "#", "&a", "*a", "!!x", "=", "--", "1e400", "{a: 1}", "()",
          "**x", "lambda: 0", "datasets", "stage", "export_dir", "中文", "\x1b", "\u2028", "- ")


@pytest.mark.slow
def test_damaged_files_are_read_or_refused() -> None:
    """Pieces cut out, put in and taken from other files: a recipe that loads, or one KitError."""
    random = Random(0)
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(FILES.iterdir()) if path.is_file()}
    outcomes = {"recipe": 0, "refused": 0}
    for _ in range(100):
        name, text = random.choice(list(texts.items()))
        for _ in range(random.randint(1, 4)):
            start, other = random.randrange(len(text) + 1), random.choice(list(texts.values()))
            piece = random.choice(("", random.choice(PIECES), other[:random.randrange(200)][-60:]))
            text = text[:start] + piece + text[start + random.choice((0, 0, 5, 30)):]
        Path(f"damaged{Path(name).suffix}").write_text(text, encoding="utf-8")
        try:
            made(f"damaged{Path(name).suffix}")
            outcomes["recipe"] += 1
        except KitError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 10


@pytest.mark.slow
def test_by_the_command_and_two_steps_with_the_files_values(tmp_path: Path, tiny_starter: Path) -> None:
    """The whole way: a pipeline's file, the command, and what PEFT and TRL were really given."""
    rows = write_rows(tmp_path / "对话 rows.jsonl", talks())
    path = tmp_path / "my config.yaml"
    values = yaml.safe_load((FILES / "pipeline.yaml").read_text(encoding="utf-8"))
    values |= {"model_name_or_path": str(tiny_starter), "dataset_path": str(rows)}
    values["quantization_config"]["load_in_4bit"] = False
    values["lora_config"]["target_modules"] = "all-linear"
    values["training_args"] |= {"max_steps": 2, "lr_scheduler_type": "cosine", "warmup_ratio": 0.5, "adam_beta2": 0.95}
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    done = command("new", str(tmp_path / "mine"), "--from", str(path), f"output_dir={tmp_path}", "max_train_samples=16")
    assert done.returncode == 0 and "ChatML QLoRA pipelines" in done.stdout, done.stdout + done.stderr
    refused = command("lint", "--recipe", str(path))
    assert refused.returncode == 2 and f"kit new NAME --from '{path}'" in refused.stderr

    recipe = Recipe.load(tmp_path / "mine.yaml")
    model, tokenizer = kit.load_model(recipe)
    model = kit.add_lora(model, recipe)
    trainer = kit.make_trainer(model, tokenizer, kit.load_data(recipe, tokenizer), recipe)
    lora, args, asked = model.peft_config["default"], trainer.args, values["training_args"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (32, 64, 0.1)
    assert set(lora.target_modules) == set(PROJECTIONS) and lora.bias == "none"
    assert (args.learning_rate, args.lr_scheduler_type, args.warmup_steps) == (2e-4, "cosine", 0.5)
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "adam_beta2", "max_steps"):
        assert getattr(args, name) == asked[name], name
    assert (args.weight_decay, args.seed, args.optim) == (0.0, 42, "adamw_torch_fused")
    assert tokenizer.chat_template.startswith("{% for message in messages %}{{ '<|im_start|>'")
    assert kit.train(trainer, recipe).steps == 2
