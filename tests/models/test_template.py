"""One template renders everything, and the mask is exactly the answers with their stop token."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest

from kit.common.errors import KitError
from kit.data.masks import Formatter
from kit.export.modelfile import modelfile_of
from kit.gguf.trial import BeyondLimits, attempt
from kit.models.styles import ALPACA_PREAMBLE
from kit.models.template import alpaca_turn, prepare_tokenizer, prompt_ids, render
from kit.recipe.recipe import Recipe
from support import grammars
from support.crafted import CRAFTED_TEMPLATES
from support.vocabularies import FOLDER, WHY_NOT, real_tokenizer

TURNS = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好，请用中文回答"},
     {"role": "assistant", "content": "好的。"}, {"role": "user", "content": "1+1?"},
     {"role": "assistant", "content": "2"}],
    [{"role": "user", "content": "  {{ x }} {% y %}\n\n\\'\"🙂 "}, {"role": "assistant", "content": '{"a": null}\n'}],
]


OWN = ("{% for m in messages %}<|im_start|>{{ m.role | upper }}:\n{{ m.content }}<|im_end|>\n{% endfor %}"
       "{% if add_generation_prompt %}<|im_start|>ASSISTANT:\n{% endif %}")


@pytest.fixture(params=["chat", "chatml", "qwen", "alpaca", "a file"])
def styled(request: pytest.FixtureRequest, tokenizer: Any, tmp_path: Path) -> tuple[Any, Recipe]:
    if request.param == "a file":
        (tmp_path / "模板 1.jinja").write_text(OWN, "utf-8")
        recipe = Recipe.load({}, chat_template=str(tmp_path / "模板 1.jinja"))
    else:
        recipe = Recipe.load({}, prompt_style=request.param)
    fresh = copy.deepcopy(tokenizer)
    if request.param == "alpaca":
        fresh.eos_token = "<|endoftext|>"
    return prepare_tokenizer(fresh, recipe), recipe


@pytest.mark.slow
@pytest.mark.parametrize("messages", TURNS, ids=["one turn", "system and two turns", "odd characters"])
def test_trained_tokens_are_the_answers_and_the_stop(styled: Any, messages: list[dict[str, str]]) -> None:
    tokenizer, recipe = styled
    [(ids, labels)] = Formatter(tokenizer, recipe).encode([messages])
    assert tokenizer.decode(ids) == render(tokenizer, messages, recipe)
    trained = tokenizer.decode([label for label in labels if label != -100])
    stop = tokenizer.eos_token
    assert trained == "".join(m["content"] + stop for m in messages if m["role"] == "assistant")
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))


@pytest.mark.slow
def test_the_prompt_at_inference_is_what_stood_before_the_answer(styled: Any) -> None:
    tokenizer, recipe = styled
    for messages in TURNS:
        [(ids, labels)] = Formatter(tokenizer, recipe).encode([messages])
        last = max(i for i, label in enumerate(labels) if label == -100 and i + 1 < len(ids) and labels[i + 1] != -100)
        assert ids[: last + 1] == prompt_ids(tokenizer, messages[:-1], recipe)


@pytest.mark.slow
def test_stop_and_pad_are_two_tokens(styled: Any) -> None:
    tokenizer, recipe = styled
    assert tokenizer.eos_token == ("<|endoftext|>" if recipe.prompt_style == "alpaca" else "<|im_end|>")
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


@pytest.mark.slow
def test_a_base_models_stop_token_becomes_the_templates(tokenizer: Any) -> None:
    base = copy.deepcopy(tokenizer)
    base.eos_token = base.pad_token = "<|endoftext|>"  # as Qwen2.5's base models come
    prepare_tokenizer(base, Recipe.load({}))
    assert (base.eos_token, base.pad_token) == ("<|im_end|>", "<|endoftext|>")


@pytest.mark.slow
def test_loss_on_everything_when_asked(tokenizer: Any) -> None:
    recipe = Recipe.load({}, train_on_responses_only=False)
    [(ids, labels)] = Formatter(tokenizer, recipe).encode([TURNS[0]])
    assert ids == labels


@pytest.mark.slow
def test_system_prompt_of_the_recipe(tokenizer: Any) -> None:
    recipe = Recipe.load({}, system_prompt="Answer as a pirate.")
    assert "<|im_start|>system\nAnswer as a pirate.<|im_end|>" in render(tokenizer, TURNS[0], recipe)
    assert "Be brief." in render(tokenizer, TURNS[1], recipe) and "pirate" not in render(tokenizer, TURNS[1], recipe)


def broken(tokenizer: Any, template: str) -> str:
    fresh = copy.deepcopy(tokenizer)
    fresh.chat_template = template
    with pytest.raises(KitError) as caught:
        Formatter(prepare_tokenizer(fresh, Recipe.load({})), Recipe.load({})).encode(TURNS[:2])
    return str(caught.value)


@pytest.mark.slow
def test_templates_that_cannot_be_masked_are_refused(tokenizer: Any) -> None:
    each = "{% for m in messages %}"
    assert "no special token" in broken(tokenizer, each + "{{ m.content }}\n{% endfor %}")
    assert "drops, moves or repeats" in broken(tokenizer, "{{ messages[-1].content }}<|im_end|>")
    upper = each + "{{ m.content | upper }}<|im_end|>{% endfor %}"
    assert "rewrites" in broken(tokenizer, upper)
    last_only = each + "{{ m.content }}{% if loop.last %}<|im_end|>{% else %}\n{% endif %}{% endfor %}"
    assert "would not be what is asked" in broken(tokenizer, last_only)


@pytest.mark.slow
def test_a_template_is_a_program_that_is_not_trusted(tokenizer: Any) -> None:
    assert "needs more than 512 MB" in broken(tokenizer, CRAFTED_TEMPLATES["times"])
    assert "division or modulo by zero" in broken(tokenizer, "{{ 1 // 0 }}")
    assert "maximum recursion depth" in broken(tokenizer, "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")
    later = "{% if messages | length == 13 %}" + CRAFTED_TEMPLATES["a long text"] + "{% endif %}"
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = later + tokenizer.chat_template
    assert render(changed, TURNS[0], Recipe.load({})) == render(tokenizer, TURNS[0], Recipe.load({}))
    with pytest.raises(KitError, match="writes 100,0"):
        render(changed, TURNS[0] * 6 + TURNS[0][:1], Recipe.load({}))
    changed.chat_template = 5
    with pytest.raises(KitError, match="no text, but 5"):
        render(changed, TURNS[0], Recipe.load({}))


@pytest.mark.slow
def test_a_template_does_not_write_into_the_conversation(tokenizer: Any) -> None:
    changed, messages = copy.deepcopy(tokenizer), copy.deepcopy(TURNS[0])
    changed.chat_template = "{% set x %}{{ (messages | indent)[0] }}{% endset %}" + tokenizer.chat_template
    with contextlib.suppress(KitError):
        render(changed, messages, Recipe.load({}))
    assert messages == TURNS[0]


@pytest.mark.slow
def test_no_template_names_the_remedy(tokenizer: Any) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(KitError, match="prompt_style: chatml or alpaca"):
        prepare_tokenizer(bare, Recipe.load({}))


def test_alpaca_rows_fold_the_input_into_the_users_turn() -> None:
    assert alpaca_turn("Sum up.") == alpaca_turn("Sum up.", None) == "Sum up."
    assert alpaca_turn("Sum up.", "A text") == "Sum up.\n\n### Input:\nA text"


@pytest.mark.slow
def test_alpaca_text_has_its_three_headings(tokenizer: Any) -> None:
    recipe = Recipe.load({}, prompt_style="alpaca")
    fresh = prepare_tokenizer(copy.deepcopy(tokenizer), recipe)
    messages = [{"role": "user", "content": alpaca_turn("Add.", "1, 2")}, {"role": "assistant", "content": "3"}]
    assert render(fresh, messages, recipe) == (
        f"{ALPACA_PREAMBLE}\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n3{fresh.eos_token}\n\n")


@pytest.mark.parametrize("count", [pytest.param(500, marks=pytest.mark.slow),
                                   pytest.param(10_000, marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # Jinja's code of (1)(2)
def test_random_templates_are_masked_or_refused(tokenizer: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried out as in the process of their own, which would take 0.2 seconds for each."""
    def use(template: str) -> None:
        try:
            attempt(template)
        except BeyondLimits as error:
            raise KitError(str(error)) from None
        fresh = copy.copy(tokenizer)
        fresh.chat_template = template
        prepared = prepare_tokenizer(fresh, recipe)
        for ids, labels in Formatter(prepared, recipe).encode(TURNS):
            assert len(ids) == len(labels) and prepared.eos_token_id in labels

    recipe = Recipe.load({})
    monkeypatch.setattr("kit.models.template.check_template", lambda template: None)
    outcomes = grammars.attempts(count, grammars.template, use)
    assert min(outcomes["value"], outcomes["refused"]) > count / 10


