"""Every recipe that is shipped: its header is true, its lines are needed, and two steps of it go the whole way.

The models are tiny, with the architecture, vocabulary and chat template of the recipe's own, and so are the data, in
the form the recipe's data have.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import kit
from kit.common.errors import KitError
from kit.readiness.doctor import preflight
from kit.recipe.reading import parse_overrides
from kit.recipe.recipe import Recipe
from kit.runs.run import Run
from support.command import PROJECT
from support.documents import check_name, kit_words
from support.tiny_runs import talks

RECIPES = {path.stem: path for path in sorted((PROJECT / "recipes").glob("*.yaml"))}
NEW = [name for name in RECIPES if name != "quickstart"]  # that one is run as it is by tests/whole/test_run.py
QWEN3 = ("qwen3-0.6b-lora", "qwen3-1.7b-lora", "qwen3-8b-qlora", "qwen3-14b-qlora", "qwen3-32b-qlora")
WITH_PICTURES = "qwen3.5-4b-lora"  # run by tests/export/test_multimodal.py
OWN_ROWS = {"qwen2.5-7b-chatml-qlora": "data/my-novel.jsonl", "qwen2-7b-full": "data/my-messages.jsonl",
            "qwen2-7b-lora": "data/my-messages.jsonl", "qwen2-7b-qlora": "data/my-messages.jsonl",
            **dict.fromkeys((*QWEN3, WITH_PICTURES), "data/my-messages.jsonl")}
LIKE_ANOTHER = {"qwen3-1.7b-lora", "qwen3-14b-qlora", "qwen3-32b-qlora"}  # but for numbers that two steps don't see
OPTIONS = (PROJECT / "docs" / "options.md").read_text(encoding="utf-8")
VARIABLES = {"CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_TOKEN", "KIT_CACHE"}


def header(name: str) -> list[str]:
    """The comment lines above the first blank line, without their sign."""
    lines = RECIPES[name].read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    return [line.removeprefix("#") for line in lines if line.startswith("#")]


def commands(name: str) -> list[list[str]]:
    """The commands of a header: the lines that are set in further, continued ones joined."""
    text = "\n".join(header(name)).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith("   ")]


@pytest.mark.parametrize("name", NEW)
def test_a_line_that_repeats_a_default_says_why(name: str) -> None:
    recipe = Recipe.load(RECIPES[name])
    lines = RECIPES[name].read_text(encoding="utf-8").splitlines()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        field = re.match(r"(\w+):", line)
        if field and getattr(recipe, field[1]) == Recipe.model_fields[field[1]].default:
            assert " # " in line or re.match(r" +# ", after), line


@pytest.mark.parametrize("name", RECIPES)
def test_a_field_in_a_comment_is_one(name: str) -> None:
    for line in RECIPES[name].read_text(encoding="utf-8").splitlines():
        if found := re.match(r"# (\w+: [^ ]+)(  +# |$)", line):
            fields = yaml.safe_load(found[1])
            Recipe.load(RECIPES[name], **fields, **({"test_size": 0} if "eval_dataset" in fields else {}))


@pytest.mark.parametrize("name", NEW)
def test_the_header_says_what_it_needs(name: str) -> None:
    text = header(name)
    assert not text[0].startswith("  ") and text[0].endswith(".")
    assert [line for line in text if line.startswith(" Memory: not measured")]
    assert [line for line in text if line.startswith(" Time: not measured")]
    assert ["kit", "run", f"recipes/{name}.yaml"] in commands(name)
    folders = [command for command in commands(name) if "local_files_only=true" in command]
    assert folders and {"model_name", "dataset"} <= {word.partition("=")[0] for word in folders[0]}


@pytest.mark.parametrize("name", RECIPES)
def test_the_commands_of_the_header_are_possible(name: str) -> None:
    assert commands(name)
    for command in commands(name):
        words = kit_words(command)
        assert words[1] == f"recipes/{name}.yaml"
        recipe = Recipe.load(words[1], **parse_overrides(words[2:]))
        assert recipe.deepspeed is None or (PROJECT / recipe.deepspeed).is_file()


@pytest.mark.parametrize("name", OWN_ROWS)
def test_rows_that_the_user_has_to_bring(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = OWN_ROWS[name]
    assert any(wanted in line for line in header(name))
    recipe = Recipe.load(RECIPES[name], output_dir=str(tmp_path), gguf=[])
    with pytest.raises(KitError, match=rf"there is no {wanted}\n"):
        preflight(recipe)
    near = wanted.replace("my-", "mine-")
    (tmp_path / "data").mkdir()
    (tmp_path / near).write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KitError, match=rf"there is no {wanted} \(did you mean '{Path(near).name}'\?\)"):
        preflight(recipe)


def table() -> list[tuple[str, str, str]]:
    """(option, what stands here, remark) of every row in docs/options.md."""
    rows = [line.strip("|").split(" | ") for line in OPTIONS.splitlines() if line.startswith("| ")]
    assert all(len(row) in (2, 3) for row in rows)
    cells = [[cell.strip(" |") for cell in (*row, "")][:3] for row in rows]
    return [(option, here, remark) for option, here, remark in cells if option != "option"]


def test_every_field_and_command_in_the_options_exists() -> None:
    rows = table()
    assert len(rows) > 120
    for option, here, remark in rows:
        named = re.findall(r"`([^`]+)`", here)
        assert named or (here == "–" and remark), f"{option}: what to use instead?"
        for name in named:
            check_name(name, VARIABLES)


def test_what_the_remarks_name_exists() -> None:
    for _, _, remark in table():
        for name in re.findall(r"`([^`]+)`", remark):
            if name.startswith("kit."):
                assert hasattr(kit, name.removeprefix("kit.")), name
            elif re.match(r"(kit|make) |\w+: |[a-z]+(_[a-z]+)+$", name):
                check_name(name, VARIABLES)


def test_every_recipe_after_another_tool_is_in_the_options() -> None:
    after = [name for name in NEW if ", after " in header(name)[0]]
    assert len(after) == len(NEW) - len(QWEN3) - 1
    for name in after:
        assert f"(../recipes/{name}.yaml)" in OPTIONS


# ── Two steps of each ─────────────────────────────────────────────────────────────────────────────────────────────────


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(only_chinese: bool = False) -> list[tuple[str, str]]:
    """(question, answer) in words that the tiny models know."""
    first = [[turn["content"] for turn in talk if turn["role"] != "system"][:2] for talk in talks()]
    return [(question, answer) for question, answer in first if not only_chinese or answer[0] >= "一"]


def ruozhiba(folder: Path) -> Path:
    """The data set as it is downloaded: a card that names the parts, and a folder for each."""
    rows = [{"instruction": question, "input": "", "output": answer,
             "task_type": {"major": ["问答"], "minor": ["逻辑问答"]}, "domain": ["通用"], "answer_from": "human",
             "human_verified": True, "copyright": "作者"} for question, answer in pairs(only_chinese=True)]
    lines(folder / "COIG-CQIA" / "ruozhiba" / "ruozhiba.jsonl", rows)
    lines(folder / "COIG-CQIA" / "zhihu" / "zhihu.jsonl", [{**rows[0], "instruction": "另一部分", "output": ""}])
    parts = [{"config_name": part, "data_files": [{"split": "train", "path": f"{part}/*"}]}
             for part in ("ruozhiba", "zhihu")]
    (folder / "COIG-CQIA" / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': parts})}---\n", encoding="utf-8")
    return folder / "COIG-CQIA"


def alpaca(folder: Path) -> Path:
    path = folder / "alpaca_data_cleaned.json"
    rows = [{"instruction": question, "input": "Order 1024." * (number % 3 == 0), "output": answer}
            for number, (question, answer) in enumerate(pairs())]
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def novel(folder: Path) -> Path:
    """Rows with and without an input and a system of their own."""
    rows: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(pairs(only_chinese=True)):
        row = {"instruction": question, "output": answer}
        rows.append({**row, "input": "", "system": "你是小说家。"} if number % 2 else row)
    return lines(folder / "my-novel.jsonl", rows)


def messages(folder: Path) -> Path:
    return lines(folder / "my-messages.jsonl",
                 [{"type": "chatml", "messages": talk, "source": "self-made"} for talk in talks()])


# What stands for a recipe's model and data here.
STAND_INS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "qwen2.5-0.5b-ruozhiba-lora": ("qwen2-base", ruozhiba),
    "qwen2.5-0.5b-ruozhiba-qlora4": ("qwen2-base", ruozhiba),
    "qwen2.5-0.5b-ruozhiba-qlora8": ("qwen2-base", ruozhiba),
    "qwen3-4b-alpaca": ("qwen3", alpaca),
    "qwen2.5-7b-chatml-qlora": ("qwen2", novel),
    "qwen2-7b-full": ("qwen2-base", messages),
    "qwen2-7b-lora": ("qwen2-base", messages),
    "qwen2-7b-qlora": ("qwen2-base", messages),
    **dict.fromkeys(QWEN3, ("qwen3", messages)),
}
# Tiny models have room for 4,096 tokens, and two steps are a pass over so few rows: the evaluation after it happens.
SHORT: dict[str, Any] = {
    "local_files_only": True, "max_steps": 2, "max_train_samples": 8, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2, "max_seq_length": 512, "test_size": 2, "max_eval_samples": 2,
    "max_new_tokens": 8,
}  # fmt: skip


def test_every_new_recipe_is_run_here() -> None:
    assert sorted([*STAND_INS, WITH_PICTURES]) == sorted(NEW)


@pytest.mark.slow
@pytest.mark.parametrize("name, whole", [
    *(pytest.param(name, name == "qwen2-7b-qlora", marks=[pytest.mark.long] * (name in LIKE_ANOTHER))
      for name in STAND_INS),
    *(pytest.param(name, True, marks=pytest.mark.long) for name in STAND_INS if name != "qwen2-7b-qlora")])
def test_two_steps_of_it(name: str, whole: bool, taught: Callable[..., Path], tmp_path: Path) -> None:
    """`whole` to the GGUF; up to the merged model it is the same with a short vocabulary."""
    family, data_of = STAND_INS[name]
    recipe = Recipe.load(RECIPES[name], model_name=str(taught(family, short=not whole)),
                         dataset=str(data_of(tmp_path)), output_dir=str(tmp_path / "runs"),
                         **SHORT, gguf=["q8_0"] if whole else [])
    preflight(recipe)
    kit.lint(recipe).require()
    model, tokenizer = kit.load_model(recipe)
    model = kit.add_lora(model, recipe)
    check_precision(model, recipe)
    data = kit.load_data(recipe, tokenizer)
    assert (len(data["train"]), len(data["test"])) == (8, 2)
    trainer = kit.make_trainer(model, tokenizer, data, recipe)
    kit.check_trainer(trainer, tokenizer, recipe).require()
    result = kit.train(trainer, recipe)
    result.gates.require()
    assert result.steps == 2
    assert len(result.evaluations) == (0 if recipe.eval_strategy == "no" else 1)
    assert (Run.of(recipe).checkpoints / "checkpoint-2").is_dir() == (recipe.save_strategy != "no")
    check_what_is_shipped(model, tokenizer, data["test"]["prompt"], recipe)


def check_precision(model: Any, recipe: Recipe) -> None:
    """Every layer that an adapter is on, or of a full model every one, is what the recipe says."""
    import bitsandbytes as bnb
    import torch

    layers = [module for name, module in model.named_modules() if re.search(r"_proj$", name)]
    assert len(layers) == 14
    adapted = [layer for layer in layers if hasattr(layer, "lora_A")]
    assert len(adapted) == (0 if recipe.full_finetuning else 2 * len(recipe.target_modules))
    for layer in layers:
        base = getattr(layer, "base_layer", layer)
        kind, dtype = (bnb.nn.Linear4bit, torch.uint8) if recipe.load_in_4bit else \
            (bnb.nn.Linear8bitLt, torch.int8) if recipe.load_in_8bit else (torch.nn.Linear, None)
        assert isinstance(base, kind) and (dtype is None or base.weight.dtype is dtype)
        if recipe.load_in_4bit:
            assert (base.weight.quant_state.quant_type, base.weight.quant_state.nested) == ("nf4", True)
        if dtype is None:
            assert not isinstance(base, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)) and base.weight.is_floating_point()


def check_what_is_shipped(model: Any, tokenizer: Any, prompts: list[Any], recipe: Recipe) -> None:
    """Adapter or weights, the merged model, a GGUF that llama.cpp answers with, and its Modelfile."""
    from kit.runs.gates import Gates
    from kit.verifying.contents import check_merge

    run = Run.of(recipe)
    saved = kit.save_adapter(model, tokenizer, run)
    assert (saved / "adapter_config.json").is_file() != recipe.full_finetuning
    merged = kit.merge(saved, run, recipe)
    if not recipe.full_finetuning:
        gates = Gates("merge")
        check_merge(gates, Path(recipe.model_name), saved, merged)
        gates.require()
    if not recipe.gguf:
        return
    [gguf] = kit.export_gguf(merged, run.gguf, recipe.gguf, recipe.run_name)
    assert len(kit.answer(gguf, None, prompts, recipe)) == 2
    modelfile = kit.write_modelfile(run.gguf / "Modelfile", gguf.name, tokenizer, recipe.max_seq_length,
                                    kit.template_kwargs(recipe), recipe.system_prompt or "")
    assert gguf.name in modelfile.read_text(encoding="utf-8")
