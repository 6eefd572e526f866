"""What a run will need, told before it: at most so much memory, and disk, steps and tokens.

Sizes come from config.json and the safetensors headers, on this disk or on the hub: no weights are read, no torch or
transformers is imported.

Of the memory, `training step` and `answers` are bounds, not estimates. A step is taken to need BOUND times the inputs
and outputs of all linear layers for the tokens of a micro-batch (with gradient checkpointing: of one layer, and every
layer's input), and the logits of all these tokens. PyTorch's saved_tensors_hooks count 1.5 times for the backward pass
(rows of 750 tokens, starter model); the rest is for gradients, float32 copies and the holes that rows of changing
lengths leave in a CPU's heap. Attention is taken not to keep its scores (SDPA). Loading is not in the bound: while it
lasts, the mapped file and the copy made of it are both in memory.

Measured on a CPU with the starter model in bfloat16: the demo took 3.27 GB, its training 2.74 GB, trainings of six
steps 1.3 to 2.5 GB. A GPU's figures have not been measured.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.common.show import Table
from kit.gguf.formats import file_bytes, needed_bytes
from kit.models.fetch import ModelFiles, local_model
from kit.recipe.machine import Machine, look
from kit.recipe.recipe import Recipe
from kit.training.steps import steps_of, token_counts, tokens_of

if TYPE_CHECKING:
    from datasets import DatasetDict

ANSWERED_AT_ONCE = 20  # kit.answer's batch
ANSWERED_WITHOUT_HELD_OUT_ROWS = 3
# Measured on a CPU: Python with torch, unsloth, trl and a small data set, resident.
LIBRARIES_BYTES = 0.6e9
# What a CPU's process gathers in a long run. Of it 0.4 GB are kernels that oneDNN makes for rows of new lengths until
# its cache is full, measured with the starter model.
GATHERED_BYTES = 0.6e9
CUDA_CONTEXT_BYTES = 0.5e9  # outside of what torch counts as its own
# Dettmers et al. 2023, QLoRA, section 3: 4 bits, and 0.127 bits for the doubly quantised constants of 64 weights each.
NF4_BYTES = (4 + 0.127) / 8
PYTHON_BYTES = 0.5e9  # of a process with torch, such as the converter's
BOUND = {"cpu": 6, "cuda": 4}
# Copies of the logits in a step: 16-bit, float32, log-softmax and gradient. On a GPU Unsloth keeps them below 4 GB.
BYTES_PER_LOGIT = 14
CUDA_LOGITS_BYTES = 4e9
STEP, ANSWERS = "training step", "answers"  # the parts that grow with the rows


@dataclass(frozen=True)
class Forecast:
    """A run's needs; all sizes in GB of 1e9 bytes. None is what can't be known yet, and `notes` say why.

    `peak_memory_gb`: an upper bound, for the training process on a CPU, for the GPU's memory on a GPU. `disk_gb`: what
    the run leaves in its folder; `room_gb`: what the disk must have free for it, with what is there only for a while;
    `fetch_gb`: what is fetched into the hub's cache before. `export_gb`: what the export takes of the machine's memory,
    whatever it trains on, beside the process of the run.
    `tokens`: read in all steps, without padding. `memory_gb` and `files_gb` are the parts by name.
    """

    peak_memory_gb: float | None = None
    disk_gb: float | None = None
    fetch_gb: float = 0.0
    room_gb: float | None = None
    export_gb: float | None = None
    steps: int | None = None
    tokens: int | None = None
    memory_gb: dict[str, float] = field(default_factory=dict)
    files_gb: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def _table(self) -> Table:
        sizes: dict[str, float | None] = {
            **{f"memory: {name}": size for name, size in self.memory_gb.items()}, "memory at most": self.peak_memory_gb,
            **{f"disk: {name}": size for name, size in self.files_gb.items()}, "disk in all": self.disk_gb,
            **({"to fetch": self.fetch_gb} if self.fetch_gb else {})}
        counts = {"steps": self.steps, "tokens": self.tokens}
        rows = [[name, "?" if size is None else f"{size:.2f} GB"] for name, size in sizes.items()]
        rows += [[name, "?" if count is None else f"{count:,}"] for name, count in counts.items()]
        return Table(["forecast", ""], rows, "; ".join(self.notes))

    def __repr__(self) -> str:
        return repr(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()


def forecast(recipe: Recipe, data: DatasetDict | None = None) -> Forecast:
    """The forecast of a run on this machine, from the real rows where `data` (of kit.load_data) is given.

    Without `data` every row is taken to be max_seq_length long.
    """
    return forecast_on(look(Path(recipe.output_dir)), recipe, data)


def forecast_on(machine: Machine | None, recipe: Recipe, data: DatasetDict | None = None,
                model: ModelFiles | str | None = None) -> Forecast:
    """As `forecast`, on a machine that is known already; where none is (None), the memory isn't known either.

    `model` is what is known of the recipe's model (kit.models.remote asks its hub), or the reason why nothing is;
    without it the files on this disk tell.
    """
    lengths, held_out = ([], None) if data is None else (token_counts(data["train"]), token_counts(data["test"]))
    steps, tokens = recipe.max_steps, None
    if data is not None and len(data["train"]):
        steps = steps_of(recipe, len(data["train"]))
        tokens = tokens_of(recipe, data["train"], steps)
    notes = () if lengths else ("row lengths are not known: max_seq_length is assumed",)
    model = model or local_model(recipe)
    if isinstance(model, str):
        return Forecast(steps=steps, tokens=tokens, notes=(*notes, model))
    files, temporary = _files(model, recipe, steps, machine.device if machine else "cuda")
    disk = sum(files.values())
    parts = _memory_parts(model, recipe, lengths, held_out, machine) if machine else {}
    peak = sum(parts.values())
    if machine and machine.device == "cuda":  # its memory serves the next stage again, a CPU's heap may keep both
        peak -= min(parts[STEP], parts[ANSWERS])
    return Forecast(_in_gb(peak) if machine else None, _in_gb(disk), _in_gb(model.fetch_bytes),
                    _in_gb(disk + temporary), _in_gb(_export(model, recipe)), steps, tokens,
                    {name: _in_gb(size) for name, size in parts.items()},
                    {name: _in_gb(size) for name, size in files.items()}, notes)


def _in_gb(size: float) -> float:
    return round(size / 1e9, 6)


def _files(model: ModelFiles, recipe: Recipe, steps: int | None, device: str) -> tuple[dict[str, float], float]:
    """Bytes of what a run leaves by folder, and of what it needs for a while besides.

    Sizes of GGUFs are those that kit.gguf asks free room for: k-quants of wide models come out smaller.
    """
    tokenizer = model.tokenizer_bytes
    count = model.parameters if recipe.full_finetuning else model.adapter(recipe)
    width = (4 if _trained_in_float32(recipe) else 2) if recipe.full_finetuning else _adapter_width(recipe, device)
    checkpoint = count * width + _moments(model, recipe, width, device) + tokenizer
    saved = count * (2 if recipe.full_finetuning else width)  # full weights leave in 16-bit at the end
    files: dict[str, float] = {"merged" if recipe.full_finetuning else "adapter": saved + tokenizer}
    if recipe.save_merged != "none":
        files.setdefault("merged", model.weight_bytes + tokenizer)
    if recipe.save_merged == "4bit":
        files["merged-4bit"] = _weights(model, NF4_BYTES, 2) + tokenizer
    temporary = 0.0
    if recipe.gguf:
        files["gguf"] = sum(file_bytes(model.parameters, name) for name in recipe.gguf)
        temporary = max(0.0, needed_bytes(model.parameters, recipe.gguf) - files["gguf"])
    if recipe.checkpoint_dir:
        return files, temporary
    if kept := checkpoints_left(recipe, steps):
        files["checkpoints"] = kept * checkpoint
        temporary = max(temporary, checkpoint)  # an old one goes when the new one is there
    elif recipe.save_minutes:
        temporary = max(temporary, ((recipe.save_total_limit or 1) + 1) * checkpoint)  # if it takes that long
    return files, temporary


def checkpoints_left(recipe: Recipe, steps: int | None) -> int:
    """How many checkpoints are left at most besides those of save_minutes; the last step is always saved."""
    def times(strategy: str, every: int) -> int:
        if strategy == "steps":
            return math.ceil(steps / every) if steps else recipe.save_total_limit or 1
        return math.ceil(recipe.num_train_epochs or 1) if strategy == "epoch" else 0

    best = recipe.load_best_model_at_end
    # Each evaluation may be the best so far, and then it is saved and kept besides the newest ones.
    made = times(recipe.save_strategy, recipe.save_steps) + best * times(recipe.eval_strategy, recipe.eval_steps)
    return min(made, recipe.save_total_limit + best) if recipe.save_total_limit else made


def _memory_parts(model: ModelFiles, recipe: Recipe, lengths: list[int], held_out: list[int] | None,
                  machine: Machine) -> dict[str, float]:
    """Bytes by part, by the rows' lengths in tokens, or bounds where they are not known.

    A training step and answers are never at work at the same time.
    """
    device, bound = machine.device, recipe.max_seq_length
    longest = bound if recipe.packing else max(lengths, default=bound)
    answered = (recipe.max_eval_samples if held_out is None else len(held_out)) or ANSWERED_WITHOUT_HELD_OUT_ROWS
    prompt = max(held_out or lengths, default=bound)
    width = 4 if recipe.dtype == "float32" or (recipe.dtype is None and not machine.bf16 and device == "cpu") else 2
    trained = 4 if _trained_in_float32(recipe) else width
    matrix = NF4_BYTES if recipe.load_in_4bit else 1 if recipe.load_in_8bit else trained
    process = {"libraries": LIBRARIES_BYTES} if device == "cpu" else {"CUDA context": CUDA_CONTEXT_BYTES}
    return {**process, "weights": _weights(model, matrix, trained),
            "adapter and optimiser": _optimised(model, recipe, trained, device),
            STEP: _step(model, recipe, longest, width, device),
            ANSWERS: min(answered, ANSWERED_AT_ONCE) * _answer(model, prompt, recipe.max_new_tokens, width)}


def _weights(model: ModelFiles, matrix: float, width: int) -> float:
    """Bytes of all weights: `matrix` for one in the layers' matrices, `width` for any other."""
    linear = sum(math.prod(shape) for shape in model.linears.values())
    return linear * matrix + (model.parameters - linear) * width


