"""The guide of a plain torchrun script from its first command to its last, in its order, on the starter model."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kit.models.starter import starter_model
from kit.recipe.recipe import Recipe
from kit.runs.run import read_result
from support.command import PROJECT
from support.hub_stand_in import TOKEN, serving

pytestmark = pytest.mark.slow
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
JOKES = [("为什么{}不能当饭吃？", "因为{}不是食物，吃了对身体没有好处。"),
         ("{}会自己回家吗？", "不会，{}没有腿，也不认识路。")]
THINGS = ["月亮", "石头", "雨伞", "镜子", "书包", "钟表"]
SCRIPT = """#!/bin/bash
export CUDA_VISIBLE_DEVICES=0,1
torchrun --nproc_per_node={processes} {script}.py \\
    --dataset_name_or_path data/m-a-p/COIG-CQIA/ruozhiba/ruozhiba.jsonl \\
    --pretrained_model_name_or_path models/{model} \\
    --output_dir output --padding_side left --per_device_train_batch_size 2 --gradient_accumulation_steps 1 \\
    --learning_rate 1e-3 --num_train_epochs 1 --logging_steps 1 --save_strategy epoch --save_total_limit 2 {more}
"""
Command = Callable[..., str]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """A command in a folder of the reader's; the whole of what it printed."""
    folder = tmp_path / "我的 项目"
    folder.mkdir()

    def run(*arguments: str, **environment: str) -> str:
        done = subprocess.run([sys.executable, "-m", *arguments], cwd=folder, capture_output=True, text=True,
                              timeout=600, env={**os.environ, "PYTHONPATH": str(PROJECT), **environment})
        assert done.returncode == 0, (arguments, done.stdout[-2000:], done.stderr[-3000:])
        return done.stdout

    run.folder = folder  # type: ignore[attr-defined]
    return run


def test_from_the_first_command_to_the_last(command: Command, tmp_path: Path) -> None:
    folder: Path = command.folder  # type: ignore[attr-defined]
    rows = tmp_path / "rows"
    (rows / "ruozhiba").mkdir(parents=True)
    (rows / "ruozhiba" / "ruozhiba.jsonl").write_text("".join(
        json.dumps({"instruction": ask.format(thing), "input": "", "output": say.format(thing)}) + "\n"
        for thing in THINGS for ask, say in JOKES), encoding="utf-8")

    # Data and model, from a hub.
    with serving(tmp_path / "hub") as hub:
        hub.hold(MODEL, starter_model())
        hub.hold("m-a-p/COIG-CQIA", rows)
        there = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        command("kit", "download", MODEL, "--to", "models", **there)
        command("kit", "download", "m-a-p/COIG-CQIA", "--data", "--include", "ruozhiba/*", "--to", "data", **there)

    # LoRA, on two devices.
    for name, processes, script, more in (("lora", 2, "run_qwen_no_sft_trainer", ""),
                                          ("qlora4", 1, "sft_qwen_quantization", "--quantization_bit 4")):
        (folder / f"{name}.bash").write_text(SCRIPT.format(processes=processes, script=script, model=MODEL, more=more))
        # As there, adapters only.
        command("kit", "new", name, "--from", f"{name}.bash", "save_merged=none", "max_new_tokens=16")
        recipe = Recipe.load(folder / f"{name}.yaml")
        assert (recipe.load_in_4bit, recipe.learning_rate, recipe.save_strategy) == (name == "qlora4", 1e-3, "epoch")
    command("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "kit", "train", "lora.yaml")
    assert read_result(folder / "output" / "lora")["train"]["steps"] == len(THINGS) * len(JOKES) // 4

    # QLoRA in 4 bits, with gradient checkpointing.
    command("kit", "train", "qlora4.yaml")
    assert read_result(folder / "output" / "qlora4")["status"] == "finished"

    # A file of questions, answered by a checkpoint on its base in as many bits, and by the base alone.
    [checkpoint] = (folder / "output" / "qlora4" / "checkpoints").glob("checkpoint-*")
    (folder / "questions.txt").write_text("月亮会自己回家吗？\n为什么石头不能当饭吃？\n", encoding="utf-8")
    short = ("max_new_tokens=12", "max_input_length=1024")
    said = command("kit", "answer", str(checkpoint.relative_to(folder)), "questions.txt", "--base", f"models/{MODEL}",
                   "load_in_4bit=true", *short, "--show", "-o", "answers.csv")
    assert "月亮会自己回家吗？" in said
    command("kit", "answer", f"models/{MODEL}", "answers.csv", *short, "-o", "both.csv", "--answer-column", "base")
    with (folder / "both.csv").open(encoding="utf-8-sig", newline="") as file:
        both = list(csv.DictReader(file))
    assert len(both) == 2 and all(row["answer"] and row["base"] for row in both)
    assert any(row["answer"] != row["base"] for row in both), "the adapter answers as its base does"
