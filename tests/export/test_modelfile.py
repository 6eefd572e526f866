"""The Modelfile's template against Jinja, for every template we know: by our own steps, and by Go's text/template."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kit.common.errors import KitError
from kit.export.modelfile import (
    START,
    Modelfile,
    derive,
    fill,
    go_template,
    limits,
    modelfile_of,
    proof_conversations,
    write_modelfile,
)
from kit.models.template import prepare_tokenizer, render, template_kwargs
from kit.recipe.recipe import Recipe
from support.tiny_models import tiny_tokenizer
from support.vocabularies import PAIRS, in_modelfile, real_tokenizer, templates

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# An opening sentence unless a system message takes its place, quotes and braces in it, and plain headings.
ALPACA = (
    "{% if messages[0].role != 'system' %}{{ 'Below is a \"task\" {with} \\\\ braces {{.}}.\n\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}"
    "{% elif m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + m.content + '<|im_end|>\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
# Gemma's manner: no system role, and a BOS in front.
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{{ '<turn>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)

# What Ollama does with a template: missingkey=zero, and System and Messages as values.
GO_PROGRAM = """
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content string }
type Case struct {
	Template      string
	Conversations [][]Message
}

func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	var texts [][]string
	for _, c := range cases {
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(c.Template))
		var made []string
		for _, messages := range c.Conversations {
			var text strings.Builder
			if err := parsed.Execute(&text, map[string]any{"Messages": messages, "System": ""}); err != nil {
				panic(err)
			}
			made = append(made, text.String())
		}
		texts = append(texts, made)
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
"""


def jinja(template: str, **variables: object):
    """A renderer with the Jinja settings of transformers, without importing it."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(reason: str) -> None:
        raise TemplateError(reason)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    compiled = environment.from_string(template)
    return lambda messages: compiled.render(messages=messages, add_generation_prompt=True, raise_exception=refuse,
                                            bos_token="<bos>", eos_token="<|im_end|>", **variables)


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


CALLED = [*turns("How warm is it?", '{"name": "weather", "arguments": {"city": "北京"}}'),
          {"role": "tool", "content": '{"celsius": 21}\n"fair" & <b>'}]
WITH_TOOLS = [CALLED, [*CALLED, CALLED[-1]], [*CALLED, *turns("b", "21 degrees")[1:], *turns("And there?")],
              [*CALLED, CALLED[1], CALLED[2], *turns("b", "21")[1:], *CALLED],
              [{"role": "system", "content": "Call a function."}, *CALLED]]


@pytest.mark.parametrize("template", [CHATML, ALPACA])
def test_our_steps_equal_jinja(template: str) -> None:
    render = jinja(template)
    joints = derive(render)
    for messages in proof_conversations(system=True):
        assert fill(joints, messages) == render(messages)


def test_proof_covers_hard_text() -> None:
    contents = "".join(m["content"] for c in proof_conversations(system=True) for m in c)
    assert all(part in contents for part in ['"', "{{", "}}", "{%", "\\", "北京", "\n", "\t"])
    assert {c[0]["role"] for c in proof_conversations(system=True)} == {"system", "user"}


def test_system_later_in_a_conversation() -> None:
    render = jinja(CHATML)
    messages = [*turns("a", "b"), {"role": "system", "content": "c"}, *turns("d")]
    assert fill(derive(render), messages) == render(messages)


def test_started_answer_is_left_open() -> None:
    joints = derive(jinja(CHATML))
    assert fill(joints, turns("a", "So")).endswith("<|im_end|>\n<|im_start|>assistant\nSo")


def test_default_system_text_only_without_a_system_message() -> None:
    default = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    joints = derive(jinja(default + CHATML))
    assert fill(joints, turns("a")).count("Be kind.") == 1
    assert "Be kind." not in fill(joints, [{"role": "system", "content": "x"}, *turns("a")])


def test_no_system_role_is_left_out_and_said() -> None:
    render = jinja(NO_SYSTEM)
    joints = derive(render)
    assert (START, "system") not in joints
    assert fill(joints, [{"role": "system", "content": "x"}, *turns("a")]) == render(turns("a"))

    class Tokenizer:
        chat_template, bos_token = NO_SYSTEM, None

    notes = " ".join(limits(joints, render, Tokenizer()))
    assert "no system message" in notes
    assert "strips the space" in notes


