"""The merged model is the base plus the adapter, once: checked tensor by tensor, and its config against the base's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kit.common.errors import KitError
from kit.common.weight_files import weight_files
from kit.export.merging import LowRank, changes_of, fitting, merged_tensor
from kit.runs.gates import Gates

# What a merge settles, or what only says who wrote the file.
SETTLED = {"eos_token_id", "pad_token_id", "transformers_version", "_name_or_path", "unsloth_version", "dtype",
           "torch_dtype", "use_cache", "unsloth_fixed"}
AGAIN = "delete merged/ and merge again (kit.merge), then export again"


def check_merge(gates: Gates, base: Path, adapter: Path, merged: Path) -> None:
    """Add the gates `merged config` and `merge`. One tensor is in memory at a time."""
    _check_config(gates, base, merged)
    _check_weights(gates, base, adapter, merged)


def _check_config(gates: Gates, base: Path, merged: Path) -> None:
    ours, theirs = ({k: v for k, v in json.loads((folder / "config.json").read_text(encoding="utf-8")).items()
                     if k not in SETTLED} for folder in (merged, base))
    differ = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
    told = "; ".join(f"{key} is {ours.get(key)!r}, in the base model {theirs.get(key)!r}" for key in differ[:4])
    gates.check("merged config", not differ, f"{len(ours) - len(differ)} of {len(ours)} values as in the base",
                "all", f"merged/config.json: {told}" if differ else "", AGAIN)


def _check_weights(gates: Gates, base: Path, adapter: Path, merged: Path) -> None:
    changes = fitting(changes_of(adapter), adapter, base)
    ours, theirs = _Weights(merged), _Weights(base)
    missing, added = sorted(theirs.names - ours.names), sorted(ours.names - theirs.names)
    wrong, parts, untouched = [], [], 0
    for name in sorted(theirs.names & ours.names):
        found, original = ours.tensor(name), theirs.tensor(name)
        change = changes.get(name)
        if change is None:
            if not (found.shape == original.shape and torch.equal(found, original)):
                wrong.append(name)
            untouched += 1
            continue
        expected = merged_tensor(name, original, change)
        if isinstance(change, LowRank):
            parts.append(_share_of_change(found, original, change))
        if not _same(found, expected):
            wrong.append(name)
    cause = _cause(wrong, missing, added, parts, changes, ours)
    figure = f"{len(changes)} tensors with the adapter added {_mean(parts):.3f} times, {untouched} as in the base"
    gates.check("merge", not (wrong or missing or added), figure, "added once, the others equal", cause, AGAIN)


def _cause(wrong: list[str], missing: list[str], added: list[str], parts: list[float], changes: dict[str, Any],
           ours: _Weights) -> str:
    if added or missing:
        name = (added or missing)[0]
        head = " (the base ties it to the embedding: the tie is broken)" if "lm_head" in name else ""
        return f"{name} is {'only in merged/' if added else 'not in merged/'}{head}"
    if not wrong:
        return ""
    others = [name for name in wrong if name not in changes]
    if others:
        head = " (a tied embedding is the output head too)" if "embed" in others[0] and not ours.has_head else ""
        return f"{others[0]} differs from the base, though the adapter does not touch it{head}"
    mean = _mean(parts)
    if abs(mean) < 0.05:
        return "merged/ equals the base model: the adapter was not merged"
    if abs(mean - 2) < 0.05:
        return "the adapter was added twice: merged into a base that already held it"
    return f"{wrong[0]} is not the base plus the adapter (added {mean:.2f} times on average)"


def _share_of_change(found: Any, original: Any, change: LowRank) -> float:
    """How many times the adapter's change is in the weights: least squares over one tensor."""
    delta = change.applied(original.float()) - original.float()
    size = float((delta * delta).sum())
    return float(((found.float() - original.float()) * delta).sum()) / size if size else 1.0


def _same(found: Any, expected: Any) -> bool:
    """Equal, but for a last bit here and there: another machine adds up in another order."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if torch.equal(found, expected):
        return True
    close = torch.isclose(found.float(), expected.float(), rtol=2 ** -7, atol=1e-6)
    return bool(close.all()) and float((found != expected).float().mean()) < 1e-3


def _mean(parts: list[float]) -> float:
    return sum(parts) / len(parts) if parts else 1.0


class _Weights:
    """The tensors of a folder's safetensors files, read one by one."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        for path in weight_files(folder):
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise KitError(f"{path} can't be read: {error}", AGAIN) from None
            self._files |= dict.fromkeys(file.keys(), file)
        self.names = set(self._files)
        self.has_head = any("lm_head" in name for name in self.names)

    def tensor(self, name: str) -> Any:
        return self._files[name].get_tensor(name)
