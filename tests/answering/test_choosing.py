"""What kit ask and kit answer can be pointed at, what their arguments mean, and how two models are compared."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.answering.answer_file import _shown
from kit.answering.chat import question_and_fields
from kit.answering.choosing import choose, second
from kit.answering.comparison import compare
from kit.answering.question_files import answers_beside, read_questions
from kit.common import files
from kit.common.errors import KitError
from kit.common.files import remembered_sha256, sha256, write_json
from kit.recipe.fields import fields_affecting
from kit.recipe.recipe import Recipe
from kit.runs.own import MANIFEST
from kit.runs.provenance import seal
from kit.runs.run import Run
from support.command import kit, refused


def adapter(folder: Path, base: str | None = "starter", weights: str = "adapter_model.safetensors") -> Path:
    """The files of an adapter, as far as it is looked at before it is loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 4, "base_model_name_or_path": base})
    (folder / weights).write_bytes(b"weights")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that was stopped: it has a checkpoint, and an adapter that was sealed."""
    recipe = Recipe.load({}, run_name="r", output_dir=str(tmp_path / "我的 runs"), prompt_style="alpaca",
                         max_new_tokens=7)
    run = Run.of(recipe)
    adapter(run.adapter, "somewhere/else")
    adapter(run.checkpoints / "checkpoint-20", "somewhere/else")
    (run.folder / "recipe.yaml").write_text(recipe.dump())
    write_json(run.folder / "manifest.json", {})
    seal(run)
    return run


def test_what_lies_in_a_run_answers_as_the_run(run: Run) -> None:
    for folder in (run.adapter, run.checkpoints / "checkpoint-20"):
        chosen = choose(folder, temperature=0.5)
        assert (chosen.name, chosen.path, chosen.own) == ("adapter", folder, True)
        recipe = chosen.recipe
        assert (recipe.prompt_style, recipe.max_new_tokens, recipe.temperature) == ("alpaca", 7, 0.5)
        assert recipe.model_name == "starter", "the run's, whatever the adapter was loaded from"
    moved = choose(run.adapter, base="Qwen/Qwen3-4B")
    assert (moved.recipe.model_name, moved.own) == ("Qwen/Qwen3-4B", False)


def test_a_copied_checkpoint_brings_its_own_values(run: Run, tmp_path: Path) -> None:
    made_of = run.recipe.model_dump(mode="json", include=set(fields_affecting("weights")))
    write_json(run.checkpoints / "checkpoint-20" / MANIFEST, {"identity": {"base model": "1" * 64, **made_of}})
    copy = shutil.copytree(run.checkpoints / "checkpoint-20", tmp_path / "kopie")
    chosen = choose(copy)
    assert (chosen.recipe.prompt_style, chosen.recipe.model_name, chosen.own) == ("alpaca", "starter", False)
    assert choose(copy, base="me/base").recipe.model_name == "me/base"


def test_another_tools_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = adapter(tmp_path / "out put" / "checkpoint-100", "Qwen/Qwen2.5-0.5B")
    chosen = choose(folder, load_in_4bit=True)
    assert (chosen.recipe.model_name, chosen.recipe.load_in_4bit, chosen.own) == ("Qwen/Qwen2.5-0.5B", True, False)
    assert choose(folder, base="starter").recipe.model_name == "starter"
    with pytest.raises(KitError, match=r"has no merged\n.*--engine adapter"):
        choose(folder, "merged")
    monkeypatch.chdir(tmp_path)
    assert choose("out put/checkpoint-100").label == "out put/checkpoint-100"
    with pytest.raises(KitError, match=r"holds checkpoints: checkpoint-100\n.*one of them: out put/checkpoint-100"):
        choose("out put")


@pytest.mark.parametrize(("make", "words", "hint"), [
    (lambda folder: adapter(folder, None), "does not name its base", "--base"),
    (lambda folder: adapter(folder, "/root/models/Qwen 3"), "is not there: /root/models/Qwen 3", "--base"),
    (lambda folder: adapter(folder, weights="adapter_model.bin"), r"a pickle \(adapter_model.bin\)", "save_pretrained"),
    (lambda folder: (adapter(folder) / "adapter_config.json").write_text('{"peft_type": "IA3"}'), "IA3", "merge it"),
    (lambda folder: (folder / "config.json").write_text("{}"), "no model folder: no tokenizer_config.json, "
                                                              r"\*.safetensors", "safetensors"),
    (lambda folder: (folder / "pytorch_model.bin").write_text(""), "beside pytorch_model.bin", "safetensors"),
    (lambda folder: None, "no run folder .*, and no adapter or model", "an adapter, a checkpoint or a model"),
])
def test_what_can_not_answer_is_told(make: Callable[[Path], Any], words: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    make(tmp_path / "x")
    with pytest.raises(KitError, match=words) as error:
        choose(tmp_path / "x")
    assert hint in error.value.hint


def test_a_slip_in_a_path_is_not_asked_of_a_hub(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.folder.parents[1])
    with pytest.raises(KitError, match="is no run folder"):
        choose("我的 runs/q")
    Path("runs").mkdir()
    with pytest.raises(KitError, match="is no run folder"):
        choose("runs/quikstart")
    assert choose("starter").name == "base"


def test_a_base_is_for_adapters(run: Run, tmp_path: Path) -> None:
    for what in (run.folder, "starter", "recipes/quickstart.yaml"):
        with pytest.raises(KitError, match="--base is for an adapter"):
            choose(what, base="x/y")
    assert second("starter", "adapter", "x/y").name == "base", "both count where they apply"
    assert second(str(run.adapter), "merged", "x/y").recipe.model_name == "x/y"


def test_a_run_without_a_model_names_its_checkpoint(run: Run) -> None:
    shutil.rmtree(run.adapter)
    with pytest.raises(KitError, match="no trained model yet") as error:
        choose(run.folder)
    assert str(run.checkpoints / "checkpoint-20") in error.value.hint


def test_what_was_changed_since_it_was_sealed_is_told(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for what in (run.folder, run.adapter):
        choose(what)
        assert capsys.readouterr().err == ""
    (run.adapter / "adapter_model.safetensors").write_bytes(b"Weights")
    (run.checkpoints / "checkpoint-20" / "adapter_model.safetensors").write_bytes(b"others")
    for what in (run.folder, run.adapter):
        choose(what)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "adapter_model.safetensors is changed since the run" in said
    choose(run.checkpoints / "checkpoint-20")
    assert capsys.readouterr().err == "", "checkpoints are not sealed by the run"


def test_a_large_file_is_read_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LARGE", 4)
    monkeypatch.setenv("KIT_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "模型.gguf"
    file.write_bytes(b"12345")
    first = remembered_sha256(file)
    assert first == sha256(file)
    monkeypatch.setattr(files, "sha256", lambda path: "read again")
    assert remembered_sha256(file) == first
    file.write_bytes(b"123456")
    assert remembered_sha256(file) == "read again"


@pytest.mark.parametrize(("words", "question", "fields"), [
    ([], None, {}),
    (["Hi there"], "Hi there", {}),
    (["temperature=0.7", "1 + 1 = ?", "max_new_tokens=64"], "1 + 1 = ?", {"temperature": 0.7, "max_new_tokens": 64}),
    (["system_prompt=Be brief, please"], None, {"system_prompt": "Be brief, please"}),
    (["x = 3, what is y?"], "x = 3, what is y?", {}),
    (["如果x=3"], "如果x=3", {}) if not "如果x".isidentifier() else ([" 如果x=3"], " 如果x=3", {}),
    ([" E=mc²"], " E=mc²", {}),
])
def test_the_question_and_the_fields(words: list[str], question: str | None, fields: dict[str, Any]) -> None:
    assert question_and_fields(words) == (question, fields)


@pytest.mark.parametrize(("words", "said"), [
    (["Hi", "there"], "the question is one argument, not 2"), (["  "], "the question is empty"),
    (["temprature=0.7", "Hi"], r"'temprature' is no recipe field \(did you mean 'temperature'\?\)\n.*with a space"),
    (["max_new_tokens=[", "Hi"], "not YAML")])
def test_arguments_that_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(KitError, match=said):
        question_and_fields(words)


def test_two_models_answers_are_compared(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"prompt": f"q{i}"}) + "\n" for i in range(5)))
    questions = read_questions(tmp_path / "q.jsonl")
    found = compare(questions, {0: "a", 1: "b", 2: "c\nd", 4: "e"}, {0: "a", 1: "B", 2: "c d", 3: "x"},
                    ("run", "tuned"))
    assert found.same == {0: "yes", 1: "no", 2: "no"}
    said = str(found)
    assert said.startswith("the same answer: 1 of 3 rows; another one: row 2, 3\n")
    assert "run" in said and "tuned" in said and "q1" in said and "q0" not in said
    assert str(compare(questions, {0: "a"}, {0: "a"}, ("a", "b"))) == "the same answer: 1 of 1 rows"
    assert answers_beside(Path("a b.txt"), table=True) == Path("a b.answers.csv")
    assert answers_beside(Path("q.xlsx"), table=True) == Path("q.answers.xlsx")


def test_a_question_is_shown_with_its_answer() -> None:
    assert _shown(0, "猫用英语\n怎么说？", "cat\n\nend\n") == "── row 1\n? 猫用英语\n  怎么说？\n→ cat\n  \n  end"


@pytest.fixture(scope="module")
def foreign(tiny_starter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of adapters that PEFT wrote, without a tokenizer: `own`, and on other bases `deep` and `wide`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("适配器 1")
    for name, changes in (("own", {}), ("deep", {"num_hidden_layers": 3}), ("wide", {"hidden_size": 96})):
        config = AutoConfig.from_pretrained(tiny_starter, **changes)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(folder / name)
        saved = json.loads((folder / name / "adapter_config.json").read_text())
        write_json(folder / name / "adapter_config.json", {**saved, "base_model_name_or_path": "/root/gone"})
    (folder / "q.txt").write_text("Where is it?\n\n在哪里？\n", encoding="utf-8")
    return folder


@pytest.mark.slow
def test_a_foreign_adapter_answers_a_file_beside_its_base(foreign: Path, tiny_starter: Path, tmp_path: Path) -> None:
    shutil.copyfile(foreign / "q.txt", tmp_path / "问 题.txt")
    done = kit("answer", str(foreign / "own"), str(tmp_path / "问 题.txt"), "--base", str(tiny_starter), "--against",
               str(tiny_starter), "--show", "max_new_tokens=4", "max_input_length=64")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("── row 3\n? 在哪里？\n→ ") == 2 and "the same answer: 0 of 2 rows" in done.stdout
    with (tmp_path / "问 题.answers.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert [(row["prompt"], row["answer_same"]) for row in found] == \
        [("Where is it?", "no"), ("", ""), ("在哪里？", "no")]
    assert all(row["answer"] and row["answer_against"] and row["answer"] != row["answer_against"]
               for row in (found[0], found[2]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["问 题.answers.csv", "问 题.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["load_in_4bit=true", "load_in_8bit=true"])
def test_a_foreign_adapter_on_a_quantised_base(bits: str, foreign: Path, tiny_starter: Path) -> None:
    done = kit("ask", str(foreign / "own"), "Where is it?", "--base", str(tiny_starter), bits, "max_new_tokens=3")
    assert done.returncode == 0, done.stderr[-2000:]
    precision = "4-bit = True" if "4" in bits else "8-bit through transformers"
    assert precision in done.stdout + done.stderr


@pytest.mark.slow
def test_an_adapter_of_another_base_is_refused(foreign: Path, tiny_starter: Path) -> None:
    refused(foreign, "ask", str(foreign / "wide"), "Hi", "--base", str(tiny_starter),
            words=f"the adapter {foreign / 'wide'} does not fit {tiny_starter}: size mismatch")
    refused(foreign, "ask", str(foreign / "deep"), "Hi", "--base", str(tiny_starter),
            words="layers.2.self_attn.q_proj.lora_A.weight is only on one side (4 tensors)")
    refused(foreign, "ask", str(foreign / "own"), "Hi", words="is not there: /root/gone")