def test_tools_results_are_taken_over_whole_or_left_out_and_that_is_said() -> None:
    """A template that counts the results of a call, or writes them as JSON, is beyond Ollama's."""
    class Tokenizer:
        chat_template, bos_token = "", None

    for write, taken in (("m.content", True), ("m.content | tojson if m.role == 'tool' else m.content", False),
                         ("loop.index ~ m.content if m.role == 'tool' else m.content", False)):
        render = jinja(CHATML.replace("m.content", f"({write})"))
        joints = derive(render)
        told = " ".join(limits(joints, render, Tokenizer()))
        assert Modelfile(joints, [], 0, "", []).takes(CALLED) is taken is ("tools' results" not in told)
        if taken:
            assert [fill(joints, talk) for talk in WITH_TOOLS] == [render(talk) for talk in WITH_TOOLS]


@pytest.mark.parametrize(("template", "part"), [
    ("{% for m in messages %}[{{ loop.index }}]{{ m.content }}{% endfor %}", "'[4]'"),
    ("{{ messages[-1].content }}", "repeats, drops or moves"),
    ("{% for m in messages %}{{ m.role + ':' + m.content | replace('\"', '') }}{% endfor %}", "Ollama would write"),
    ("{% for tool in tools.names %}{{ tool + 1 }}{% endfor %}{{ messages[0].content + 1 }}", "refuses"),
    ("{% if messages | length > 1 %}{{ raise_exception('once') }}{% endif %}{{ messages[0].content }}", "refuses"),
])
def test_what_cannot_be_expressed_is_named(template: str, part: str) -> None:
    render = jinja(template)
    with pytest.raises(KitError, match=re.escape(part)) as error:
        derive(render)
    assert error.value.hint


def test_no_triple_quote_and_one_line_per_pair() -> None:
    template = go_template(derive(jinja("{% for m in messages %}{{ '\"\"\" {{ ' + m.content }}{% endfor %}\"\"\"")))
    assert '"""' not in template
    assert r"\x22\x22\x22 {{ " in template


# From here on: real tokenizers, real templates, real Go.

@pytest.fixture(scope="module")
def go_render(tmp_path_factory: pytest.TempPathFactory):
    """Render [(template, conversations)] with Go's text/template."""
    if shutil.which("go") is None:
        pytest.skip("go is not on PATH: Go's own text/template cannot be asked")
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(GO_PROGRAM)
    environment = {**os.environ, "GOCACHE": str(folder / "cache"), "GO111MODULE": "off", "GOTOOLCHAIN": "local"}
    subprocess.run(["go", "build", "-o", "render", "main.go"], cwd=folder, env=environment, check=True, timeout=300)

    def run(cases: list[tuple[str, list[list[dict[str, str]]]]]) -> list[list[str]]:
        request = json.dumps([{"Template": t, "Conversations": c} for t, c in cases])
        done = subprocess.run([str(folder / "render")], input=request, capture_output=True, check=True,
                              encoding="utf-8", timeout=60)
        return json.loads(done.stdout)

    return run


# Their answers end with no special token, they are for tools only, or they move the system message.
REFUSED = {
    "Apertus-8B-Instruct", "Apriel-1.6-15b-Thinker-fixed", "CohereForAI-c4ai-command-r-plus-tool_use", "GLM-4.6",
    "GLM-4.7-Flash", "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "fireworks-ai-llama-3-firefunction-v2", "llama-cpp-rwkv-world", "mistralai-Mistral-Nemo-Instruct-2407",
    "tencent-Hy3",
}  # fmt: skip
STYLES = ("chatml", "alpaca")
EVERY = [("own", None), *((style, None) for style in STYLES), ("llama", None), ("Qwen-Qwen3-0.6B", False),
         *((name, None) for name in templates() if name not in REFUSED)]
# A text that looks like the file's own commands.
SYSTEM = 'Say "hi".\nPARAMETER stop "x"\n# 你好 {{ .Prompt }} "quoted"'


def recipe_of(name: str, thinking: bool | None) -> Recipe:
    return Recipe.load({}, prompt_style=name if name in STYLES else "chat", enable_thinking=thinking)


def trained(name: str, recipe: Recipe, tokenizer: Any) -> Any:
    """The tokenizer as a training of that template leaves it: its family's own, or the starter's."""
    if name == "llama":
        return prepare_tokenizer(tiny_tokenizer(name), recipe)
    return prepare_tokenizer(real_tokenizer(PAIRS[name].vocab, name, short=True) if name in PAIRS
                             else copy.deepcopy(tokenizer), recipe)


