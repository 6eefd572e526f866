"""Real tokenizers for the tests, built from the vocabularies in llama-cpp-python's source archive."""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kit.common.errors import KitError
from kit.gguf.formats import CONTROL, read_header
from kit.gguf.setup import converter_dir

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# The chat templates in the same archive.
try:
    FOLDER: Path | None = converter_dir() / "models" / "templates"
    WHY_NOT = ""
except KitError as error:
    FOLDER, WHY_NOT = None, f"the templates come with llama.cpp's converter: {error}"
USER_DEFINED = 4  # tokenizer.ggml.token_type of an added token that is not special

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WHITESPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
# The letters of DeepSeek's first tokenizer: those with an upper and a lower case, as its tokenizer.json lists them.
# Escaped are those that an editor which composes characters would turn into others.
DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼ"
    "ℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
# What splits a text before the merges, one expression after the other, by `tokenizer.ggml.pre`.
# https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
SPLITS = {
    "qwen2": [CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + WHITESPACE],
    "qwen35": [
        CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + WHITESPACE
    ],
    "llama-bpe": [CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + WHITESPACE],
    "deepseek-llm": [
        r"[\r\n]", rf"\s?[{DEEPSEEK_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", r"[一-龥ࠀ-一가-퟿]+",
        r"\p{N}+",
    ],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
    "falcon": [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"],
    "command-r": [r"\p{N}", GPT2],
    "starcoder": [r"\p{N}", GPT2],
    "refact": [r"\p{N}", GPT2],
    "gpt-2": [GPT2],
    "mpt": [GPT2],
}  # fmt: skip


class Pair(NamedTuple):
    """A template's vocabulary, with the tokens of the template that the vocabulary lacks."""

    vocab: str
    special: str = ""  # separated by spaces
    plain: str = ""  # added, but not special
    bos: str | None = None
    eos: str | None = None


IM = "<|im_start|> <|im_end|>"  # in qwen2 and qwen35 already
THINK = "<think> </think>"
TOOLS = "<tool_call> </tool_call> <tool_response> </tool_response>"
GLM = Pair("qwen2", "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>", f"{THINK} {TOOLS}")
KIMI = Pair("qwen2", "<|im_user|> <|im_assistant|> <|im_system|> <|im_middle|> [EOS]", THINK)
TEKKEN = "[INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS]"
DEEPSEEK = "<｜User｜> <｜Assistant｜>"
DISTILL = f"{DEEPSEEK} <｜begin▁of▁sentence｜> <｜end▁of▁sentence｜>"
DISTILL_ENDS = {"bos": "<｜begin▁of▁sentence｜>", "eos": "<｜end▁of▁sentence｜>"}
COHERE = "<|START_THINKING|> <|END_THINKING|> <|START_RESPONSE|> <|END_RESPONSE|> <|START_ACTION|> <|END_ACTION|>"
GRANITE = "<|start_of_role|> <|end_of_role|> <|end_of_text|>"
APRIEL = "<|begin_system|> <|begin_user|> <|begin_assistant|> <|begin_content|> <|begin_tool_result|> <|end|>"
LAGUNA = Pair("qwen2", "〈|EOS|〉 <system> </system> <user> </user> <assistant> </assistant>", f"{THINK} {TOOLS}")
LLAMA = "<|eom_id|> <|python_tag|>"
HY3 = "begin_of_sentence eos pad User Assistant reasoning_mode"
# Whose own vocabulary is not among the files: the nearest one there, else qwen2. Mistral's later models have a
# byte-level one, but llama-spm, that of the earlier ones, is the harder case.
PAIRS = {
    "Apertus-8B-Instruct": Pair("qwen2", "<|system_start|> <|system_end|> <|developer_start|> <|developer_end|> "
        "<|user_start|> <|user_end|> <|assistant_start|> <|assistant_end|> <|inner_prefix|> <|inner_suffix|> <s> </s>",
        bos="<s>", eos="</s>"),
    "Apriel-1.6-15b-Thinker-fixed": Pair("qwen2", f"{APRIEL} <s>", bos="<s>", eos="<|end|>"),
    "Bielik-11B-v3.0-Instruct": Pair("llama-spm", IM, THINK),
    "ByteDance-Seed-OSS": Pair("qwen2", "<seed:bos> <seed:eos> <seed:pad>", "<seed:think> </seed:think>",
        bos="<seed:bos>", eos="<seed:eos>"),
    "Cohere2MoE": Pair("command-r", f"{COHERE} <|START_TEXT|> <|END_TEXT|>"),
    "CohereForAI-c4ai-command-r-plus-tool_use": Pair("command-r"),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": Pair("command-r", COHERE),
    "GLM-4.6": GLM,
    "GLM-4.7-Flash": GLM,
    "GigaChat3-10B-A1.8B": Pair("qwen2", "<s> </s> <|role_sep|> <|message_sep|>", bos="<s>", eos="</s>"),
    "GigaChat3.1-10B-A1.8B": Pair("qwen2", "<s> </s> <|role_sep|> <|message_sep|>", bos="<s>", eos="</s>"),
    "HuggingFaceTB-SmolLM3-3B": Pair("llama-bpe", IM, THINK, eos="<|im_end|>"),
    "Kimi-K2-Instruct": KIMI,
    "Kimi-K2-Thinking": KIMI,
    "Kimi-K3": Pair("qwen2", "<|open|> <|close|> <|sep|> <|end_of_msg|>"),
    "LFM2-8B-A1B": Pair("qwen2", "<|startoftext|>", bos="<|startoftext|>", eos="<|im_end|>"),
    "LFM2.5-8B-A1B": Pair("qwen2", "<|startoftext|>", THINK, bos="<|startoftext|>", eos="<|im_end|>"),
    "LFM2.5-Instruct": Pair("qwen2", "<|startoftext|>", THINK, bos="<|startoftext|>", eos="<|im_end|>"),
    "MiMo-VL": Pair("qwen2", "", f"{THINK} {TOOLS}"),
    "MiniMax-M1": Pair("qwen2", "<begin_of_document> <beginning_of_sentence> <end_of_sentence>"),
    "MiniMax-M2": Pair("qwen2", "]~!b[ ]~b] [e~[", THINK, bos="]~!b[", eos="[e~["),
    "MiniMax-M3": Pair("qwen2", "]~!b[ ]~b] [e~[", "<mm:think> </mm:think>", bos="]~b]", eos="[e~["),
    "Mistral-Small-3.2-24B-Instruct-2506": Pair("llama-spm", TEKKEN),
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": Pair("qwen2", "", f"{THINK} {TOOLS}"),
    "NVIDIA-Nemotron-Nano-v2": Pair("qwen2", "<SPECIAL_10> <SPECIAL_11> <SPECIAL_12>", THINK, eos="<SPECIAL_12>"),
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": Pair("llama-bpe", IM),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": Pair("llama-bpe", IM),
    "Qwen-QwQ-32B": Pair("qwen2", "", f"{THINK} {TOOLS}", eos="<|im_end|>"),
    "Qwen-Qwen2.5-7B-Instruct": Pair("qwen2", "", "<tool_call> </tool_call>", eos="<|im_end|>"),
    "Qwen-Qwen3-0.6B": Pair("qwen2", "", f"{THINK} {TOOLS}", eos="<|im_end|>"),
    "Qwen3-Coder": Pair("qwen2", "", TOOLS, eos="<|im_end|>"),
    "Qwen3.5-4B": Pair("qwen35", "", f"{THINK} {TOOLS}", eos="<|im_end|>"),
    "Reka-Edge": Pair("qwen2", "<sep>", f"{THINK} {TOOLS}"),
    "Spark2.5": Pair("qwen2", "<｜start▁of▁sentence｜> <｜end▁of▁sentence｜> <|System|> <|User|> <|Bot|> <|Tool|>",
        THINK),
    "StepFun3.5-Flash": Pair("qwen2", "<｜begin▁of▁sentence｜>", THINK, bos="<｜begin▁of▁sentence｜>"),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": Pair("llama-bpe", DISTILL, THINK, **DISTILL_ENDS),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": Pair("qwen2", DISTILL, THINK, **DISTILL_ENDS),
    "deepseek-ai-DeepSeek-V3.1": Pair("deepseek-llm", DEEPSEEK, THINK),
    "deepseek-ai-DeepSeek-V3.2": Pair("deepseek-llm", DEEPSEEK, THINK),
    "deepseek-ai-DeepSeek-V4": Pair("deepseek-llm", DEEPSEEK, THINK),
    "deepseek-ai-DeepSeek-V4-Flash-0731": Pair("deepseek-llm", DEEPSEEK, THINK),
    "fireworks-ai-llama-3-firefunction-v2": Pair("llama-bpe", eos="<|eot_id|>"),
    "google-gemma-2-2b-it": Pair("gemma-4", "<start_of_turn> <end_of_turn>"),
    "google-gemma-4-31B-it": Pair("gemma-4"),
    "google-gemma-4-31B-it-interleaved": Pair("gemma-4"),
    "ibm-granite-granite-3.3-2B-Instruct": Pair("starcoder", GRANITE, THINK, bos="<|end_of_text|>",
        eos="<|end_of_text|>"),
    "ibm-granite-granite-4.0": Pair("llama-bpe", "<|start_of_role|> <|end_of_role|>", eos="<|end_of_text|>"),
    "ibm-granite-granite-4.1": Pair("llama-bpe", "<|start_of_role|> <|end_of_role|>", eos="<|end_of_text|>"),
    "inclusionai-ling-3.0-flash": Pair("qwen2", "<role> </role> <|role_end|>", f"{THINK} {TOOLS}", eos="<|role_end|>"),
    "llama-cpp-deepseek-r1": Pair("deepseek-llm", DEEPSEEK, THINK),
    "llama-cpp-rwkv-world": Pair("qwen2"),
    "meetkai-functionary-medium-v3.1": Pair("llama-bpe", LLAMA, eos="<|eot_id|>"),
    "meetkai-functionary-medium-v3.2": Pair("llama-bpe", eos="<|eot_id|>"),
    "meta-llama-Llama-3.1-8B-Instruct": Pair("llama-bpe", LLAMA, eos="<|eot_id|>"),
    "meta-llama-Llama-3.2-3B-Instruct": Pair("llama-bpe", LLAMA, eos="<|eot_id|>"),
    "meta-llama-Llama-3.3-70B-Instruct": Pair("llama-bpe", LLAMA, eos="<|eot_id|>"),
    "microsoft-Phi-3.5-mini-instruct": Pair("phi-3"),
    "mistralai-Ministral-3-14B-Reasoning-2512": Pair("llama-spm", f"{TEKKEN} [THINK] [/THINK]"),
    "mistralai-Mistral-Nemo-Instruct-2407": Pair("llama-spm", TEKKEN),
    "moonshotai-Kimi-K2": KIMI,
    "muse-glimmer": Pair("llama-bpe", "<|start|> <|message|> <|eom|> <|eot|>"),
    "openai-gpt-oss-120b": Pair("qwen2", "<|start|> <|end|> <|message|> <|channel|> <|return|> <|call|>",
        eos="<|return|>"),
    "openbmb-MiniCPM5-1B": Pair("qwen2", "<s> </s>", THINK, bos="<s>", eos="<|im_end|>"),
    "poolside-Laguna-S-2.1": LAGUNA,
    "poolside-Laguna-XS-2.1": LAGUNA,
    "poolside-Laguna-XS.2": LAGUNA,
    "tencent-Hy3": Pair("qwen2", " ".join(f"<｜hy_{name}:opensource｜>" for name in HY3.split()),
        "<think:opensource> </think:opensource>", eos="<｜hy_eos:opensource｜>"),
    "unsloth-Apriel-1.5": Pair("qwen2", "<s> <|system|> <|user|> <|assistant|> <|content|> <|tool_result|> <|end|>",
        bos="<s>", eos="<|end|>"),
    "unsloth-mistral-Devstral-Small-2507": Pair("llama-spm", TEKKEN),
    "upstage-Solar-Open-100B": Pair("qwen2", "<|begin|> <|content|> <|think|> <|end|> <|tool_calls|> <|calls|>"),
}  # fmt: skip


def real_tokenizer(vocab: str, template: str | None = None, short: bool = False) -> PreTrainedTokenizerFast:
    """A fresh tokenizer from `models/ggml-vocab-<vocab>.gguf`, with `models/templates/<template>.jinja` if named.

    A byte-level one that is `short` has its first 2,256 tokens and the special ones: it loads a hundred times as fast,
    and the converter to GGUF does not know it.

    With a template the tokens that PAIRS lists for it are added: a vocabulary is often of another model of the
    family, or of an earlier version, and lacks the marks of turns. Raises KitError when the archive is not unpacked.
    """
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(_tokenizer(vocab, short))
    if template is not None:
        file = converter_dir() / "models" / "templates" / f"{template}.jinja"
        tokenizer.chat_template = file.read_text(encoding="utf-8")
        pair = PAIRS[template]
        lacking = [token for token in pair.special.split() if not _is_added(tokenizer, token)]
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in lacking],
                             special_tokens=True)
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in pair.plain.split()])
        tokenizer.bos_token = pair.bos or tokenizer.bos_token
        tokenizer.eos_token = pair.eos or tokenizer.eos_token
    return tokenizer


