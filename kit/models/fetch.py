"""Models and adapters: where they lie, fetched from a hub if need be, and what their files tell."""

import importlib.util
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from kit.common.errors import KitError, one_line
from kit.common.files import read_json
from kit.common.weight_files import TensorInfo, read_weights_header, weight_files
from kit.models.hubs import HUBS
from kit.models.starter import NAME, starter_folder, starter_model
from kit.recipe.fields import ALL_LINEAR
from kit.recipe.recipe import Recipe

# Of a model on a hub; other formats of its weights would double the download.
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.py", "tokenizer.model"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "vocab.json",
                   "merges.txt")
HUB_HINT = ("without that hub: set model_name and dataset to folders on this disk, HF_ENDPOINT to a mirror, "
            "or hub: modelscope; for what is already cached, local_files_only: true")
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Some architectures have the three projections of attention, or the two of the MLP, in one matrix.
FUSED = {"qkv_proj": {"q_proj", "k_proj", "v_proj"}, "gate_up_proj": {"gate_proj", "up_proj"}}
PREFIX = "base_model.model."  # of a tensor's name in an adapter
# These starts change the base model's own weights: the adapter belongs to the changed ones.
STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga", "kasa", "mica")


def local_folder(name: str, bare_ids: bool = True) -> Path | None:
    """The folder that a name means, there or not; None for a hub id.

    Ids of models need no owner (gpt2); without `bare_ids` only owner/name is one.
    """
    path = Path(name).expanduser()
    is_id = name.count("/") == 1 or (bare_ids and "/" not in name)
    return path if path.exists() or name.startswith((".", "/", "~")) or not is_id else None


def model_folder(recipe: Recipe) -> str:
    """What to load: the starter's folder, a folder of the user's, or a hub id.

    With `hub: modelscope` the model is fetched there first, or found in its cache. Raises KitError when a path is no
    model.
    """
    if recipe.model_name == "starter":
        return str(starter_model())
    if folder := local_folder(recipe.model_name):
        _check_model_folder(folder)
        return str(folder)
    if recipe.hub == "modelscope":
        return str(fetched("model_name", recipe.model_name, MODEL_FILES, recipe, recipe.revision, "ModelScope"))
    return recipe.model_name


def base_folder(recipe: Recipe) -> Path:
    """The base model's 16-bit weights on this disk: what an adapter is merged into. Fetched if they are not there.

    Raises KitError when the hub can't be reached or has no such model.
    """
    name = model_folder(recipe)
    return local_folder(name) or fetched("model_name", name, MODEL_FILES, recipe, recipe.revision)


def _check_model_folder(path: Path) -> None:
    if not path.is_dir():
        state = "is a file" if path.is_file() else "does not exist"
        raise KitError(f"model_name: {path} {state}; a model is a folder or a hub id like Qwen/Qwen3-4B",
                       "correct model_name, or use `starter`")
    missing = [name for name in ("config.json", "tokenizer_config.json") if not (path / name).is_file()]
    if not list(path.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        present = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise KitError(f"model_name: {path} is no model folder: no {', '.join(missing)} in it (found: {present})",
                       "name the folder that holds config.json and the weights as safetensors")


def fetched(field: str, name: str, patterns: list[str], recipe: Recipe, revision: str | None = None,
            hub: str = "Hugging Face") -> Path:
    """The folder of what `field` names on a hub: its files of these patterns, downloaded if the cache has them not."""
    if hub == "ModelScope":
        if importlib.util.find_spec("modelscope") is None:
            raise KitError("hub: modelscope needs the package modelscope", "pip install modelscope")
        from modelscope import snapshot_download
    else:
        snapshot_download = huggingface_hub.snapshot_download
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns,
                                      local_files_only=recipe.local_files_only))
    except Exception as error:  # the hub's own, those of requests or httpx, the disk's
        raise KitError(f"{field}: {name} could not be fetched from {hub}: {one_line(error)}", HUB_HINT) from None


def cached_folder(name: str, revision: str | None) -> Path | None:
    """The folder of a model in Hugging Face's cache, whole or not."""
    with suppress(HFValidationError):
        for file in ("config.json", "tokenizer_config.json"):
            path = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
            if isinstance(path, str):
                return Path(path).parent
    return None


def loading_options(recipe: Recipe) -> dict[str, Any]:
    """What every `from_pretrained` of the recipe's model is given."""
    return {name: getattr(recipe, name) for name in ("revision", "trust_remote_code", "local_files_only")}


def not_loaded(part: str, recipe: Recipe, error: Exception) -> KitError:
    """For what transformers raises while it loads a part of the recipe's model: its config, tokenizer, weights."""
    hint = "check the folder's files, or fetch the model again" if local_folder(recipe.model_name) else HUB_HINT
    return KitError(f"model_name: the {part} of {recipe.model_name} could not be loaded: {one_line(error)}", hint)


def model_label(recipe: Recipe) -> str:
    """The model's own name: Qwen/Qwen3-4B → Qwen3-4B."""
    return NAME if recipe.model_name == "starter" else Path(recipe.model_name.rstrip("/")).name


