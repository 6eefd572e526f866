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


def tiny_model(family: str, folder: Path, short: bool = False, **shape: int) -> Path:
    """Write a random bfloat16 model of two layers with its tokenizer into `folder`; return it.

    `short` cuts its vocabulary, for what makes no GGUF of it; `shape` is what its config has besides SHAPE.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = tiny_tokenizer(family, short)
    config = tiny_config(family, tokenizer, **shape)
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


def tiny_config(family: str, tokenizer: PreTrainedTokenizerFast, **shape: int) -> PretrainedConfig:
    """The family's config class, two layers small, for this tokenizer."""
    import transformers

    _, _, name, own = FAMILIES[family]
    # Rounded up, as published models have it: the converter fills the missing tokens in.
    vocab_size = -(-len(tokenizer) // 64) * 64
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}
    if family.startswith("qwen"):
        ids["bos_token_id"] = tokenizer.convert_tokens_to_ids("<|endoftext|>")  # though its tokenizer names none
    return getattr(transformers, name)(vocab_size=vocab_size, **{**ids, **SHAPE, **own, **shape})


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


def tiny_multimodal(folder: Path, short: bool = False) -> Path:
    """As `tiny_model`: a Qwen3.5 as its makers ship it, with a part that sees and a layer that predicts one token more.

    Four layers, the last with full attention. transformers leaves the further layer out; here it is a copy of the last.
    """
    import json

    import torch
    from safetensors.torch import load_file, save_file
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    tokenizer = real_tokenizer("qwen35", "Qwen3.5-4B", short)
    tokenizer.bos_token = None
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    text = {**SHAPE, "num_hidden_layers": 4, "head_dim": 32, "vocab_size": len(tokenizer), "tie_word_embeddings": True,
            "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_interleaved": True,
                "mrope_section": [2, 1, 1]}, **ends}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
              "num_position_embeddings": 64}
    torch.manual_seed(0)
    config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True)
    model = Qwen3_5ForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors, last = load_file(folder / "model.safetensors"), "model.language_model.layers.3."
    tensors |= {f"mtp.layers.0.{name.removeprefix(last)}": tensor.clone() for name, tensor in tensors.items()
                if name.startswith(last)}
    tensors |= {f"mtp.{name}.weight": torch.ones(64, dtype=torch.bfloat16)
                for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    tensors["mtp.fc.weight"] = torch.randn(64, 128).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    written["text_config"]["mtp_num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")
    return folder
