"""What an artefact holds against what it was made of.

The merged model is the base plus the adapter, once: checked tensor by tensor, and its config against the base's. A
GGUF's header has the merged folder's tokenizer and shape.
"""

import json
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kit.common.errors import KitError
from kit.common.weight_files import FETCH_AGAIN, weight_files
from kit.export.adapter import LowRank, changes_of, fitting, merged_tensor
from kit.gguf.formats import QUANTIZATIONS, Header
from kit.runs.gates import Gates
from kit.runs.provenance import export_again

# What a merge settles, or what only says who wrote the file.
SETTLED = {"eos_token_id", "pad_token_id", "transformers_version", "_name_or_path", "unsloth_version", "dtype",
           "torch_dtype", "use_cache", "unsloth_fixed"}
CONVERTER = "with the converter of the installed llama-cpp-python (kit doctor names both)"
# transformers' config.json → llama.cpp's field behind "<architecture>."; convert_hf_to_gguf.py writes them.
VALUES = {
    "num_hidden_layers": "block_count", "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base",
}


def check_merge(gates: Gates, base: Path, adapter: Path, merged: Path, hint: str = "") -> None:
    """Add the gates `merged config` and `merge`. One tensor is in memory at a time.

    `hint` is what to do when one fails; by default the command that merges again.
    """
    hint = hint or export_again("merged")
    configs = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (merged, base))
    ours, bases = ({key: value for key, value in config.items() if key not in SETTLED} for config in configs)
    differ = sorted(key for key in {*ours, *bases} if ours.get(key) != bases.get(key))
    cause = "; ".join(f"{key} is {ours.get(key)!r}, in the base model {bases.get(key)!r}" for key in differ[:4])
    gates.check("merged config", not differ, f"{len(ours) - len(differ)} of {len(ours)} values as in the base",
                "all", f"merged/config.json: {cause}" if differ else "", hint)
    _check_weights(gates, base, adapter, merged, hint)


def _check_weights(gates: Gates, base: Path, adapter: Path, merged: Path, hint: str) -> None:
    changes = fitting(changes_of(adapter), adapter, base)
    ours, bases = _tensors(merged), _tensors(base)
    wrong, shares = [], []
    for name in sorted(bases.keys() & ours.keys()):
        tensor, original, change = ours[name](name), bases[name](name), changes.get(name)
        if change is None:
            same = tensor.shape == original.shape and torch.equal(tensor, original)
        else:
            same = _same(tensor, merged_tensor(name, original, change))
        if isinstance(change, LowRank):
            shares.append(_share_of_change(tensor, original, change))
        if not same:
            wrong.append(name)
    mean = sum(shares) / len(shares) if shares else 1.0
    missing, added = sorted(bases.keys() - ours.keys()), sorted(ours.keys() - bases.keys())
    if added or missing:
        name = (added or missing)[0]
        tie = " (the base ties it to the embedding: the tie is broken)" if "lm_head" in name else ""
        cause = f"{name} is {'only in merged/' if added else 'not in merged/'}{tie}"
    else:
        cause = _cause(wrong, [name for name in wrong if name not in changes], mean, any("lm_head" in n for n in ours))
    untouched = len((bases.keys() & ours.keys()) - changes.keys())
    figure = f"{len(changes)} tensors with the adapter added {mean:.3f} times, {untouched} as in the base"
    gates.check("merge", not cause, figure, "added once, the others equal", cause, hint)


def _cause(wrong: list[str], untouched: list[str], mean: float, has_head: bool) -> str:
    """Why tensors are wrong, `untouched` being those that no adapter is for; `mean` times was the adapter added."""
    if not wrong:
        return ""
    if untouched:
        head = " (a tied embedding is the output head too)" if "embed" in untouched[0] and not has_head else ""
        return f"{untouched[0]} differs from the base, though the adapter does not touch it{head}"
    if abs(mean) < 0.05:
        return "merged/ equals the base model: the adapter was not merged"
    if abs(mean - 2) < 0.05:
        return "the adapter was added twice: merged into a base that already held it"
    return f"{wrong[0]} is not the base plus the adapter (added {mean:.2f} times on average)"


def _share_of_change(tensor: Any, original: Any, change: LowRank) -> float:
    """How many times the adapter's change is in the weights: least squares over one tensor."""
    delta = change.applied(original.float()) - original.float()
    size = float((delta * delta).sum())
    return float(((tensor.float() - original.float()) * delta).sum()) / size if size else 1.0


def _same(tensor: Any, expected: Any) -> bool:
    """Equal, but for a last bit here and there: another machine adds up in another order."""
    if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
        return False
    if torch.equal(tensor, expected):
        return True
    close = torch.isclose(tensor.float(), expected.float(), rtol=2 ** -7, atol=1e-6)
    return bool(close.all()) and float((tensor != expected).float().mean()) < 1e-3


