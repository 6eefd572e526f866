"""Save the adapter; merge it into the 16-bit base model, tensor by tensor; write the merged model in 4-bit too."""

import math
import re
import shutil
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kit.common.errors import GateError, KitError
from kit.common.files import hashes_of, read_json, whole_folder, write_json
from kit.common.show import bar
from kit.common.weight_files import INDEX, read_weights_header, weight_files
from kit.models.fetch import PREFIX, base_folder, changed_base, read_adapter_config
from kit.models.precision import rounded_by_chance
from kit.models.saved import saved_model, saved_tokenizer
from kit.recipe.recipe import Recipe
from kit.runs.run import Run, read_manifest

PIECE = 16 << 20  # bytes copied at once
SHARD = "4GB"  # of a GPU's weights so much is in the machine's memory at once, while they are written
HEAD = "lm_head.weight"
INNER = "model.language_model."  # where the files of a model of pictures and text have the tensors of the text model
SEEING = ("preprocessor_config.json", "video_preprocessor_config.json")  # such a model's, which vLLM asks for
LEFT_OUT = "set save_merged: none and gguf: [], and load the adapter with PEFT"
# Settings of PEFT's LoraConfig that make another update than W + s B A, or write it to other weights.
UNKNOWN = ("fan_in_fan_out", "target_parameters", "lora_bias", "use_qalora", "use_bdlora", "arrow_config",
           "alora_invocation_tokens", "trainable_token_indices", "layer_replication", "megatron_config",
           "kasa_config", "velora_config", "monteclora_config")


def save_adapter(model: Any, tokenizer: Any, run: Run) -> Path:
    """Write the adapter with its tokenizer and trained template; returns the folder.

    A fully fine-tuned model has no adapter: its weights go to `merged/` in 16-bit.
    """
    is_adapter = hasattr(model, "peft_config")
    target = run.adapter if is_adapter else run.merged
    with whole_folder(target) as folder:
        # "auto" would ask the hub for the base model's vocabulary size.
        model.save_pretrained(folder, **({"save_embedding_layers": False} if is_adapter else {"max_shard_size": SHARD}))
        _save_tokenizer(tokenizer, folder)
    return target


def merge(saved: Path, run: Run, recipe: Recipe) -> Path | None:
    """Merge what `save_adapter` wrote into the base model's 16-bit weights; returns `merged/`, or None.

    The adapter is added in float32 and stored in the base's own format; to bfloat16 it is rounded by seeded chance,
    which keeps what rounding to the nearest would lose. One tensor is in memory at a time. A QLoRA adapter is merged
    into the original 16-bit weights too, so the result differs slightly from the model it was trained on. With
    save_merged: 4bit the merged model is also written to `merged-4bit/`.
    """
    if recipe.save_merged == "none":
        return None
    if saved != run.merged:
        base = base_folder(recipe)
        merge_adapter(base, saved, run.merged, recipe.trust_remote_code)
        if (run.folder / "manifest.json").is_file() and not (manifest := read_manifest(run.folder)).get("base_sha256"):
            write_json(run.folder / "manifest.json", {**manifest, "base_sha256": hashes_of(base)})
    if recipe.save_merged == "4bit":
        save_4bit(run.merged, run.merged_4bit, recipe)
    return run.merged


def merge_adapter(base: Path, adapter: Path, target: Path, trust_remote_code: bool = False) -> None:
    """Merge the adapter folder into the base folder's weights and write a complete model folder.

    An adapter that was saved without a tokenizer gets the base's, and the base's stop tokens. Raises KitError, or
    GateError when the base is not the one it was trained on, before anything is written.
    """
    check_mergeable(adapter, base)
    changes = fitting(changes_of(adapter), adapter, base)
    files = weight_files(base)
    with whole_folder(target) as folder, bar(sum(file.stat().st_size for file in files), "merging", "B", leave=False,
                                             unit_scale=True, delay=2) as progress:
        for file in files:
            merge_file(file, folder / file.name, changes, progress)
        for name in (INDEX, "config.json", "generation_config.json", *SEEING):
            if (base / name).is_file():
                shutil.copyfile(base / name, folder / name)
        if (adapter / "tokenizer_config.json").is_file():
            _save_tokenizer(saved_tokenizer(adapter, trust_remote_code), folder)
        else:
            saved_tokenizer(base, trust_remote_code).save_pretrained(folder)


def save_4bit(merged: Path, target: Path, recipe: Recipe) -> None:
    """Write the merged model's weights as bitsandbytes 4-bit, with the recipe's bnb_4bit settings, and its tokenizer.

    transformers and vLLM load the folder as it is: its config says how it is quantised.
    """
    from kit.models.load import four_bit_config  # imports unsloth, which only this export needs

    dtype = read_json(merged / "config.json").get("dtype") or "bfloat16"
    # On the CPU on every machine: there is room for it, and the same weights come out.
    model = saved_model(merged, recipe.trust_remote_code, dtype="auto", device_map="cpu",
                        quantization_config=four_bit_config(recipe, dtype))
    with whole_folder(target) as folder:
        model.save_pretrained(folder, max_shard_size=SHARD)
        saved_tokenizer(merged, recipe.trust_remote_code).save_pretrained(folder)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save the trained tokenizer; its stop and pad tokens become those of the model's own files, if any lie there."""
    tokenizer.save_pretrained(folder)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for path in (folder / "config.json", folder / "generation_config.json"):
        if path.is_file():
            write_json(path, {**read_json(path), **ends})


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
    if any(name.startswith(INNER) for name in shapes):  # a model of pictures and text, of which the text was trained
        changes = {name.replace("model.", INNER, 1) if name not in shapes else name: change
                   for name, change in changes.items()}
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