def _is_added(tokenizer: PreTrainedTokenizerFast, token: str) -> bool:
    return token in tokenizer.get_added_vocab()


@cache
def _tokenizer(vocab: str, short: bool = False) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    meta = dict(read_header(converter_dir() / "models" / f"ggml-vocab-{vocab}.gguf").fields)
    if short and meta["tokenizer.ggml.model"] == "gpt2":
        _shorten(meta, 2000)
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    build = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _gemma}[meta["tokenizer.ggml.model"]]
    backend = build(meta, {token: i for i, token in enumerate(tokens)})
    kinds = list(zip(tokens, meta["tokenizer.ggml.token_type"], strict=True))
    added = [token for token, kind in kinds if kind == USER_DEFINED]
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])
    backend.add_special_tokens([token for token, kind in kinds if kind == CONTROL])
    named = {
        f"{name}_token": tokens[meta[f"tokenizer.ggml.{field}_token_id"]]
        for name, field in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
        if f"tokenizer.ggml.{field}_token_id" in meta
    }
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)


def _shorten(meta: dict[str, Any], merges: int) -> None:
    """Leave single characters, what comes of the first merges, and the special tokens; all get new ids."""
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    special = {token for token, kind in zip(tokens, kinds, strict=True) if kind in (CONTROL, USER_DEFINED)}
    known, kept = {token for token in tokens if len(token) == 1}, []
    for pair, (first, second) in zip(meta["tokenizer.ggml.merges"], _merges(meta), strict=True):
        if len(kept) < merges and {first, second} <= known:
            known.add(first + second)
            kept.append(pair)
    places = [i for i, token in enumerate(tokens) if token in known or token in special]
    meta["tokenizer.ggml.merges"] = kept
    meta["tokenizer.ggml.tokens"] = [tokens[i] for i in places]
    meta["tokenizer.ggml.token_type"] = [kinds[i] for i in places]
    for name in [name for name in meta if name.endswith("_token_id")]:
        meta[name] = places.index(meta[name])


