"""Checkpoints that count: each folder is sealed by a manifest, written last, with sizes and hashes of its files.

What the trainer writes can be torn by a kill or a full disk at any byte. A checkpoint without a manifest, or with a
file that differs from it, is skipped with its reason. The manifest also says what the training was made of
(`identity`), so that no training resumes from a checkpoint of other data or settings.
"""

import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc

from kit.common.errors import KitError
from kit.common.files import read_json, sha256, unwritable, write_json
from kit.data.sources import data_files
from kit.recipe.fields import fields_affecting
from kit.recipe.recipe import Recipe
from kit.recipe.settings import resolved, sharding
from kit.runs.own import MANIFEST
from kit.runs.run import Run

TRAINED = fields_affecting("weights")  # a checkpoint is resumed under the same values only
ROWS = ("training rows", "held-out rows")
LOG = "log.jsonl"  # the run's log as it was at this step
DISK_HINT = "free room or set checkpoint_dir to another disk; the same command resumes from the checkpoint before"


class Checkpoint(NamedTuple):
    """A sealed checkpoint: its folder, optimiser step, and training time up to it in seconds."""

    folder: Path
    step: int
    seconds: float


def identity(recipe: Recipe, tokenizer: Any, rows: Any, held_out: Any) -> dict[str, Any]:
    """What a training is made of, as a flat dict of plain values: two with the same identity take the same steps."""
    base = read_json(Run.of(recipe).folder / "manifest.json").get("base_sha256")
    # Of the others, data is compared by its rows and the processes by `sharding`.
    fields = recipe.model_dump(mode="json", include=set(TRAINED))
    hashes = (rows_sha256(rows), rows_sha256(held_out) if held_out else None)
    return {**dict(zip(ROWS, hashes, strict=True)),
            "chat template": hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest(),
            "base model": hashlib.sha256(json.dumps(base, sort_keys=True).encode()).hexdigest() if base else None,
            "number format": resolved(recipe).dtype, **sharding(recipe), **fields}


def source(recipe: Recipe, data: list[str]) -> dict[str, Any]:
    """What the training rows come from, known without reading them: hashes of the data files, and what picks rows."""
    return {"data": sorted(data), **recipe.model_dump(mode="json", include=set(fields_affecting("rows")))}


def rows_sha256(rows: Any) -> str:
    """Of a Dataset's tokens and labels in order, or of its messages where tokens are made when a row is taken."""
    digest = hashlib.sha256()
    columns = [name for name in ("input_ids", "labels") if name in rows.column_names] or ["messages"]
    for batch in rows.with_format("arrow").select_columns(columns).iter(batch_size=1000):
        for name in columns:
            column = batch.column(name)
            if name == "messages":
                digest.update(json.dumps(column.to_pylist(), ensure_ascii=False).encode())
            else:
                digest.update(pc.list_value_length(column).to_numpy().tobytes())
                digest.update(pc.list_flatten(column).to_numpy().tobytes())
    return digest.hexdigest()


def seal(folder: Path, identity: dict[str, Any], seconds: float, log: Path,
         source: dict[str, Any] | None = None) -> None:
    """Add the run's log and, when every byte is on the disk, the manifest that makes the checkpoint count.

    `source` is that of `source()`, for `check_resumable`. Raises KitError when the disk refuses; the checkpoints before
    this one are whole.
    """
    with unwritable(folder, DISK_HINT):
        if log.is_file():
            shutil.copyfile(log, folder / LOG)
        files = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
            _to_disk(path)
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        write_json(folder / MANIFEST, {"step": _step(folder), "seconds": round(seconds, 2), "identity": identity,
                                       "source": source, "files": files})
        for path in (folder / MANIFEST, folder, folder.parent):
            _to_disk(path)


def newest(folder: Path, wanted: dict[str, Any]) -> Checkpoint | None:
    """The newest sound checkpoint in `folder`; None when there is none. Prints why a broken one is skipped.

    Raises KitError when the newest sound one was made from something else than `wanted` (an `identity`).
    """
    for path in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        if _step(path) < 0:
            continue
        if reason := problem(path):
            print(f"{path.name} is skipped: {reason}")
            # Out of the trainer's way, which will write that step again; deleted once that one is sealed.
            aside = path.with_name(f"{path.name}.broken")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
            continue
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        _refuse_changes(path, manifest["identity"], wanted)
        return Checkpoint(path, manifest["step"], manifest["seconds"])
    return None