@pytest.mark.slow
def test_qwens_template_by_name(tokenizer: Any) -> None:
    recipe = Recipe.load({}, prompt_style="qwen")
    fresh = prepare_tokenizer(copy.deepcopy(tokenizer), recipe)
    assert render(fresh, TURNS[0], recipe) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n")
    assert render(fresh, TURNS[1], recipe).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert modelfile_of(recipe, fresh).prompt(TURNS[0][:1]) == render(fresh, TURNS[0][:1], recipe, True)
    with pytest.raises(KitError, match=r"llama3 needs the tokens <\|start_header_id\|> and"):
        prepare_tokenizer(copy.deepcopy(tokenizer), Recipe.load({}, prompt_style="llama3"))


@pytest.mark.slow
@pytest.mark.skipif(FOLDER is None, reason=str(WHY_NOT))
def test_llamas_template_by_name() -> None:
    recipe = Recipe.load({}, prompt_style="llama3")
    fresh = prepare_tokenizer(real_tokenizer("llama-bpe", short=True), recipe)
    assert render(fresh, TURNS[1][:3], recipe) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n你好，请用中文回答<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n好的。<|eot_id|>")
    assert modelfile_of(recipe, fresh).prompt(TURNS[1][:2]) == render(fresh, TURNS[1][:2], recipe, True)
    for messages in TURNS:
        [(_, labels)] = Formatter(fresh, recipe).encode([messages])
        assert fresh.decode([label for label in labels if label != -100]) == "".join(
            m["content"] + "<|eot_id|>" for m in messages if m["role"] == "assistant")


