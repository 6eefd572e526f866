"""A Modelfile read back is the one that was written, and what it says Ollama sends is what Go's text/template makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.common.errors import KitError
from kit.export import modelfile
from kit.export.modelfile import derive, stop_tokens, without_bos, write_modelfile
from kit.export.modelfile_reader import read_modelfile
from kit.models.template import prepare_tokenizer, render, template_kwargs
from kit.recipe.recipe import Recipe
from kit.verifying.template import TALKS
from support.tiny_models import tiny_tokenizer
from support.vocabularies import FOLDER, PAIRS, WHY_NOT, in_modelfile, real_tokenizer, templates

pytestmark = [pytest.mark.slow, pytest.mark.skipif(FOLDER is None, reason=WHY_NOT)]

# A text that looks like the file's own commands.
SYSTEM = 'Say "hi".\nPARAMETER stop "x"\n# 你好 {{ .Prompt }} "quoted"'

# Their answers end with no special token, they are for tools only, or they move the system message.
REFUSED_TEMPLATES = {
    "Apertus-8B-Instruct", "Apriel-1.6-15b-Thinker-fixed", "CohereForAI-c4ai-command-r-plus-tool_use", "GLM-4.6",
    "GLM-4.7-Flash", "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "fireworks-ai-llama-3-firefunction-v2", "llama-cpp-rwkv-world", "mistralai-Mistral-Nemo-Instruct-2407",
    "tencent-Hy3",
}  # fmt: skip


def joints_of(tokenizer: Any) -> modelfile.Joints:
    """What the trained template writes between messages."""
    return without_bos(derive(lambda talk: tokenizer.apply_chat_template(talk, tokenize=False,
                                                                         add_generation_prompt=True)), tokenizer)


@pytest.mark.parametrize("template", templates())
def test_reading_inverts_writing(template: str, tmp_path: Path) -> None:
    recipe = Recipe.load({})
    tokenizer = real_tokenizer(PAIRS[template].vocab, template)
    path = tmp_path / "Modelfile"
    if template in REFUSED_TEMPLATES:
        with pytest.raises(KitError):
            prepare_tokenizer(tokenizer, recipe)
            write_modelfile(path, "m-q8_0.gguf", tokenizer, 2048)
        return
    prepare_tokenizer(tokenizer, recipe)
    write_modelfile(path, "m-q8_0.gguf", tokenizer, 2048, {}, SYSTEM)
    found = read_modelfile(path)
    assert found.joints == joints_of(tokenizer)
    assert found.stops == stop_tokens(found.joints, tokenizer) and tokenizer.eos_token in found.stops
    assert (found.gguf, found.system) == ("m-q8_0.gguf", SYSTEM)
    assert [f"# {note}" for note in found.notes] == path.read_text(encoding="utf-8").split("FROM")[0].splitlines()


FAMILIES = [("own", None), ("chatml", None), ("alpaca", None), ("Qwen-Qwen2.5-7B-Instruct", None),
            ("Qwen-Qwen3-0.6B", None), ("Qwen-Qwen3-0.6B", False), ("meta-llama-Llama-3.1-8B-Instruct", None),
            ("meta-llama-Llama-3.2-3B-Instruct", None), ("google-gemma-2-2b-it", None),
            ("llama", None)]  # fmt: skip


@pytest.mark.parametrize(("template", "thinking"), FAMILIES)
def test_the_prompt_is_what_go_renders(template: str, thinking: bool | None, tokenizer: Any, tmp_path: Path,
                                       go_render: Callable[..., list[list[str]]]) -> None:
    import copy

    style = template if template in ("chatml", "alpaca") else "chat"
    recipe = Recipe.load({}, prompt_style=style, enable_thinking=thinking)
    if template == "llama":
        trained = tiny_tokenizer(template)
    else:
        trained = real_tokenizer(PAIRS[template].vocab, template) if template in PAIRS else copy.deepcopy(tokenizer)
    prepare_tokenizer(trained, recipe)
    path = write_modelfile(tmp_path / "Modelfile", "m.gguf", trained, 2048, template_kwargs(recipe))
    found = read_modelfile(path)
    [sent] = go_render([(in_modelfile(path), list(TALKS.values()))])
    assert sent == [found.prompt(talk) for talk in TALKS.values()]
    # Ollama puts this one before a prompt by itself.
    bos = trained.bos_token if trained.bos_token and trained("")["input_ids"] == [trained.bos_token_id] else ""
    assert bool(bos) == (template == "llama")
    compared = 0
    for talk, text in zip(TALKS.values(), sent, strict=True):
        if talk[0]["role"] == "user" or ("", "system") in found.joints:
            assert bos + text == render(trained, talk, recipe, add_generation_prompt=True)
            compared += 1
    assert compared >= 5


def test_the_files_own_system_message(tokenizer: Any, tmp_path: Path) -> None:
    found = read_modelfile(write_modelfile(tmp_path / "Modelfile", "m.gguf", tokenizer, 64, {}, "Be brief."))
    asked, own = [{"role": "user", "content": "a"}], {"role": "system", "content": "Be long."}
    assert found.prompt(asked) == found.prompt([{"role": "system", "content": "Be brief."}, *asked])
    assert "Be brief." not in found.prompt([own, *asked])


@pytest.fixture
def written(tokenizer: Any, tmp_path: Path) -> Path:
    return write_modelfile(tmp_path / "Modelfile", "m.gguf", tokenizer, 2048, {}, "Be brief.")


REFUSED = {
    "space between actions": ("}}{{ .Content", "}} {{ .Content", "its TEMPLATE is not one that the kit writes"),
    "text behind an action": ("{{- end }}\n{{- if", "{{- end }}x\n{{- if", "is not one that the kit writes"),
    "quotes end it": ('{{- range', '"""\n{{- range', "line 4.*not of a form that the kit writes"),
    "quotes within a line": ("{{- range", '""" {{- range', "is not one that the kit writes"),
    "not closed": ('}}"""', "}}", "not of a form that the kit writes|is not one that the kit writes"),
    "no FROM": ("FROM ./m.gguf\n", "", "has no FROM"),
    "two FROM": ("FROM ./m.gguf\n", "FROM ./m.gguf\nFROM ./n.gguf\n", "line 2.*there is one already"),
    "another SYSTEM": ("PARAMETER num_ctx", "SYSTEM Be long.\nPARAMETER num_ctx", "SYSTEM Be long.*not of a form"),
    "a message": ("PARAMETER num_ctx", "MESSAGE user Hi\nPARAMETER num_ctx", "MESSAGE user Hi.*not of a form"),
    "an adapter": ("PARAMETER num_ctx", "ADAPTER ./a\nPARAMETER num_ctx", "ADAPTER ./a.*not of a form"),
    "carriage returns": ("\n", "\r\n", r"line 1, 'FROM ./m.gguf\\r'.*not of a form"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_was_changed_by_hand_is_refused(name: str, written: Path) -> None:
    old, new, message = REFUSED[name]
    text = written.read_text(encoding="utf-8")
    assert old in text
    written.write_bytes(text.replace(old, new).encode())
    with pytest.raises(KitError, match=message) as error:
        read_modelfile(written)
    assert "write it again" in error.value.hint


def test_other_contents(written: Path) -> None:
    whole = written.read_bytes()
    foreign = b'FROM ./m.gguf\nTEMPLATE """{{ .System }}\n{{ .Prompt }}"""\n'
    for data, message in ((b"", "has no FROM"), (b"FROM ./m.gguf\n", "has no TEMPLATE"), (foreign, "'{{ .System }}"),
                          (whole.replace(b"brief", b"\xff\xfe"), "can't be read"),
                          (whole.replace(b'TEMPLATE """', b'TEMPLATE "').replace(b'}}"""', b'}}"'), "not of a form")):
        written.write_bytes(data)
        with pytest.raises(KitError, match=message):
            read_modelfile(written)
    with pytest.raises(KitError, match="can't be read"):
        read_modelfile(written.with_name("none"))


def test_a_space_within_a_text_is_read_as_it_stands(written: Path) -> None:
    """The template is of the kit's form, but another one: the gate finds the difference in what it sends."""
    before = read_modelfile(written)
    text = written.read_text(encoding="utf-8")
    assert "<|im_start|>assistant\\n" in text
    written.write_text(text.replace("<|im_start|>assistant\\n", "<|im_start|>assistant \\n"), encoding="utf-8")
    talk = [{"role": "user", "content": "a"}]
    assert read_modelfile(written).prompt(talk) == before.prompt(talk).replace("assistant\n", "assistant \n")


def test_parameters_and_comments_may_be_added(written: Path) -> None:
    before = read_modelfile(written)
    text = "# mine\n\n" + written.read_text(encoding="utf-8") + "PARAMETER temperature 0.7\n\n# the end"
    written.write_text(text, encoding="utf-8")
    assert read_modelfile(written) == before._replace(notes=["mine", "the end"])
