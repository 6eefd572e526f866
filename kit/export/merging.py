"""An adapter's changes to a model's weights, and a safetensors file written anew with them in it."""

import math
import re
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kit.common.errors import GateError, KitError
from kit.common.files import read_json
from kit.common.weight_files import read_weights_header, weight_files
from kit.models.fetch import PREFIX, changed_base, read_adapter_config
from kit.models.precision import rounded_by_chance

PIECE = 16 << 20  # bytes copied at once
HEAD = "lm_head.weight"
LEFT_OUT = "set save_merged: none and gguf: [], and load the adapter with PEFT"
# Settings of PEFT's LoraConfig that make another update than W + s B A, or write it to other weights.
UNKNOWN = ("fan_in_fan_out", "target_parameters", "lora_bias", "use_qalora", "use_bdlora", "arrow_config",
           "alora_invocation_tokens", "trainable_token_indices", "layer_replication", "megatron_config",
           "kasa_config", "velora_config", "monteclora_config")


class LowRank(NamedTuple):
    """The change of one weight W (out, in): A (r, in), B (out, r), their scale s, and DoRA's lengths m (out,) or None.

    LoRA makes of W the sum W + s B A (Hu et al. 2021, LoRA, section 4.1). DoRA gives its rows the trained lengths:
    m (W + s B A) / ||W + s B A||, the norm over the inputs of each row (Liu et al. 2024, DoRA, equation 5; the paper
    writes W transposed).
    """

    a: Any
    b: Any
    scale: float
    magnitude: Any = None

    def applied(self, weight: Any) -> Any:
        """The changed weight in float32."""
        exact = self.scale * (self.b.float() @ self.a.float())
        exact += weight
        if self.magnitude is not None:
            exact *= (self.magnitude.float().flatten() / torch.linalg.norm(exact, dim=1)).unsqueeze(1)
        return exact


def check_mergeable(adapter: Path, base: Path) -> None:
    """KitError that names what can't be merged exactly: a setting of the adapter, or quantised base weights."""
    config = read_adapter_config(adapter)
    for key in UNKNOWN:
        if config.get(key):
            raise KitError(f"the adapter uses {key}, which can't be merged yet", LEFT_OUT)
    if start := changed_base(config):
        raise KitError(f"the adapter began with init_lora_weights: {start}, which changes the base model's weights "
                       "too: merged into the original ones it would be another model", LEFT_OUT)
    if read_json(base / "config.json").get("quantization_config"):
        raise KitError(f"{base} holds quantised weights, an adapter is merged into 16-bit ones",
                       "set model_name (or --base) to the 16-bit original; load_in_4bit quantises it while loading")


def changes_of(adapter: Path) -> dict[str, Any]:
    """{name in the base: a LowRank, or a whole tensor that replaces the base's} of an adapter folder.

    rsLoRA scales by lora_alpha / sqrt(r) in place of lora_alpha / r (Kalajdzievski 2023); a module's own r is the
    number of A's rows, its own lora_alpha stands in alpha_pattern.
    """
    from peft.utils.other import get_pattern_key

    config = read_adapter_config(adapter)
    alphas: dict[str, float] = config.get("alpha_pattern") or {}
    # A state dict saved by hand still has the adapter's name in its keys.
    tensors = {re.sub(r"\.default(?=\.weight$|$)", "", key.removeprefix(PREFIX)): tensor
               for key, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    changes: dict[str, Any] = {}
    for name, tensor in tensors.items():
        stem, is_lora, part = name.partition(".lora_")
        if not is_lora:
            changes[re.sub(r"\.(base_layer|modules_to_save)(?=\.)", "", name)] = tensor
        elif part == "A.weight":
            alpha, r = alphas.get(get_pattern_key(list(alphas), stem), config["lora_alpha"]), tensor.shape[0]
            lengths = f"{stem}.lora_magnitude_vector"
            magnitude = tensors.get(lengths, tensors.get(f"{lengths}.weight"))
            changes[f"{stem}.weight"] = LowRank(tensor, tensors[f"{stem}.lora_B.weight"],
                                                alpha / (math.sqrt(r) if config.get("use_rslora") else r), magnitude)
        elif not part.startswith(("B.weight", "magnitude_vector")):
            raise KitError(f"the adapter holds {name}, which can't be merged yet", LEFT_OUT)
    return changes


def fitting(changes: dict[str, Any], adapter: Path, base: Path) -> dict[str, Any]:
    """The changes by the names of the base's files; GateError when one of them is not there or has another shape.

    A tied head is the embedding: of the two, trained alike, the files hold one. Trained apart they can't be merged.
    """
    shapes = {name: tensor.shape for file in weight_files(base)
              for name, tensor in read_weights_header(file).tensors.items()}
    tied = {name: change for name, change in changes.items() if name.endswith(("embed_tokens.weight", HEAD))}
    if tied and not any(name.endswith(HEAD) for name in shapes):
        pair = list(tied.values())
        if len(pair) < 2 or not all(isinstance(change, torch.Tensor) for change in pair) or not torch.equal(*pair):
            raise KitError(f"the adapter {adapter} trained {', '.join(sorted(tied))}, but {base} ties its head to its "
                           "embedding: merged, the other would change too",
                           "train both alike (ensure_weight_tying), or neither")
        changes = {name: change for name, change in changes.items() if not name.endswith(HEAD)}
    if missing := sorted(set(changes) - set(shapes)):
        raise GateError(f"the adapter changes {missing[0]}, which the base model {base} does not have "
                        f"({len(missing)} of {len(changes)} tensors)", "merge into the base it was trained on")
    for name, change in changes.items():
        shape = (change.b.shape[0], change.a.shape[1]) if isinstance(change, LowRank) else tuple(change.shape)
        if shape != shapes[name]:
            raise GateError(f"the adapter's change of {name} is of shape {shape}, in the base model {base} it is "
                            f"{shapes[name]}", "merge into the base it was trained on, with the tokens it had")
    return changes


def merged_tensor(name: str, tensor: Any, change: Any) -> Any:
    """A base tensor with its change from `changes_of`, in the base's own format."""
    if not isinstance(change, LowRank):
        return change.to(tensor.dtype)
    exact = change.applied(tensor.float())
    return rounded_by_chance(exact, name) if tensor.dtype == torch.bfloat16 else exact.to(tensor.dtype)


def merge_file(source: Path, target: Path, changes: dict[str, Any], progress: Any) -> None:
    """Write `target` as `source` with its tensors changed; one tensor is in memory at a time.

    A change keeps shape and format, so the header stays as it is, byte for byte. `progress` is told the bytes written.
    """
    header = read_weights_header(source)
    with source.open("rb") as old, target.open("wb") as new:
        _copy(old, new, header.start)
        for name, tensor in sorted(header.tensors.items(), key=lambda item: item[1].begin):
            if name in changes:
                with safe_open(source, framework="pt") as tensors:  # anew each time: what it has read stays mapped
                    merged = merged_tensor(name, tensors.get_tensor(name), changes[name])
                new.write(memoryview(merged.contiguous().flatten().view(torch.uint8).numpy()))
                old.seek(header.start + tensor.end)
            else:
                _copy(old, new, tensor.end - tensor.begin)
            progress.update(tensor.end - tensor.begin)


def _copy(old: BinaryIO, new: BinaryIO, count: int) -> None:
    """Copy `count` bytes, which the header's check has seen to be there."""
    for size in [PIECE] * (count // PIECE) + [count % PIECE]:
        new.write(old.read(size))
