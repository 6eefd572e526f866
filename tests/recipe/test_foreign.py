"""What other tools call things is named where it is met: in recipes, on the command line, as whole files."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest

from kit.common.errors import KitError
from kit.common.files import PROJECT
from kit.recipe.fields import Fields
from kit.recipe.foreign import tools
from kit.recipe.reading import parse_overrides
from kit.recipe.recipe import Recipe

FILES = Path(__file__).parent / "foreign"
NAMED = {
    "model_name_or_path": "here it is model_name", "lora_r": "here it is r", "lora_rank": "here it is r",
    "lora_target": "target_modules", "cutoff_len": "here it is max_seq_length", "dataset_path": "here it is dataset",
    "q_lora": "here it is load_in_4bit: true", "template": "here it is prompt_style", "data_path": "here it is dataset",
    "warmup_ratio": "here it is warmup_steps: 0.05 (below 1 it is a share of the run)", "base_model": "model_name",
    "quantization_bit": "load_in_4bit: true or load_in_8bit: true", "sequence_len": "here it is max_seq_length",
    "pretrained_model_name_or_path": "here it is model_name", "dataset_name_or_path": "here it is dataset",
    "micro_batch_size": "per_device_train_batch_size", "model_max_length": "here it is max_seq_length",
    "val_size": "here it is test_size", "evaluation_strategy": "here it is eval_strategy", "stage": "kit run",
    "preprocessing_num_workers": "nothing here goes by it (rows are", "--lora-r": "here it is r",
    "finetuning_type": "full_finetuning", "gradient_checkpointing": "here it is use_gradient_checkpointing",
    "export_dir": "kit export", "quant_bits": "load_in_4bit: true",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_a_foreign_name_says_where_it_is_here(name: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"r: 8\n{name}: x\n")
    for call in (lambda: parse_overrides([f"{name}=x"]), lambda: Recipe.load({name: "x"}), lambda: Recipe.load(path)):
        with pytest.raises(KitError) as error:
            call()
        assert NAMED[name] in error.value.message and "did you mean" not in error.value.message
    assert f"{path}:2: " in error.value.message


def test_the_value_chooses_among_them() -> None:
    for value, here in ((4, "load_in_4bit: true"), (8, "load_in_8bit: true")):
        with pytest.raises(KitError, match=rf"here it is {here}( \(|\n)"):
            parse_overrides([f"quantization_bit={value}"])
    with pytest.raises(KitError, match="lora_target_modules' is no recipe field: here it is target_modules"):
        Recipe.given({"lora_target_modules": "x"})


@pytest.mark.parametrize("group", ["lora_config", "quantization_config", "training_args", "anything"])
def test_a_group_is_told_to_be_flat(group: str) -> None:
    for call in (lambda: Recipe.load({group: {"r": 8}}), lambda: parse_overrides([f"{group}={{r: 8}}"])):
        with pytest.raises(KitError, match=f"no groups: write the lines of {group} at the top level"):
            call()


@pytest.mark.parametrize("path", sorted(FILES.iterdir()), ids=lambda path: path.name)
def test_a_whole_file_is_known_for_what_it_is(path: Path, tmp_path: Path) -> None:
    there = tmp_path / f"my {path.name}"
    shutil.copy(path, there)
    with pytest.raises(KitError) as error:
        Recipe.load(there)
    known = {"llamafactory": "LLaMA-Factory", "axolotl": "axolotl", "swift": "ms-swift", "unsloth": "Unsloth",
             "torchrun": "torchrun scripts", "finetune": "Qwen's finetune.py", "pipeline": "ChatML QLoRA",
             "trl": "transformers"}
    name = next(words for start, words in known.items() if path.name.startswith(start))
    assert f"is no recipe: it looks like a file of {name}" in error.value.message
    assert error.value.hint == f"kit new NAME --from '{there}' makes a recipe of it"


@pytest.mark.parametrize("fields", [
    {"columns": {"instruction": "a", "input": "b", "output": "c", "system": "d"}}, {"lora_r": 8, "cutoff_len": 9},
    {"loftq_config": {"loftq_bits": 4}, "load_in_4bit": True, "save_merged": "none"},
])
def test_a_recipe_is_not_taken_for_one(fields: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(str(fields).replace("True", "true"))
    if "lora_r" in fields:  # one or two names are slips of a recipe
        with pytest.raises(KitError, match="2 problems"):
            Recipe.load(path)
    else:
        assert Recipe.load(path)


def test_what_is_no_python_is_installed_too() -> None:
    setup = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    others = [path for path in (PROJECT / "kit").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert others and all(f"*{path.suffix}" in setup["package-data"]["*"] for path in others), others


def test_the_table_is_sound() -> None:
    """Every default is an option of its tool or a field, every line has its Chinese, no line is there twice."""
    for tool in tools().values():
        based = [tool, tools()["transformers"]]
        names = {name for one in based for row in one.options for name in row.names}
        for name in (*tool.defaults, *tool.lora_defaults, *tool.script):
            assert name in names or name in Fields.model_fields, f"{tool.key}: {name}"
        assert len({row.option for row in tool.options}) == len(tool.options)
        for row in tool.options:
            assert row.option and row.here and bool(row.remark) == bool(row.remark_zh), row
            assert (row.here == "–") <= bool(row.remark), row
