"""The chat templates of many models, REQUIRED with a real vocabulary, the others with the beginning of one: what is
trained is what the model would be asked for.

What to expect is worked out here from the rendered text alone. Either a conversation is encoded exactly so, or it is
refused with a reason, and which are refused is written down below.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import pytest

from kit.common.errors import KitError
from kit.data.masks import Formatter
from kit.models.template import Message, prepare_tokenizer, prompt_ids, render
from kit.recipe.recipe import Recipe
from support.vocabularies import FOLDER, PAIRS, WHY_NOT, real_tokenizer, templates

pytestmark = pytest.mark.slow



def talk(*contents: str, system: str | None = None) -> list[Message]:
    """A conversation whose contents are the user's and the assistant's in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def thought(reasoning: str, answer: str) -> str:
    return f"<think>\n{reasoning}\n</think>\n\n{answer}"


ODD = (
    "Two  spaces,\ttab,\n\n\nlines,\n  an indent\n{{ x }} {% y %} {# z #} "
    "'one' \"two\" \\n $ {\"a\": [null]} 🦙👩‍👩‍👧 é"
)
SEVERAL = ("What is 1+1?", "2", "And 2+2?", "It is 4.", "Thanks!", "You are welcome.\n\nAnything else?")
CONVERSATIONS = {
    "one turn": talk("Hi there", "Hello! How can I help?"),
    "one turn, system": talk("Hi there", "Hello! How can I help?", system="Be brief."),
    "several turns": talk(*SEVERAL),
    "several turns, system": talk(*SEVERAL, system="Be brief."),
    "Chinese": talk("你好，请介绍北京。", "北京是中国的首都。", "谢谢！", "不客气，再见。", system="请用中文回答。"),
    "odd characters": talk(ODD, "a" + ODD, "b" + ODD, "c" + ODD),
    "space at the ends": talk("  Hi\n", " Hello!\n\n", "\n\nAnd 2+2?  ", "\t4 "),
    "thinking": talk("What is 1+1?", thought("One and one make two.", "2")),
    "thinking, several turns": talk("1+1?", thought("One and one.", "2"), "2+2?", thought("Two and two.", "It is 4.")),
}
THINKING = {"": None, "thinking unset": None, "thinking on": True, "thinking off": False}

# Why a conversation is refused: parts of the messages.
NO_STOP = "which is no special token"
EARLY_STOP = "into an answer, before its text"
ASKS = "what is trained would not be what is asked"  # the prompt opens the answer in a way the text does not
TURNS = "the chat template refuses the turns"
MOVES = "the chat template drops, moves or repeats a message"
# The conversations that are refused, and no others: template → {pattern of cases: part of the message}. Cases that
# begin with t are those whose answers hold thinking.
REFUSED: dict[str, dict[str, str]] = {
    # An answer ends with the next user's mark, or with nothing.
    "Apertus-8B-Instruct": {"*": NO_STOP},
    "Apriel-1.6-15b-Thinker-fixed": {"*": NO_STOP},
    "GLM-4.6": {"*": NO_STOP},
    "GLM-4.7-Flash": {"*": NO_STOP},
    "llama-cpp-rwkv-world": {"*": NO_STOP},
    "tencent-Hy3": {"*": NO_STOP},
    "Kimi-K3": {"*": EARLY_STOP},
    # The prompt opens the answer's thinking, or closes it, and the conversation is written without.
    "Cohere2MoE": {"*": ASKS},
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": {"*": ASKS},
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": {"*": ASKS},
    "llama-cpp-deepseek-r1": {"*": ASKS},
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": {"*, thinking unset": ASKS, "*, thinking off": ASKS},
    "Spark2.5": {"*, thinking unset": ASKS, "*, thinking on": ASKS},
    "deepseek-ai-DeepSeek-V3.2": {"*, thinking unset": ASKS, "*, thinking off": ASKS},
    "google-gemma-4-31B-it": {"*, thinking unset": ASKS, "*, thinking off": ASKS},
    "google-gemma-4-31B-it-interleaved": {"*, thinking unset": ASKS, "*, thinking off": ASKS},
    # Asked to think, answers need their thinking; asked not to, they must have none.
    "Bielik-11B-v3.0-Instruct": {"[!t]*, thinking on": ASKS},
    "MiniMax-M2": {"[!t]*": ASKS},
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": {
        "[!t]*, thinking unset": ASKS, "[!t]*, thinking on": ASKS, "t*, thinking off": ASKS,
    },
    "Qwen-QwQ-32B": {"*, thinking unset": ASKS, "*, thinking off": ASKS, "[!t]*, thinking on": ASKS},
    "Qwen-Qwen3-0.6B": {"t*, thinking off": ASKS},
    "Qwen3.5-4B": {"t*, thinking off": ASKS},
    "inclusionai-ling-3.0-flash": {"t*, thinking off": ASKS},
    "openbmb-MiniCPM5-1B": {"[!t]*, thinking on": ASKS, "*, thinking off": ASKS},
    "poolside-Laguna-XS-2.1": {"[!t]*, thinking on": ASKS, "t*, thinking unset": ASKS, "t*, thinking off": ASKS},
    "poolside-Laguna-XS.2": {"[!t]*, thinking on": ASKS, "t*, thinking unset": ASKS, "t*, thinking off": ASKS},
    # Its prompt keeps the thinking of earlier answers, its conversation drops it.
    "LFM2.5-Instruct": {"thinking, several turns": ASKS},
    # Templates that are for conversations with tools only.
    "CohereForAI-c4ai-command-r-plus-tool_use": {"*": TURNS},
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": {"*": TURNS},
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": {"*": TURNS},
    "fireworks-ai-llama-3-firefunction-v2": {"*": TURNS},
    # No system turn; Mistral Nemo writes it into the last user's turn.
    "google-gemma-2-2b-it": {"*, system": "System role not supported", "Chinese": "System role not supported"},
    "mistralai-Mistral-Nemo-Instruct-2407": {"*, system": MOVES, "Chinese": MOVES},
    # An earlier answer ends with another token than the last.
    "openai-gpt-oss-120b": {
        pattern: "does not end every answer"
        for pattern in ("several turns*", "Chinese", "odd*", "space*", "*, several*")
    },
}  # fmt: skip
# The space it writes before an answer joins the answer when all earlier turns are tokenised as one text.
JOINS = ("Reka-Edge",)
# Must be handled whatever happens to the table above.
REQUIRED = (
    "Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "Qwen3.5-4B", "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct", "meta-llama-Llama-3.3-70B-Instruct", "google-gemma-2-2b-it",
    "HuggingFaceTB-SmolLM3-3B", "microsoft-Phi-3.5-mini-instruct", "mistralai-Mistral-Nemo-Instruct-2407",
)  # fmt: skip