def _trained_in_float32(recipe: Recipe) -> bool:
    """Full finetuning keeps its weights in float32 unless it is told otherwise."""
    return recipe.full_finetuning and recipe.dtype in (None, "float32")


def _adapter_width(recipe: Recipe, device: str) -> int:
    """Bytes of a number in an adapter, in memory and in its files; its gradient has the same.

    PEFT makes adapters in float32 (autocast_adapter_dtype). On a CPU TRL's SFTTrainer then puts those of a quantised
    model into bfloat16. For a GPU Unsloth makes these lines of the trainer `if False:` (unsloth/models/rl.py), after
    its prepare_model_for_training (unsloth_zoo/training_utils.py) has put all LoRA weights into float32.
    """
    return 2 if recipe.quantised and device == "cpu" else 4


def _moments(model: ModelFiles, recipe: Recipe, width: int, device: str) -> int:
    """Bytes of Adam's two moments. 8-bit ones are on a GPU only: on a CPU Unsloth takes plain AdamW. Those of an
    embedding transformers leaves as they are (GlobalOptimManager in its trainer.py).
    """
    count = model.parameters if recipe.full_finetuning else model.adapter(recipe)
    if device != "cuda" or "8bit" not in recipe.optim:
        return 2 * width * count
    embedding = sum(math.prod(tensor.shape) for name, tensor in model.tensors.items()
                    if recipe.full_finetuning and name.endswith("embed_tokens.weight"))
    return 2 * (count - embedding) + 2 * width * embedding


