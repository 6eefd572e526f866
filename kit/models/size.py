"""What a model's config.json and safetensors headers tell about its size, without reading a weight."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from kit.common.errors import KitError
from kit.common.paths import cache_dir
from kit.common.weight_files import TensorInfo, read_weights_header, weight_files
from kit.models.starter import NAME
from kit.recipe.recipe import Recipe

NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Some architectures have the three projections of attention, or the two of the MLP, in one matrix.
FUSED = {"qkv_proj": {"q_proj", "k_proj", "v_proj"}, "gate_up_proj": {"gate_proj", "up_proj"}}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "vocab.json",
                   "merges.txt")


@dataclass(frozen=True)
class Checkpoint:
    """A model on this disk: its (text) config, and shape and dtype of every tensor by name."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

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

    @property
    def tokenizer_bytes(self) -> int:
        return sum((self.folder / name).stat().st_size for name in TOKENIZER_FILES if (self.folder / name).is_file())

    def targets(self, recipe: Recipe) -> dict[str, tuple[int, int]]:
        """The matrices that get an adapter; a model's experts are one tensor in memory and get none."""
        wanted = set(recipe.target_modules)
        wanted |= {whole for whole, parts in FUSED.items() if parts & wanted}
        return {name: shape for name, shape in self.linears.items()
                if name.split(".")[-2] in wanted and ".experts." not in name}

    def adapter(self, recipe: Recipe) -> int:
        """Parameters of the LoRA adapter: A is r × inputs, B outputs × r (Hu et al. 2021, section 4.1)."""
        return sum(recipe.r * (outputs + inputs) for outputs, inputs in self.targets(recipe).values())


def local_model(recipe: Recipe) -> Checkpoint | str:
    """The recipe's model where all of it is on this disk, else the reason why its size isn't known."""
    folder = _folder(recipe)
    if isinstance(folder, str):
        return folder
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = {**config, **config.get("text_config", {})}
        tensors = {name: tensor for file in weight_files(folder)
                   for name, tensor in read_weights_header(file).tensors.items()}
    except KitError as error:
        return f"{error.message}: the size of {recipe.model_name} is not known"
    except (OSError, ValueError, AttributeError, TypeError):
        return f"{folder}/config.json can't be read: the size of {recipe.model_name} is not known"
    if lacking := [name for name in NEEDED if name not in config]:
        return f"{folder}/config.json has no {', '.join(lacking)}: the memory of such a model can't be forecast"
    return Checkpoint(folder, config, tensors)


def _folder(recipe: Recipe) -> Path | str:
    if recipe.model_name == "starter":
        folder = cache_dir() / "starter" / NAME
        return folder if folder.is_dir() else "the starter model is unpacked by the first run: size not known yet"
    folder = Path(recipe.model_name).expanduser()
    if folder.is_dir():
        return folder

    try:
        config = try_to_load_from_cache(recipe.model_name, "config.json", revision=recipe.revision)
    except HFValidationError:
        config = None
    if isinstance(config, str):
        return Path(config).parent
    return f"{recipe.model_name} is not on this disk: its size is known when it has been fetched"
