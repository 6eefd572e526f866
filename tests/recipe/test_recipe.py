"""The recipe: defaults, bounds, slips, contradictions, and the files that ship."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kit.common.errors import KitError
from kit.common.files import PROJECT
from kit.recipe.fields import AFFECTS, fields_affecting
from kit.recipe.reading import parse_overrides
from kit.recipe.recipe import Recipe
from support import grammars
from support.command import kit

RECIPES = sorted((PROJECT / "recipes").glob("*.yaml"))


def refused(**fields: Any) -> str:
    with pytest.raises(KitError) as caught:
        Recipe.load({}, **fields)
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_every_line_says_why(path: Path) -> None:
    recipe = Recipe.load(path)
    assert recipe.run_name == path.stem
    text = path.read_text(encoding="utf-8")
    fields = yaml.safe_load(text)
    uncommented = [line for line in text.splitlines() if line[:1].isalpha() and "#" not in line
                   and line.split(":")[0] not in ("target_modules", "per_device_train_batch_size",
                                                  "num_train_epochs", "warmup_steps", "save_merged",
                                                  "test_size", "max_eval_samples")]
    assert len(uncommented) <= 1, uncommented
    assert set(fields) <= set(Recipe.model_fields)


def test_qwen_recipe_has_the_usual_settings() -> None:
    recipe = Recipe.load(PROJECT / "recipes" / "qwen3-4b-alpaca.yaml")
    assert (recipe.model_name, recipe.dataset, recipe.load_in_4bit) == ("Qwen/Qwen3-4B", "yahma/alpaca-cleaned", True)
    assert (recipe.r, recipe.lora_alpha, recipe.lora_dropout, len(recipe.target_modules)) == (16, 16, 0, 7)
    assert (recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps) == (2, 4)
    assert (recipe.warmup_steps, recipe.max_steps, recipe.learning_rate) == (5, 60, 2e-4)
    assert (recipe.optim, recipe.weight_decay, recipe.lr_scheduler_type) == ("adamw_8bit", 0.01, "linear")
    assert recipe.seed == recipe.random_state == 3407


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("learning_rate: 2e-4\n")  # YAML 1.1 reads this as text
    assert Recipe.load(path).learning_rate == 2e-4
    assert Recipe.load(path, learning_rate="1e-3").learning_rate == 1e-3
    assert parse_overrides(["learning_rate=1e-4"]) == {"learning_rate": "1e-4"}


def test_a_slip_names_the_nearest_field() -> None:
    assert "'learning_rat' is no recipe field (did you mean 'learning_rate'?)" in refused(learning_rat=1)
    with pytest.raises(KitError, match="did you mean 'lora_alpha'"):
        parse_overrides(["lora_aplha=3"])
    assert "did you mean 'q4_k_m'" in refused(gguf=["q4_km"])
    assert "f16, bf16, q8_0, q5_k_m, q4_k_m" in refused(gguf=["int3"])


@pytest.mark.parametrize("fields, words", [
    ({"max_steps": 3, "num_train_epochs": 1}, "max_steps and num_train_epochs"),
    ({"load_in_4bit": True, "load_in_8bit": True}, "one precision"),
    ({"load_in_4bit": True, "full_finetuning": True}, "quantised weights"),
    ({"load_in_8bit": True, "full_finetuning": True}, "quantised weights"),
    ({"fp16": True, "bf16": True}, "mixed precision has one format"),
    ({"dtype": "float16", "bf16": True}, "dtype: float16 and bf16"),
    ({"dtype": "bfloat16", "fp16": True}, "dtype: bfloat16 and fp16"),
    ({"gguf": ["q8_0"], "save_merged": "none"}, "made from the merged model"),
    ({"eval_dataset": "x.jsonl", "test_size": 0.1}, "keep the file or the share"),
    ({"max_steps": 0}, "0 steps train nothing"),
    ({"test_size": 1.5}, "whole number"),
    ({"learning_rate": "fast"}, "valid number"),
    ({"r": 0}, "greater than or equal to 1"),
    ({"run_name": "../../etc"}, "pattern"),
    ({"loftq_config": {"loftq_bits": 4}, "load_in_4bit": True}, "LoftQ adapter belongs to its own"),
])
def test_contradictions_and_bounds_are_refused_with_the_reason(fields: dict[str, Any], words: str) -> None:
    assert words in refused(**fields)


@pytest.mark.parametrize("written, field, value", [
    ("target_modules: all", "target_modules", ["all-linear"]),
    ("target_modules: all-linear", "target_modules", ["all-linear"]),
    ("target_modules: [all_linear]", "target_modules", ["all-linear"]),
    ("target_modules: q_proj, v_proj", "target_modules", ["q_proj", "v_proj"]),
    ("gguf: q4_k_m", "gguf", ["q4_k_m"]), ("gguf: Q4_K_M, q8_0", "gguf", ["q4_k_m", "q8_0"]),
    ("gguf: none", "gguf", []), ("gguf: false", "gguf", []), ("gguf:", "gguf", []),
    ("dataset: a.jsonl , b.jsonl", "dataset", ["a.jsonl", "b.jsonl"]),
    ("dataset: a.jsonl,", "dataset", "a.jsonl"), ("bias: None", "bias", "none"),
    ("loftq_config: None", "loftq_config", None), ("dtype: none", "dtype", None), ("bf16: 'null'", "bf16", None),
    ("max_train_samples: None", "max_train_samples", None), ("save_merged: merged_16bit", "save_merged", "16bit"),
    ("save_merged: merged_4bit", "save_merged", "4bit"), ("save_merged: merged_4bit_forced", "save_merged", "4bit"),
    ("save_merged: lora", "save_merged", "none"), ("save_merged: false", "save_merged", "none"),
    ("save_merged:", "save_merged", "none"), ("report_to: None", "report_to", "none"),
    ("max_steps: -1\nnum_train_epochs: 3", "num_train_epochs", 3),
])  # fmt: skip
def test_spellings_that_everybody_uses(written: str, field: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(written + "\n")
    assert getattr(Recipe.load(path), field) == value
    name, _, text = written.split("\n")[0].partition(":")
    assert getattr(Recipe.load(path, **parse_overrides([f"{name}={text.strip()}"])), field) == value


def test_a_comma_in_the_name_of_a_file_that_is_there(tmp_path: Path) -> None:
    file = tmp_path / "a,b.jsonl"
    file.touch()
    assert Recipe.load({"dataset": str(file)}).dataset == str(file)
    assert Recipe.load({"dataset": f"{file}x,b"}).dataset == [f"{tmp_path}/a", "b.jsonlx", "b"]
    assert "stands alone" in refused(target_modules=["all-linear", "lm_head"])


def test_epochs_asked_for_with_max_steps_left_to_them(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("num_train_epochs: 2\n")
    assert Recipe.load(path, max_steps=-1).num_train_epochs == 2


def test_all_problems_at_once_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("r: -1\nlearning_rate: 7\nunknown: 1\n")
    with pytest.raises(KitError) as caught:
        Recipe.load(path)
    text = str(caught.value)
    assert "3 problems" in text
    assert all(f"{path}:{line}: " in text for line in (1, 2, 3))


@pytest.mark.parametrize("content, words", [
    (b"r: [1\n", "not YAML"), (b"- a\n- b\n", "lines of `field: value`"), (b"\xff\xfe\x00", "not UTF-8"),
    (b"r: 8\nr: 16\n", "set twice"), (b"just words", "lines of `field: value`"),
])
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(KitError, match=words):
        Recipe.load(path)


def test_a_missing_recipe_lists_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(KitError) as caught:
        Recipe.load("recipes/quickstrat.yaml")
    assert "quickstart.yaml" in str(caught.value)
    with pytest.raises(KitError, match="is a folder"):
        Recipe.load(tmp_path)


def test_the_length_asked_for_replaces_the_files(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("num_train_epochs: 2\n")
    recipe = Recipe.load(path, max_steps=5)
    assert (recipe.max_steps, recipe.num_train_epochs) == (5, None)


def test_dump_and_load_is_the_same_recipe(tmp_path: Path) -> None:
    recipe = Recipe.load({}, learning_rate=1e-5, gguf=["q8_0"], system_prompt="请用中文回答。")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.dump(), encoding="utf-8")
    assert Recipe.load(path) == recipe
    with pytest.raises(ValueError, match="frozen"):
        recipe.r = 4  # type: ignore[misc]


def test_notebook_parameters() -> None:
    given = {"recipe": "x.yaml", "learning_rate": 1e-4, "gguf": ["q8_0"], "_hidden": 1, "unrelated": 3, "Path": Path}
    assert Recipe.given(given) == {"learning_rate": 1e-4, "gguf": ["q8_0"]}
    with pytest.raises(KitError, match="did you mean 'learning_rate'"):
        Recipe.given({"learning_rat": 1})


# Made up, in the form of real ones.
TOKENS = ["hf_" + "Ab3dE5gH" * 5, "sk-proj-" + "aB3dE6gH9" * 5, "ghp_" + "x1Y2z3W4v" * 4]
SECRET_FIELDS = ["hf_token", "HF_TOKEN", "token", "wandb_api_key", "api_key", "apikey", "private_key", "password",
                 "hub_secret", "aws_credentials"]


def without_the_secret(call: Callable[[], object], secret: str, words: str) -> None:
    """KitError with these words; it says where tokens belong and does not repeat the secret."""
    with pytest.raises(KitError, match=words) as caught:
        call()
    text = str(caught.value)
    assert secret not in text and "HF_TOKEN" in caught.value.hint


@pytest.mark.parametrize("name", SECRET_FIELDS)
def test_a_field_named_like_a_secret_is_refused(tmp_path: Path, name: str) -> None:
    secret, path = "correct-horse-battery", tmp_path / "r.yaml"
    path.write_text(f"r: 8\n{name}: {secret}\n")
    for call in (lambda: parse_overrides([f"{name}={secret}"]), lambda: Recipe.load(path),
                 lambda: Recipe.load({}, **{name: secret}), lambda: Recipe.given({name: secret})):
        without_the_secret(call, secret, f"{name}' looks like a secret")


@pytest.mark.parametrize("token", TOKENS, ids=lambda token: token[:4])
@pytest.mark.parametrize("name, wrapped", [
    ("model_name", "{}"), ("dataset", "https://user:{}@host/rows.jsonl"), ("system_prompt", "Use {} to log in."),
    ("report_to", "{}")])
def test_a_value_that_looks_like_a_token_is_refused(tmp_path: Path, name: str, wrapped: str, token: str) -> None:
    value, path = wrapped.format(token), tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({name: value}))
    for call in (lambda: Recipe.load(path), lambda: Recipe.load({}, **{name: value}),
                 lambda: Recipe.load({}, dataset=["starter", value])):
        without_the_secret(call, token, "holds what looks like a secret")


def test_names_and_values_that_only_remind_of_secrets_are_taken(tmp_path: Path) -> None:
    fields = {"max_new_tokens": 64, "system_prompt": "You answer questions about tokens, keys and passwords.",
              "model_name": "Qwen/Qwen3-4B", "run_name": "token_test", "columns": {"prompt": "token", "answer": "key"}}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(fields))
    assert Recipe.load(path).max_new_tokens == 64
    assert parse_overrides(["max_new_tokens=8"]) == {"max_new_tokens": 8}
    # A notebook holds other variables too, and one that was never filled in gives nothing away.
    namespace = {"tokens": [1, 2], "stop_token_id": 2, "n_tokens": 5, "keys": ["a"], "hf_token": "", "token": None}
    assert Recipe.given({**namespace, "max_new_tokens": 8}) == {"max_new_tokens": 8}


@pytest.mark.slow
def test_no_command_takes_a_token_and_nothing_of_it_is_written(tmp_path: Path) -> None:
    token = TOKENS[0]
    for arguments, code in ((["run", "recipes/quickstart.yaml", f"hf_token={token}"], 2),
                            (["train", "recipes/quickstart.yaml", f"model_name={token}"], 2),
                            (["lint", "starter", f"api_key={token}"], 2)):
        fields = [] if arguments[0] == "lint" else [f"output_dir={tmp_path}"]
        done = kit(*arguments, *fields, timeout=120)
        told = done.stdout + done.stderr
        assert done.returncode == code and "a secret" in told and "→" in told, told[-2000:]
        assert token not in told and "Traceback" not in told
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_papermill_with_a_token_stops_before_anything_is_made(tmp_path: Path) -> None:
    notebook = PROJECT / "notebooks" / "01_finetune.ipynb"
    done = subprocess.run([sys.executable, "-m", "papermill", str(notebook), str(tmp_path / "out.ipynb"), "-p",
                           "HF_TOKEN", TOKENS[0], "-p", "output_dir", str(tmp_path / "runs")],
                          cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "HF_TOKEN' looks like a secret" in done.stderr
    assert "delete that notebook" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_every_field_says_what_it_does_and_affects() -> None:
    schema = Recipe.model_json_schema()["properties"]
    for name, field in Recipe.model_fields.items():
        assert field.description and field.description.endswith("."), name
        assert schema[name]["affects"] and set(schema[name]["affects"].split()) <= set(AFFECTS), name


def words(text: str) -> set[str]:
    return set(text.split())


def test_what_other_rooms_take_from_the_fields() -> None:
    """A checkpoint's free fields, what an answer depends on, what a card leaves out and shortens, what TRL is given."""
    free = words("""
        run_name overwrite output_dir local_files_only hub trust_remote_code dataset dataset_config dataset_split
        dataset_revision columns eval_dataset test_size eval_overlap max_train_samples max_eval_samples answer_seconds
        chat_template
        metric save_strategy save_steps save_minutes save_total_limit checkpoint_dir resume_from_checkpoint fsdp
        deepspeed ddp_timeout dataloader_num_workers dataloader_pin_memory report_to bf16 fp16 dtype max_input_length
        max_new_tokens temperature top_p top_k min_p repetition_penalty save_merged gguf num_ctx push_to_hub
        hub_model_id hub_private_repo""")
    assert set(Recipe.model_fields) - set(fields_affecting("weights")) == free
    # kit answer puts max_input_length with its default into its journal.
    assert set(fields_affecting("answers")) - {"max_input_length"} == words("""
        chat_template prompt_style system_prompt enable_thinking max_new_tokens temperature top_p top_k min_p
        repetition_penalty seed dtype load_in_4bit load_in_8bit bnb_4bit_quant_type bnb_4bit_use_double_quant
        bnb_4bit_compute_dtype""")
    assert set(fields_affecting("place")) == words("""
        overwrite output_dir checkpoint_dir deepspeed local_files_only report_to hub push_to_hub hub_model_id
        hub_private_repo""")
    assert set(fields_affecting("source")) == {
        "model_name", "dataset", "eval_dataset", "adapter_name_or_path", "chat_template"}
    assert set(fields_affecting("SFTConfig")) == words("""
        per_device_train_batch_size gradient_accumulation_steps learning_rate warmup_steps lr_scheduler_type
        weight_decay adam_beta1 adam_beta2 max_grad_norm neftune_noise_alpha train_sampling_strategy
        dataloader_num_workers dataloader_pin_memory logging_steps eval_strategy eval_steps ddp_timeout report_to
        seed""")


