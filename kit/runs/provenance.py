"""Where an artefact comes from: hashes of everything that went in and came out, and secrets that must not go along."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kit.common.files import hashes_of, read_json, remembered_sha256, sha256, write_json
from kit.common.secrets import secret
from kit.gguf.formats import Header
from kit.runs.gates import Gates
from kit.runs.own import SEALED
from kit.runs.run import Run, read_manifest

# Texts of a run that people pass on; weights and tokenizers hold no text of the user's.
TEXTS = ("*.yaml", "*.json", "*.jsonl", "*.ipynb", "*.html", "*.md", "*.txt", "*.jinja", "Modelfile")
NOT_TEXT = {"tokenizer.json", "vocab.json"}
# Of result.json what is known when the run is sealed and does not change after that.
FIGURES = ("data", "gates", "parameters", "trainable_parameters", "train", "score_before", "score_after",
           "stopped_after", "scores", "answers")
CHANGED, GONE, ADDED = "changed since the run", "gone", "not made by the run"
RUN_AGAIN = "run the recipe again: kit run RECIPE --overwrite"
COPY_AGAIN = f"copy the run's folder again from where it was made, or {RUN_AGAIN}"
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MODELSCOPE_API_TOKEN", "GITHUB_TOKEN")


def seal(run: Run, made: Sequence[Path] | None = None) -> dict[str, str]:
    """Write the sha256 of every artefact into manifest.json; returns what `artefacts` does.

    With `made`, the files and folders that were made just now, only those get a new hash. All others keep theirs, so
    that a file which was changed since the run is not taken for the run's.
    """
    manifest = read_manifest(run.folder)
    if made is None or not manifest.get("artefacts"):
        hashes = artefacts(run)
    else:
        kept = {name: digest for name, digest in manifest["artefacts"].items()
                if not any((run.folder / name).is_relative_to(place) for place in made)}
        hashes = kept | _hashes(run, made)
    write_json(run.folder / "manifest.json", {**manifest, "artefacts": hashes})
    return hashes


def artefacts(run: Run) -> dict[str, str]:
    """{path in the run folder: sha256} of what SEALED names; result.json#train and so on for the parts in FIGURES.

    A part's hash is that of its JSON with sorted keys.
    """
    result = read_json(run.folder / "result.json")
    return _hashes(run, [run.folder / name for name in SEALED]) | {
        f"result.json#{name}": _json_sha256(result[name]) for name in FIGURES if name in result}


def _hashes(run: Run, places: Sequence[Path]) -> dict[str, str]:
    return hashes_of(run.folder, [path for place in places for path in sorted([place, *place.rglob("*")])
                                  if path.is_file()])


def altered(run: Run) -> dict[str, str]:
    """{path in the run folder: CHANGED, GONE or ADDED} of all that is not as it was sealed; {} of a run never sealed.

    Raises KitError when manifest.json can't be read.
    """
    sealed: dict[str, str] = read_manifest(run.folder).get("artefacts") or {}
    present = artefacts(run)
    # Earlier versions sealed neither the log nor the figures.
    known = sealed if any("#" in name for name in sealed) else {
        **sealed, **{name: "" for name in present if "#" in name or name == "log.jsonl"}}
    changed = {name: CHANGED for name in sealed if present.get(name, sealed[name]) != sealed[name]}
    gone = {name: GONE for name in sealed if name not in present}
    return changed | gone | {name: ADDED for name in present if sealed and name not in known}


def unlike_sealed(run: Run, place: Path) -> str:
    """What of a file or folder in the run is not as it was sealed, in words; '' when all is, or nothing was sealed."""
    sealed: dict[str, str] = read_json(run.folder / "manifest.json").get("artefacts") or {}
    of_place = {path: digest for name, digest in sealed.items()
                if (path := (run.folder / name).resolve()).is_relative_to(place.resolve())}
    if sealed and not of_place:
        return f"{place} is {ADDED}"
    return next((f"{path} is {CHANGED if path.is_file() else GONE}" for path, digest in of_place.items()
                 if not path.is_file() or remembered_sha256(path) != digest), "")


def export_again(name: str = "") -> str:
    """The command that makes an artefact again: merged, merged-4bit or a quantisation; '' for all that needs it."""
    option = {"": "", "merged": " --save-merged 16bit", "merged-4bit": " --save-merged 4bit"}
    return f"kit export RUN{option.get(name, f' --gguf {name}')}"


def about(run: Run) -> str:
    """What a GGUF's general.description says: the run's name and short hashes of what it was made from."""
    manifest = read_manifest(run.folder)
    trained, folder = ("adapter", run.adapter) if run.adapter.is_dir() else ("weights", run.merged)
    parts = {"base": manifest.get("base_sha256"), "data": manifest.get("data_sha256") or manifest.get("dataset"),
             "template": manifest.get("template_sha256"),
             trained: {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}}
    return f"{run.recipe.run_name}: " + ", ".join(f"{name} {_digest(part)}" for name, part in parts.items())


def check_hashes(gates: Gates, run: Run) -> bool:
    """Add `sha256`: every sealed file and figure is there, unchanged, and none has come along.

    merged/ and its 4-bit copy may be gone as a whole, to free the disk: GGUFs are compared without them.
    """
    sealed = read_manifest(run.folder).get("artefacts")
    if not sealed:
        return gates.check("sha256", False, "no hashes", "those written when the run ended",
                           "manifest.json holds no artefacts: the run did not come to its end", RUN_AGAIN)
    problems = altered(run)
    freed = [folder.name for folder in (run.merged, run.merged_4bit) if run.adapter.is_dir() and not folder.exists()
             and any(name.startswith(f"{folder.name}/") for name in sealed)]
    problems = {name: what for name, what in problems.items() if name.partition("/")[0] not in freed}
    shown = [[name for name in problems if problems[name] == what][:3] for what in (CHANGED, GONE, ADDED)]
    cause = "; ".join(f"{name} is {problems[name]}" for names in shown for name in names)
    remark = f"{' and '.join(f'{name}/' for name in freed)} not looked at: removed whole" if freed else ""
    return gates.check("sha256", not cause, f"{len(sealed)} files and figures", "as when the run ended",
                       cause or remark, _put_right(run, problems))


def _put_right(run: Run, problems: dict[str, str]) -> str:
    """What to do about what `altered` found."""
    added = [name for name, what in problems.items() if what == ADDED]
    others = [name for name in problems if name not in added]
    steps = [f"take away {', '.join(added[:3])}"] if added else []
    if others and run.adapter.is_dir() and all(name.startswith(("merged", "gguf")) for name in others):
        steps.append(f"{export_again()} makes the others again" if added else f"{export_again()} makes them again")
    elif others:
        steps.append(COPY_AGAIN)
    return "; ".join(steps)


def check_origin(gates: Gates, name: str, header: Header, expected: str) -> bool:
    """Add `origin <name>`: the GGUF names the base, data, template and adapter of this run."""
    origin = header.fields.get("general.description", "")[:1000]  # any text may stand there
    cause = ""
    if not origin:
        cause = "its metadata (general.description) does not say what it was made from"
    elif origin != expected:
        cause = f"it was made from {origin!r}, this run is {expected!r}: it is another run's file"
    return gates.check(f"origin {name}", not cause, origin.rpartition(", ")[2] or "none", "this run's", cause,
                       export_again(name))


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
                       "revoke that token now and take it out of that file, a new one belongs in the environment only "
                       "(one that the model made up in an answer need only be removed); if sha256 fails after that, "
                       f"{RUN_AGAIN}")


def _digest(part: Any) -> str:
    """The 12 first hex digits of a hash, or of a JSON value's hash."""
    return (part if isinstance(part, str) and len(part) == 64 else _json_sha256(part))[:12]


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