def conversations(modelfile: Modelfile) -> list[list[dict[str, str]]]:
    """Those of the proof and those of the gate, with system messages and tools' results where the template has them."""
    from kit.verifying.template import TALKS

    system = (START, "system") in modelfile.joints
    return [*proof_conversations(system),
            *(talk for talk in [*TALKS.values(), *WITH_TOOLS] if modelfile.takes(talk))]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "thinking"), EVERY)
def test_go_renders_what_jinja_renders(name: str, thinking: bool | None, tokenizer: Any, tmp_path: Path,
                                       request: pytest.FixtureRequest) -> None:
    recipe = recipe_of(name, thinking)
    tokenizer = trained(name, recipe, tokenizer)
    path = write_modelfile(tmp_path / "Modelfile", "m-q8_0.gguf", tokenizer, 2048, template_kwargs(recipe), SYSTEM)
    modelfile = modelfile_of(recipe, tokenizer)
    # Ollama puts this one before a prompt by itself.
    bos = tokenizer.bos_token if tokenizer("")["input_ids"] == [tokenizer.bos_token_id] else ""
    assert bos == ("<|begin_of_text|>" if name == "llama" else "")
    talks = conversations(modelfile)
    expected = [render(tokenizer, talk, recipe, add_generation_prompt=True) for talk in talks]
    assert [bos + modelfile.prompt(talk) for talk in talks] == expected
    if shutil.which("go"):  # else the next test is skipped, and says so
        go_render, template = request.getfixturevalue("go_render"), in_modelfile(path)
        [sent] = go_render([(template, talks)])
        assert [bos + text for text in sent] == expected
        assert sent != go_render([(template.replace(".Content", ".Role"), talks)])[0]

    text = path.read_text(encoding="utf-8")
    assert text == modelfile._replace(system=SYSTEM, num_ctx=2048).text("m-q8_0.gguf")
    assert "\nFROM ./m-q8_0.gguf\n" in "\n" + text and f'SYSTEM """{SYSTEM}"""\n' in text
    assert f'PARAMETER stop "{tokenizer.eos_token}"\n' in text and text.endswith("PARAMETER num_ctx 2048\n")
    assert "temperature" not in text
    assert os.listdir(tmp_path) == ["Modelfile"]


@pytest.mark.slow
def test_go_leaves_a_started_answer_open(tokenizer, go_render, tmp_path: Path) -> None:
    path = write_modelfile(tmp_path / "Modelfile", "m.gguf", tokenizer, 2048)
    [[made]] = go_render([(in_modelfile(path), [turns("a", "So")])])
    assert made == tokenizer.apply_chat_template(turns("a", "So"), tokenize=False, continue_final_message=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(REFUSED & set(templates())))
def test_what_ollama_cannot_render_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(KitError):
        write_modelfile(tmp_path / "Modelfile", "m.gguf", trained(name, recipe_of(name, None), None), 2048)
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_the_files_own_system_message(tokenizer: Any) -> None:
    modelfile = modelfile_of(Recipe.load({}, system_prompt="Be brief."), tokenizer)
    asked, own = [{"role": "user", "content": "a"}], {"role": "system", "content": "Be long."}
    assert modelfile.prompt(asked) == modelfile.prompt([{"role": "system", "content": "Be brief."}, *asked])
    assert "Be brief." not in modelfile.prompt([own, *asked])


@pytest.mark.slow
def test_bos_is_left_to_ollama_when_the_tokenizer_adds_one(tokenizer, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    adding = copy.deepcopy(tokenizer)
    adding.chat_template = "{{ bos_token }}" + ALPACA
    adding.add_bos_token = True
    adding._tokenizer.post_processor = TemplateProcessing(
        single=f"{adding.bos_token} $A", special_tokens=[(adding.bos_token, adding.bos_token_id)])
    with_bos = write_modelfile(tmp_path / "a", "m.gguf", adding, 2048)
    assert adding.bos_token not in in_modelfile(with_bos)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = adding.chat_template
    assert tokenizer.bos_token in in_modelfile(write_modelfile(tmp_path / "b", "m.gguf", tokenizer, 2048))


@pytest.mark.slow
def test_stop_tokens_and_trained_system(tokenizer, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = "<|endoftext|>"
    text = write_modelfile(tmp_path / "m", "m.gguf", tokenizer, 2048, system="Be brief.").read_text()
    assert 'PARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_end|>"\n' in text
    assert 'SYSTEM """Be brief."""\n' in text
    tokenizer.chat_template = None
    with pytest.raises(KitError, match="no chat template"):
        write_modelfile(tmp_path / "n", "m.gguf", tokenizer, 2048)
    assert not (tmp_path / "n").exists()