# A file of one's own

@pytest.mark.slow
@pytest.mark.parametrize("content, words", [
    (b"", "is empty"), ("{{ '好' }}".encode("gb18030"), "not UTF-8 text (byte 4)"),
    (None, "did you mean 'mine.jinja'?"),
    (b"{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
     "does not write what opens an answer, '<|im_start|>assistant\\n'"),
    (b"{{ messages[-1].content }}<|im_end|>", "drops, moves or repeats"),
    (b"{% for m in messages %}{{ m.content }}\n{% endfor %}", "no special token"),
    (b"{% for m in messages %}", "line 1: Unexpected end of template"),
    (b"{% for i in range(999999999) %}{% for j in range(999999999) %}{% endfor %}{% endfor %}", "the chat template")])
def test_a_bad_file_of_a_template_is_one_error(tokenizer: Any, tmp_path: Path, content: bytes | None,
                                               words: str) -> None:
    path = tmp_path / "my.jinja"
    (tmp_path / "mine.jinja").write_text(OWN)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(KitError) as caught:
        prepare_tokenizer(copy.deepcopy(tokenizer), Recipe.load({}, chat_template=str(path)))
    assert f"chat_template: {path}" in caught.value.message and words in caught.value.message and caught.value.hint


def test_a_template_is_named_once() -> None:
    with pytest.raises(KitError, match="chat_template and prompt_style are both set"):
        Recipe.load({}, chat_template="a.jinja", prompt_style="chatml")