def _tensors(folder: Path) -> dict[str, Callable[[str], Any]]:
    """Of each tensor in a folder's safetensors files what reads it, so that one is in memory at a time."""
    readers: dict[str, Callable[[str], Any]] = {}
    for path in weight_files(folder):
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise KitError(f"{path} can't be read: {error}", FETCH_AGAIN) from None
        readers |= dict.fromkeys(file.keys(), file.get_tensor)
    return readers


def check_contents(gates: Gates, name: str, header: Header, trained: Path, config: dict[str, Any],
                   hint: str = "") -> bool:
    """Add `tokenizer <name>` and `shape <name>`; returns whether llama.cpp can load the file safely.

    `trained` is a folder with the trained tokenizer, `config` the model's config.json. The tokenizer must be of the
    same kind, with the same tokens and the same merges in the same order: a file that declares byte-level tokens as
    SentencePiece's ends llama.cpp's process, so this is read before it is loaded. `hint` is what to do when one fails;
    by default the command that converts again.
    """
    hint = hint or f"{export_again(name)}, {CONVERTER}"
    safe = _check_tokenizer(gates, name, header.fields, trained, hint)
    _check_shape(gates, name, header, config, hint)  # what a wrong one does is for parity to say
    return safe


def _check_tokenizer(gates: Gates, name: str, fields: dict[str, Any], folder: Path, hint: str) -> bool:
    trained = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens: list[str] = fields.get("tokenizer.ggml.tokens", [])
    merges: list[str] = fields.get("tokenizer.ggml.merges", [])
    kind = str(fields.get("tokenizer.ggml.model"))
    vocabulary = trained["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score
        vocabulary = {token: place for place, (token, _) in enumerate(vocabulary)}
    expected = [pair if isinstance(pair, str) else " ".join(pair) for pair in trained["model"].get("merges", [])]
    byte_level = "ByteLevel" in json.dumps([trained.get("pre_tokenizer"), trained.get("decoder")])
    cause = ""
    if byte_level != (kind == "gpt2"):
        cause = (f"it declares a tokenizer of the kind {kind!r}, the trained one is "
                 f"{'byte-level (gpt2)' if byte_level else 'not byte-level'}: llama.cpp would split text otherwise, "
                 "or end its process")
    elif wrong := next((t for t, i in vocabulary.items() if i >= len(tokens) or tokens[i] != t), None):
        place = vocabulary[wrong]
        cause = f"token {place} is {dict(enumerate(tokens)).get(place)!r}, in the trained tokenizer {wrong!r}"
    elif merges and merges != expected:
        pairs = enumerate(zip_longest(merges, expected))
        place, (shipped, due) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
        cause = f"merge {place} is {shipped!r}, in the trained tokenizer {due!r}: text is split in another way"
    figure = f"{kind}, {len(tokens):,} tokens, {len(merges):,} merges"
    return gates.check(f"tokenizer {name}", not cause, figure, "the trained tokenizer's", cause, hint)


def _check_shape(gates: Gates, name: str, header: Header, config: dict[str, Any], hint: str) -> None:
    """Add `shape <name>`: layers and widths are the model's, and each tensor is of a type that the format has."""
    fields = header.fields
    config = {**config, **config.get("text_config", {})}
    rope = config.get("rope_parameters") or {}
    config.setdefault("rope_theta", rope.get("rope_theta", rope.get("full_attention", {}).get("rope_theta")))
    architecture = fields.get("general.architecture")
    compared, wrong = 0, []
    for key, field in VALUES.items():
        shipped, due = fields.get(f"{architecture}.{field}"), config.get(key)
        if key == "num_hidden_layers" and isinstance(shipped, int):  # those that predict a further token count, too
            shipped -= fields.get(f"{architecture}.nextn_predict_layers") or 0
        # An architecture whose layers differ has lists in one place or the other.
        if not isinstance(shipped, (int, float)) or not isinstance(due, (int, float)):
            continue
        compared += 1
        if not abs(shipped - due) <= 1e-6 * abs(due):  # so that a NaN is wrong
            wrong.append(f"{architecture}.{field} is {shipped:g}, {key} of the model {due:g}")
    figure = f"{compared - len(wrong)} of {compared} values of {architecture}, {len(header.tensors)} tensors"
    if known := QUANTIZATIONS.get(name):
        other = [tensor for tensor in header.tensors if tensor.kind not in known.types]
        wrong += [f"{tensor.name} is of GGML's type {tensor.kind}, which {name} does not have" for tensor in other[:3]]
    gates.check(f"shape {name}", not wrong, figure, "as in config.json, types of the format", "; ".join(wrong),
                hint)