def _optimised(model: ModelFiles, recipe: Recipe, width: int, device: str) -> float:
    """Adapter, gradient and Adam's two moments; of full finetuning the last three, as the weights are counted already.
    """
    if recipe.full_finetuning:
        return model.parameters * width + _moments(model, recipe, width, device)
    width = _adapter_width(recipe, device)
    return model.adapter(recipe) * 2 * width + _moments(model, recipe, width, device)


def _export(model: ModelFiles, recipe: Recipe) -> float:
    """Memory of the export's largest step: a tensor at a time is merged and converted, and of the 4-bit copy what is
    quantised is held, the rest stays in its file.

    Measured with 0.93e9 weights in four shards, of which the largest tensor has 0.233e9 (RssAnon, sampled): merge
    0.5 GB with torch itself, the converter 2.2 GB, llama.cpp's quantiser less, 4-bit copy 0.44 GB.
    """
    if recipe.save_merged == "none":
        return 0.0
    matrix = max((math.prod(shape) for shape in model.linears.values()), default=0)
    largest = max((math.prod(tensor.shape) for tensor in model.tensors.values()), default=0)
    # Bytes of a weight: bfloat16 → float32, the change in float32, the dice; bfloat16, float32 and what is written.
    merging = 0 if recipe.full_finetuning else 4 * model.adapter(recipe) + 14 * matrix
    converting = PYTHON_BYTES + 8 * largest if recipe.gguf else 0
    copying = _weights(model, NF4_BYTES, 0) + 14 * matrix if recipe.save_merged == "4bit" else 0
    return max(merging, converting, copying)


