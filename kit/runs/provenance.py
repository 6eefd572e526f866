"""Where an artefact comes from: hashes of everything that went in and came out, and secrets that must not go along."""

import hashlib
import json
import os
from typing import Any

from kit.common.files import hashes_of, sha256, write_json
from kit.common.secrets import secret
from kit.gguf.formats import Header
from kit.runs.gates import Gates
from kit.runs.run import SEALED, Run, read_manifest

# Texts of a run that people pass on; weights and tokenizers hold no text of the user's.
TEXTS = ("*.yaml", "*.json", "*.jsonl", "*.ipynb", "*.html", "*.md", "*.txt", "*.jinja", "Modelfile")
NOT_TEXT = {"tokenizer.json", "vocab.json"}
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MODELSCOPE_API_TOKEN", "GITHUB_TOKEN")


def seal(run: Run) -> dict[str, str]:
    """Write the sha256 of every artefact into manifest.json; returns {path in the run folder: hex digest}."""
    hashes = artefacts(run)
    write_json(run.folder / "manifest.json", {**read_manifest(run.folder), "artefacts": hashes})
    return hashes


def artefacts(run: Run) -> dict[str, str]:
    """{path in the run folder: sha256} of what SEALED names."""
    return hashes_of(run.folder, [path for place in map(run.folder.joinpath, SEALED)
                                  for path in sorted([place, *place.rglob("*")]) if path.is_file()])


def about(run: Run) -> str:
    """What a GGUF's general.description says: the run's name and short hashes of what it was made from."""
    manifest = read_manifest(run.folder)
    trained, folder = ("adapter", run.adapter) if run.adapter.is_dir() else ("weights", run.merged)
    parts = {"base": manifest.get("base_sha256"), "data": manifest.get("data_sha256") or manifest.get("dataset"),
             "template": manifest.get("template_sha256"),
             trained: {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}}
    return f"{run.recipe.run_name}: " + ", ".join(f"{name} {_digest(part)}" for name, part in parts.items())


def check_hashes(gates: Gates, run: Run) -> bool:
    """Add `sha256`: every sealed file is there, unchanged, and none has come along."""
    sealed: dict[str, str] = read_manifest(run.folder).get("artefacts", {})
    if not sealed:
        return gates.check("sha256", False, "no hashes", "those written when the run ended",
                           "manifest.json holds no artefacts: the run did not come to its end", "run the recipe again")
    present = artefacts(run)
    problems = {"changed since the run": [name for name in sealed if present.get(name, sealed[name]) != sealed[name]],
                "gone": [name for name in sealed if name not in present],
                "not made by the run": [name for name in present if name not in sealed]}
    cause = "; ".join(f"{name} is {what}" for what, names in problems.items() for name in names[:3])
    return gates.check("sha256", not cause, f"{len(present)} files", "as when the run ended", cause,
                       "copy the run's files again, or export again")


def check_origin(gates: Gates, name: str, header: Header, expected: str) -> bool:
    """Add `origin <name>`: the GGUF names the base, data, template and adapter of this run."""
    origin = header.fields.get("general.description", "")[:1000]  # any text may stand there
    cause = ""
    if not origin:
        cause = "its metadata (general.description) does not say what it was made from"
    elif origin != expected:
        cause = f"it was made from {origin!r}, this run is {expected!r}: it is another run's file"
    return gates.check(f"origin {name}", not cause, origin.rpartition(", ")[2] or "none", "this run's", cause,
                       "put back this run's own file, or export again")


def check_secrets(gates: Gates, run: Run) -> bool:
    """Add `secrets`: no text of the run holds what looks like a token, or the value of one in the environment."""
    values = {name: value for name in TOKEN_VARIABLES if len(value := os.environ.get(name, "")) >= 8}
    paths = {path for pattern in TEXTS for path in run.folder.rglob(pattern)
             if path.is_file() and path.name not in NOT_TEXT and path != run.folder / "verify.json"}
    leaks = []
    for path in sorted(paths):
        text = path.read_text(encoding="utf-8", errors="replace")
        known = [f"the value of {name}" for name, value in values.items() if value in text]
        if kind := known[0] if known else secret(text):
            leaks.append(f"{path.relative_to(run.folder)} holds {kind}")
    return gates.check("secrets", not leaks, f"{len(paths)} texts", "none", "; ".join(leaks[:3]),
                       "revoke that token now, remove it there, and run again with it in the environment only; one "
                       "that the model made up in an answer need only be removed")


def _digest(part: Any) -> str:
    """The 12 first hex digits of a hash, or of a JSON value's hash."""
    if not (isinstance(part, str) and len(part) == 64):
        part = hashlib.sha256(json.dumps(part, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    return part[:12]
