"""What was left in a text by mistake: a placeholder that nothing was put into, another maker's assistant."""

import re
from collections.abc import Collection
from functools import lru_cache

from kit.models.template import Message

# A name in double or single braces that stands by itself: not behind a command, a letter or a sign, as in LaTeX, code,
# paths and sets.
_BEHIND = r"(?<![\\$}^_{%#/=A-Za-z0-9(\[<|&.])"
_BRACES = (_BEHIND + r"(?:\{\{ ?[A-Za-z_][A-Za-z0-9_. ]{0,40}?(?<! ) ?\}\}"
           r"|\{[a-z][a-z0-9_]{1,30}\}|\{[A-Z][A-Z0-9_]{2,30}\}"
           r"|\{\{ ?[\u4e00-\u9fff]{1,10} ?\}\}|\{[\u4e00-\u9fff]{1,10}\})")
# Capitals in square or angle brackets, of words that stand for something to fill in: [MASK], [ERROR] and <BR> are none.
_FIRST = "YOUR|INSERT|ENTER|FIRST|LAST|FULL|USER|CUSTOMER|CLIENT|COMPANY|ORDER|PRODUCT|API"
_WORDS = ("NAME|COMPANY|DATE|TIME|E-?MAIL|PHONE|ADDRESS|CITY|COUNTRY|PRODUCT|AMOUNT|PRICE|TITLE|TOPIC|QUESTION|ANSWER|"
          "CONTEXT|TEXT|INPUT|OUTPUT|PLACEHOLDER|NUMBER|URL|LINK|USERNAME|PASSWORD|KEY|ID")
_CAPITALS = rf"(?:(?:{_FIRST})[ _-]){{0,2}}(?:{_WORDS})(?:[ _-](?:HERE|\d))?"
_BRACKETS = rf"\[{_CAPITALS}\](?!\()|<(?:{_CAPITALS}|(?:your|insert|enter)[ _-][a-z _-]{{2,30}})>"
PLACEHOLDER = re.compile(f"{_BRACES}|{_BRACKETS}")
# A row with code, markup or LaTeX in it, or that speaks of templates, has such names for good reasons.
OF_PROGRAMS = re.compile(
    r"```|`[^`\n]*[{<\[]|</|/>|\{%|[$#]\{|(?<![A-Za-z])[fF][\"']|\\[a-zA-Z]+\{|#include|=>|\);|\b(?:def|elif|printf|template|"
    r"placeholder|jinja|mustache|handlebars|f-string|regex|html|latex|python|javascript)s?\b|模板|占位|变量|代码|函数|编程",
    re.IGNORECASE)

# Assistants by their makers. Of those in CLOSED nobody else can train the model.
MAKERS = {
    "OpenAI": ("ChatGPT|GPT-?[345][\\w.-]*|gpt-oss", "OpenAI"),
    "Anthropic": ("Claude", "Anthropic"),
    "Google": ("Gemini|Gemma|Bard", "Google(?: DeepMind)?|谷歌"),
    "Microsoft": ("Copilot|Phi-?[1-9]?[\\w.-]*", "Microsoft|微软"),
    "Alibaba": ("Qwen[\\w.-]*|QwQ[\\w.-]*|Tongyi(?: Qianwen)?|通义千问",
                "Alibaba(?: Cloud| Group)?|阿里云|阿里巴巴|达摩院"),
    "Meta": ("Llama[\\w.-]*|Meta AI", "Meta(?: AI)?"),
    "Mistral AI": ("Mistral[\\w.-]*|Mixtral[\\w.-]*|Le Chat", "Mistral(?: AI)?"),
    "DeepSeek": ("DeepSeek[\\w.-]*|深度求索", "DeepSeek(?: AI)?|深度求索|幻方"),
    "Moonshot AI": ("Kimi[\\w.-]*|月之暗面", "Moonshot(?: AI)?|月之暗面"),
    "Zhipu AI": ("ChatGLM[\\w.-]*|GLM-?\\d[\\w.-]*|智谱清言", "Zhipu(?: ?AI)?|智谱(?: ?AI)?"),
    "Baidu": ("ERNIE(?: Bot)?[\\w.-]*|文心一言", "Baidu|百度"),
    "ByteDance": ("Doubao[\\w.-]*|豆包", "ByteDance|字节跳动"),
    "Tencent": ("Hunyuan[\\w.-]*|腾讯混元|混元|腾讯元宝", "Tencent|腾讯"),
    "Baichuan": ("Baichuan[\\w.-]*|百川大模型|百川", "Baichuan(?: AI)?|百川智能"),
    "Shanghai AI Lab": ("InternLM[\\w.-]*|书生·?浦语", "Shanghai AI Lab(?:oratory)?|上海人工智能实验室"),
    "xAI": ("Grok[\\w.-]*", "xAI"),
    "Hugging Face": ("SmolLM[\\w.-]*|Zephyr[\\w.-]*", "Hugging ?Face"),
}  # fmt: skip
CLOSED = ("OpenAI", "Anthropic")
LONGEST = 2000  # characters of a system message that are looked at
_MADE = "created|developed|trained|made|built|designed|powered"
_MADE_ZH = "开发|研发|训练|创建|推出|打造|设计|创造|构建"


