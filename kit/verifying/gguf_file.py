"""One GGUF, from its bytes to its predictions.

What stands in its header is compared with the merged folder it was made from: tokenizer and shape of the model.
"""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

from kit.gguf.child import LlamaChild
from kit.gguf.formats import Header, check_gguf, quantization_of, read_header
from kit.runs.gates import Gates
from kit.runs.provenance import about, check_origin
from kit.verifying.answers import Answer, gguf_answers
from kit.verifying.evidence import Evidence
from kit.verifying.parity import compare, gguf_predictions, judge
from kit.verifying.template import check_gguf_template, check_modelfile

EXPORT_AGAIN = "export again with the converter of the installed llama-cpp-python (kit doctor names both)"
# transformers' config.json → llama.cpp's field behind "<architecture>."; convert_hf_to_gguf.py writes them.
VALUES = {
    "num_hidden_layers": "block_count", "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base",
}


def check_gguf_file(gates: Gates, path: Path, evidence: Evidence) -> dict[int, Answer]:
    """Add the gates of one GGUF, and of the Modelfile if it names this one; returns its answers by held-out row.

    There are none when the file is not sound. Raises KitError for a damaged file, GateError when llama.cpp fails.
    """
    run, reference = evidence.run, evidence.reference
    quantization = quantization_of(path)
    check_gguf(path)
    header = read_header(path)
    check_origin(gates, quantization, header, about(run))
    if not check_contents(gates, quantization, header, run.merged):
        return {}  # llama.cpp would split text in another way, or end its process
    longest = max(map(len, [*(row.ids for row in reference.rows), *(case.ids for case in evidence.cases)]))
    with LlamaChild(path, n_ctx=longest + 16, logits=True) as child:
        check_gguf_template(gates, quantization, child, evidence.tokenizer, evidence.cases)
        figures = compare(reference, gguf_predictions(child, reference))
        judge(gates, quantization, figures, quantization, reference.precision, evidence.remark)
        modelfile = run.gguf / "Modelfile"
        if modelfile.is_file() and f"FROM ./{path.name}\n" in modelfile.read_text(encoding="utf-8", errors="replace"):
            check_modelfile(gates, modelfile, child, evidence.tokenizer, evidence.cases, evidence.recipe)
    return gguf_answers(path, evidence, figures.answers)


def check_contents(gates: Gates, name: str, header: Header, merged: Path) -> bool:
    """Add `tokenizer <name>` and `shape <name>`; returns whether llama.cpp can load the file safely.

    The tokenizer must be of the same kind, with the same tokens and the same merges in the same order: a file that
    declares byte-level tokens as SentencePiece's ends llama.cpp's process, so this is read before it is loaded.
    """
    safe = _check_tokenizer(gates, name, header.fields, merged)
    _check_shape(gates, name, header.fields, merged)  # what a wrong one does is for parity to say
    return safe


def _check_tokenizer(gates: Gates, name: str, fields: dict[str, Any], merged: Path) -> bool:
    trained = json.loads((merged / "tokenizer.json").read_text(encoding="utf-8"))
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
    return gates.check(f"tokenizer {name}", not cause, figure, "the trained tokenizer's", cause, EXPORT_AGAIN)


def _check_shape(gates: Gates, name: str, fields: dict[str, Any], merged: Path) -> None:
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    config = {**config, **config.get("text_config", {})}
    rope = config.get("rope_parameters") or {}
    config.setdefault("rope_theta", rope.get("rope_theta", rope.get("full_attention", {}).get("rope_theta")))
    architecture = fields.get("general.architecture")
    compared, wrong = 0, []
    for key, field in VALUES.items():
        shipped, due = fields.get(f"{architecture}.{field}"), config.get(key)
        # An architecture whose layers differ has lists in one place or the other.
        if not isinstance(shipped, (int, float)) or not isinstance(due, (int, float)):
            continue
        compared += 1
        if abs(shipped - due) > 1e-6 * abs(due):
            wrong.append(f"{architecture}.{field} is {shipped:g}, {key} of the merged model {due:g}")
    gates.check(f"shape {name}", not wrong, f"{compared - len(wrong)} of {compared} values of {architecture}",
                "as in merged/config.json", "; ".join(wrong), EXPORT_AGAIN)
