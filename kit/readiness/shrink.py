"""A model's architecture with little in it: the same kinds of layers, few and narrow, with random weights."""

from typing import Any

import kit.common.unsloth

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

# Sizes are cut down to these. Lengths are multiples of 32, the weights in a block of q8_0, so that every matrix of the
# tiny model is quantised.
SIZES = {
    "intermediate_size": 128, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    "expert_intermediate_size": 64, "ffn_dim": 128, "n_inner": 128, "ffn_hidden_size": 128,
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "qk_head_dim": 64,
    "v_head_dim": 32, "global_head_dim": 64, "hidden_size_per_layer_input": 32,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "top_k_experts": 2,
    "n_group": 2, "topk_group": 1,
    "num_nextn_predict_layers": 0,  # layers that transformers leaves out
}  # fmt: skip
HIDDEN, HEAD, MOST_LAYERS, MOST_RATIO = 64, 32, 8, 4


def shrunk(config: PretrainedConfig) -> PretrainedConfig:
    """A config of the same class with every switch as it was, and few, narrow layers.

    Left alone are the vocabulary and all that says how a layer computes: rotation and its scaling, norms, biases, tied
    embeddings, windows, soft caps, and up to 4 query heads for a key head. At least two layers are kept, and so many
    from the first on that each kind is among them: llama.cpp knows some kinds by the layer's number alone. Raises
    ValueError for an architecture whose converter asks for layers that transformers leaves out.
    """
    values = config.to_dict()
    _shrink(config, values)
    return type(config).from_dict(values)


def random_model(config: PretrainedConfig, seed: int, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model of `config` with random 16-bit weights, in evaluation mode.

    Every weight is random, norms and biases too: one that is lost or moved on the way changes the answers.
    """
    dtype = torch.float16 if config.dtype == torch.float16 else torch.bfloat16
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        for parameter in model.parameters():
            spread = 1.6 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.add_(torch.randn_like(parameter) * spread)
    return model.eval()


def _shrink(config: PretrainedConfig, values: dict[str, Any]) -> None:
    if values.get("mtp_num_hidden_layers"):
        raise ValueError("transformers leaves out its layers for multi-token prediction")
    for part in config.sub_configs:
        if isinstance(values.get(part), dict):
            _shrink(getattr(config, part), values[part])
    own = {name: config.attribute_map.get(name, name)  # GPT-2's num_hidden_layers is n_layer
           for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")}
    if all(isinstance(values.get(name), int) for name in own.values()):
        _fewer_layers(values, own["num_hidden_layers"])
        _fewer_heads(values, own["num_attention_heads"], own["hidden_size"])
    for name, most in SIZES.items():
        if isinstance(values.get(name), list):
            values[name] = [min(size, most) for size in values[name]]
        elif values.get(name) is not None:
            values[name] = min(values[name], most)


def _fewer_layers(values: dict[str, Any], name: str) -> None:
    count = values[name]
    lists = [key for key, value in values.items() if isinstance(value, list) and len(value) == count]
    dense = values.get("first_k_dense_replace") or 0
    kinds = [(i < dense, *(values[key][i] for key in lists if isinstance(values[key][i], str))) for i in range(count)]
    firsts = sorted(map(kinds.index, set(kinds)))
    kept = list(range(min(count, max(2, firsts[-1] + 1))))
    if len(kept) > MOST_LAYERS:
        kept = firsts
    if values.get("num_kv_shared_layers"):
        # The last layers take keys and values from the last one of their kind before them: all kinds once more.
        values["num_kv_shared_layers"] = len(kept)
        kept = list(range(2 * len(kept)))
    values[name] = len(kept)
    for key in lists:
        values[key] = [values[key][i] for i in kept]
    for key in ("max_window_layers", "first_k_dense_replace"):
        if values.get(key) is not None:
            values[key] = sum(i < values[key] for i in kept)
    if isinstance(values.get("mlp_only_layers"), list):
        values["mlp_only_layers"] = [new for new, i in enumerate(kept) if i in values["mlp_only_layers"]]
    if isinstance(values.get("per_layer_config"), dict):  # by the layer's number: Gemma 4's wider heads
        values["per_layer_config"] = {
            i: {key: min(size, SIZES["global_head_dim"] if key == "head_dim" else 2) for key, size in own.items()}
            for i, own in values["per_layer_config"].items() if int(i) < len(kept)}


def _fewer_heads(values: dict[str, Any], heads_name: str, hidden_name: str) -> None:
    heads, hidden = values[heads_name], values[hidden_name]
    keys = values.get("num_key_value_heads") or heads
    ratio = max(1, min(heads // keys, MOST_RATIO))
    fewer = 1 if keys == 1 else 2 if ratio > 1 else 4
    # Most models' heads share out the hidden size, and some loaders count on it.
    shared_out = values.get("head_dim") in (None, hidden // heads)
    head = HEAD // 2 if shared_out and ratio * fewer % 2 == 0 else HEAD
    values[heads_name] = ratio * fewer
    values[hidden_name] = ratio * fewer * head if shared_out else HIDDEN
    sizes = {"num_key_value_heads": fewer, "query_pre_attn_scalar": head,  # llama.cpp derives the latter
             "head_dim": SIZES["qk_rope_head_dim"] if "qk_rope_head_dim" in values else head}
    values |= {key: size for key, size in sizes.items() if values.get(key) is not None}
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(values.get(key), dict):
            _shorten_factors(values[key], values, head)


def _shorten_factors(rope: dict[str, Any], values: dict[str, Any], head: int) -> None:
    """LongRoPE has a factor, multimodal RoPE a share, of each rotated pair of a head's weights."""
    for part in (part for part in rope.values() if isinstance(part, dict)):
        _shorten_factors(part, values, head)
    pairs = int(head * (rope.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1)) // 2
    for key in ("short_factor", "long_factor"):
        if isinstance(rope.get(key), list):
            rope[key] = [rope[key][i * len(rope[key]) // pairs] for i in range(pairs)]
    if isinstance(sections := rope.get("mrope_section"), list):
        shares = [share * pairs // sum(sections) for share in sections]
        rope["mrope_section"] = [pairs - sum(shares[1:]), *shares[1:]]
