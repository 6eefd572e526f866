"""What a model's config.json and safetensors headers tell about its size, without reading a weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.common.errors import KitError
from kit.common.files import read_json
from kit.common.weight_files import TensorInfo, read_weights_header, weight_files
from kit.models.fetch import cached_folder, local_folder
from kit.models.starter import starter_folder
from kit.recipe.recipe import Recipe

NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Some architectures have the three projections of attention, or the two of the MLP, in one matrix.
FUSED = {"qkv_proj": {"q_proj", "k_proj", "v_proj"}, "gate_up_proj": {"gate_proj", "up_proj"}}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "vocab.json",
                   "merges.txt")


@dataclass(frozen=True)
class ModelFiles:
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

    def adapter(self, recipe: Recipe) -> int:
        """Parameters of the LoRA adapter: A is r × inputs, B outputs × r (Hu et al. 2021, section 4.1).

        A mixture's experts are one tensor in memory and get none.
        """
        targets = set(recipe.target_modules)
        targets |= {whole for whole, parts in FUSED.items() if parts & targets}
        return sum(recipe.r * (outputs + inputs) for name, (outputs, inputs) in self.linears.items()
                   if name.split(".")[-2] in targets and ".experts." not in name)


def local_model(recipe: Recipe) -> ModelFiles | str:
    """The recipe's model where all of it is on this disk, else the reason why its size isn't known."""
    name = recipe.model_name
    folder = starter_folder() if name == "starter" else local_folder(name) or cached_folder(name, recipe.revision)
    if folder is None or not folder.is_dir():
        return ("the starter model is unpacked by the first run: size not known yet" if name == "starter" else
                f"{name} is not on this disk: its size is known when it has been fetched")
    config = read_json(folder / "config.json")
    config |= config.get("text_config") or {}
    try:
        tensors = {key: tensor for file in weight_files(folder)
                   for key, tensor in read_weights_header(file).tensors.items()}
    except KitError as error:
        return f"{error.message}: the size of {name} is not known"
    if missing := [field for field in NEEDED if field not in config]:
        return f"{folder}/config.json has no {', '.join(missing)}: the memory of such a model can't be forecast"
    return ModelFiles(folder, config, tensors)