def _merges(meta: dict[str, Any]) -> list[tuple[str, str]]:
    # The first piece may itself be a space.
    cuts = ((pair, pair.index(" ", 1)) for pair in meta["tokenizer.ggml.merges"])
    return [(pair[:cut], pair[cut + 1 :]) for pair, cut in cuts]


def _byte_level(meta: dict[str, Any], vocabulary: dict[str, int]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    kind = meta["tokenizer.ggml.pre"]
    whole_words = kind == "llama-bpe"  # Llama 3 takes a word that is a token without merging up to it
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(meta), ignore_merges=whole_words))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[kind]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(meta: dict[str, Any], vocabulary: dict[str, int]) -> Tokenizer:
    """SentencePiece's BPE: the pair that makes the best scored token is merged first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import generate_merges

    scores = dict(zip(vocabulary, meta["tokenizer.ggml.scores"], strict=True))
    unknown = meta["tokenizer.ggml.tokens"][meta["tokenizer.ggml.unknown_token_id"]]
    merges = generate_merges(vocabulary, scores)
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    # The space before a text goes in front of any text, one that begins with a space too; a single Metaspace
    # would leave that one out. None goes behind a special token, as in Llama's tokenizer without `legacy`.
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False),
        pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False),
        pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False),
    ])
    backend.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1),
    ])  # fmt: skip
    return backend


def _gemma(meta: dict[str, Any], vocabulary: dict[str, int]) -> Tokenizer:
    """Gemma's BPE: merges over whole lines of plain UTF-8, with ▁ for a space."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=_merges(meta), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|[^\n]+"), "isolated")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def templates() -> list[str]:
    """The names of the archive's chat templates; none without the converter."""
    return sorted(file.stem for file in FOLDER.glob("*.jinja")) if FOLDER else []


def in_modelfile(path: Path) -> str:
    """The text between TEMPLATE's quotes, ended by the first closing ones at a line's end, as Ollama reads it."""
    return re.search(r'^TEMPLATE """(.*?)"""$', path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)[1]
