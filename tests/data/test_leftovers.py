"""Unfilled placeholders and other makers' assistants: found where they were left, not where they belong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kit.common.files import PROJECT
from kit.data.leftovers import CLOSED, MAKERS, makers_of, other_assistant, placeholder

PLACEHOLDERS = [
    "Dear {{name}}, your order is here.", "Dear {{ customer.name }},", "Hello {name}!",
    "Answer the question: {question}",
    "请回答：{问题}", "尊敬的{{客户姓名}}：您好", "Hi [NAME], thanks", "Call <YOUR NAME>",
    "Kind regards, [YOUR COMPANY NAME]",
    "write to <your email>", "Today is {DATE}.", "“{city}” is far", "[INSERT DATE HERE]", "context:\n{context}\n",
]
NO_PLACEHOLDERS = [
    r"\frac{{a}}{b}", r"$x^{name}$ and \text{name}", "the set {a, b} and {1}", "GET /users/{id}/x",
    "[MASK], [SEP], [ERROR], [TODO]",
    "[LINK](http://example.com)", "a<br>b<name>", '{"a": {"b": 1}, "c": [1]}', 'f"{name}"', "[INPUT_IDS] is an array",
    "${{ secrets.X }}", "<p>{{name}}</p>", "Use `{name}` here", "see [1], [A] and [12]", "{{#if x}}yes{{/if}}", "{}",
    "{{}}",
    "```python\nprint('{name}'.format(name=1))\n```", "Write a Jinja template that greets {{name}}.",
    "map(x => {name})",
    "模板里写 {{姓名}}", "Dear [Your Name]", "if (a) { b(); }", "a {b} c", "#include <name>", "body {color: red}",
]


@pytest.mark.parametrize("text", PLACEHOLDERS)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_placeholder_that_nothing_was_put_into(role: str, text: str) -> None:
    found = placeholder([{"role": "user", "content": "Hi"}, {"role": role, "content": text}])
    assert found and found in text


@pytest.mark.parametrize("text", NO_PLACEHOLDERS)
def test_code_formulas_markup_and_templates_have_none(text: str) -> None:
    assert placeholder([{"role": "user", "content": text}]) is None
    assert placeholder([{"role": "assistant", "content": f"Look: {text}"}]) is None


def test_the_bundled_rows_have_none() -> None:
    for file in sorted((PROJECT / "data").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            texts = [value for value in row.values() if isinstance(value, str)]
            texts += [turn["content"] for turn in row.get("messages", [])]
            messages = [{"role": role, "content": text} for text in texts for role in ("system", "user")]
            assert placeholder(messages) is None and other_assistant(messages, {"Hugging Face"}) is None


def told(text: str, *makers: str) -> str | None:
    return other_assistant([{"role": "system", "content": text}, {"role": "user", "content": "Hi"}], makers)


@pytest.mark.parametrize(("text", "name", "maker"), [
    ("You are ChatGPT, a large language model trained by OpenAI.", "ChatGPT", "OpenAI"),
    ("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", "Qwen", "Alibaba"),
    ("You are a helpful assistant named Claude.", "Claude", "Anthropic"), ("Your name is Mistral.", "Mistral",
    "Mistral AI"),
    ("You're Kimi, an AI assistant provided by Moonshot AI.", "Kimi", "Moonshot AI"),
    ("You are an AI assistant developed by Google.", "Google", "Google"), ("You are Llama 3.", "Llama", "Meta"),
    ("Be kind.\nYou are DeepSeek-V3.", "DeepSeek-V3", "DeepSeek"), ("you are GPT-4.", "GPT-4", "OpenAI"),
    ("你是ChatGPT，由OpenAI训练的大型语言模型。", "ChatGPT", "OpenAI"), ("你是通义千问，由阿里云开发的AI助手。",
    "通义千问", "Alibaba"),
    ("你是一个由百度开发的AI助手。", "百度", "Baidu"), ("你叫豆包。", "豆包", "ByteDance"), ("你是 Kimi。", "Kimi",
    "Moonshot AI"),
    ("我是文心一言", "文心一言", "Baidu"), ("你是DeepSeek，由深度求索公司开发的智能助手", "DeepSeek", "DeepSeek"),
])
def test_another_makers_assistant(text: str, name: str, maker: str) -> None:
    other = "Google" if maker == "Meta" else "Meta"
    assert (told(text, other) or "").rstrip(".") == name
    assert told(text, maker) is None
    # Of a model that nothing is known of, only an assistant that nobody else can train is surely another.
    assert bool(told(text)) == (maker in CLOSED)


@pytest.mark.parametrize("text", [
    "You are a helpful assistant.", "You are an expert in Qwen and ChatGPT.", "You are a ChatGPT prompt engineer.",
    "You are a Google Ads expert.", "You are a support agent for Microsoft products.", "You are Claudette, a cook.",
    "You are a llama farmer.", "You are Gemini Smith's lawyer.", "Compare ChatGPT with Claude.",
    "You sell cars built by Tesla.",
    "You are a helpful assistant. Describe what was made by OpenAI.", "你是一个精通ChatGPT的专家",
    "你是ChatGPT提示词专家", "你是百度的客服",
    "你是腾讯公司的招聘专员", "你是一名精通百度地图的司机", "你是在阿里巴巴工作的设计师", "请把这句话译成英文：你好",
])
def test_a_name_that_is_no_identity(text: str) -> None:
    assert told(text, "Hugging Face") is None


def test_only_the_system_message_counts() -> None:
    assert other_assistant([{"role": "user", "content": "You are ChatGPT."}], {"Meta"}) is None


@pytest.mark.parametrize(("model", "makers"), [
    ("Qwen/Qwen2.5-7B-Instruct", {"Alibaba"}), ("starter", {"Hugging Face"}), ("/models/Llama-3.1-8B/", {"Meta"}),
    ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", {"DeepSeek", "Alibaba"}), ("google/gemma-3-4b-it", {"Google"}),
    ("microsoft/phi-4", {"Microsoft"}), ("openai/gpt-oss-20b", {"OpenAI"}), ("THUDM/glm-4-9b-chat", {"Zhipu AI"}),
    ("mistralai/Mistral-7B-v0.3", {"Mistral AI"}), ("me/my-model", set()), ("lmsys/vicuna-7b", set()),
])
def test_the_makers_of_a_model(model: str, makers: set[str]) -> None:
    assert makers_of(model) == makers <= set(MAKERS)
    assert makers_of(model, "{{ 'You are Qwen, created by Alibaba Cloud.' }}") == (makers or {"Alibaba"})


@pytest.mark.parametrize("text",
["{" * 50_000, "{{a " * 20_000, "[YOUR " * 20_000, "you are " * 20_000, "你是" * 50_000,
                                  "you are a " + "x " * 50_000])
def test_a_long_text_takes_no_time(text: str, tmp_path: Path) -> None:
    assert placeholder([{"role": "user", "content": text}]) is None and told(text, "Meta") is None