def cases(template: str) -> list[tuple[str, str, str]]:
    """(name, conversation, setting): every conversation, with each setting of `enable_thinking` the template reads."""
    assert FOLDER is not None
    reads = "enable_thinking" in (FOLDER / f"{template}.jinja").read_text("utf-8")
    return [(f"{conversation}, {setting}" if setting else conversation, conversation, setting)
            for conversation in CONVERSATIONS for setting in THINKING if bool(setting) == reads]


def refusal(template: str, case: str) -> str | None:
    """The part of the message that a refused case must have."""
    return next((part for pattern, part in REFUSED.get(template, {}).items() if fnmatchcase(case, pattern)), None)


@lru_cache(maxsize=1)
def built(template: str) -> tuple[Any, str, str | None]:
    """A template's tokenizer with the stop and pad tokens it came with."""
    tokenizer = real_tokenizer(PAIRS[template].vocab, template, short=template not in REQUIRED)
    return tokenizer, tokenizer.eos_token, tokenizer.pad_token


def unprepared(template: str) -> Any:
    # Copying a tokenizer takes up to a second, so each is copied once and set back between the cases.
    tokenizer, tokenizer.eos_token, tokenizer.pad_token = built(template)
    return tokenizer


def prepared(template: str, setting: str) -> tuple[Any, Recipe]:
    recipe = Recipe.load({}, enable_thinking=THINKING[setting])
    return prepare_tokenizer(unprepared(template), recipe), recipe


def trained_texts(tokenizer: Any, ids: list[int], labels: list[int]) -> list[tuple[int, str]]:
    """(start, text) of each run of trained tokens.

    The text is cut out of the decoded whole: decoded alone, SentencePiece's first piece would lose its space.
    """
    edges = [k for k in range(len(ids) + 1)
             if (k < len(ids) and labels[k] != -100) != (k > 0 and labels[k - 1] != -100)]  # fmt: skip
    runs = []
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        before, through = tokenizer.decode(ids[:start]), tokenizer.decode(ids[:end])
        assert through.startswith(before), "a run of trained tokens begins within a character"
        runs.append((start, through[len(before) :]))
    return runs


def ways(content: str) -> set[str]:
    """How a template may write an earlier answer: as it is, with its thinking, without, or emptied; stripped."""
    thinking, _, answer = content.rpartition("</think>")
    reasoning = thinking.removeprefix("<think>").strip()
    bodies = {content, content.strip(), answer.strip(), answer.lstrip("\n")}
    empty = {"<think>\n\n</think>\n\n", "<think></think>", "<think>\n</think>\n", "</think>", "<think>\n</think>"}
    blocks = {"", *empty}
    if reasoning:
        blocks |= {f"<think>\n{reasoning}\n</think>\n\n", f"<think>{reasoning}</think>", f"{reasoning}</think>"}
        blocks |= {f"{reasoning}\n</think>\n\n", f"<think>\n{reasoning}\n</think>\n"}
    return {(block + body).strip() for block in blocks for body in bodies}