def _layer_values(model: ModelFiles) -> float:
    """Inputs and outputs of a layer's matrices for one token; of a mixture's experts those that a token passes."""
    experts = model.config.get("num_experts_per_tok") or 1
    shapes = {re.sub(r"\.experts\.\d+\.", ".experts.", name): tensor.shape[-2:]
              for name, tensor in model.tensors.items() if ".layers." in name and len(tensor.shape) > 1}
    values = sum(sum(shape) * (experts if ".experts." in name else 1) for name, shape in shapes.items())
    return values / model.config["num_hidden_layers"]


def _step(model: ModelFiles, recipe: Recipe, longest: int, width: int, device: str) -> float:
    """What a training step keeps for its backward pass and makes on the way."""
    layers, values = model.config["num_hidden_layers"], _layer_values(model)
    tokens = recipe.per_device_train_batch_size * longest
    kept = values + layers * model.config["hidden_size"] if recipe.use_gradient_checkpointing else layers * values
    logits = tokens * model.config["vocab_size"] * BYTES_PER_LOGIT
    weights_in_16bit = 2 * model.parameters if _trained_in_float32(recipe) else 0  # autocast makes and keeps them
    return BOUND[device] * tokens * width * kept + weights_in_16bit + (
        min(logits, CUDA_LOGITS_BYTES) if device == "cuda" else logits + GATHERED_BYTES)


def _answer(model: ModelFiles, prompt: int, new_tokens: int, width: int) -> float:
    """One of a batch's answers: its prompt in one layer, keys and values (copied as they grow), the next logits.

    A layer of linear attention has a state in their place, in float32 and of one size for any length.
    """
    config = model.config
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    linear = (config.get("layer_types") or []).count("linear_attention")
    cache = (prompt + new_tokens) * 2 * heads * size * (config["num_hidden_layers"] - linear)
    states = linear and linear * 4 * math.prod(
        config[f"linear_{name}"] for name in ("num_value_heads", "key_head_dim", "value_head_dim"))
    return width * (prompt * _layer_values(model) + 2 * cache) + 2 * states + config["vocab_size"] * (4 + width)