def _statement(names: str, makers: str) -> re.Pattern[str]:
    """Who an assistant is told to be: You are X, … made by Y; 你是 X，由 Y 开发."""
    # "You are a Claude expert", "你是精通 ChatGPT 的专家" and "你是在 Y 工作的 …" say something else.
    return re.compile(
        rf"\b(?:you are|you're|your name is|i am|i'm)\s+(?:an?\s+(?:[\w-]+,?\s+){{0,5}}?(?:named|called)\s+)?[\"“']?"
        rf"({names})\b(?=[\"”']?\s*(?:[,.;:!?(\n\d]|$|an?\b|the\b|{_MADE}|from\b|by\b))"
        rf"|\b(?:you are|you're|i am|i'm)\b[^.\n]{{0,100}}\b(?:{_MADE})\s+by\s+({makers})\b"
        rf"|(?:[你您我]是|[你我]叫|你的名字[是叫]|名为|名叫)\s*[“「\"']?({names})"
        r"(?!\s*[\w-]*(?:的|专家|工程师|提示|用户|使用|培训|教程))"
        rf"|[你您我]是[^。！\n]{{0,30}}?(?<!在)({makers})[^。，！\n]{{0,8}}?(?:{_MADE_ZH})", re.IGNORECASE)


STATEMENTS = {maker: _statement(*words) for maker, words in MAKERS.items()}


def placeholder(messages: list[Message]) -> str | None:
    """The first placeholder in a conversation that nothing was put into, such as {{name}} or [YOUR NAME].

    None in one that has to do with programs or templates.
    """
    found = next((match[0] for m in messages if any(bracket in m["content"] for bracket in "{[<")
                  and (match := PLACEHOLDER.search(m["content"]))), None)
    return None if found is None or any(OF_PROGRAMS.search(m["content"]) for m in messages) else found


def makers_of(model_name: str, template: str = "") -> set[str]:
    """The makers that a model's name tells, or else what its chat template says by default; none where neither does."""
    name = model_name.rstrip("/").rpartition("/")[2].replace("_", "-")
    found = {maker for maker, (names, _) in MAKERS.items()
             if re.search(rf"(?<![a-z])(?:{names})", "SmolLM" if name == "starter" else name, re.IGNORECASE)}
    return found or {maker for maker, statement in STATEMENTS.items() if statement.search(template[:10 * LONGEST])}


def other_assistant(messages: list[Message], makers: Collection[str]) -> str | None:
    """The assistant of another maker that a system message says, at its beginning, that the model is.

    Of a model whose maker is not known only those of CLOSED are another's.
    """
    text = next((m["content"] for m in messages if m["role"] == "system"), "")
    return _other(text[:LONGEST], frozenset(makers)) if text else None


@lru_cache(1000)  # many rows have the same system message
def _other(text: str, makers: frozenset[str]) -> str | None:
    for maker, statement in STATEMENTS.items():
        if maker not in makers and (makers or maker in CLOSED) and (match := statement.search(text)):
            return next(filter(None, match.groups()))
    return None