def check(tokenizer: Any, recipe: Recipe, messages: list[Message], ids: list[int], labels: list[int],
          joins: bool = False) -> None:
    full = render(tokenizer, messages, recipe)
    stop = str(tokenizer.eos_token)
    assert tokenizer.decode(ids) == full
    assert len(ids) == len(labels)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    runs = trained_texts(tokenizer, ids, labels)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    assert len(runs) == len(answers), [text for _, text in runs]
    for i, (start, text) in zip(answers, runs, strict=True):
        prompt = render(tokenizer, messages[:i], recipe, add_generation_prompt=True)
        if full.startswith(prompt):
            answer, found, _ = full[len(prompt) :].partition(stop)
            assert found, f"{stop!r} does not follow the answer"
            assert text == answer + stop
            if not joins:
                assert ids[:start] == prompt_ids(tokenizer, messages[:i], recipe)
        else:
            assert i != answers[-1], f"the text does not begin with the prompt, which ends {prompt[-80:]!r}"
            # Around an earlier answer a template may write space of its own.
            assert text.removesuffix(stop).strip() in ways(messages[i]["content"])


@pytest.mark.skipif(FOLDER is None, reason=WHY_NOT)
def test_every_template_has_its_vocabulary() -> None:
    assert sorted(PAIRS) == templates()


@pytest.mark.skipif(FOLDER is None, reason=WHY_NOT)
def test_the_table_of_refusals_names_real_cases() -> None:
    known = {template: [case for case, _, _ in cases(template)] for template in templates()}
    for template, refused in REFUSED.items():
        for pattern in refused:
            assert any(fnmatchcase(case, pattern) for case in known[template]), (template, pattern)
    for template in REQUIRED:
        plain = [case for case in known[template] if case.startswith(("one turn", "several turns"))]
        assert not any(refusal(template, case) for case in plain if "system" not in case), template


@pytest.mark.parametrize("template", templates() or [pytest.param("", marks=pytest.mark.skip(reason=WHY_NOT))])
def test_a_template(template: str, subtests: pytest.Subtests) -> None:
    """All its conversations in one test: building its tokenizer takes longer than they do."""
    for case, conversation, setting in cases(template):
        with subtests.test(case):
            trained_is_asked_for(template, CONVERSATIONS[conversation], setting, refusal(template, case))
    if refusal(template, "several turns") not in (NO_STOP, TURNS):
        with subtests.test("preparing it changes no text"):
            preparing_changes_no_text(template)


def trained_is_asked_for(template: str, messages: list[Message], setting: str, reason: str | None) -> None:
    if reason is not None:
        with pytest.raises(KitError, match=re.escape(reason)):
            Formatter(*prepared(template, setting)).encode([messages])
        return
    tokenizer, recipe = prepared(template, setting)
    [(ids, labels)] = Formatter(tokenizer, recipe).encode([messages])
    check(tokenizer, recipe, messages, ids, labels, template in JOINS)


def preparing_changes_no_text(template: str) -> None:
    """Another stop token must not change what a template writes with `eos_token`."""
    messages = CONVERSATIONS["several turns"]
    asked = ((messages, False), (messages[:-1], True))
    before = [render(unprepared(template), turns, Recipe.load({}), ask) for turns, ask in asked]
    tokenizer, recipe = prepared(template, "")
    assert [render(tokenizer, turns, recipe, ask) for turns, ask in asked] == before


@pytest.mark.skipif(FOLDER is None, reason=WHY_NOT)
@pytest.mark.parametrize("conversation", ["one turn", "several turns", "several turns, system"])
@pytest.mark.parametrize("eats_space", [False, True], ids=["space before every text", "marks take the space behind"])
def test_sentencepiece_whose_pieces_do_not_decode_to_the_text(conversation: str, eats_space: bool) -> None:
    """A space before every stretch of text, as Llama's tokenizer with `legacy`; and marks that take the space behind.

    A GGUF tells neither; llama.cpp knows by the model's name that Phi-3's marks are of the second kind.
    """
    from tokenizers import AddedToken, pre_tokenizers

    template = "microsoft-Phi-3.5-mini-instruct"
    tokenizer, recipe = real_tokenizer(PAIRS[template].vocab, template), Recipe.load({})
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=False)
    if eats_space:
        marks = [AddedToken(f"<|{name}|>", special=True, normalized=False, rstrip=True)
                 for name in ("system", "user", "assistant", "end")]  # fmt: skip
        tokenizer.add_tokens(marks, special_tokens=True)
    prepare_tokenizer(tokenizer, recipe)
    messages = CONVERSATIONS[conversation]
    [(ids, labels)] = Formatter(tokenizer, recipe).encode([messages])
    assert ids == tokenizer(render(tokenizer, messages, recipe), add_special_tokens=False)["input_ids"]
    edges = [k for k in range(len(ids)) if (labels[k] != -100) != (labels[k - 1] != -100)]
    runs = [tokenizer.decode(ids[start:end]) for start, end in zip(edges[::2], edges[1::2], strict=True)]
    assert runs == [m["content"] + str(tokenizer.eos_token) for m in messages if m["role"] == "assistant"]
    start = max(k for k in range(1, len(ids)) if labels[k] != -100 and labels[k - 1] == -100)
    assert ids[:start] == prompt_ids(tokenizer, messages[:-1], recipe)
