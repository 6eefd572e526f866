"""What stands in a GGUF's header against the merged folder it was made from: tokenizer and shape of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kit.gguf.header import Header
from kit.runs.gates import Gates

EXPORT_AGAIN = "export again with the converter of the installed llama-cpp-python (kit doctor names both)"
# transformers' config.json → llama.cpp's field behind "<architecture>."; convert_hf_to_gguf.py writes them.
VALUES = {
    "num_hidden_layers": "block_count", "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base",
}


def check_contents(gates: Gates, name: str, header: Header, merged: Path) -> bool:
    """Add `tokenizer <name>` and `shape <name>`; returns whether llama.cpp can load the file safely.

    The tokenizer must be of the same kind, with the same tokens and the same merges in the same order: a file that
    declares byte-level tokens as SentencePiece's ends llama.cpp's process, so this is read before it is loaded.
    """
    safe = _check_tokenizer(gates, name, header.fields, merged)
    _check_shape(gates, name, header.fields, merged)  # what a wrong one does is for parity to say
    return safe


def _check_tokenizer(gates: Gates, name: str, fields: dict[str, Any], merged: Path) -> bool:
    ours = json.loads((merged / "tokenizer.json").read_text(encoding="utf-8"))
    tokens: list[str] = fields.get("tokenizer.ggml.tokens", [])
    merges: list[str] = fields.get("tokenizer.ggml.merges", [])
    kind = str(fields.get("tokenizer.ggml.model"))
    model = ours["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score
        vocabulary = {token: place for place, (token, _) in enumerate(vocabulary)}
    expected = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])]
    byte_level = "ByteLevel" in json.dumps([ours.get("pre_tokenizer"), ours.get("decoder")])
    cause = ""
    if byte_level != (kind == "gpt2"):
        cause = (f"it declares a tokenizer of the kind {kind!r}, the trained one is "
                 f"{'byte-level (gpt2)' if byte_level else 'not byte-level'}: llama.cpp would split text otherwise, "
                 "or end its process")
    elif wrong := next((t for t, i in vocabulary.items() if i >= len(tokens) or tokens[i] != t), None):
        there = tokens[vocabulary[wrong]] if vocabulary[wrong] < len(tokens) else None
        cause = f"token {vocabulary[wrong]} is {there!r}, in the trained tokenizer {wrong!r}"
    elif merges and (place := _first_difference(merges, expected)) is not None:
        cause = (f"merge {place} is {_at(merges, place)!r}, in the trained tokenizer {_at(expected, place)!r}: "
                 "text is split in another way")
    figure = f"{kind}, {len(tokens):,} tokens, {len(merges):,} merges"
    return gates.check(f"tokenizer {name}", not cause, figure, "the trained tokenizer's", cause, EXPORT_AGAIN)


def _check_shape(gates: Gates, name: str, fields: dict[str, Any], merged: Path) -> bool:
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    config = {**config, **config.get("text_config", {})}
    rope = config.get("rope_parameters") or {}
    config.setdefault("rope_theta", rope.get("rope_theta", rope.get("full_attention", {}).get("rope_theta")))
    architecture = fields.get("general.architecture")
    compared, wrong = 0, []
    for ours, theirs in VALUES.items():
        there = fields.get(f"{architecture}.{theirs}")
        asked = config.get(ours)
        # An architecture whose layers differ has lists in one place or the other.
        if not isinstance(there, (int, float)) or not isinstance(asked, (int, float)):
            continue
        compared += 1
        if abs(there - asked) > 1e-6 * abs(asked):
            wrong.append(f"{architecture}.{theirs} is {there:g}, {ours} of the merged model {asked:g}")
    return gates.check(f"shape {name}", not wrong, f"{compared - len(wrong)} of {compared} values of {architecture}",
                       "as in merged/config.json", "; ".join(wrong), EXPORT_AGAIN)


def _first_difference(ours: list[str], theirs: list[str]) -> int | None:
    if ours == theirs:
        return None
    return next((place for place, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                min(len(ours), len(theirs)))


def _at(merges: list[str], place: int) -> str | None:
    return merges[place] if place < len(merges) else None