def check_resumable(recipe: Recipe) -> None:
    """Raise KitError, before anything long, where the newest checkpoint was made with other settings or other rows.

    Settings are compared, and what the rows come from; only where that changed are the rows made and compared. Base
    model and number format, which take loading, are left to `newest`, as is whether the checkpoint is whole.
    """
    folder = Run.of(recipe).checkpoints
    for path in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        manifest = read_json(path / MANIFEST)
        had = manifest.get("identity")
        if not isinstance(had, dict):
            continue
        wanted = {**sharding(recipe), **recipe.model_dump(mode="json", include=set(TRAINED))}
        _refuse_changes(path, {name: had[name] for name in had if name in wanted}, wanted)
        if manifest.get("source") != source(recipe, [sha256(file) for file in data_files(recipe)]):
            _refuse_changes(path, {name: had.get(name) for name in ROWS}, _rows_of(recipe))
        return


def _rows_of(recipe: Recipe) -> dict[str, Any]:
    """The part of `identity` that tells of the rows, made as the training will make them."""
    import kit.common.unsloth  # before transformers, which the next two import

    from kit.data.formatting import load_data
    from kit.models.template import load_tokenizer

    data = load_data(recipe, load_tokenizer(recipe))
    held_out = data["test"] if recipe.eval_strategy != "no" and len(data["test"]) else None
    return dict(zip(ROWS, (rows_sha256(data["train"]), held_out and rows_sha256(held_out)), strict=True))


def _refuse_changes(path: Path, had: dict[str, Any], wanted: dict[str, Any]) -> None:
    if changed := _changes(had, wanted):
        raise KitError(f"training can't resume from {path}, what it was made from has changed: {'; '.join(changed)}",
                       "set it back, give another run_name, or start again with --overwrite "
                       "(resume_from_checkpoint: false)")


def problem(folder: Path) -> str:
    """Why a checkpoint does not count, or ''."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        step = manifest["step"]
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return "it has no manifest: writing it was cut short"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest can't be read ({type(error).__name__})"
    if step != _step(folder):
        return f"its manifest is that of step {step}"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, {size:,} were written"
        try:
            if sha256(path) != digest:
                return f"{name} is damaged (its hash differs)"
        except OSError as error:
            return f"{name} can't be read ({error.strerror})"
    return ""


def rotate(folder: Path, keep: int | None, best: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and that of step `best`, and what was set aside as broken.

    To be called when the newest one is sealed: until then the one before is all there is.
    """
    for path in folder.glob("checkpoint-*.broken"):
        shutil.rmtree(path, ignore_errors=True)
    checkpoints = sorted((path for path in folder.glob("checkpoint-*") if _step(path) >= 0), key=_step)
    for path in checkpoints[:-keep] if keep else []:
        if _step(path) != best:
            # Without its manifest first: a deletion that is cut short must not leave half of one that counts.
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)


def restore_log(checkpoint: Path, log: Path) -> None:
    """The run's log as it was at the checkpoint: lines of steps that will be taken again are gone."""
    if (checkpoint / LOG).is_file():
        shutil.copyfile(checkpoint / LOG, log)
    else:
        log.unlink(missing_ok=True)


def _changes(had: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What differs, in words: hashes as 'changed', other values as 'from → to'."""
    changes = []
    for name in wanted | had:
        pair = had.get(name), wanted.get(name)
        if pair[0] != pair[1] and (name != "base model" or None not in pair):  # a hub's is known only after merging
            hashed = any(isinstance(value, str) and len(value) == 64 for value in pair)
            changes.append(f"the {name} changed" if hashed else f"{name}: {pair[0]} → {pair[1]}")
    return changes


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _to_disk(path: Path) -> None:
    with suppress(OSError):  # a mounted folder may not know the call
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
