"""Complete folders of tiny random models: a family's real architecture, vocabulary and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.vocabularies import real_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

QWEN2: tuple[str, str, str, dict[str, Any]] = ("qwen2", "Qwen-Qwen2.5-7B-Instruct", "Qwen2Config",
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}})
# {family: (vocabulary, template, config class, what its config has besides SHAPE)}. llama.cpp's archive holds one
# Gemma vocabulary, that of Gemma 4, and the converter asks for a SentencePiece file for the earlier ones: so Gemma 4.
FAMILIES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "qwen2": QWEN2,
    "qwen2-base": QWEN2,
    "qwen3": ("qwen2", "Qwen-Qwen3-0.6B", "Qwen3Config",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}, "head_dim": 32,
         "tie_word_embeddings": True}),
    "llama": ("llama-bpe", "meta-llama-Llama-3.2-3B-Instruct", "LlamaConfig",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
         "tie_word_embeddings": True, "head_dim": 32, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072}),
    "gemma": ("gemma-4", "google-gemma-4-31B-it", "Gemma4TextConfig",
        {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 32, "global_head_dim": 64,
         "sliding_window": 64, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0}),
}  # fmt: skip
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 4096, "dtype": "bfloat16"}  # fmt: skip


def tiny_model(family: str, folder: Path, short: bool = False) -> Path:
    """Write a random bfloat16 model of two layers with its tokenizer into `folder`; return it.

    `short` cuts its vocabulary, for what makes no GGUF of it.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = tiny_tokenizer(family, short)
    config = tiny_config(family, tokenizer)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            # Far enough from zero, and from one in norms, that a weight which is lost or moved changes the answer.
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.1))
    model.generation_config = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id,
                                               pad_token_id=config.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_tokenizer(family: str, short: bool = False) -> PreTrainedTokenizerFast:
    """The family's tokenizer as its makers ship it: Llama's and Gemma's put BOS before a text, Qwen's has none."""
    from tokenizers.processors import TemplateProcessing

    vocab, template, _, _ = FAMILIES[family]
    tokenizer = real_tokenizer(vocab, template, short)
    if vocab == "qwen2":
        tokenizer.bos_token = None
    else:
        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)])
    if family == "qwen2-base":
        tokenizer.eos_token = "<|endoftext|>"  # though its template ends an answer with <|im_end|>
    if vocab == "gemma-4":
        # The converter takes for a control token what tokenizer_config.json names as a special one.
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn>", "<turn|>", "<|think|>"]})
    return tokenizer


def tiny_config(family: str, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """The family's config class, two layers small, for this tokenizer."""
    import transformers

    _, _, name, own = FAMILIES[family]
    # Rounded up, as published models have it: the converter fills the missing tokens in.
    vocab_size = -(-len(tokenizer) // 64) * 64
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}
    if family.startswith("qwen"):
        ids["bos_token_id"] = tokenizer.convert_tokens_to_ids("<|endoftext|>")  # though its tokenizer names none
    return getattr(transformers, name)(vocab_size=vocab_size, **{**ids, **SHAPE, **own})


def small_starter(starter: Path, folder: Path) -> Path:
    """The starter model's architecture and tokenizer with two layers, in `folder`; return it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(starter)
    config.update({name: SHAPE[name] for name in SHAPE if name not in ("dtype", "max_position_embeddings")})
    config.head_dim = config.hidden_size // config.num_attention_heads
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(starter).save_pretrained(folder)
    return folder