def test_a_slip_of_a_field_is_not_taken_for_a_secret() -> None:
    with pytest.raises(KitError, match="did you mean 'max_new_tokens'"):
        parse_overrides(["max_new_token=5"])
    with pytest.raises(KitError, match="looks like a secret"):
        parse_overrides(["hub_token=5"])


@pytest.mark.parametrize("word", ["no", "No", "off", "false", "'no'"])
def test_words_that_yaml_takes_for_truth_values_are_read_as_meant(word: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"eval_strategy: {word}\nsave_strategy: {word}\n")
    recipe = Recipe.load(path)
    assert (recipe.eval_strategy, recipe.save_strategy) == ("no", "no")
    values = parse_overrides([f"eval_strategy={word}"])
    assert Recipe.load({"eval_strategy": "epoch", "test_size": 2}, **values).eval_strategy == "no"


@pytest.mark.parametrize("line, part", [
    ("r: true", "true is no number"), ("learning_rate: yes", "true is no number"), ("r: " + "9" * 5000, "digits"),
    ("learning_rate: .inf", "finite"), ("weight_decay: .nan", "finite"), ("test_size: 1e999", "finite"),
    ("max_steps: .inf", "finite"), ("r: !!bool x", "tags"), ("gguf: " + "[" * 3000 + "]" * 3000, "in one another"),
    ("gguf: &a [*a]", "no aliases"), ("run_name: " + "n" * 300, "at most 80"), ("run_name: ..", "pattern"),
    ("columns: {instruction: a, instruction: b}", "instruction is there twice"), ("eval_strategy: yes", "input should"),
    ("a: &a [x]\n" + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi",
                                                                                      strict=True)), "no aliases"),
    ("? [a, b]\n: 1", "unhashable key"), ("dataset: {a: .inf}", "how often"), ("dataset: {a: true}", "how often"),
])  # fmt: skip
def test_a_recipe_of_any_making_ends_in_one_message(line: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(line + "\n")
    with pytest.raises(KitError) as error:
        Recipe.load(path)
    assert part in error.value.message and len(error.value.message) < 6000, error.value.message[:500]


@pytest.mark.parametrize("count", [pytest.param(600, marks=pytest.mark.slow),
                                   pytest.param(30_000, marks=pytest.mark.long)])
def test_random_recipes_are_read_or_refused(tmp_path: Path, count: int) -> None:
    """What is read is written, and read again as the same."""
    def use(data: bytes) -> None:
        path.write_bytes(data)
        recipe = Recipe.load(path)
        again.write_text(recipe.dump(), encoding="utf-8")
        assert Recipe.load(again) == recipe

    with grammars.in_memory(tmp_path) as folder:
        path, again = folder / "random.yaml", folder / "again.yaml"
        outcomes = grammars.attempts(count, grammars.recipe, use)
    assert min(outcomes["value"], outcomes["refused"]) > count / 20