def adapter_folder(recipe: Recipe) -> Path:
    """The adapter that adapter_name_or_path names, on this disk; fetched from the hub if it is an id there."""
    name = str(recipe.adapter_name_or_path)
    return local_folder(name, bare_ids=False) or fetched("adapter_name_or_path", name, ["adapter_*"], recipe)


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """adapter_config.json; KitError when the folder holds no LoRA adapter in safetensors."""
    config = read_json(adapter / "adapter_config.json")
    if not config:
        raise KitError(f"{adapter} is no LoRA adapter: there is no adapter_config.json in it that can be read",
                       "name a folder that PEFT's save_pretrained wrote")
    if config.get("peft_type") != "LORA":
        raise KitError(f"{adapter}: peft_type is {config.get('peft_type')!r}, only LORA is known here",
                       "merge it with the tool it was trained with")
    if not (adapter / "adapter_model.safetensors").is_file():
        pickle = (adapter / "adapter_model.bin").is_file()
        raise KitError(f"{adapter} has no adapter_model.safetensors" + ", but a pickle (adapter_model.bin): that can "
                       "hold code, and is never loaded" * pickle,
                       "where you trust it, load it with PEFT's PeftModel.from_pretrained and write it anew with "
                       "save_pretrained" if pickle else "save the adapter as safetensors: PEFT's save_pretrained does")
    return config


def adapter_base(adapter: Path, base: str | None) -> str:
    """The base model of an adapter: `base`, else the one that its config names.

    Raises KitError when that is none, or a folder that is not there.
    """
    name = base or read_adapter_config(adapter).get("base_model_name_or_path")
    if not name:
        raise KitError(f"{adapter}/adapter_config.json does not name its base model",
                       "name it: --base, with a folder or a hub id")
    folder = None if name == "starter" else local_folder(name)
    if folder and not folder.exists():
        raise KitError(f"the base model of {adapter} is not there: {name}",
                       "name the folder or hub id that it was trained on: --base")
    return str(name)


def changed_base(config: dict[str, Any]) -> str:
    """The start (init_lora_weights) of an adapter that fits other weights than the base model's own, else ''."""
    start = "loftq" if config.get("loftq_config") else str(config.get("init_lora_weights", ""))
    return start if start.startswith(STARTS) else ""


@dataclass(frozen=True)
class ModelFiles:
    """What a model's files tell: its (text) config, and shape and dtype of every tensor by name.

    `fetch_bytes` are those of its files that are not on this disk yet.
    """

    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    tokenizer_bytes: int = 0
    fetch_bytes: int = 0

    @classmethod
    def of(cls, name: str, config: dict[str, Any], tensors: dict[str, TensorInfo], sizes: dict[str, int],
           fetch_bytes: int = 0) -> "ModelFiles | str":
        """The model of that config.json, or why nothing can be forecast of it; `sizes` are those of its files."""
        config |= config.get("text_config") or {}
        if missing := [field for field in NEEDED if field not in config]:
            return f"{name}/config.json has no {', '.join(missing)}: the memory of such a model can't be forecast"
        return cls(config, tensors, sum(sizes.get(file, 0) for file in TOKENIZER_FILES), fetch_bytes)

    @property
    def parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.end - tensor.begin for tensor in self.tensors.values())

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of the layers' matrices: what is quantised, and what can get an adapter."""
        return {name: (tensor.shape[0], tensor.shape[1]) for name, tensor in self.tensors.items()
                if len(tensor.shape) == 2 and ".layers." in name and name.endswith(".weight")}

    def adapter(self, recipe: Recipe) -> int:
        """Parameters of the LoRA adapter: A is r × inputs, B outputs × r (Hu et al. 2021, section 4.1).

        A mixture's experts are one tensor in memory and get none.
        """
        targets = set(recipe.target_modules)
        targets |= {whole for whole, parts in FUSED.items() if parts & targets}
        return sum(recipe.r * (outputs + inputs) for name, (outputs, inputs) in self.linears.items()
                   if (ALL_LINEAR in targets or name.split(".")[-2] in targets) and ".experts." not in name)


def local_model(recipe: Recipe) -> ModelFiles | str:
    """The recipe's model where all of it is on this disk, else the reason why its size isn't known."""
    name = recipe.model_name
    folder = starter_folder() if name == "starter" else local_folder(name) or _cached(recipe)
    if folder is None or not folder.is_dir():
        return ("the starter model is unpacked by the first run: size not known yet" if name == "starter" else
                f"{name} is not on this disk: its size is known when it has been fetched")
    try:
        tensors = {key: tensor for file in weight_files(folder)
                   for key, tensor in read_weights_header(file).tensors.items()}
    except KitError as error:
        return f"{error.message}: the size of {name} is not known"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    return ModelFiles.of(str(folder), read_json(folder / "config.json"), tensors, sizes)


def _cached(recipe: Recipe) -> Path | None:
    """The folder of a hub's model in the cache of the recipe's hub, whole or not."""
    if recipe.hub == "huggingface":
        return cached_folder(recipe.model_name, recipe.revision)
    with suppress(KitError):  # without the package modelscope
        file = HUBS[recipe.hub](False, recipe.revision).cached(recipe.model_name, "config.json")
        return file.parent if file and file.is_file() else None
    return None
